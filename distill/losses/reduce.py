"""Averages: the only file that makes them.

Every quantity that is averaged travels as a pair ``(sum, weight)``. Pairs from micro-batches, devices and evaluation
batches are added; the division happens once, at the end, by the weight of everything. A mean of means would weigh a
token in a short batch more than one in a long batch.
"""

import jax.numpy as jnp

from distill.shapes import Array, Bool, Float, Int, Mask, Nats

Pair = tuple[Float[Array, ""], Float[Array, ""]]


def select(x: Float[Array, "*batch D"], mask: Mask) -> Float[Array, "*batch D"]:
    """Logits or states, zeros where nothing counts: chosen BEFORE a loss is computed, or a NaN comes back as 0·NaN.

    Example:
      >>> select(jnp.array([[1.0, 2.0], [jnp.nan, 3.0]]), jnp.array([True, False])).tolist()
      [[1.0, 2.0], [0.0, 0.0]]
    """
    return jnp.where(mask[..., None], x, 0.0)


def masked_sum(values: Nats, mask: Mask, weights: Float[Array, "*batch"] | None = None) -> Pair:
    """``(Σ weight · value, Σ weight)`` over the positions of the mask, both float32 scalars; None: every weight is 1.

    Selects, never multiplies by the mask: a NaN at a position that does not count stays out (0·NaN is NaN).

    Example:
      >>> total, weight = masked_sum(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True]))
      >>> float(total), float(weight)
      (4.0, 2.0)
    """
    kept = jnp.where(mask, values, 0.0)
    if weights is None:
        return jnp.sum(kept, dtype=jnp.float32), jnp.sum(mask, dtype=jnp.float32)
    weights = jnp.where(mask, weights, 0.0)
    return jnp.sum(weights * kept, dtype=jnp.float32), jnp.sum(weights, dtype=jnp.float32)


def sequence_weights(mask: Bool[Array, "B L"], segments: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """1 / (counted positions of the sequence): with these, ``masked_sum`` is a mean over *sequences* of token means.

    A sequence is a segment of a row: packed documents are sequences of their own. One in which nothing counts is none.
    With weights of 1 a long sequence counts for more than a short one; with these, each for 1.

    Args:
      mask: ``[B, L]``.
      segments: ``[B, L]`` in [0, L].

    Returns:
      ``[B, L]`` float32, 0 outside the mask; they sum to the number of sequences.

    Example:
      >>> mask, segments = jnp.array([[True, True, True, False]]), jnp.array([[1, 1, 2, 2]])
      >>> sequence_weights(mask, segments)
      Array([[0.5, 0.5, 1. , 0. ]], dtype=float32)
    """
    rows = jnp.arange(mask.shape[0])[:, None]
    counts = jnp.zeros((mask.shape[0], mask.shape[1] + 1), jnp.float32).at[rows, segments].add(mask)
    return jnp.where(mask, 1.0 / jnp.maximum(counts[rows, segments], 1.0), 0.0)


def divide(pair: Pair) -> Float[Array, ""]:
    """``sum / weight``; 0 where nothing counts (then the sum is 0 too, and so is its gradient).

    Example:
      >>> float(divide((jnp.float32(6.0), jnp.float32(4.0)))), float(divide((jnp.float32(0.0), jnp.float32(0.0))))
      (1.5, 0.0)
    """
    total, weight = pair
    return total / jnp.where(weight > 0, weight, 1.0)
