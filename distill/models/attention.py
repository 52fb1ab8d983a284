"""Softmax attention: scores, weights and the mixing of values."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from distill.devices import backend
from distill.models.attention_forms import fused, in_blocks, softmax
from distill.shapes import Array


def attention_weights(
    q_BHLK: Array, k_BGSK: Array, mask_BLS: Array, *, scale: float | None = None, softcap: float | None = None
) -> Array:
    """softmax(cap(scale · q·k)) over the keys a query may see, float32 ``[B, G, R, L, S]``.

    Args:
      q_BHLK: queries of H = G·R heads; R query heads share the keys of one group.
      k_BGSK: keys.
      mask_BLS: bool, True where query l may see key s. A row that sees no key is uniform, not NaN.
      scale: factor of the scores; None: 1/√K.
      softcap: scores s become softcap · tanh(s / softcap) before they are masked (arXiv 2408.00118); None: no softcap.

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
    return softmax(jnp.where(mask_BLS[:, None, None], scores, jnp.finfo(jnp.float32).min))


def mix(weights_BGRLS: Array, v_BGSK: Array) -> Array:
    """The weighted sum of the values: ``[B, H, L, K]``."""
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
      v_BGSK: values.
      causal: the caller guarantees that query l and key l are the same token and that ``mask_BLS`` shows no query a
        later key, so that scores of later keys need not be computed. The mask applies all the same.
    """
    length, size = q_BHLK.shape[2:]
    if causal and backend.fuse_attention(backend.platform(), q_BHLK.dtype, length, size, softcap):
        return fused(q_BHLK, k_BGSK, v_BGSK, mask_BLS, scale=scale)
    if causal and backend.block_attention(length):
        return in_blocks(q_BHLK, k_BGSK, v_BGSK, mask_BLS, scale=scale, softcap=softcap)
    return mix(attention_weights(q_BHLK, k_BGSK, mask_BLS, scale=scale, softcap=softcap), v_BGSK)


def of_whole_text(x_BGSK: Array) -> Array:
    """Gathers keys or values of all positions on every device where positions lie over the mesh axis ``sequence``."""
    if jax.sharding.get_abstract_mesh().shape.get("sequence", 1) == 1:
        return x_BGSK
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x_BGSK, PartitionSpec(free, free, None, free))
