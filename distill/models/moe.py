"""Mixtures of experts: a router sends each token to k of E feed-forward networks, and no token is dropped.

Tokens are sorted by expert, so that each expert multiplies a block of neighbouring rows. That is k/E of the work of all
experts on all tokens, with shapes that do not depend on the routing.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill.models.config import DecoderConfig
from distill.models.output import Routing
from distill.models.parameters import parameter
from distill.models.products import grouped_dot
from distill.shapes import Array


class Chosen(NamedTuple):
    """Experts of each token, and their weights."""

    experts_TK: Array
    """The k experts of a token, the most probable first; ties: the lower number first."""
    weights_TK: Array
    """Weights of their outputs."""
    probabilities_TE: Array
    """Probabilities of all experts."""


def route(x_TD: Array, kernel_DE: Array, experts: int, normalize: bool) -> Chosen:
    """p = softmax(x · kernel) in float32; the ``experts`` largest p, divided by their sum if ``normalize``."""
    logits_TE = jnp.einsum("td,de->te", x_TD, kernel_DE.astype(x_TD.dtype), preferred_element_type=jnp.float32)
    probabilities_TE = jax.nn.softmax(logits_TE, axis=-1)
    weights_TK, experts_TK = jax.lax.top_k(probabilities_TE, experts)
    if normalize:
        weights_TK = weights_TK / jnp.sum(weights_TK, axis=-1, keepdims=True)
    return Chosen(experts_TK, weights_TK, probabilities_TE)


def mixture(chosen: Chosen, x_TD: Array, expert: Callable[[Array, Callable[[Array, Array], Array]], Array]) -> Array:
    """Σ over a token's k experts of weight · expert(x), ``[T, D]``.

    Args:
      chosen: from ``route``.
      x_TD: tokens.
      expert: ``expert(rows, multiply) -> rows``, where ``multiply(rows [R, A], kernels [E, A, B]) -> [R, B]`` gives
        each row the kernel of its expert.
    """
    tokens, k = chosen.experts_TK.shape
    experts_R = chosen.experts_TK.reshape(-1)
    order_R = jnp.argsort(experts_R, stable=True)
    sizes_E = jnp.bincount(experts_R, length=chosen.probabilities_TE.shape[1]).astype(jnp.int32)
    y_RD = expert(x_TD[order_R // k], lambda rows, kernels: grouped_dot(rows, kernels, sizes_E))
    y_TKD = y_RD[jnp.argsort(order_R)].reshape(tokens, k, -1)
    weights_TK = chosen.weights_TK.astype(y_TKD.dtype)
    return jnp.einsum("tkd,tk->td", y_TKD, weights_TK, preferred_element_type=jnp.float32).astype(x_TD.dtype)


# ---- the layer


class _Kernel(nn.Module):
    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @nn.compact
    def __call__(self) -> Array:
        stored = self.get_variable("params", "kernel")
        if isinstance(stored, Mapping):  # integers and one scale for each output (int8.py)
            return stored["int8"] * stored["scale"][:, None]
        return self.param("kernel", parameter(self.axes, std=self.shape[-2] ** -0.5), self.shape)


class Experts(nn.Module):
    """Σ over k of E experts of p · down(silu(gate(x)) · up(x)) (arXiv 2101.03961, 2401.04088)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BLD: Array, real_BL: Array) -> tuple[Array, Routing]:
        """The output, and the routing of the tokens where ``real_BL``."""
        c = self.config
        x_TD, real_T1 = x_BLD.reshape(-1, c.width), real_BL.reshape(-1, 1).astype(jnp.float32)
        router_DE = _Kernel((c.width, c.experts), ("embed", "experts"), name="router")()
        wide, narrow = (c.experts, c.width, c.feed_forward), (c.experts, c.feed_forward, c.width)
        gate_EDF = _Kernel(wide, ("experts", "embed", "mlp"), name="gate")()
        up_EDF = _Kernel(wide, ("experts", "embed", "mlp"), name="up")()
        down_EFD = _Kernel(narrow, ("experts", "mlp", "embed"), name="down")()

        def expert(rows: Array, multiply: Callable[[Array, Array], Array]) -> Array:
            gate, up, down = (kernel.astype(rows.dtype) for kernel in (gate_EDF, up_EDF, down_EFD))
            return multiply(nn.silu(multiply(rows, gate)) * multiply(rows, up), down)

        chosen = route(x_TD, router_DE, c.experts_per_token, c.normalize_experts)
        y_TD = mixture(chosen, x_TD, expert)
        counts_TE = jnp.sum(jax.nn.one_hot(chosen.experts_TK, c.experts, dtype=jnp.float32), axis=1)
        counts_E = jax.lax.stop_gradient(jnp.sum(counts_TE * real_T1, axis=0))
        return y_TD.reshape(x_BLD.shape), Routing(counts_E, jnp.sum(chosen.probabilities_TE * real_T1, axis=0))
