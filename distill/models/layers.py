"""The layers of a decoder, in Linen, and the functions they are made of."""

import functools
from collections.abc import Collection, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill.devices import backend
from distill.models.attention import attend, attention_weights, mix, of_whole_text
from distill.models.collect import keep
from distill.models.config import DecoderConfig
from distill.models.moe import Experts
from distill.models.output import Relations
from distill.models.parameters import parameter
from distill.models.placement import rows_apart
from distill.models.products import einsum, low_rank
from distill.models.rope import Turns, choose, rotate
from distill.shapes import Array

ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
}
"""Name in ``DecoderConfig`` → function."""


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """x / sqrt(mean(x²) + ε) · scale over the last axes, those of the scale, in float32 (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=tuple(range(-scale.ndim, 0)), keepdims=True)
    scale = jnp.expand_dims(scale, range(x.ndim - scale.ndim))
    return (x32 * jax.lax.rsqrt(variance + epsilon) * scale).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array | None, epsilon: float) -> Array:
    """(x − mean(x)) / sqrt(var(x) + ε) · scale + bias over the last axis, in float32 (arXiv 1607.06450)."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + epsilon) * jnp.expand_dims(scale, range(x.ndim - 1))
    return (y if bias is None else y + jnp.expand_dims(bias, range(x.ndim - 1))).astype(x.dtype)


class Projection(nn.Module):
    """One einsum with its kernel, and a bias if asked."""

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    fan_in: int
    bias_axes: int = 0
    """Number of trailing axes of the bias; 0: no bias."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        stored = self.get_variable("params", "kernel")
        if self.has_variable("params", "left"):  # two factors in place of the kernel (students/factors.py)
            y = self._low_rank(x, "left", "right")
        elif isinstance(stored, Mapping):  # integers and one scale for each output (int8.py)
            y = einsum(self.equation, x, stored["int8"].astype(x.dtype)).astype(jnp.float32)
            y = (y * _as_outputs(stored["scale"], y)).astype(x.dtype)
        else:
            kernel = self.param("kernel", parameter(self.axes, std=self.fan_in**-0.5), self.shape)
            y = einsum(self.equation, x, kernel.astype(x.dtype))
        if self.has_variable("params", "lora_left"):
            y = y + self._low_rank(x, "lora_left", "lora_right")
        if not self.bias_axes:
            return y
        bias = self.param("bias", parameter(self.axes[-self.bias_axes :]), self.shape[-self.bias_axes :])
        return y + _as_outputs(bias, y).astype(x.dtype)

    def _low_rank(self, x: Array, *names: str) -> Array:
        left, right = (self.get_variable("params", name).astype(x.dtype) for name in names)
        return low_rank(self.equation, x, left, right)


def _as_outputs(values: Array, y: Array) -> Array:
    """One number for each output, in the shape that broadcasts to y: ``[H, K]`` for ``[B, H, L, K]``."""
    values = values[:, None] if values.ndim == 2 else values
    return jnp.expand_dims(values, range(y.ndim - values.ndim))


class Norm(nn.Module):
    """The norm of a configuration, with its scale and bias."""

    config: DecoderConfig
    axes: tuple[str, ...] = ("norm",)
    """Logical axes of the scale: the residual dimensions, or those of a head, or of all heads."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, shape = self.config, x.shape[-len(self.axes) :]
        scale = self.param("scale", parameter(self.axes, mean=0.0 if c.norm_plus_one else 1.0), shape)
        scale = 1.0 + scale.astype(jnp.float32) if c.norm_plus_one else scale
        if c.norm == "rms":
            return rms_norm(x, scale, c.norm_epsilon)
        return layer_norm(x, scale, self.param("bias", parameter(self.axes), shape), c.norm_epsilon)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (arXiv 2305.13245); ``turns`` and ``kinds`` as in ``Block``."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BLD: Array, turns: tuple[Turns, ...], mask_BLS: Array, cache, wanted: Collection[str], kinds):
        c = self.config

        def project(name: str, heads: int, axis: str) -> Array:
            shape, axes = (c.width, heads, c.key_size), ("embed", axis, "head")
            bias_axes = 2 if c.qkv_bias else 0
            return Projection("bld,dhk->bhlk", shape, axes, c.width, bias_axes, name=name)(x_BLD)

        def norm(name: str, x_BHLK: Array) -> Array:
            if not c.qk_norm:
                return x_BHLK
            if not c.qk_norm_joint:
                return Norm(c, ("head",), name=name)(x_BHLK)
            axes = ("heads" if name == "query_norm" else "kv", "head")
            return Norm(c, axes, name=name)(x_BHLK.swapaxes(1, 2)).swapaxes(1, 2)

        def place(name: str, heads: int, axis: str) -> Array:
            x_BHLK = norm(f"{name}_norm", project(name, heads, axis))
            if not turns:
                return x_BHLK
            turned_BHLK = rotate(x_BHLK, choose(kinds.get("window", jnp.bool_(True)), turns))
            return jnp.where(kinds["rope"], turned_BHLK, x_BHLK) if "rope" in kinds else turned_BHLK

        q_BHLK, k_BGLK = place("query", c.heads, "heads"), place("key", c.groups, "kv")
        v_BGLK = project("value", c.groups, "kv")
        k_BGLK, v_BGLK = of_whole_text(k_BGLK), of_whole_text(v_BGLK)
        if cache is not None:
            keys, values, start = cache
            k_BGLK = jax.lax.dynamic_update_slice_in_dim(keys, k_BGLK.astype(keys.dtype), start, axis=2)
            v_BGLK = jax.lax.dynamic_update_slice_in_dim(values, v_BGLK.astype(values.dtype), start, axis=2)
        seen = {}
        scale = None if c.attention_scalar is None else c.attention_scalar**-0.5
        options = {"scale": scale, "softcap": c.attention_softcap}
        if "attention" in wanted:
            weights = attention_weights(q_BHLK, k_BGLK, mask_BLS, **options)
            y_BHLK = mix(weights, v_BGLK)
            seen["attention"] = weights.reshape(*q_BHLK.shape[:3], k_BGLK.shape[2])
        else:
            y_BHLK = attend(q_BHLK, k_BGLK, v_BGLK, mask_BLS, causal=cache is None, **options)
        if "relations" in wanted:
            seen["relations"] = Relations(q_BHLK, k_BGLK, v_BGLK)
        shape, fan_in = (c.heads, c.key_size, c.width), c.heads * c.key_size
        axes, bias_axes = ("heads", "head", "embed"), int(c.output_bias)
        out = Projection("bhlk,hkd->bld", shape, axes, fan_in, bias_axes, name="output")(y_BHLK)
        return out, (k_BGLK, v_BGLK), seen


class MLP(nn.Module):
    """down(activation(gate(x)) · up(x)) (arXiv 2002.05202), or down(activation(up(x))) without a gate."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        c = self.config
        bias_axes, activation = int(c.mlp_bias), ACTIVATIONS[c.activation]
        x = backend.as_rows(x_BLD)

        def widen(name: str) -> Array:
            shape, axes = (c.width, c.feed_forward), ("embed", "mlp")
            return Projection("...d,df->...f", shape, axes, c.width, bias_axes, name=name)(x)

        names, inner = ("up",), activation
        if c.gated:
            names, inner = ("gate", "up"), lambda gate, up: activation(gate) * up
        # Recomputed in the backward pass: that is faster than storing and reading what the activation keeps.
        y = jax.checkpoint(inner)(*map(widen, names))
        shape, axes = (c.feed_forward, c.width), ("mlp", "embed")
        y = Projection("...f,fd->...d", shape, axes, c.feed_forward, bias_axes, name="down")(y)
        return y.reshape(x_BLD.shape)


class Shared(NamedTuple):
    """What all layers read alike: the broadcast arguments of ``nn.scan``."""

    turns: tuple[Turns, ...]
    """Rotary positions: none, those of all layers, or those of layers without and with a window."""
    masks: tuple[Array, ...]
    """The mask of all layers, or those without and with a window."""
    start: Array
    """Slot of the cache where the tokens are written."""
    real_BL: Array
    """True for tokens, False for padding."""


class Own(NamedTuple):
    """What differs between layers, with a leading axis of layers: the scanned arguments of ``nn.scan``."""

    cache: tuple[Array, Array] | None
    """Keys and values."""
    slots: dict[str, tuple[Array, Array]] | None
    """Of the buffers of ``collect.py``."""
    kinds: dict[str, Array]
    """Bools: ``window``, whether the layer has a window, and ``rope``, whether it rotates queries and keys."""


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    The configuration says where the norms stand, and whether the MLP reads what attention has added. The carry is
    ``(x, kept)``; ``kept`` holds a buffer for each thing that is collected, or is None (``collect.py``).
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, carry, shared: Shared, own: Own):
        c, kinds, masks = self.config, own.kinds, shared.masks
        x_BLD, kept = rows_apart(carry[0]), carry[1]

        def read(branch: str, x_BLD: Array) -> Array:
            return x_BLD if c.norm_place == "after" else Norm(c, name=f"{branch}_norm")(x_BLD)

        def give(branch: str, y_BLD: Array) -> Array:
            return y_BLD if c.norm_place == "before" else Norm(c, name=f"{branch}_post_norm")(y_BLD)

        mask_BLS = jnp.where(kinds["window"], masks[1], masks[0]) if "window" in kinds else masks[0]
        cache = None if own.cache is None else (*own.cache, shared.start)
        attention = Attention(c, name="attention")
        y_BLD, kv, seen = attention(read("attention", x_BLD), shared.turns, mask_BLS, cache, kept or (), kinds)
        attended_BLD = x_BLD + give("attention", y_BLD)
        y_BLD, routing = read("mlp", x_BLD if c.parallel else attended_BLD), None
        if c.experts:
            y_BLD, routing = Experts(c, name="mlp")(y_BLD, shared.real_BL)
        else:
            y_BLD = MLP(c, name="mlp")(y_BLD)
        x_BLD = attended_BLD + give("mlp", y_BLD)
        if kept is not None:
            kept = keep(kept, seen | {"hidden": x_BLD}, own.slots)
        return (x_BLD, kept), (None if cache is None else kv, routing)
