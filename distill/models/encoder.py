"""The encoder: embedding, a scan over stacked layers, pooler and head. A token sees all tokens of its segment.

With post-norm and learned positions it is a BERT, a DistilBERT or a MiniLM; with pre-norm, rotary positions, windows
and gates it is a ModernBERT. ``distill/weights/families/encoders.py`` lists the options of each.
"""

import dataclasses
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill.devices import backend
from distill.errors import UserError
from distill.head import Head
from distill.models.adapters import from_linen
from distill.models.attention import attend, attention_weights, mix
from distill.models.collect import collected, empty, keep, slots_of
from distill.models.config import EncoderConfig
from distill.models.layers import Projection, layer_norm
from distill.models.model import Model
from distill.models.output import Collect, Output, Relations
from distill.models.parameters import parameter, rematerialized
from distill.models.placement import rows_apart
from distill.models.rope import Turns, choose, rotate, turns_of
from distill.shapes import Array, Params


class LayerNorm(nn.Module):
    """LayerNorm with its scale, and its bias if it has one."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", parameter(("norm",), mean=1.0), x.shape[-1:])
        bias = self.param("bias", parameter(("norm",)), x.shape[-1:]) if self.config.norm_bias else None
        return layer_norm(x, scale, bias, self.config.norm_epsilon)


def activation(config: EncoderConfig, x: Array) -> Array:
    """GELU (arXiv 1606.08415), by the error function or by a tanh."""
    return nn.gelu(x, approximate=config.activation == "gelu_tanh")


class SelfAttention(nn.Module):
    """Attention of every token to the keys of ``mask_BLS``; ``local``: whether this layer has the window."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BLD: Array, turns: tuple[Turns, ...], mask_BLS: Array, wanted=(), local=None):
        c = self.config
        bias_axes = 2 if c.qkv_bias else 0

        def project(name: str, axis: str) -> Array:
            shape, axes = (c.width, c.heads, c.key_size), ("embed", axis, "head")
            return Projection("bld,dhk->bhlk", shape, axes, c.width, bias_axes, name=name)(x_BLD)

        def place(x_BHLK: Array) -> Array:
            return rotate(x_BHLK, choose(local, turns)) if turns else x_BHLK

        q_BHLK, k_BHLK, v_BHLK = place(project("query", "heads")), place(project("key", "kv")), project("value", "kv")
        seen = {"relations": Relations(q_BHLK, k_BHLK, v_BHLK)} if "relations" in wanted else {}
        if "attention" in wanted:
            weights = attention_weights(q_BHLK, k_BHLK, mask_BLS)
            y_BHLK = mix(weights, v_BHLK)
            seen["attention"] = weights.reshape(*q_BHLK.shape[:3], k_BHLK.shape[2])
        else:
            y_BHLK = attend(q_BHLK, k_BHLK, v_BHLK, mask_BLS)
        shape, axes = (c.heads, c.key_size, c.width), ("heads", "head", "embed")
        bias_axes = int(c.output_bias)
        return Projection("bhlk,hkd->bld", shape, axes, c.width, bias_axes, name="output")(y_BHLK), seen


class FeedForward(nn.Module):
    """down(gelu(up(x))), or with a gate."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        c = self.config

        def widen(name: str) -> Array:
            shape, axes = (c.width, c.feed_forward), ("embed", "mlp")
            return Projection("bld,df->blf", shape, axes, c.width, int(c.mlp_bias), name=name)(x_BLD)

        y_BLF = activation(c, widen("gate")) * widen("up") if c.gated else activation(c, widen("up"))
        shape, axes = (c.feed_forward, c.width), ("mlp", "embed")
        return Projection("blf,fd->bld", shape, axes, c.feed_forward, int(c.mlp_bias), name="down")(y_BLF)


class EncoderBlock(nn.Module):
    """One layer, shaped for ``nn.scan``: the carry ``(x, kept)``, broadcasts, and what differs by layer.

    ``masks`` are those without and with the window; ``kinds`` holds ``local`` and ``first``, each a bool.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(self, carry, turns: tuple[Turns, ...], masks: tuple[Array, ...], slots, kinds):
        c = self.config
        (x_BLD, kept), local = carry, kinds.get("local")
        mask_BLS = masks[0] if local is None else jnp.where(local, masks[1], masks[0])
        attention, mlp = SelfAttention(c, name="attention"), FeedForward(c, name="mlp")
        attention_norm, mlp_norm = LayerNorm(c, name="attention_norm"), LayerNorm(c, name="mlp_norm")
        if c.norm_place == "post":
            attended_BLD, seen = attention(x_BLD, turns, mask_BLS, kept or (), local)
            x_BLD = attention_norm(x_BLD + attended_BLD)
            x_BLD = mlp_norm(x_BLD + mlp(x_BLD))
        else:
            normed_BLD = jnp.where(kinds["first"], x_BLD, attention_norm(x_BLD))
            attended_BLD, seen = attention(normed_BLD, turns, mask_BLS, kept or (), local)
            x_BLD = x_BLD + attended_BLD
            x_BLD = x_BLD + mlp(mlp_norm(x_BLD))
        if kept is not None:
            kept = keep(kept, seen | {"hidden": x_BLD}, slots)
        return (x_BLD, kept), None


class Encoder(nn.Module):
    """An encoder in Linen. Use it through ``encoder(config)``."""

    config: EncoderConfig
    remat: str = "none"
    """One of ``REMAT``: what a layer does not keep is recomputed in the backward pass."""

    def setup(self):
        c, std = self.config, self.config.width**-0.5
        self.embedding = self.param("embedding", parameter(("vocab", "embed"), std=std), (c.vocab_size, c.width))
        if c.positions == "learned":
            self.positions = self.param("positions", parameter(("position", "embed"), std=std), (c.max_length, c.width))
        if c.token_types:
            self.types = self.param("types", parameter(("position", "embed"), std=std), (c.token_types, c.width))
        self.embedding_norm = LayerNorm(c)
        self.layers = nn.scan(
            rematerialized(EncoderBlock, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0, 0),
            length=c.layers,
            unroll=backend.unroll(c.layers, self.remat),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        if c.norm_place == "pre":
            self.norm = LayerNorm(c)
        square = ("...d,de->...e", (c.width, c.width), ("embed", "norm"), c.width)
        if c.pooler:
            self.pooler = Projection(*square, 1)
        if c.mlm_head:
            self.transform, self.transform_norm = Projection(*square, int(c.mlm_bias)), LayerNorm(c)
            self.head_bias = self.param("head_bias", parameter(("vocab",)), (c.vocab_size,))

    def __call__(
        self, tokens_BL: Array, positions=None, segments=None, token_types=None, collect: Collect | None = None
    ) -> Output:
        c, (batch, length) = self.config, tokens_BL.shape
        if c.positions == "learned" and positions is None and length > c.max_length:
            raise UserError(f"encoder: {length} tokens, but positions for {c.max_length}; cut the text.")
        positions_BL = jnp.broadcast_to(jnp.arange(length), (batch, length)) if positions is None else positions
        segments_BL = jnp.ones((batch, length), jnp.int32) if segments is None else segments
        masks, kinds = _by_layer(c, segments_BL[:, :, None] == segments_BL[:, None, :])

        embedded_BLD = rows_apart(self.embedding[tokens_BL])
        if c.positions == "learned":
            embedded_BLD = embedded_BLD + self.positions[positions_BL]
        if c.token_types:
            embedded_BLD = embedded_BLD + self.types[jnp.zeros_like(tokens_BL) if token_types is None else token_types]
        embedded_BLD = self.embedding_norm(embedded_BLD).astype(c.dtype)
        kept = slots = None
        if collect is not None:
            collect.check(c.layers)
            kept, slots = empty(c, collect, batch, length, length), slots_of(collect, c.layers)
        (x_BLD, kept), _ = self.layers((embedded_BLD, kept), _turns(c, positions_BL), masks, slots, kinds)
        hidden_BLD = self.norm(x_BLD) if c.norm_place == "pre" else x_BLD
        if self.is_initializing():
            if c.mlm_head:
                self.unembed(hidden_BLD)
            if c.pooler:
                self.pooled(hidden_BLD)
        return Output(
            hidden_BLD, None, None if collect is None else collected(collect, c.layers, kept, embedded_BLD, x_BLD)
        )

    def unembed(self, hidden_BLD: Array) -> Array:
        """Logits ``[..., V]`` of masked tokens; the matmul accumulates in float32."""
        if not self.config.mlm_head:
            raise UserError("encoder: no head, so no logits; use terms on hidden states, or weights with an MLM head.")
        states_BLD = self.transform_norm(activation(self.config, self.transform(hidden_BLD)))
        return Head(self.embedding.T, self.head_bias).logits(states_BLD)

    def pooled(self, hidden_BLD: Array) -> Array:
        """tanh(W · first token + b), ``[B, D]``."""
        if not self.config.pooler:
            raise UserError("encoder: no pooler; use pool(hidden, segments), or weights with a pooler.")
        return jnp.tanh(self.pooler(hidden_BLD[:, 0]))


def _turns(config: EncoderConfig, positions_BL: Array) -> tuple[Turns, ...]:
    """Rotary positions of layers without and, where there are any, with a window."""
    if config.positions == "learned":
        return ()
    thetas = (config.rope_theta, config.rope_theta_local) if config.window_layers else (config.rope_theta,)
    return tuple(turns_of(config.key_size, positions_BL, theta) for theta in thetas)


def _by_layer(config: EncoderConfig, mask_BLS: Array) -> tuple[tuple[Array, ...], dict[str, Array]]:
    """The masks layers choose from, and what differs between layers: arrays ``[N]`` of bools by name."""
    masks, kinds = (mask_BLS,), {}
    if config.norm_place == "pre":
        kinds["first"] = jnp.arange(config.layers) == 0
    if config.window_layers:
        index_L = jnp.arange(mask_BLS.shape[1])
        near_LS = jnp.abs(index_L[:, None] - index_L[None, :]) <= config.sliding_window
        masks, kinds["local"] = (mask_BLS, mask_BLS & near_LS[None]), jnp.asarray(config.window_layers)
    return masks, kinds


def encoder(config: EncoderConfig) -> Model:
    """The pure functions of an encoder with this configuration; ``apply`` also takes ``token_types`` ``[B, L]``.

    The layers are stacked, so the first pre-norm layer has an attention norm too, which is never used.

    Example:
      >>> model = encoder(EncoderConfig(vocab_size=14, layers=2, width=8, heads=2, feed_forward=16, max_length=6))
      >>> output = model.apply(model.init(jax.random.key(0)), jnp.array([[1, 2, 3]]))
      >>> output.hidden.shape
      (1, 3, 8)
    """
    return from_linen(Encoder(config), config.vocab_size, config=config)


def bert_pooler(config: EncoderConfig, params: Params, hidden_BLD: Array) -> Array:
    """BERT's ``pooler_output`` ``[B, D]``: tanh(W · first token + b).

    Raises:
      UserError: an encoder without a pooler.
    """
    return Encoder(config).apply({"params": params}, hidden_BLD, method="pooled")


Kind = Literal["mean", "cls", "max", "last"]
"""How tokens become one vector (``pool``)."""


def pool(hidden_BLD: Array, segments_BL: Array, kind: Kind = "mean") -> Array:
    """One vector for each row, ``[B, D]`` float32: of its tokens the mean, the first, the largest numbers or the last.

    Args:
      hidden_BLD: hidden states.
      segments_BL: 0 is padding, which is left out; a row without a token gives 0.
      kind: ``mean``, as MiniLM does; ``cls``, the first token, as BGE does; ``max``, number by number; ``last``.

    Raises:
      UserError: another kind.

    Example:
      >>> pool(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[1, 1, 0]]))
      Array([[2.]], dtype=float32)
    """
    if kind not in get_args(Kind):
        raise UserError(f"pool: kind={kind!r}; expected one of {', '.join(get_args(Kind))}.")
    real_BL = segments_BL > 0
    if kind == "max":
        states_BLD = jnp.where(real_BL[..., None], hidden_BLD.astype(jnp.float32), -jnp.inf)
        return jnp.where(jnp.any(real_BL, axis=1)[:, None], jnp.max(states_BLD, axis=1), 0.0)
    order_BL = jnp.cumsum(real_BL, axis=1)
    wanted = {"mean": order_BL, "cls": 1, "last": order_BL[:, -1:]}[kind]
    counts_BL = real_BL & (order_BL == wanted)
    states_BLD = jnp.where(counts_BL[..., None], hidden_BLD.astype(jnp.float32), 0.0)
    number_B = jnp.sum(counts_BL, axis=1, dtype=jnp.float32)
    return jnp.sum(states_BLD, axis=1) / jnp.maximum(number_B, 1.0)[:, None]


def embed(model: Model, params: Params, tokens: Array, segments: Array, kind: Kind = "mean") -> Array:
    """Sentence embeddings of norm 1, ``[B, D]`` float32: their products are cosine similarities (arXiv 1908.10084).

    Args:
      model: an encoder.
      params: its parameters.
      tokens: ``[B, L]``, a sentence a row, special tokens included.
      segments: ``[B, L]``, 1 for a token, 0 for padding.
      kind: how tokens become one vector (``pool``).
    """
    pooled_BD = pool(model.apply(params, tokens, segments=segments).hidden, segments, kind)
    return pooled_BD / jnp.maximum(jnp.linalg.norm(pooled_BD, axis=-1, keepdims=True), 1e-12)


def keep_layers(config: EncoderConfig, params: Params, layers: tuple[int, ...]) -> tuple[EncoderConfig, Params]:
    """An encoder with some of the layers of another, counted from 0; everything else is unchanged.

    Raises:
      UserError: no layers, layers it has not, or a pre-norm encoder without its first one, which has no norm.

    Example:
      >>> config = EncoderConfig(vocab_size=14, layers=6, width=8, heads=2, feed_forward=16)
      >>> keep_layers(config, encoder(config).init(jax.random.key(0)), (1, 3, 5))[0].layers
      3
    """
    if not layers or not all(0 <= layer < config.layers for layer in layers):
        raise UserError(f"keep_layers: layers={layers}; expected some of 0 … {config.layers - 1}.")
    if config.norm_place == "pre" and (layers[0] != 0 or 0 in layers[1:]):
        raise UserError(f"keep_layers: layers={layers}; expected 0 first: the first layer has no attention norm.")
    windows = tuple(config.window_layers[layer] for layer in layers) if config.window_layers else ()
    small = dataclasses.replace(config, layers=len(layers), window_layers=windows)
    if config.window_layers and not any(windows):
        small = dataclasses.replace(small, sliding_window=None, window_layers=())
    index = jnp.asarray(layers)
    return small, params | {"layers": jax.tree.map(lambda leaf: leaf[index], params["layers"])}
