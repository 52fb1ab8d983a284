"""Other forms of causal attention, equal to the plain one within rounding: blocks of queries, and a fused kernel.

``distill/devices/backend.py`` decides which form a program takes.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from distill.devices import backend
from distill.shapes import Array

HIDDEN = -1e30
"""Additive mask: the exponential of a masked score is 0."""


def softmax(scores_BGRLS: Array) -> Array:
    """Softmax over the keys."""
    if not backend.flatten_rows():
        return jax.nn.softmax(scores_BGRLS, axis=-1)
    # One axis fewer: XLA:CPU then computes the backward pass of a small model faster.
    batch, groups, *_, keys = scores_BGRLS.shape
    return jax.nn.softmax(scores_BGRLS.reshape(batch, groups, -1, keys), axis=-1).reshape(scores_BGRLS.shape)


def fused(
    q_BHLK: Array,
    k_BGSK: Array,
    v_BGSK: Array,
    mask_BLS: Array,
    *,
    scale: float | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    """Causal attention without a softcap by ``jax.nn.dot_product_attention``, which never stores the scores."""
    arrays = (x.swapaxes(1, 2) for x in (q_BHLK, k_BGSK, v_BGSK))
    options = {"scale": scale, "is_causal": True, "implementation": implementation}
    return jax.nn.dot_product_attention(*arrays, mask=mask_BLS[:, None], **options).swapaxes(1, 2)


def in_blocks(
    q_BHLK: Array,
    k_BGSK: Array,
    v_BGSK: Array,
    mask_BLS: Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    block: int | None = None,
) -> Array:
    """Causal attention, ``block`` queries at a time, each block over the keys up to its last query.

    n blocks need (n + 1) / 2n of the multiplications. The values are mixed by exponentials, and their sum divides the
    result: K divisions a query instead of S.

    Args:
      q_BHLK: queries.
      k_BGSK: keys.
      v_BGSK: values.
      mask_BLS: bool, True where query l may see key s; it must be causal.
      scale: factor of the scores; None: 1/√K.
      softcap: as for ``attention.attention_weights``.
      block: queries of a block; None: eight blocks of at least 128 queries, in multiples of eight.
    """
    batch, heads, length, size = q_BHLK.shape
    groups = k_BGSK.shape[1]
    scale = size**-0.5 if scale is None else scale
    block = max(128, 8 * -(-length // 64)) if block is None else block
    # One leading axis. The keys are not transposed: XLA:CPU does it in the product, and their gradient needs none.
    q_NRLK = (q_BHLK * jnp.asarray(scale, q_BHLK.dtype)).reshape(batch * groups, heads // groups, length, size)
    k_NSK, v_NSK = (x.reshape(batch * groups, length, size) for x in (k_BGSK, v_BGSK))
    hidden_BLS = jnp.where(mask_BLS, 0.0, HIDDEN)

    def one(start: int, end: int) -> Array:
        """The outputs of queries ``start … end``."""
        rows = q_NRLK[:, :, start:end].reshape(batch * groups, -1, size)
        scores = _dot(rows, k_NSK[:, :end], 2)
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        # Adding the mask, XLA:CPU fuses products, mask and softmax: without gradients no score is ever stored.
        scores = scores + _for_every_head(hidden_BLS[:, start:end, :end], heads, groups)
        # The quotient does not depend on the maximum, so no gradient flows through it.
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        mixed = _dot(weights.astype(v_NSK.dtype), v_NSK[:, :end], 1) / jnp.sum(weights, axis=-1, keepdims=True)
        return mixed.astype(v_NSK.dtype).reshape(batch * groups, -1, end - start, size)

    blocks = [one(start, min(start + block, length)) for start in range(0, length, block)]
    return jnp.concatenate(blocks, axis=2).reshape(batch, heads, length, size)


def _for_every_head(x_BLS: Array, heads: int, groups: int) -> Array:
    """``[B·G, R·L, S]``: the same for all heads, in the shape of the scores."""
    batch, *shape = x_BLS.shape
    return jnp.broadcast_to(x_BLS[:, None], (batch, heads, *shape)).reshape(batch * groups, -1, shape[-1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _dot(a_NMK: Array, b: Array, summed: int) -> Array:
    """The batched product over the last axis of a and axis ``summed`` of b, accumulated in float32."""
    return _product(a_NMK, b, 2, summed)


@_dot.defjvp
def _dot_jvp(summed: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """Tangents whose transpose, the gradient of b, sums over the last axis of its first factor.

    Autodiff would sum that factor, scores or their gradient, over its rows, for which XLA:CPU has no fast product.
    Here it is transposed by a copy first.
    """
    (a, b), (of_a, of_b) = primals, tangents
    turn = jax.lax.optimization_barrier  # without it XLA merges the transposition into the product again
    by_b = _product(turn(a.swapaxes(1, 2)), of_b, 1, 1) if summed == 1 else turn(_product(of_b, a, 2, 2)).swapaxes(1, 2)
    return _dot(a, b, summed), _product(of_a, b, 2, summed) + by_b


def _product(a: Array, b: Array, of_a: int, of_b: int) -> Array:
    """The batched product summed over one axis of each."""
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((0,), (0,))), preferred_element_type=jnp.float32)
