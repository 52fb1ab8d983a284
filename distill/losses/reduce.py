"""Averages: the only file that makes them.

Every quantity that is averaged travels as a pair ``(sum, weight)``. Pairs from micro-batches, devices and evaluation
batches are added; the division happens once, at the end, by the weight of everything. A mean of means would weigh a
token in a short batch more than one in a long batch.
"""

import jax.numpy as jnp

from distill.shapes import Array, Float, Mask, Nats

Pair = tuple[Float[Array, ""], Float[Array, ""]]


def masked_sum(values: Nats, mask: Mask) -> Pair:
    """``(Σ values where mask, number of counted positions)``, both float32 scalars.

    Selects, never multiplies: a NaN at a position that does not count stays out (0·NaN is NaN).

    Example:
      >>> total, weight = masked_sum(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True]))
      >>> float(total), float(weight)
      (4.0, 2.0)
    """
    kept = jnp.where(mask, values, 0.0)
    return jnp.sum(kept, dtype=jnp.float32), jnp.sum(mask, dtype=jnp.float32)


def divide(pair: Pair) -> Float[Array, ""]:
    """``sum / weight``; 0 where nothing counts (then the sum is 0 too, and so is its gradient).

    Example:
      >>> float(divide((jnp.float32(6.0), jnp.float32(4.0)))), float(divide((jnp.float32(0.0), jnp.float32(0.0))))
      (1.5, 0.0)
    """
    total, weight = pair
    return total / jnp.where(weight > 0, weight, 1.0)
