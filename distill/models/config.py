"""What a decoder is: its sizes and options."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A Llama-like decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    vocab_size: int = 32_000
    layers: int = 2
    width: int = 64
    """Model dimension D; also the width of the embedding."""
    heads: int = 4
    kv_heads: int | None = None
    """Key/value groups; must divide ``heads``. None: one per head."""
    head_dim: int | None = None
    """Size of one head, even (rotary turns pairs). None: width / heads."""
    feed_forward: int = 256
    tied: bool = False
    """The head is the embedding, transposed: vocab_size × width fewer parameters."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matmul operands; parameters, norms, softmax and logits are float32."""

    def __post_init__(self):
        for name in ("vocab_size", "layers", "width", "heads", "kv_heads", "head_dim", "feed_forward"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model: {name}={value}; expected at least 1.")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"model: width={self.width} is no multiple of heads={self.heads}; set head_dim.")
        if self.heads % self.groups:
            raise ValueError(f"model: heads={self.heads} is no multiple of kv_heads={self.groups}.")
        if self.key_size % 2:
            raise ValueError(f"model: the size of a head is {self.key_size}; rotary positions need an even one.")

    @property
    def groups(self) -> int:
        """Number of key/value groups, G."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def key_size(self) -> int:
        """Size of one head, K."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    def flops_per_token(self, length: int) -> float:
        """FLOPs of the forward pass per token, matmuls only (2 per multiply-add), averaged over a text of ``length``.

        Scores and values count the (length + 1)/2 keys a causal position sees on average. A training step costs
        three times this: the backward pass multiplies twice.
        """
        projections = self.width * self.key_size * (2 * self.heads + 2 * self.groups)
        attention = 2 * self.heads * self.key_size * (length + 1) / 2
        per_layer = projections + attention + 3 * self.width * self.feed_forward
        return 2.0 * (self.layers * per_layer + self.width * self.vocab_size)
