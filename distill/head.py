"""``Head``: how hidden states become logits, with every bias, scale and softcap in one place."""

import jax.numpy as jnp
from flax import struct

from distill.errors import UserError
from distill.shapes import Array, Float


@struct.dataclass
class Head:
    """logits = softcap · tanh(scale · (hidden · kernel + bias) / softcap), without columns from ``vocab_size`` on.

    ``scale``, ``softcap`` and ``vocab_size`` are Python numbers, not arrays: they are part of the network's structure.

    Example:
      >>> head = Head(kernel=jnp.eye(2, 4), vocab_size=3)  # the fourth row of the embedding is padding
      >>> head.logits(jnp.array([[1.0, 2.0]]))
      Array([[1., 2., 0.]], dtype=float32)
    """

    kernel: Float[Array, "D V"]
    bias: Float[Array, " V"] | None = None
    scale: float = struct.field(pytree_node=False, default=1.0)
    """Factor of the logits (Cohere, Granite)."""
    softcap: float | None = struct.field(pytree_node=False, default=None)
    """Bound of the logits: they stay within ± softcap (Gemma)."""
    vocab_size: int | None = struct.field(pytree_node=False, default=None)
    """Size of the vocabulary; later columns of the kernel are padding and have no probability. None: no padding."""

    def unpadded(self) -> "Head":
        """Returns this head without padded columns."""
        size = self.kernel.shape[-1]
        if self.vocab_size is None or self.vocab_size == size:
            return self
        if not 0 < self.vocab_size <= size:
            raise UserError(f"Head: vocab_size={self.vocab_size}; expected 1 … {size}, the columns of the kernel.")
        bias = None if self.bias is None else self.bias[: self.vocab_size]
        return self.replace(kernel=self.kernel[:, : self.vocab_size], bias=bias, vocab_size=None)

    def finish(self, product: Float[Array, "*batch V"]) -> Float[Array, "*batch V"]:
        """Logits from ``hidden · kernel``: bias, scale and softcap."""
        logits = product if self.bias is None else product + jnp.broadcast_to(self.bias, product.shape)
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits in float32, accumulated in float32 for inputs of any type."""
        head = self.unpadded()
        return head.finish(product(hidden, head.kernel))


def product(x: Float[Array, "*batch D"], kernel: Float[Array, "D V"]) -> Float[Array, "*batch V"]:
    """``x · kernel`` in float32."""
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
