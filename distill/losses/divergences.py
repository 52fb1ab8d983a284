"""Divergences between teacher and student: two logits in, nats per position out.

Conventions, the same for every function here:

* ``student_logits, teacher_logits`` in that order, any shape ``[..., V]``; the result has shape ``[...]``, in float32.
* P is the teacher's distribution ``softmax(teacher_logits / temperature)``, Q the student's.
* Logits of any float type are read as float32. A logit of −inf is a word that cannot occur, and 0·log 0 = 0.
* No averaging, and no factor T²: both belong to the objective (``distill/objective.py``).
* Gradients flow to both arguments. The train step freezes the teacher; a loss has no business to.
"""

import jax
import jax.numpy as jnp

from distill.shapes import Logits, Nats


def _log_probs(logits: Logits, temperature: float) -> Logits:
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def _kl(log_p: Logits, log_q: Logits) -> Nats:
    """Σ_v p·(log p − log q) over the words where p > 0; selected before computing, so −inf never meets 0."""
    support = log_p != -jnp.inf  # a NaN is kept: it must be seen
    safe_log_p = jnp.where(support, log_p, 0.0)
    difference = safe_log_p - jnp.where(support, log_q, 0.0)
    return jnp.sum(jnp.where(support, jnp.exp(safe_log_p) * difference, 0.0), axis=-1)


def forward_kl(student_logits: Logits, teacher_logits: Logits, *, temperature: float = 1.0) -> Nats:
    """Forward KL, teacher first: KL(P‖Q) = Σ_v P_v (log P_v − log Q_v). Mode covering.

    The soft-target loss of Hinton et al. (arXiv 1503.02531), less the teacher's entropy, so that 0 means equal.
    Differs from ``reverse_kl`` in whose words are weighed: here the teacher's.

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      temperature: T > 0 divides both logits.

    Returns:
      ``[...]`` nats, float32, ≥ 0 up to rounding; +inf where the student gives 0 to a word of the teacher.

    Example:
      >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.75, 0.25]))
      >>> round(float(forward_kl(student, teacher)), 4)  # .75 log(.75/.5) + .25 log(.25/.5)
      0.1308
    """
    return _kl(_log_probs(teacher_logits, temperature), _log_probs(student_logits, temperature))


def reverse_kl(student_logits: Logits, teacher_logits: Logits, *, temperature: float = 1.0) -> Nats:
    """Reverse KL, student first: KL(Q‖P) = Σ_v Q_v (log Q_v − log P_v). Mode seeking.

    The divergence of MiniLLM (arXiv 2306.08543), here per position on given tokens.

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      temperature: T > 0 divides both logits.

    Returns:
      ``[...]`` nats, float32, ≥ 0 up to rounding; +inf where the teacher gives 0 to a word of the student.

    Example:
      >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.75, 0.25]))
      >>> round(float(reverse_kl(student, teacher)), 4)  # .5 log(.5/.75) + .5 log(.5/.25)
      0.1438
    """
    return _kl(_log_probs(student_logits, temperature), _log_probs(teacher_logits, temperature))


def generalized_jsd(
    student_logits: Logits, teacher_logits: Logits, *, beta: float = 0.5, temperature: float = 1.0
) -> Nats:
    """Generalised Jensen–Shannon divergence: β·KL(P‖M) + (1−β)·KL(Q‖M), with M = βP + (1−β)Q.

    GKD (arXiv 2306.13649, eq. 1). For 0 < β < 1 it is bounded, and β = ½ is the symmetric Jensen–Shannon divergence
    (≤ log 2). The ends are *defined* as the KLs: β=0 is ``forward_kl``, β=1 is ``reverse_kl``. They are the limits of
    JSD(β)/β and JSD(β)/(1−β), not of JSD(β), which itself goes to 0. β here is TRL's and the paper's β.

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      beta: weight of the teacher in the mixture, a Python number in [0, 1].
      temperature: T > 0 divides both logits.

    Returns:
      ``[...]`` nats, float32; ≤ log 2 inside the interval.

    Raises:
      ValueError: beta outside [0, 1].

    Example:
      >>> student, teacher = jnp.array([-jnp.inf, 0.0]), jnp.array([0.0, -jnp.inf])  # disjoint: log 2
      >>> round(float(generalized_jsd(student, teacher)), 4)
      0.6931
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"generalized_jsd: beta={beta}; expected a number in [0, 1] (0: forward KL, 1: reverse KL).")
    if beta == 0.0:
        return forward_kl(student_logits, teacher_logits, temperature=temperature)
    if beta == 1.0:
        return reverse_kl(student_logits, teacher_logits, temperature=temperature)
    log_p, log_q = _log_probs(teacher_logits, temperature), _log_probs(student_logits, temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)


def _log_mixture(log_p: Logits, log_q: Logits, beta: float) -> Logits:
    """log(β·exp(log_p) + (1−β)·exp(log_q)), −inf where both are, with finite gradients everywhere."""
    log_a, log_b = log_p + jnp.log(beta), log_q + jnp.log1p(-beta)
    high = jnp.maximum(log_a, log_b)
    support = high != -jnp.inf
    pivot = jax.lax.stop_gradient(jnp.where(support, high, 0.0))
    total = jnp.exp(log_a - pivot) + jnp.exp(log_b - pivot)
    return jnp.where(support, pivot + jnp.log(jnp.where(support, total, 1.0)), -jnp.inf)
