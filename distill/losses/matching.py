"""Matching logits and relations instead of distributions: two logits in, one number per position out.

The conventions are those of ``distill/losses/divergences.py``, but these are not divergences of P and Q: they are not
in nats, and have no form for stored targets.
"""

import jax
import jax.numpy as jnp

from distill.losses.divergences import check_temperature
from distill.shapes import Logits, Mask, Nats, Scalar


def logit_mse(student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0) -> Nats:
    """½ · mean_v (x_v − y_v)² of the logits / T, each row less its own mean: x = s/T − mean(s/T), y = t/T − mean(t/T).

    The limit of T²·``forward_kl`` at high temperatures is exactly T² times this (Hinton et al., arXiv 1503.02531,
    section 2.1; compared with the KL in arXiv 2105.08919). Without the means, a constant added to all logits, which
    changes no probability, would cost. The sum over tokens is *divided by their number*; Kim et al. sum and have no ½.

    Args:
      student_logits: ``[..., V]``. Tokens that are −inf on either side are left out of means, sum and number.
      teacher_logits: ``[..., V]``.
      temperature: T > 0 divides both logits.

    Returns:
      ``[...]`` float32, ≥ 0; 0 where no token is left.

    Example:
      >>> student, teacher = jnp.array([5.0, 5.0, -jnp.inf]), jnp.array([1.0, -1.0, -jnp.inf])
      >>> float(logit_mse(student, teacher))  # ½ · (1² + 1²)/2
      0.5
    """
    check_temperature(temperature)
    student, teacher = student_logits.astype(jnp.float32), teacher_logits.astype(jnp.float32)
    counted = (student != -jnp.inf) & (teacher != -jnp.inf)
    number = jnp.maximum(jnp.sum(counted, axis=-1, keepdims=True), 1)

    def centred(logits: Logits) -> Logits:
        high = jnp.max(jnp.where(counted, logits, -jnp.inf), axis=-1, keepdims=True)
        kept = jnp.where(counted, logits - jax.lax.stop_gradient(high), 0.0) / temperature
        return jnp.where(counted, kept - jnp.sum(kept, axis=-1, keepdims=True) / number, 0.0)

    return 0.5 * jnp.sum(jnp.square(centred(student) - centred(teacher)), axis=-1) / number[..., 0]


def pearson(student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0) -> Nats:
    """1 − Pearson's correlation of P and Q over the tokens of a position: the inter-class relation of DIST.

    DIST (arXiv 2205.10536). Only the relation matters, not the size: Q = aP + b costs nothing. The paper's second half,
    the intra-class relation, correlates over the *batch* for every token; a function of one position cannot, so it is
    left out here. Computed as ½·|p̂ − q̂|² of the centred unit vectors, which keeps its digits where P ≈ Q.

    Args:
      student_logits: ``[..., V]``. Tokens that are −inf on both sides are left out of the means.
      teacher_logits: ``[..., V]``.
      temperature: T > 0 divides both logits.

    Returns:
      ``[...]`` in [0, 2], float32. Against a uniform distribution, which correlates with nothing, 1, and 0 where both
      are uniform; there the gradient is 0.

    Example:
      >>> student, teacher = jnp.log(jnp.array([0.3, 0.3, 0.4])), jnp.log(jnp.array([0.2, 0.2, 0.6]))
      >>> abs(round(float(pearson(student, teacher)), 4))  # Q = P/4 + 1/4
      0.0
    """
    check_temperature(temperature)
    student, teacher = student_logits.astype(jnp.float32), teacher_logits.astype(jnp.float32)
    counted = (student != -jnp.inf) | (teacher != -jnp.inf)
    number = jnp.maximum(jnp.sum(counted, axis=-1, keepdims=True), 1)

    def unit(logits: Logits) -> tuple[Logits, Mask]:
        """The centred probabilities at length 1. Their scale is free, so e^(x − max) − 1 serves, and is precise."""
        high = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        scaled = jnp.where(counted, jnp.expm1((logits - high) / temperature), 0.0)
        centred = jnp.where(counted, scaled - jnp.sum(scaled, axis=-1, keepdims=True) / number, 0.0)
        square = jnp.sum(jnp.square(centred), axis=-1)
        flat = square == 0.0
        return centred * jax.lax.rsqrt(jnp.where(flat, 1.0, square))[..., None], flat

    (p, p_flat), (q, q_flat) = unit(teacher), unit(student)
    distance = 0.5 * jnp.sum(jnp.square(p - q), axis=-1)
    return jnp.where(p_flat | q_flat, jnp.where(p_flat & q_flat, 0.0, 1.0), distance)
