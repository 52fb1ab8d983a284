"""Softmax attention: scores, weights and the mixing of values."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from distill.devices import backend
from distill.shapes import Array

HIDDEN = -1e30
"""What is added to the score of a key that is not to be seen: nothing is left of the score, and of the exponential."""


def attention_weights(
    q_BHLK: Array, k_BGSK: Array, mask_BLS: Array, *, scale: float | None = None, softcap: float | None = None
) -> Array:
    """softmax(cap(scale · q·k)) over the keys a query may see, float32 ``[B, G, R, L, S]``.

    Args:
      q_BHLK: queries of H = G·R heads; R query heads share the keys of one group.
      k_BGSK: keys.
      mask_BLS: bool, True where query l may see key s. A row that sees no key is uniform, not NaN.
      scale: factor of the scores; None: 1/√K.
      softcap: scores s become softcap · tanh(s / softcap) before they are masked (arXiv 2408.00118); None: as they are.

    Example:
      >>> q, k = jnp.ones((1, 2, 3, 4)), jnp.ones((1, 1, 3, 4))
      >>> attention_weights(q, k, jnp.tril(jnp.ones((1, 3, 3), bool)), softcap=50.0).shape
      (1, 1, 2, 3, 3)
    """
    batch, heads, length, size = q_BHLK.shape
    groups = k_BGSK.shape[1]
    q_BGRLK = q_BHLK.reshape(batch, groups, heads // groups, length, size)
    scores = jnp.einsum("bgrlk,bgsk->bgrls", q_BGRLK, k_BGSK, preferred_element_type=jnp.float32)
    scores = scores * (size**-0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask_BLS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    # With one axis fewer XLA's CPU backend takes a fifth off the backward pass of a tiny student.
    rows = scores.reshape(batch, groups, -1, scores.shape[-1]) if backend.flatten_rows() else scores
    return jax.nn.softmax(rows, axis=-1).reshape(scores.shape)


def mix(weights_BGRLS: Array, v_BGSK: Array) -> Array:
    """The values, weighed: ``[B, H, L, K]``."""
    y_BGRLK = jnp.einsum("bgrls,bgsk->bgrlk", weights_BGRLS.astype(v_BGSK.dtype), v_BGSK)
    batch, groups, per_group, length, size = y_BGRLK.shape
    return y_BGRLK.reshape(batch, groups * per_group, length, size)


def attend(
    q_BHLK: Array,
    k_BGSK: Array,
    v_BGSK: Array,
    mask_BLS: Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = False,
) -> Array:
    """Softmax attention of H query heads over G key/value groups, scores and softmax in float32. Returns ``[B,H,L,K]``.

    Arguments as for ``attention_weights``, and:

    Args:
      causal: the caller's word that query l and key l are the same token and that ``mask_BLS`` shows no query a later
        key, so that scores of later keys need not be computed. The mask is honoured all the same.
    """
    length, size = q_BHLK.shape[2:]
    if causal and backend.fuse_attention(backend.platform(), q_BHLK.dtype, length, size, softcap):
        return fused(q_BHLK, k_BGSK, v_BGSK, mask_BLS, scale=scale)
    if causal and backend.block_attention(length):
        return in_blocks(q_BHLK, k_BGSK, v_BGSK, mask_BLS, scale=scale, softcap=softcap)
    return mix(attention_weights(q_BHLK, k_BGSK, mask_BLS, scale=scale, softcap=softcap), v_BGSK)


def fused(
    q_BHLK: Array,
    k_BGSK: Array,
    v_BGSK: Array,
    mask_BLS: Array,
    *,
    scale: float | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    """Causal ``attend`` without a softcap, by ``jax.nn.dot_product_attention``, which never writes the scores."""
    arrays = (x.swapaxes(1, 2) for x in (q_BHLK, k_BGSK, v_BGSK))
    options = {"scale": scale, "is_causal": True, "implementation": implementation}
    return jax.nn.dot_product_attention(*arrays, mask=mask_BLS[:, None], **options).swapaxes(1, 2)


def of_whole_text(x_BGSK: Array) -> Array:
    """Keys or values of all positions on every device, where positions lie over the mesh axis ``sequence``."""
    if jax.sharding.get_abstract_mesh().shape.get("sequence", 1) == 1:
        return x_BGSK
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x_BGSK, PartitionSpec(free, free, None, free))


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
    """Causal ``attend``, ``block`` queries at a time, each block over the keys up to its last query alone.

    For n blocks, (n + 1) / 2n of the multiplications. Exponentials go into the product with the values as they are;
    the sum divides what comes out, K numbers a query instead of S. No gradient flows through the subtracted maximum:
    the quotient does not depend on it. The mask is added, not selected by: then XLA's CPU backend makes one kernel of
    products, mask and softmax, and without gradients no score is ever written. ``block`` None: eight blocks, of at
    least 128 queries and whole eights.
    """
    batch, heads, length, size = q_BHLK.shape
    groups = k_BGSK.shape[1]
    scale = size**-0.5 if scale is None else scale
    block = max(128, 8 * -(-length // 64)) if block is None else block
    # One leading axis; keys as they are, since XLA's CPU backend turns them itself and their gradient needs no turn.
    q_NRLK = (q_BHLK * jnp.asarray(scale, q_BHLK.dtype)).reshape(batch * groups, heads // groups, length, size)
    k_NSK, v_NSK = (x.reshape(batch * groups, length, size) for x in (k_BGSK, v_BGSK))
    hidden_BLS = jnp.where(mask_BLS, 0.0, HIDDEN)

    def one(start: int, end: int) -> Array:
        """The values of queries ``start … end``."""
        rows = q_NRLK[:, :, start:end].reshape(batch * groups, -1, size)
        scores = _dot(rows, k_NSK[:, :end], 2)
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        scores = scores + _for_every_head(hidden_BLS[:, start:end, :end], heads, groups)
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        mixed = _dot(weights.astype(v_NSK.dtype), v_NSK[:, :end], 1) / jnp.sum(weights, axis=-1, keepdims=True)
        return mixed.astype(v_NSK.dtype).reshape(batch * groups, -1, end - start, size)

    blocks = [one(start, min(start + block, length)) for start in range(0, length, block)]
    return jnp.concatenate(blocks, axis=2).reshape(batch, heads, length, size)


def _for_every_head(x_BLS: Array, heads: int, groups: int) -> Array:
    """``[B·G, R·L, S]``: the same for all heads, in the shape that scores have when they come out of a product."""
    batch, *shape = x_BLS.shape
    return jnp.broadcast_to(x_BLS[:, None], (batch, heads, *shape)).reshape(batch * groups, -1, shape[-1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _dot(a_NMK: Array, b: Array, summed: int) -> Array:
    """The batched product over the last axis of a and axis ``summed`` of b, accumulated in float32."""
    return _product(a_NMK, b, 2, summed)


@_dot.defjvp
def _dot_jvp(summed: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """Tangents in a form whose transpose, the gradient of b, sums over the last axis of its first factor.

    For that the factor, scores or their gradient, is turned by a copy. Left to autodiff it is summed over its rows, and
    XLA's CPU backend has no quick product for that.
    """
    (a, b), (of_a, of_b) = primals, tangents
    turn = jax.lax.optimization_barrier  # else XLA takes the turn back into the product
    by_b = _product(turn(a.swapaxes(1, 2)), of_b, 1, 1) if summed == 1 else turn(_product(of_b, a, 2, 2)).swapaxes(1, 2)
    return _dot(a, b, summed), _product(of_a, b, 2, summed) + by_b


def _product(a: Array, b: Array, of_a: int, of_b: int) -> Array:
    """The batched product summed over one axis of each."""
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((0,), (0,))), preferred_element_type=jnp.float32)
