"""``Model``: what every network looks like from outside, and the adapters that make one."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from distill.head import Head
from distill.shapes import Array, Float, Int, Params

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What a layer keeps from the forward to the backward pass: all of it, its products with weights, its input alone."""


def remade(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """A layer, for ``nn.scan``, that keeps what ``REMAT`` says; the loop keeps the compiler from undoing it."""
    return block if remat == "none" else nn.remat(block, policy=REMAT[remat], prevent_cse=False)


class Cache(NamedTuple):
    """Keys and values of every layer for the tokens seen so far, and which slots they fill."""

    keys_NBGSK: Float[Array, "N B G S K"]
    values_NBGSK: Float[Array, "N B G S K"]
    segments_BS: Int[Array, "B S"]
    """Segment of each slot; −1 where nothing has been written yet."""
    length: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Collect:
    """What ``apply`` keeps on its way through the layers, which are numbered from 1; the rest costs no memory.

    Hashable: pass it through ``jax.jit(..., static_argnames="collect")`` or from a closure.

    Example:
      >>> from distill.models import DecoderConfig, decoder
      >>> model = decoder(DecoderConfig(vocab_size=14, layers=4, width=8, heads=2, feed_forward=16))
      >>> tokens = jnp.array([[1, 2, 3]])
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

    def check(self, layers: int) -> None:
        """Raises ValueError if a model with so many layers has not all of these."""
        for field in dataclasses.fields(self):
            first = 0 if field.name == "hidden" else 1
            wrong = [n for n in getattr(self, field.name) if not first <= n <= layers]
            if wrong:
                raise ValueError(
                    f"collect: {field.name} of layers {wrong}; this model has {first} … {layers}"
                    + (" (0 is the embedding)." if first == 0 else ", counted from 1.")
                )


class Relations(NamedTuple):
    """Queries, keys and values as attention multiplies them: after the rotation by position."""

    queries: Float[Array, "B H L K"]
    keys: Float[Array, "B G S K"]
    values: Float[Array, "B G S K"]


class Routing(NamedTuple):
    """Where a mixture of experts sent tokens, padding left out; of all layers ``[N, E]``."""

    counts: Float[Array, "*layers E"]
    """Tokens that went to an expert; over all experts, k times the tokens."""
    probabilities: Float[Array, "*layers E"]
    """Sum over tokens of the probability of an expert."""


class Output(NamedTuple):
    """What ``apply`` returns; ``hidden`` is after the final norm, as the head wants it."""

    hidden: Float[Array, "B L D"]
    cache: Cache | None = None
    collected: dict[str, dict[int, Any]] | None = None
    """By the names of ``Collect``, then by layer: ``collected["hidden"][3]``; None unless asked for."""
    routing: Routing | None = None
    """Of a mixture of experts, for ``losses.load_balancing``."""


class Parameter(nn.Partitioned):
    """One entry of the parameter specification: shape, logical axes and initial distribution, declared where used.

    A parameter starts as ``mean + std · normal``.
    """

    std: float = struct.field(pytree_node=False, default=0.0)
    mean: float = struct.field(pytree_node=False, default=0.0)


def parameter(axes: tuple[str, ...], *, std: float = 0.0, mean: float = 0.0) -> Callable[..., Parameter]:
    """The Linen initialiser that declares a ``Parameter`` with these logical axis names."""
    return lambda _, shape: Parameter(jnp.zeros(shape, jnp.float32), names=axes, std=std, mean=mean)


def normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Normals of the same bits however they are sharded, under jit or not.

    The barrier: fused with what they are multiplied by, the last bit of a normal depends on how the array is cut.
    """
    return jax.lax.optimization_barrier(jax.random.normal(key, shape, jnp.float32))


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A network as pure functions over plain nested dicts of arrays.

    Example:
      >>> from distill.models import DecoderConfig, decoder
      >>> model = decoder(DecoderConfig(vocab_size=14, layers=1, width=8, heads=2, feed_forward=16))
      >>> params = model.init(jax.random.key(0))
      >>> output = model.apply(params, jnp.array([[1, 2, 3]]))
      >>> output.hidden.shape, model.unembed(params, output.hidden).shape
      ((1, 3, 8), (1, 3, 14))
    """

    init: Callable[[Array], Params]
    """``init(key) -> params``."""
    apply: Callable[..., Output]
    """``apply(params, tokens, positions=None, segments=None, cache=None, collect=None, remat="none") -> Output``."""
    unembed: Callable[[Params, Array], Array]
    """``unembed(params, hidden) -> logits``, float32."""
    vocab_size: int
    axes: Params | None = None
    """Logical axis names of each parameter (``parallel.py`` maps them to the mesh); None: replicate."""
    init_cache: Callable[[int, int], Cache] | None = None
    """``init_cache(batch, length) -> Cache`` with room for ``length`` tokens; None: the model has no cache."""
    head: Callable[[Params], Head] | None = None
    """``head(params) -> Head``, what ``unembed`` multiplies by, for losses that never hold all logits."""
    config: Any = None
    merge: Callable[[Params], Params] | None = None
    """Parameters of the plain network with this ``config`` from these, for export (``factors.py``); None: they are."""
    base: "Model | None" = None
    """Model of the parameters that are not learnt. Then ``init`` gives those that are, and everything else takes both,
    ``factors.joined``; in a train step they stand beside the teacher's (``step.Frozen``). None: all are learnt."""

    def logits(self, params: Params, tokens: Array, **inputs: Any) -> Array:
        """``unembed(apply(tokens))``: ``[B, L, V]`` float32."""
        return self.unembed(params, self.apply(params, tokens, **inputs).hidden)

    def with_vocabulary(self, size: int) -> "Model":
        """This model with the ids below ``size`` alone: rows of its embedding beyond are padding and get no logit.

        Embeddings are often padded, to a multiple of 128 or to the size of a larger sibling; ``vocab.align`` tells
        how many ids there are. Two models cut to one size have the same words, whatever their rows.

        Raises:
          ValueError: a size outside 1 … vocab_size.
        """
        if not 0 < size <= self.vocab_size:
            raise ValueError(f"with_vocabulary: size={size}; expected 1 … {self.vocab_size}, the rows of the model.")
        if size == self.vocab_size:
            return self
        known = self.head
        head = None if known is None else lambda params: known(params).replace(vocab_size=size)

        def unembed(params: Params, hidden: Array) -> Array:
            return self.unembed(params, hidden)[..., :size] if head is None else head(params).logits(hidden)

        return dataclasses.replace(self, unembed=unembed, head=head, vocab_size=size)

    def parameter_count(self) -> int:
        """Number of parameters."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
