"""What a model takes and returns beside tokens and hidden states."""

import dataclasses
from typing import Any, NamedTuple

from distill.errors import UserError
from distill.shapes import Array, Float, Int


class Cache(NamedTuple):
    """Key/value cache: keys and values of every layer for the tokens seen so far, and the slots that are filled.

    More tokens than it has room for are an error where their number is known when tracing. Otherwise every hidden state
    of that call and of later ones is NaN.
    """

    keys_NBGSK: Float[Array, "N B G S K"]
    values_NBGSK: Float[Array, "N B G S K"]
    segments_BS: Int[Array, "B S"]
    """Segment of each slot; −1 for an empty slot."""
    length: Int[Array, ""]
    tokens_BS: Int[Array, "B S"] | None = None
    """Ids and positions of the slots, for models whose rotations depend on the length of the text; otherwise None."""
    positions_BS: Int[Array, "B S"] | None = None


@dataclasses.dataclass(frozen=True)
class Collect:
    """Layers whose activations ``apply`` returns. Layers are numbered from 1; the others cost no memory.

    Hashable: pass it through ``jax.jit(..., static_argnames="collect")`` or from a closure.

    Example:
      >>> import jax
      >>> from distill.models import DecoderConfig, decoder
      >>> model = decoder(DecoderConfig(vocab_size=14, layers=4, width=8, heads=2, feed_forward=16))
      >>> tokens = jax.numpy.array([[1, 2, 3]])
      >>> output = model.apply(model.init(jax.random.key(0)), tokens, collect=Collect(hidden=(0, 4), attention=(2,)))
      >>> output.collected["hidden"][4].shape, output.collected["attention"][2].shape
      ((1, 3, 8), (1, 2, 3, 3))
    """

    hidden: tuple[int, ...] = ()
    """Residual stream ``[B, L, D]``: 0 is the embedding, n the output of layer n; the last BEFORE the final norm."""
    attention: tuple[int, ...] = ()
    """Attention maps ``[B, H, L, S]`` of these layers, float32; every row sums to 1."""
    relations: tuple[int, ...] = ()
    """Queries, keys and values of these layers, as a ``Relations``."""

    def by_name(self) -> dict[str, tuple[int, ...]]:
        """Name of each field → its layers."""
        return {"hidden": self.hidden, "attention": self.attention, "relations": self.relations}

    def check(self, layers: int) -> None:
        """Raises UserError for a layer that a model of this many layers does not have."""
        for name, numbers in self.by_name().items():
            first = 0 if name == "hidden" else 1
            wrong = [n for n in numbers if not first <= n <= layers]
            if wrong:
                raise UserError(
                    f"collect: {name} of layers {wrong}; this model has {first} … {layers}"
                    + (" (0 is the embedding)." if first == 0 else ", counted from 1.")
                )


class Relations(NamedTuple):
    """Queries, keys and values as attention multiplies them: after the rotation by position."""

    queries: Float[Array, "B H L K"]
    keys: Float[Array, "B G S K"]
    values: Float[Array, "B G S K"]


class Routing(NamedTuple):
    """Where a mixture of experts routed the tokens, without padding; of all layers ``[N, E]``."""

    counts: Float[Array, "*layers E"]
    """Tokens routed to each expert; their sum over experts is k times the number of tokens."""
    probabilities: Float[Array, "*layers E"]
    """Sum over tokens of each expert's probability."""


class Output(NamedTuple):
    """What ``apply`` returns; ``hidden`` is after the final norm, as the head expects it."""

    hidden: Float[Array, "B L D"]
    cache: Cache | None = None
    collected: dict[str, dict[int, Any]] | None = None
    """By the names of ``Collect``, then by layer: ``collected["hidden"][3]``; None unless asked for."""
    routing: Routing | None = None
    """Of a mixture of experts, for ``losses.load_balancing``."""
