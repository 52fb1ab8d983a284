"""``Model``: a network as pure functions."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from distill.errors import UserError
from distill.head import Head
from distill.models.output import Cache, Output
from distill.shapes import Array, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A network as pure functions over plain nested dicts of arrays.

    Example:
      >>> from distill.models import DecoderConfig, decoder
      >>> model = decoder(DecoderConfig(vocab_size=14, layers=1, width=8, heads=2, feed_forward=16))
      >>> params = model.init(jax.random.key(0))
      >>> output = model.apply(params, jax.numpy.array([[1, 2, 3]]))
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
    """Converts parameters to those of the plain network with this ``config``, for export; None: they are the same."""
    base: "Model | None" = None
    """Model of the frozen parameters; None: all parameters are learnt.

    With a base, ``init`` returns the learnt parameters alone, and every other function takes both
    (``trees.joined``). A train step keeps the frozen ones beside the teacher's (``step.Frozen``)."""

    def logits(self, params: Params, tokens: Array, **inputs: Any) -> Array:
        """``unembed(apply(tokens))``: ``[B, L, V]`` float32."""
        return self.unembed(params, self.apply(params, tokens, **inputs).hidden)

    def with_vocabulary(self, size: int) -> "Model":
        """This model with the first ``size`` ids only: later rows of its embedding are padding and get no logit.

        Embeddings are often padded, to a multiple of 128 or to the size of a larger sibling; ``vocab.align`` returns
        how many ids there are. Two models cut to one size have the same vocabulary, however many rows they have.

        Raises:
          UserError: a size outside 1 … vocab_size.
        """
        if not 0 < size <= self.vocab_size:
            raise UserError(f"with_vocabulary: size={size}; expected 1 … {self.vocab_size}, the rows of the model.")
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
