"""Divergences between teacher and student: two logits in, nats per position out.

Conventions, the same for every function here:

* ``student_logits, teacher_logits`` in that order, any shape ``[..., V]``; the result has shape ``[...]``, in float32.
* P is the teacher's distribution ``softmax(teacher_logits / temperature)``, Q the student's.
* Logits of any float type are read as float32. A logit of −inf is a token that cannot occur, and 0·log 0 = 0.
* The greatest logit is subtracted before the division by the temperature: the other order costs digits.
* A temperature that is a number, not a traced array, and not finite and above 0, is a ``UserError``.
* No averaging, and no factor T²: both belong to the objective (``distill/objective.py``).
* Gradients flow to both arguments. The train step freezes the teacher; a loss has no business to.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from distill.errors import UserError
from distill.shapes import Array, Logits, Nats, Scalar


def check_temperature(temperature: Scalar) -> None:
    """Raises UserError for a number that is no temperature; a traced array cannot be checked.

    Example:
      >>> check_temperature(0.5)
    """
    known = isinstance(temperature, int | float | np.number)
    if known and not (math.isfinite(temperature) and temperature > 0.0):
        raise UserError(f"temperature={temperature}; expected a finite number above 0, which divides the logits.")


def _below_greatest(logits: Logits, temperature: Scalar) -> Logits:
    """(logits − max) / temperature."""
    check_temperature(temperature)
    logits = logits.astype(jnp.float32)
    return (logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))) / temperature


def _log_probs(logits: Logits, temperature: Scalar) -> Logits:
    below = _below_greatest(logits, temperature)
    return below - jnp.log(jnp.sum(jnp.exp(below), axis=-1, keepdims=True))


def _kl(log_p: Logits, log_q: Logits) -> Nats:
    """Σ_v p·(log p − log q) over the tokens where p > 0; selected before computing, so −inf never meets 0.

    A token where only q = 0 makes the sum +inf, and has no gradient.
    """
    support = log_p != -jnp.inf  # a NaN is kept: it must be seen
    missing = support & (log_q == -jnp.inf)
    compared = support & ~missing
    safe_log_p = jnp.where(compared, log_p, 0.0)
    difference = safe_log_p - jnp.where(compared, log_q, 0.0)
    terms = jnp.where(compared, jnp.exp(safe_log_p) * difference, 0.0)
    return jnp.sum(jnp.where(missing, jnp.inf, terms), axis=-1)


@jax.custom_jvp
def _kl_of_logits(a: Logits, b: Logits) -> Nats:
    """KL(P‖Q) of P = softmax(a) and Q = softmax(b), the greatest of each being 0.

    Its derivative is written down, Σ_v (Q_v − P_v) db_v + P_v (a_v − b_v − Σ_w P_w (a_w − b_w)) da_v, so that every
    exponential is taken once; the chain through both log-softmaxes is half a dozen passes over the tokens.
    """
    return _kl_and_probs(a, b)[0]


def _kl_and_probs(a: Logits, b: Logits) -> tuple[Nats, Array, Array, Array]:
    """Σ_v P_v (a_v − b_v) + log Σ e^b − log Σ e^a; P and Q; and a − b, 0 at tokens that are impossible in P."""
    exp_a, exp_b = jnp.exp(a), jnp.exp(b)
    sum_a, sum_b = (jnp.sum(x, axis=-1, keepdims=True) for x in (exp_a, exp_b))
    difference = jnp.where(a == -jnp.inf, 0.0, a - b)
    terms = jnp.where(difference == jnp.inf, jnp.inf, exp_a * difference)  # also where exp_a is too small for a float
    mean = jnp.sum(terms, axis=-1) / sum_a[..., 0]
    return mean + jnp.log(sum_b / sum_a)[..., 0], exp_a / sum_a, exp_b / sum_b, difference


def _derivative_of_kl(primals, tangents):
    """Infinite tokens have none: those of −inf in a or b."""
    (a, b), (da, db) = primals, tangents
    nats, p, q, difference = _kl_and_probs(a, b)
    change = jnp.zeros_like(nats)
    if not isinstance(db, SymbolicZero):
        change += jnp.sum(jnp.where(b == -jnp.inf, 0.0, q - p) * db, axis=-1)
    if not isinstance(da, SymbolicZero):  # never in training: the teacher is frozen
        e = jnp.where(b == -jnp.inf, 0.0, difference)
        for _ in range(2):  # the mean of what is left: one pass loses the digits of a large e under a certain P
            e = e - jnp.sum(p * e, axis=-1, keepdims=True)
        change += jnp.sum(p * e * da, axis=-1)
    return nats, change


_kl_of_logits.defjvp(_derivative_of_kl, symbolic_zeros=True)


def forward_kl(student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0) -> Nats:
    """Forward KL, teacher first: KL(P‖Q) = Σ_v P_v (log P_v − log Q_v). Mode covering.

    The soft-target loss of Hinton et al. (arXiv 1503.02531), less the teacher's entropy, so that 0 means equal.
    Differs from ``reverse_kl`` in whose tokens are weighed: here the teacher's.

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      temperature: T > 0 divides both logits.

    Returns:
      ``[...]`` nats, float32, ≥ 0 up to rounding; +inf where the student gives 0 to a token of the teacher.

    Example:
      >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.75, 0.25]))
      >>> round(float(forward_kl(student, teacher)), 4)  # .75 log(.75/.5) + .25 log(.25/.5)
      0.1308
    """
    return _kl_of_logits(*(_below_greatest(x, temperature) for x in (teacher_logits, student_logits)))


def reverse_kl(student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0) -> Nats:
    """Reverse KL, student first: KL(Q‖P) = Σ_v Q_v (log Q_v − log P_v). Mode seeking.

    The divergence of MiniLLM (arXiv 2306.08543), here per position on given tokens.

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      temperature: T > 0 divides both logits.

    Returns:
      ``[...]`` nats, float32, ≥ 0 up to rounding; +inf where the teacher gives 0 to a token of the student.

    Example:
      >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.75, 0.25]))
      >>> round(float(reverse_kl(student, teacher)), 4)  # .5 log(.5/.75) + .5 log(.5/.25)
      0.1438
    """
    return forward_kl(teacher_logits, student_logits, temperature=temperature)


def generalized_jsd(
    student_logits: Logits, teacher_logits: Logits, *, beta: float = 0.5, temperature: Scalar = 1.0
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
      UserError: beta outside [0, 1].

    Example:
      >>> student, teacher = jnp.array([-jnp.inf, 0.0]), jnp.array([0.0, -jnp.inf])  # disjoint: log 2
      >>> round(float(generalized_jsd(student, teacher)), 4)
      0.6931
    """
    if not 0.0 <= beta <= 1.0:
        raise UserError(f"generalized_jsd: beta={beta}; expected a number in [0, 1] (0: forward KL, 1: reverse KL).")
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


def skewed_forward_kl(
    student_logits: Logits, teacher_logits: Logits, *, alpha: float = 0.1, temperature: Scalar = 1.0
) -> Nats:
    """Skewed forward KL: KL(P ‖ αP + (1−α)Q). Bounded by log(1/α), unlike ``forward_kl``, its limit at α → 0.

    DistiLLM (arXiv 2402.03898), whose α it is; 0.1 is the paper's choice. The mixture is of probabilities.

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      alpha: share of the teacher in the mixture, a Python number in [0, 1); 0 is ``forward_kl``.
      temperature: T > 0 divides both logits.

    Returns:
      ``[...]`` nats, float32, ≥ 0 up to rounding.

    Raises:
      UserError: alpha outside [0, 1).

    Example:
      >>> student, teacher = jnp.array([-jnp.inf, 0.0]), jnp.array([0.0, -jnp.inf])  # disjoint: log 10
      >>> round(float(skewed_forward_kl(student, teacher, alpha=0.1)), 4)
      2.3026
    """
    log_p, log_q = _log_probs(teacher_logits, temperature), _log_probs(student_logits, temperature)
    return _skewed_kl("skewed_forward_kl", log_p, log_q, alpha)


def skewed_reverse_kl(
    student_logits: Logits, teacher_logits: Logits, *, alpha: float = 0.1, temperature: Scalar = 1.0
) -> Nats:
    """Skewed reverse KL: KL(Q ‖ (1−α)P + αQ). Bounded by log(1/α), unlike ``reverse_kl``, its limit at α → 0.

    DistiLLM (arXiv 2402.03898), whose α it is. Differs from ``skewed_forward_kl`` in exchanging teacher and student, so
    α is here the share of the *student* in the mixture.

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      alpha: share of the student in the mixture, a Python number in [0, 1); 0 is ``reverse_kl``.
      temperature: T > 0 divides both logits.

    Returns:
      ``[...]`` nats, float32, ≥ 0 up to rounding.

    Raises:
      UserError: alpha outside [0, 1).

    Example:
      >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 0.0]))  # mixture .75, .25
      >>> round(float(skewed_reverse_kl(student, teacher, alpha=0.5)), 4)  # .5 log(.5/.75) + .5 log(.5/.25)
      0.1438
    """
    log_p, log_q = _log_probs(teacher_logits, temperature), _log_probs(student_logits, temperature)
    return _skewed_kl("skewed_reverse_kl", log_q, log_p, alpha)


def _skewed_kl(name: str, log_a: Logits, log_b: Logits, alpha: float) -> Nats:
    """KL(A ‖ αA + (1−α)B)."""
    if not 0.0 <= alpha < 1.0:
        raise UserError(f"{name}: alpha={alpha}; expected a number in [0, 1) (0: no skew; at 1 all would be equal).")
    return _kl(log_a, _log_mixture(log_a, log_b, alpha) if alpha else log_b)


def total_variation(student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0) -> Nats:
    """Total variation distance: ½ Σ_v |P_v − Q_v|, in [0, 1] (a share of mass, not nats).

    One of the losses of f-DISTILL (arXiv 2307.15190). Symmetric, and no token can make it infinite. Where P_v = Q_v the
    gradient of the token is taken as 0. By Pinsker's inequality 2·TV² ≤ ``forward_kl``.

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      temperature: T > 0 divides both logits.

    Returns:
      ``[...]`` in [0, 1], float32.

    Example:
      >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.75, 0.25]))
      >>> round(float(total_variation(student, teacher)), 4)
      0.25
    """
    log_p, log_q = _log_probs(teacher_logits, temperature), _log_probs(student_logits, temperature)
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def jeffreys(student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0) -> Nats:
    """Jeffreys divergence: KL(P‖Q) + KL(Q‖P) = Σ_v (P_v − Q_v)(log P_v − log Q_v). A sum, without a factor ½.

    Jeffreys 1946, the f-divergence of f(r) = (r − 1)·log r. Symmetric and unbounded. The mean of the two KLs, also
    called symmetric KL, is half of it.

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      temperature: T > 0 divides both logits.

    Returns:
      ``[...]`` nats, float32; +inf where one side alone rules a token out.

    Example:
      >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.75, 0.25]))
      >>> round(float(jeffreys(student, teacher)), 4)  # .25 log 3
      0.2747
    """
    a, b = _below_greatest(teacher_logits, temperature), _below_greatest(student_logits, temperature)
    return _kl_of_logits(a, b) + _kl_of_logits(b, a)


def alpha_beta(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    temperature: Scalar = 1.0,
) -> Nats:
    """α-β divergence: −1/(αβ) · Σ_v [P^α Q^β − α/(α+β)·P^(α+β) − β/(α+β)·Q^(α+β)].

    ABKD (arXiv 2505.04560), whose α and β they are; the family is that of Cichocki et al. (Entropy 2011, 13, 134).
    (1, 0) is ``forward_kl``, (0, 1) is ``reverse_kl``, (½, ½) is 4·(1 − Σ√(PQ)), (1, 1) is half the squared distance
    Σ(P−Q)²/2, and α+β = 1 is ``alpha_divergence``. Where α, β or α+β is exactly 0 its limit is computed:

    * β = 0: 1/α² · Σ [P^α·log(P^α/Q^α) − P^α + Q^α];  α = 0: the same with (P, α) and (Q, β) exchanged;
    * α+β = 0: 1/α² · Σ [log(Q^α/P^α) + P^α/Q^α − 1];  α = β = 0: ½ Σ (log P − log Q)².

    The β of ``generalized_jsd`` (GKD's and TRL's) is another family and meets this one only at its ends.

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      alpha: power of the teacher, a Python number.
      beta: power of the student, a Python number.
      temperature: T > 0 divides both logits.

    Returns:
      ``[...]`` float32, ≥ 0, and 0 where P = Q. A token both rule out adds nothing; one that one side alone rules out
      adds +inf unless its own power and α+β are positive. A term that float32 cannot hold counts as +inf, without a
      gradient.

    Raises:
      UserError: alpha, beta or alpha + beta not finite, or within 0.001 of 0 but not 0, where the division by it
        would cost the digits: 0 itself is exact.

    Example:
      >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.75, 0.25]))
      >>> round(float(alpha_beta(student, teacher, alpha=1.0, beta=1.0)), 4)  # (.25² + .25²)/2
      0.0625
    """
    for name, power in (("alpha", alpha), ("beta", beta), ("alpha + beta", alpha + beta)):
        if not math.isfinite(power) or 0.0 < abs(power) < SMALLEST:
            raise UserError(
                f"alpha_beta: {name}={power} (alpha={alpha}, beta={beta}); expected 0, whose limit is exact, or a "
                f"finite number of size ≥ {SMALLEST}."
            )
    return _alpha_beta(_log_probs(teacher_logits, temperature), _log_probs(student_logits, temperature), alpha, beta)


def alpha_divergence(
    student_logits: Logits, teacher_logits: Logits, *, alpha: float = 0.5, temperature: Scalar = 1.0
) -> Nats:
    """Amari's α-divergence: (1 − Σ_v P_v^α Q_v^(1−α)) / (α(1−α)); α = 1 is ``forward_kl``, α = 0 ``reverse_kl``.

    The f-divergence of f(r) = (r^α − αr − 1 + α)/(α(α−1)), r = P/Q. α = ½ is 4 times the squared Hellinger distance
    1 − Σ√(PQ); α = 2 is half of Pearson's χ². Amari's own parameter is a = 1 − 2α or 2α − 1, by author; this α is
    that of Minka and of AlphaNet (arXiv 2102.07954). Bounded for 0 < α < 1, by 1/(α(1−α)).

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      alpha: a Python number.
      temperature: T > 0 divides both logits.

    Returns:
      ``[...]`` float32, ≥ 0. Outside [0, 1] a ratio that float32 cannot hold counts as +inf, without a gradient.

    Raises:
      UserError: alpha not finite, or nearer to 0 or 1 than 0.001 without being it.

    Example:
      >>> student, teacher = jnp.array([-jnp.inf, 0.0]), jnp.array([0.0, -jnp.inf])  # disjoint: 1/(.5·.5)
      >>> round(float(alpha_divergence(student, teacher, alpha=0.5)), 4)
      4.0
    """
    _check_order("alpha_divergence", alpha, -math.inf)
    log_p, log_q = _log_probs(teacher_logits, temperature), _log_probs(student_logits, temperature)
    return _alpha_beta(log_p, log_q, alpha, 1.0 - alpha)


def renyi(student_logits: Logits, teacher_logits: Logits, *, alpha: float = 0.5, temperature: Scalar = 1.0) -> Nats:
    """Rényi divergence of order α: 1/(α−1) · log Σ_v P_v^α Q_v^(1−α). α = 1 is ``forward_kl``.

    A monotone function of ``alpha_divergence`` (arXiv 1206.2459), in nats at every order and growing with it; for
    α < 1 it is infinite only where P and Q share no token. α = ½ is symmetric: −2·log Σ√(PQ).

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      alpha: order, a Python number > 0.
      temperature: T > 0 divides both logits.

    Returns:
      ``[...]`` nats, float32, ≥ 0; for α ≥ 1 +inf where the student gives 0 to a token of the teacher.

    Raises:
      UserError: alpha not a positive finite number, or nearer to 0 or 1 than 0.001 without being 1.

    Example:
      >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.75, 0.25]))
      >>> round(float(renyi(student, teacher, alpha=2.0)), 4)  # log(.75²/.5 + .25²/.5)
      0.2231
    """
    _check_order("renyi", alpha, 0.0)
    log_p, log_q = _log_probs(teacher_logits, temperature), _log_probs(student_logits, temperature)
    if alpha == 1.0:
        return _kl(log_p, log_q)
    both = (log_p != -jnp.inf) & (log_q != -jnp.inf)
    powers = alpha * jnp.where(both, log_p, 0.0) + (1.0 - alpha) * jnp.where(both, log_q, 0.0)
    log_sum = _masked_logsumexp(powers, both)
    # Near 0 the logarithm of a number near 1 would lose the digits: there it is log1p of a sum of small terms ≥ 0.
    near = (jnp.abs(log_sum) < 0.5)[..., None]
    amari = _alpha_beta(log_p, jnp.where(near, log_q, log_p), alpha, 1.0 - alpha)
    near = near[..., 0] & (amari * alpha * (1.0 - alpha) < 0.9)
    precise = jnp.log1p(jnp.where(near, -alpha * (1.0 - alpha) * amari, 0.0))
    nats = jnp.where(near, precise, log_sum) / (alpha - 1.0)
    if alpha < 1.0:
        return nats
    missing = jnp.any((log_p != -jnp.inf) & (log_q == -jnp.inf), axis=-1)
    return jnp.where(missing, jnp.inf, nats)


# ---- the α-β family, as a sum of terms ≥ 0 that lose no digits where P ≈ Q

SMALLEST = 1e-3
"""The α-β family divides by its powers: one that is smaller, but not 0, is refused."""

LARGEST = 85.0
"""exp of more than this, and its small multiples, is not a float32."""


def _check_order(name: str, alpha: float, above: float) -> None:
    powers = (alpha, 1.0 - alpha)
    if not (math.isfinite(alpha) and alpha > above) or any(0.0 < abs(power) < SMALLEST for power in powers):
        low = "" if above == -math.inf else f" above {above:g}"
        raise UserError(f"{name}: alpha={alpha}; expected a number{low}, and 0 or 1 themselves or not within 0.001.")


def _alpha_beta(log_p: Logits, log_q: Logits, alpha: float, beta: float) -> Nats:
    """The α-β divergence of log-probabilities, token by token from the side of the larger probability."""
    has_p, has_q = log_p != -jnp.inf, log_q != -jnp.inf
    both = has_p & has_q
    p, q = jnp.where(both, log_p, 0.0), jnp.where(both, log_q, 0.0)
    more, ratio = p >= q, -jnp.abs(p - q)
    from_p = _term(jnp.where(more, p, 0.0), jnp.where(more, ratio, 0.0), alpha, beta)
    from_q = _term(jnp.where(more, 0.0, q), jnp.where(more, 0.0, ratio), beta, alpha)
    only_p, only_q = (
        _alone(log_p, has_p & ~has_q, beta, alpha + beta),
        _alone(log_q, has_q & ~has_p, alpha, alpha + beta),
    )
    return jnp.sum(jnp.where(both, jnp.where(more, from_p, from_q), 0.0) + only_p + only_q, axis=-1)


def _alone(log_own: Logits, where: Array, other_power: float, total: float) -> Array:
    """The term of a token only one side can say: own^(α+β)/(other power · (α+β)), if both are positive, else +inf."""
    if other_power <= 0.0 or total <= 0.0:
        return jnp.where(where, jnp.inf, 0.0)
    return jnp.where(where, jnp.exp(total * jnp.where(where, log_own, 0.0)) / (other_power * total), 0.0)


def _term(high: Array, ratio: Array, u: float, v: float) -> Array:
    """One token's term from its larger log-probability (power u) and ratio = log(smaller/larger) ≤ 0 (power v).

    With s = u+v:  exp(s·high) · [expm1(s·ratio)/s − expm1(v·ratio)/v] / u, or the limit of it where s, v or u is 0.
    """
    if u == v == 0.0:
        return 0.5 * jnp.square(ratio)
    weight, equal = (u + v) * high, ratio == 0.0
    steepest = jnp.maximum(jnp.maximum(v * ratio, (u + v) * ratio), 0.0)
    # The term is at most exp(weight + steepest) · ratio²/2: small where P ≈ Q, however large the weight.
    bound = steepest + jnp.minimum(0.0, 2.0 * jnp.log(jnp.where(equal, 1.0, -ratio)))
    fits = (weight + bound < LARGEST) & (weight < 2.0 * LARGEST) & ~equal
    weight, ratio = jnp.where(fits, weight, 0.0), jnp.where(fits, ratio, 0.0)
    half = jnp.where(weight > LARGEST, 0.5 * weight, 0.0) if u + v < 0.0 else 0.0  # whose exponential is a float32
    weight = weight - half
    if u == 0.0:
        term = (jnp.exp(weight + v * ratio) * ratio - _scaled_expm1(weight, ratio, v)) / v
    else:
        term = (_scaled_expm1(weight, ratio, u + v) - _scaled_expm1(weight, ratio, v)) / u
    return jnp.where(fits | equal, term * jnp.exp(half) if u + v < 0.0 else term, jnp.inf)


def _scaled_expm1(weight: Array, ratio: Array, power: float) -> Array:
    """exp(weight) · expm1(power·ratio)/power, and exp(weight)·ratio for power 0; never 0·inf."""
    if power == 0.0:
        return jnp.exp(weight) * ratio
    small = power * ratio < 1.0
    near = jnp.exp(weight) * jnp.expm1(jnp.where(small, power * ratio, 0.0))
    return jnp.where(small, near, jnp.exp(weight + power * ratio) - jnp.exp(weight)) / power


def _masked_logsumexp(values: Logits, mask: Array) -> Nats:
    """log Σ exp over the tokens of the mask, −inf (without a gradient) where there is none."""
    anything = jnp.any(mask, axis=-1)
    kept = jnp.where(mask, values, -jnp.inf)
    return jnp.where(anything, jax.nn.logsumexp(jnp.where(anything[..., None], kept, 0.0), axis=-1), -jnp.inf)
