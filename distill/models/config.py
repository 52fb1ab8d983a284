"""Configurations of decoders and encoders: sizes and options."""

import dataclasses
import math
from typing import Any, Literal

from distill.errors import UserError, check_fields

_SIZES = ("vocab_size", "layers", "width", "heads", "feed_forward")


def changed(config: Any) -> dict[str, Any]:
    """The fields of a configuration that differ from the default."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {name: value for name, value in vars(config).items() if value != defaults[name]}


def _check_sizes(model: str, fields: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if fields[name] is not None and fields[name] < 1:
            raise UserError(f"{model}: {name}={fields[name]}; expected at least 1.")


def _check_positive(model: str, fields: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if fields[name] is not None and not 0.0 < fields[name] < math.inf:
            raise UserError(f"{model}: {name}={fields[name]}; expected a number above 0.")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are scaled for texts longer than those of the first training (``rope.py``)."""

    kind: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = "none"
    """``linear``: the factor slows every pair. ``dynamic``: NTK-aware, by the length of each text. ``llama3``: the
    factor slows slow pairs, fast ones are kept. ``yarn`` (arXiv 2309.00071): the same between other bounds.
    ``longrope`` (arXiv 2402.13753): each pair has its factor, by the length of each text. Padding and the other
    texts of a row do not count. With a cache, ``longrope`` reads the text again where it outgrows the original
    length; ``dynamic`` leaves the keys of earlier tokens as they were turned, as transformers does."""
    factor: float = 1.0
    original_length: int = 0
    """Length of the first training, in tokens; every kind but ``linear`` needs it."""
    low_frequency: float = 1.0
    """llama3: pairs that turn less often than this in a text of the original length are slowed by the factor."""
    high_frequency: float = 4.0
    """llama3: pairs that turn more often are kept."""
    beta_fast: float = 32.0
    """yarn: as ``high_frequency``."""
    beta_slow: float = 1.0
    """yarn: as ``low_frequency``."""
    truncate: bool = True
    """yarn: the bounds are whole numbers of pairs."""
    attention_factor: float | None = None
    """yarn, longrope: factor of queries and keys; None: 0.1 ln(factor) + 1 for yarn,
    √(1 + ln(factor) / ln(original_length)) for longrope."""
    short_factors: tuple[float, ...] = ()
    """longrope: the factor of each pair in texts up to the original length."""
    long_factors: tuple[float, ...] = ()
    """longrope: the factor of each pair in longer texts."""

    def __post_init__(self):
        check_fields(self, "rope_scaling", self._read)
        if self.kind == "none":
            if changed(self):
                raise UserError(
                    f"rope_scaling: {self} has no kind; expected linear, dynamic, llama3, yarn or longrope."
                )
            return
        if not 1.0 <= self.factor < math.inf:
            raise UserError(f"rope_scaling: factor={self.factor}; expected at least 1.")
        numbers = ("low_frequency", "high_frequency", "beta_fast", "beta_slow", "attention_factor")
        _check_positive("rope_scaling", vars(self), numbers)
        if self.kind != "linear" and self.original_length < 1:
            raise UserError(f"rope_scaling: {self.kind} needs original_length; got {self.original_length}.")
        if self.kind == "longrope" and not 0 < len(self.short_factors) == len(self.long_factors):
            raise UserError(
                f"rope_scaling: {len(self.short_factors)} short_factors and {len(self.long_factors)} long_factors; "
                "longrope needs one of each for every pair."
            )
        if self.kind == "llama3" and not self.low_frequency < self.high_frequency:
            raise UserError(f"rope_scaling: low_frequency={self.low_frequency} must be below {self.high_frequency}.")

    def _read(self) -> dict[str, tuple[bool, str]]:
        """Number → whether this kind reads it."""
        kinds = dict.fromkeys(("low_frequency", "high_frequency"), ("llama3",))
        kinds |= dict.fromkeys(("beta_fast", "beta_slow", "truncate"), ("yarn",))
        kinds |= dict.fromkeys(("short_factors", "long_factors"), ("longrope",))
        kinds |= {"attention_factor": ("yarn", "longrope")}
        return {name: (self.kind in readers, f"kind {' or '.join(readers)}") for name, readers in kinds.items()}

    @property
    def magnitude(self) -> float:
        """Factor of queries and of keys."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1.0
        return math.sqrt(1.0 + math.log(self.factor) / math.log(self.original_length))


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A causal decoder; by default Llama's: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Its options make it Mistral, Qwen, SmolLM, Gemma, Phi-3, OLMo 2, GPT-2 or GPT-NeoX; ``distill/weights/families``
    lists the options of each family.
    """

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
    """Ties the head to the embedding, transposed: vocab_size × width fewer parameters."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm of every head's queries and keys, before the rotation."""
    qk_norm_joint: bool = False
    """Takes that norm over all heads together (OLMo 2)."""
    attention_scalar: float | None = None
    """Scores are q·k / √this; None: the size of a head."""
    attention_softcap: float | None = None
    """Scores s become c · tanh(s / c) (Gemma 2, arXiv 2408.00118)."""
    logit_softcap: float | None = None
    """Softcap of the logits."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """``gelu_tanh`` approximates ``gelu`` by a tanh."""
    gated: bool = True
    """The MLP is down(activation(gate) · up); False: down(activation(up))."""
    norm: Literal["rms", "layer"] = "rms"
    """``layer``: LayerNorm (arXiv 1607.06450), which subtracts the mean and adds a bias."""
    norm_plus_one: bool = False
    """Norms multiply by 1 + scale (Gemma)."""
    norm_place: Literal["before", "after", "around"] = "before"
    """Norms of what attention and MLP read; ``after``: of what they add (OLMo 2); ``around``: of both (Gemma)."""
    parallel: bool = False
    """Attention and MLP of a layer read the same (GPT-NeoX); False: the MLP reads what attention has added too."""
    scaled_embedding: bool = False
    """The embedding times √width (Gemma)."""
    positions: Literal["rotary", "learned"] = "rotary"
    """``learned``: a table of ``max_length`` rows is added to the embedding (GPT-2)."""
    rope_fraction: float = 1.0
    """Fraction of each head that is rotated: its first numbers."""
    rope_theta_local: float | None = None
    """Theta in layers with a window, without ``rope_scaling`` (Gemma 3). None: ``rope_theta``."""
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    rope_layers: tuple[bool, ...] = ()
    """For each layer, whether positions rotate its queries and keys. Empty: in all of them."""
    sliding_window: int | None = None
    """Number of keys a token sees, itself included. None: all before it."""
    window_layers: tuple[bool, ...] = ()
    """For each layer, whether it has the window. Empty: all layers have it."""
    experts: int = 0
    """Experts E of every layer, each an MLP of ``feed_forward`` units; 0: one MLP for all tokens."""
    experts_per_token: int = 2
    """Experts k to which each token is routed."""
    normalize_experts: bool = True
    """Divides the weights of a token's experts by their sum."""
    router_loss_weight: float = 0.0
    """Weight of the load-balancing loss when the model is trained (``losses.load_balancing``)."""
    max_length: int | None = None
    """Longest text the model is meant for, kept in files; only learned positions enforce it."""
    norm_epsilon: float = 1e-5
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matmul operands; parameters, norms, softmax and logits are float32."""

    def __post_init__(self):
        check_fields(self, "model")
        _check_sizes("model", vars(self), (*_SIZES, "kv_heads", "head_dim", "max_length"))
        _check_positive("model", vars(self), ("norm_epsilon", "rope_theta", "rope_theta_local"))
        if self.head_dim is None and self.width % self.heads:
            raise UserError(f"model: width={self.width} is no multiple of heads={self.heads}; set head_dim.")
        if self.heads % self.groups:
            raise UserError(f"model: heads={self.heads} is no multiple of kv_heads={self.groups}.")
        if self.qk_norm_joint and not self.qk_norm:
            raise UserError("model: qk_norm_joint without qk_norm.")
        _check_positive("model", vars(self), ("attention_scalar", "attention_softcap", "logit_softcap"))
        self._check_layers()
        self._check_positions()
        self._check_experts()

    def _check_experts(self) -> None:
        if self.experts < 0 or self.router_loss_weight < 0.0:
            raise UserError(
                f"model: experts={self.experts}, router_loss_weight={self.router_loss_weight}; expected at least 0."
            )
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise UserError(f"model: experts_per_token={self.experts_per_token}; expected 1 … {self.experts} experts.")
        if self.experts and (self.mlp_bias or not self.gated or self.activation != "silu"):
            raise UserError("model: experts are gated, by silu, without biases; leave mlp_bias, gated and activation.")

    def _check_layers(self) -> None:
        for name, value in {"rope_layers": self.rope_layers, "window_layers": self.window_layers}.items():
            if value and len(value) != self.layers:
                raise UserError(
                    f"model: {name} has {len(value)} entries; expected one for each of {self.layers} layers."
                )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"model: sliding_window={self.sliding_window}; expected at least 1.")
        if self.window_layers and self.sliding_window is None:
            raise UserError("model: window_layers without a sliding_window.")

    def _check_positions(self) -> None:
        if self.positions == "learned":
            rope = {"rope_scaling", "rope_layers", "rope_fraction", "rope_theta_local"}
            if self.max_length is None or changed(self).keys() & rope:
                raise UserError(
                    f"model: learned positions need max_length, got {self.max_length}, and no rope options."
                )
            return
        size = self.rotary_size
        if size % 2 or not 0 < size <= self.key_size:
            raise UserError(
                f"model: the size of a head is {self.key_size}, of which rope_fraction={self.rope_fraction} rotates "
                f"{size}; rotary positions need an even number."
            )
        if self.rope_scaling.kind == "yarn" and not self.rope_theta > 1.0:
            raise UserError(f"model: rope_theta={self.rope_theta}; yarn needs more than 1.")
        if self.rope_scaling.kind == "dynamic" and size < 4:
            raise UserError(f"model: dynamic rope_scaling needs heads of size 4 or more; got {size}.")
        if self.rope_scaling.kind == "longrope" and len(self.rope_scaling.short_factors) != size // 2:
            raise UserError(f"model: {len(self.rope_scaling.short_factors)} factors of longrope; expected {size // 2}.")
        if self.rope_theta_local is not None and self.sliding_window is None:
            raise UserError("model: rope_theta_local without a sliding_window.")

    @property
    def groups(self) -> int:
        """Number of key/value groups, G."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def key_size(self) -> int:
        """Size of one head, K."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def rotary_size(self) -> int:
        """Numbers of a head that are rotated."""
        return int(self.key_size * self.rope_fraction)

    @property
    def idle_parameters(self) -> int:
        """Parameters that a token does not use: of the experts to which it is not routed."""
        idle = self.experts - self.experts_per_token if self.experts else 0
        return 3 * self.layers * idle * self.width * self.feed_forward

    def flops_per_token(self, length: int) -> float:
        """FLOPs of the forward pass per token, matmuls only (2 per multiply-add), averaged over a text of ``length``.

        Scores and values count the keys a causal position sees on average: (length + 1)/2, fewer through a window. A
        training step costs three times this: the backward pass multiplies twice.
        """
        projections = self.width * self.key_size * (2 * self.heads + 2 * self.groups)
        window = length if self.sliding_window is None else min(self.sliding_window, length)
        windowed = sum(self.window_layers) if self.window_layers else self.layers
        keys = (self.layers - windowed) * (length + 1) / 2
        keys += windowed * (window * (window + 1) / 2 + (length - window) * window) / length
        attention = 2 * self.heads * self.key_size * keys
        mlp = (3 if self.gated else 2) * self.feed_forward
        per_token = self.experts_per_token * mlp + self.experts if self.experts else mlp
        per_layer = projections + self.width * per_token
        return 2.0 * (self.layers * per_layer + attention + self.width * self.vocab_size)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """An encoder; by default BERT."""

    vocab_size: int = 30_522
    layers: int = 2
    width: int = 64
    """Model dimension D; also the width of the embeddings."""
    heads: int = 4
    feed_forward: int = 256
    token_types: int = 0
    """Rows of the embedding of token types (sentence A or B); 0: there is none."""
    max_length: int = 512
    """Longest text: the rows of learned positions; for rotary positions what the model is meant for."""
    norm_place: Literal["post", "pre"] = "post"
    """post: norm(x + f(x)) (arXiv 1810.04805). pre: x + f(norm(x)) and a norm at the end; the first layer's attention
    follows the norm of the embedding and has no other norm (arXiv 2412.13663)."""
    positions: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 160_000.0
    rope_theta_local: float = 10_000.0
    """Theta in layers with a window."""
    sliding_window: int | None = None
    """Distance on either side up to which layers of ``window_layers`` see keys. None: all layers see all keys."""
    window_layers: tuple[bool, ...] = ()
    """For each layer, whether it has the window."""
    gated: bool = False
    """down(gelu(gate(x)) · up(x)) (GeGLU, arXiv 2002.05202) instead of down(gelu(up(x)))."""
    qkv_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    norm_epsilon: float = 1e-12
    pooler: bool = False
    """BERT's tanh(W · first token + b), for ``bert_pooler``."""
    mlm_head: bool = False
    """A head for masked tokens: a transform with a norm, then the embedding, transposed, with a bias."""
    mlm_bias: bool = True
    """The transform of that head has a bias."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matmul operands; parameters, norms, softmax and logits are float32."""

    def __post_init__(self):
        check_fields(self, "encoder")
        _check_sizes("encoder", vars(self), (*_SIZES, "max_length"))
        _check_positive("encoder", vars(self), ("norm_epsilon", "rope_theta", "rope_theta_local"))
        if self.token_types < 0:
            raise UserError(f"encoder: token_types={self.token_types}; expected at least 0.")
        if self.width % self.heads:
            raise UserError(f"encoder: width={self.width} is no multiple of heads={self.heads}.")
        if self.positions == "rotary" and self.key_size % 2:
            raise UserError(f"encoder: the size of a head is {self.key_size}; rotary positions need an even one.")
        if (self.sliding_window is None) != (not self.window_layers) or (self.sliding_window or 0) < 0:
            raise UserError(
                f"encoder: sliding_window={self.sliding_window} and window_layers={self.window_layers} go together."
            )
        if self.window_layers and len(self.window_layers) != self.layers:
            raise UserError(
                f"encoder: window_layers has {len(self.window_layers)} entries; expected one for each of "
                f"{self.layers} layers."
            )

    @property
    def groups(self) -> int:
        """Number of key/value groups, G: the number of heads."""
        return self.heads

    @property
    def key_size(self) -> int:
        """Size of one head, K."""
        return self.width // self.heads

    def flops_per_token(self, length: int) -> float:
        """FLOPs of the forward pass per token, matmuls only (2 per multiply-add), in a text of ``length``; no head."""
        windowed = sum(self.window_layers)
        near = length if self.sliding_window is None else min(length, 2 * self.sliding_window + 1)
        keys = (self.layers - windowed) * length + windowed * near
        per_layer = 4 * self.width**2 + (3 if self.gated else 2) * self.width * self.feed_forward
        return 2.0 * (self.layers * per_layer + 2 * self.width * keys)


NetworkConfig = DecoderConfig | EncoderConfig
