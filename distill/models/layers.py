"""The layers of a decoder, in Linen, and the functions they are made of."""

from collections.abc import Collection

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill.models.attention import attend, attention_weights, mix
from distill.models.collect import keep
from distill.models.config import DecoderConfig
from distill.models.model import Relations, parameter
from distill.models.rope import rotate
from distill.shapes import Array


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """x / sqrt(mean(x²) + ε) · scale over the last axis, in float32 (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    scale = jnp.expand_dims(scale, range(x.ndim - 1))
    return (x32 * jax.lax.rsqrt(variance + epsilon) * scale).astype(x.dtype)


class Projection(nn.Module):
    """One einsum with its kernel, and a bias if asked."""

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    fan_in: int
    bias_axes: int = 0
    """How many trailing axes the bias has; 0: no bias."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", parameter(self.axes, std=self.fan_in**-0.5), self.shape)
        y = jnp.einsum(self.equation, x, kernel.astype(x.dtype))
        if not self.bias_axes:
            return y
        bias = self.param("bias", parameter(self.axes[-self.bias_axes :]), self.shape[-self.bias_axes :])
        bias = bias[:, None] if self.bias_axes == 2 else bias  # [H, K] meets [B, H, L, K]
        return y + jnp.expand_dims(bias, range(y.ndim - bias.ndim)).astype(x.dtype)


class Norm(nn.Module):
    """RMSNorm with its scale."""

    epsilon: float
    axis: str = "norm"
    """Logical axis of the scale: the residual dimensions, or those of a head."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", parameter((self.axis,), mean=1.0), x.shape[-1:])
        return rms_norm(x, scale, self.epsilon)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (arXiv 2305.13245).

    ``turns``: whether this layer's queries and keys are rotated; None: yes.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x_BLD: Array, positions_BL: Array, mask_BLS: Array, cache, wanted: Collection[str] = (), turns=None
    ):
        c = self.config

        def project(name: str, heads: int, axis: str) -> Array:
            shape, axes = (c.width, heads, c.key_size), ("embed", axis, "head")
            bias_axes = 2 if c.qkv_bias else 0
            return Projection("bld,dhk->bhlk", shape, axes, c.width, bias_axes, name=name)(x_BLD)

        def place(name: str, heads: int, axis: str) -> Array:
            x_BHLK = project(name, heads, axis)
            x_BHLK = Norm(c.norm_epsilon, "head", name=f"{name}_norm")(x_BHLK) if c.qk_norm else x_BHLK
            turned_BHLK = rotate(x_BHLK, positions_BL, c.rope_theta, c.rope_scaling)
            return turned_BHLK if turns is None else jnp.where(turns, turned_BHLK, x_BHLK)

        q_BHLK, k_BGLK = place("query", c.heads, "heads"), place("key", c.groups, "kv")
        v_BGLK = project("value", c.groups, "kv")
        if cache is not None:
            keys, values, start = cache
            k_BGLK = jax.lax.dynamic_update_slice_in_dim(keys, k_BGLK.astype(keys.dtype), start, axis=2)
            v_BGLK = jax.lax.dynamic_update_slice_in_dim(values, v_BGLK.astype(values.dtype), start, axis=2)
        seen = {}
        if "attention" in wanted:
            weights = attention_weights(q_BHLK, k_BGLK, mask_BLS)
            y_BHLK = mix(weights, v_BGLK)
            seen["attention"] = weights.reshape(*q_BHLK.shape[:3], k_BGLK.shape[2])
        else:
            y_BHLK = attend(q_BHLK, k_BGLK, v_BGLK, mask_BLS)
        if "relations" in wanted:
            seen["relations"] = Relations(q_BHLK, k_BGLK, v_BGLK)
        shape, fan_in = (c.heads, c.key_size, c.width), c.heads * c.key_size
        axes, bias_axes = ("heads", "head", "embed"), int(c.output_bias)
        out = Projection("bhlk,hkd->bld", shape, axes, fan_in, bias_axes, name="output")(y_BHLK)
        return out, (k_BGLK, v_BGLK), seen


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (arXiv 2002.05202)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        c = self.config
        bias_axes = int(c.mlp_bias)

        def widen(name: str) -> Array:
            shape, axes = (c.width, c.feed_forward), ("embed", "mlp")
            return Projection("bld,df->blf", shape, axes, c.width, bias_axes, name=name)(x_BLD)

        y_BLF = nn.silu(widen("gate")) * widen("up")
        shape, axes = (c.feed_forward, c.width), ("mlp", "embed")
        return Projection("blf,fd->bld", shape, axes, c.feed_forward, bias_axes, name="down")(y_BLF)


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)). Shaped for ``nn.scan``: carry, broadcasts, cache.

    The carry is ``(x, kept)``; ``kept`` holds a buffer for each thing that is collected, or is None (``collect.py``).
    ``masks`` are two where some layers have a window: without and with it. ``kinds`` says what differs by layer:
    ``window`` and ``rope``, each a bool.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, carry, positions_BL: Array, masks: tuple[Array, ...], start, cache, slots, kinds):
        c = self.config
        x_BLD, kept = carry
        mask_BLS = jnp.where(kinds["window"], masks[1], masks[0]) if "window" in kinds else masks[0]
        cache = None if cache is None else (*cache, start)
        attended, kv, seen = Attention(c, name="attention")(
            Norm(c.norm_epsilon, name="attention_norm")(x_BLD),
            positions_BL,
            mask_BLS,
            cache,
            kept or (),
            kinds.get("rope"),
        )
        x_BLD = x_BLD + attended
        x_BLD = x_BLD + SwiGLU(c, name="mlp")(Norm(c.norm_epsilon, name="mlp_norm")(x_BLD))
        if kept is not None:
            kept = keep(kept, seen | {"hidden": x_BLD}, slots)
        return (x_BLD, kept), None if cache is None else kv
