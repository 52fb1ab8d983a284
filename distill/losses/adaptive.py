"""Divergences that look at the position before they choose: two logits in, nats per position out.

The conventions are those of ``distill/losses/divergences.py``. What is chosen from the logits (a weight, a target) is
a constant to the gradient.
"""

import jax
import jax.numpy as jnp

from distill.errors import UserError
from distill.losses.divergences import _below_greatest, _kl_of_logits, _log_probs, forward_kl
from distill.shapes import Logits, Nats, Scalar


def adaptive_kl(student_logits: Logits, teacher_logits: Logits, *, mu: float = 0.5, temperature: Scalar = 1.0) -> Nats:
    """Adaptive KL: g_head/(g_head+g_tail)·KL(P‖Q) + g_tail/(g_head+g_tail)·KL(Q‖P), with gaps g = Σ |P_v − Q_v|.

    AKL (arXiv 2404.02657). The teacher's tokens are sorted by probability; a token is of the head while the mass up
    to and including it is ≤ μ, and the first token always does; the tail is the rest. This is the rule of the public
    implementations (``cumsum > mu`` is the tail), which leaves the token that crosses μ in the tail. As there, the
    weights carry no gradient. Where both gaps are 0 the weights are ½ (there 0 is divided by 0). Tokens with equal
    logits are sorted by their ids.

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      mu: mass of the head, a Python number in (0, 1).
      temperature: T > 0 divides both logits, in the weights too.

    Returns:
      ``[...]`` nats, float32; +inf where one side alone rules a token out.

    Raises:
      UserError: mu outside (0, 1).

    Example:
      >>> student, teacher = jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.log(jnp.array([0.7, 0.2, 0.1]))
      >>> round(float(adaptive_kl(student, teacher)), 4)  # gaps .2 and .1 + .1: the mean of .0851 and .0920
      0.0886
    """
    if not 0.0 < mu < 1.0:
        raise UserError(f"adaptive_kl: mu={mu}; expected a number in (0, 1), the mass of the teacher's head.")
    log_p, log_q = _log_probs(teacher_logits, temperature), _log_probs(student_logits, temperature)
    head, tail = (jax.lax.stop_gradient(gap) for gap in _gaps(teacher_logits, log_p, log_q, mu))
    total = head + tail
    share = jnp.where(total > 0.0, head / jnp.where(total > 0.0, total, 1.0), 0.5)
    return _mix(share, *_both_kls(student_logits, teacher_logits, temperature))


def _both_kls(student_logits: Logits, teacher_logits: Logits, temperature: Scalar) -> tuple[Nats, Nats]:
    """KL(P‖Q) and KL(Q‖P)."""
    a, b = _below_greatest(teacher_logits, temperature), _below_greatest(student_logits, temperature)
    return _kl_of_logits(a, b), _kl_of_logits(b, a)


def _gaps(teacher_logits: Logits, log_p: Logits, log_q: Logits, mu: float) -> tuple[Nats, Nats]:
    """Σ |P − Q| over the teacher's head and over its tail."""
    order = jnp.argsort(teacher_logits, axis=-1, descending=True, stable=True)
    p = jnp.take_along_axis(jnp.exp(log_p), order, axis=-1)
    gap = jnp.abs(p - jnp.take_along_axis(jnp.exp(log_q), order, axis=-1))
    in_head = (jnp.cumsum(p, axis=-1) <= mu).at[..., 0].set(True)
    return jnp.sum(jnp.where(in_head, gap, 0.0), axis=-1), jnp.sum(jnp.where(in_head, 0.0, gap), axis=-1)


def _mix(share: Nats, one: Nats, other: Nats) -> Nats:
    """share·one + (1−share)·other; a part without a share is not there, be it infinite."""
    first = jnp.where(share > 0.0, share * jnp.where(share > 0.0, one, 0.0), 0.0)
    return first + jnp.where(share < 1.0, (1.0 - share) * jnp.where(share < 1.0, other, 0.0), 0.0)


def entropy_aware_kl(student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0) -> Nats:
    """h·KL(P‖Q) + (1−h)·KL(Q‖P), with h = H(P)/log V the teacher's normalised entropy.

    Cover where the teacher is uncertain (h = 1: ``forward_kl``), imitate where it is confident (h = 0:
    ``reverse_kl``). The idea is that of entropy-aware on-policy distillation (arXiv 2603.07079), which *adds* the
    forward to the reverse KL where the entropy is high; this is a smooth mixture without a threshold, and so not that
    paper's loss to the letter. V counts the tokens the teacher does not rule out, so padding the vocabulary changes
    nothing; with one such token h = 0. h carries no gradient, and is that of P at the temperature of the loss.

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      temperature: T > 0 divides both logits, in h too.

    Returns:
      ``[...]`` nats, float32; +inf where one side alone rules a token out that counts.

    Example:
      >>> student, teacher = jnp.log(jnp.array([0.75, 0.25])), jnp.zeros(2)  # h = 1: the forward KL
      >>> round(float(entropy_aware_kl(student, teacher)), 4)
      0.1438
    """
    log_p = _log_probs(teacher_logits, temperature)
    possible = log_p != -jnp.inf
    entropy = -jnp.sum(jnp.where(possible, jnp.exp(log_p) * jnp.where(possible, log_p, 0.0), 0.0), axis=-1)
    tokens = jnp.sum(possible, axis=-1)
    share = jnp.where(tokens > 1, entropy / jnp.log(jnp.maximum(tokens, 2).astype(jnp.float32)), 0.0)
    share = jax.lax.stop_gradient(jnp.clip(share, 0.0, 1.0))
    return _mix(share, *_both_kls(student_logits, teacher_logits, temperature))


def taid(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    interpolation: Scalar = 0.5,
    temperature: Scalar = 1.0,
) -> Nats:
    """KL(R‖Q) to the interpolated teacher R = softmax(((1−t)·stop_gradient(student) + t·teacher) / T).

    TAID (arXiv 2501.16937): t = ``interpolation`` grows from 0 to 1 over the training (t = 1 is ``forward_kl``; at 0
    nothing is learnt), linearly in ``ObjectiveConfig(final_interpolation=1.0, schedule_steps=…)``; the paper's schedule
    that follows the loss is not here. The mixture is of *logits*, so R is
    the normalised geometric mean of the two: not the mixture of ``skewed_forward_kl``. KL where the authors minimise
    the cross-entropy: the gradient is the same, since R is a constant to the student.

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      interpolation: t in [0, 1]: a Python number, or a scalar array (not checked) when it is part of the train state.
      temperature: T > 0 divides both logits.

    Returns:
      ``[...]`` nats, float32, ≥ 0 up to rounding. For 0 < t < 1, R has the tokens that are possible on both sides.
      Where there are none, R does not exist and the value is NaN. That is a mask of one side alone, such as a
      different vocabulary: align both first.

    Raises:
      UserError: a Python number outside [0, 1].

    Example:
      >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
      >>> round(float(taid(student, teacher, interpolation=0.5)), 4)  # R = (.75, .25)
      0.1308
    """
    if isinstance(interpolation, float | int) and not 0.0 <= interpolation <= 1.0:
        raise UserError(f"taid: interpolation={interpolation}; expected a number in [0, 1] (1: the teacher itself).")
    t = jnp.asarray(interpolation, jnp.float32)
    student, teacher = (_below_greatest(logits, 1.0) for logits in (student_logits, teacher_logits))
    from_student = jnp.where(t < 1.0, (1.0 - t) * jax.lax.stop_gradient(student), 0.0)  # 0·(−inf) is NaN
    target = from_student + jnp.where(t > 0.0, t * teacher, 0.0)
    return forward_kl(student, target, temperature=temperature)
