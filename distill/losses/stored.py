"""Divergences from a few stored tokens of the teacher instead of all its logits.

Two kinds of stored target, two kinds of exactness:

* ``SparseTargets``: the K most probable tokens with their log-probabilities. With one more class, the *tail*, that
  holds all other tokens on both sides, the divergence is exact for these K+1 classes: never negative, a lower bound of
  the full one (data processing) for every f-divergence, and mass the student puts off the support is paid for.
  Without the tail, a truncated sum can be negative, and renormalising lets that mass go unseen.
* ``SampledTargets``: tokens drawn from the teacher, with counts. The mean over draws of the gradient is that of the
  full forward KL (arXiv 2503.16870), whatever the number of draws.

Targets remember the temperature they were stored at, a Python number that ``jit`` treats as static.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from distill.errors import UserError
from distill.losses.divergences import _log_probs, _masked_logsumexp, forward_kl
from distill.losses.matching import logit_mse, pearson
from distill.shapes import Array, Float, Int, Logits, Nats

Kept = Float[Array, "*batch kept"]
Ids = Int[Array, "*batch kept"]
Leaf = Any  # an array or None, or what JAX puts in its place while it transforms a tree


@partial(jax.tree_util.register_dataclass, data_fields=("ids", "log_probs", "log_tail"), meta_fields=("temperature",))
@dataclass(frozen=True)
class SparseTargets:
    """Stored tokens of a teacher: their ids and log-probabilities at a temperature, and the mass of all others.

    Attributes:
      ids: ``[..., K]`` integers in [0, V), different from each other within a position.
      log_probs: ``[..., K]`` log P of these tokens among *all* tokens, not among the K. −inf: the slot is not used.
      log_tail: ``[...]`` log of the mass of the tokens not stored, or None: then log(1 − Σ P), which float32 resolves
        down to 1e-7; what is smaller is rounding, or −inf, which makes a reverse KL +inf. Better stored.
      temperature: the T of the softmax the log-probabilities come from.

    Example:
      >>> SparseTargets(jnp.array([2, 0]), jnp.log(jnp.array([0.5, 0.25])), temperature=2.0).temperature
      2.0
    """

    ids: Leaf
    log_probs: Leaf
    log_tail: Leaf = None
    temperature: float = 1.0


@partial(jax.tree_util.register_dataclass, data_fields=("ids", "counts", "log_probs"), meta_fields=("temperature",))
@dataclass(frozen=True)
class SampledTargets:
    """Tokens drawn from a teacher, each with the number of times it was drawn.

    Attributes:
      ids: ``[..., K]`` integers in [0, V).
      counts: ``[..., K]`` how often; 0: the slot is not used. Their sum N may differ by position, and must not be 0.
      log_probs: ``[..., K]`` log P of the tokens, or None: only ``sampled_forward_kl`` needs them.
      temperature: the T of the distribution they were drawn from.

    Example:
      >>> SampledTargets(jnp.array([7, 1]), jnp.array([3, 1])).temperature
      1.0
    """

    ids: Leaf
    counts: Leaf
    log_probs: Leaf = None
    temperature: float = 1.0


@partial(jax.tree_util.register_dataclass, data_fields=("logits",), meta_fields=())
@dataclass(frozen=True)
class DenseTargets:
    """All logits of a teacher, computed beforehand: for small vocabularies.

    Attributes:
      logits: ``[..., V]``, at temperature 1.

    Example:
      >>> logits_of(DenseTargets(jnp.array([0.5, 0.25]))).tolist()
      [0.5, 0.25]
    """

    logits: Leaf


@partial(jax.tree_util.register_dataclass, data_fields=("hidden",), meta_fields=())
@dataclass(frozen=True)
class HiddenTargets:
    """The teacher's final hidden states, after its last norm: with its head, they hold all that its logits hold.

    Attributes:
      hidden: ``[..., D]``, as the teacher's head wants them.

    Example:
      >>> HiddenTargets(jnp.zeros((2, 8))).hidden.shape
      (2, 8)
    """

    hidden: Leaf


def logits_of(targets: Any) -> Logits | None:
    """The teacher's logits, where the targets hold all of them, else None.

    Example:
      >>> logits_of(None), logits_of(DenseTargets(jnp.zeros(3))).shape
      (None, (3,))
    """
    return targets.logits if isinstance(targets, DenseTargets) else None


def from_targets(
    divergence: Callable[..., Nats], student_logits: Logits, targets: Any, *, temperature: float = 1.0, **options: float
) -> Nats:
    """A divergence between the student and what is stored of a teacher: the same information, the same numbers.

    ``DenseTargets``: ``divergence`` itself. ``SparseTargets``: ``sparse``, exact for the stored tokens and the tail.
    ``SampledTargets``: ``sampled_forward_kl``, which is unbiased for ``forward_kl`` and for no other divergence.

    Args:
      divergence: a function of ``distill.losses``, or one like it.
      student_logits: ``[..., V]``.
      targets: stored targets of the same positions.
      temperature: T > 0; that at which the targets were stored, but for ``DenseTargets``.
      **options: hyperparameters of the divergence.

    Returns:
      ``[...]`` float32.

    Raises:
      UserError: targets of another kind, a temperature that they were not stored at, or a divergence that cannot be
        computed from them.

    Example:
      >>> teacher, student = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.zeros(3)
      >>> round(float(from_targets(forward_kl, student, top_k_targets(teacher, 1))), 4)
      0.0589
    """
    if not isinstance(temperature, int | float) and isinstance(targets, SparseTargets | SampledTargets):
        raise UserError(
            f"a temperature that follows a schedule, and targets stored at temperature={targets.temperature}; use one "
            "temperature, or all of the teacher's logits."
        )
    if isinstance(targets, DenseTargets):
        return divergence(student_logits, targets.logits, temperature=temperature, **options)
    if isinstance(targets, SparseTargets):
        return sparse(divergence, student_logits, targets, temperature=temperature, **options)
    if isinstance(targets, SampledTargets):
        if divergence is not forward_kl:
            raise UserError(
                f"sampled targets: {divergence.__name__} has no unbiased estimate from draws; use forward_kl, or store "
                "the top k."
            )
        return sampled_forward_kl(student_logits, targets, temperature=temperature)
    raise UserError(
        f"targets are a {type(targets).__name__}; expected DenseTargets, SparseTargets or SampledTargets, or a term "
        "that reads them."
    )


def top_k_targets(teacher_logits: Logits, k: int, *, temperature: float = 1.0) -> SparseTargets:
    """The teacher's k most probable tokens with their log-probabilities, and the exact mass of the rest.

    Args:
      teacher_logits: ``[..., V]``.
      k: tokens to keep, 1 ≤ k ≤ V.
      temperature: T > 0 divides the logits; it is stored with the targets.

    Returns:
      ``SparseTargets`` with ``ids [..., k]`` from the most probable down.

    Raises:
      UserError: k outside [1, V].

    Example:
      >>> targets = top_k_targets(jnp.log(jnp.array([0.1, 0.6, 0.3])), 2)
      >>> targets.ids.tolist(), round(float(jnp.exp(targets.log_tail)), 4)
      ([1, 2], 0.1)
    """
    vocab = teacher_logits.shape[-1]
    if not 1 <= k <= vocab:
        raise UserError(f"top_k_targets: k={k}; expected 1 ≤ k ≤ {vocab}, the number of tokens.")
    log_p = _log_probs(teacher_logits, temperature)
    _, ids = jax.lax.top_k(log_p, k)
    kept, log_tail = _kept_and_tail(log_p, ids, jnp.ones(ids.shape, bool))
    return SparseTargets(ids, kept, log_tail, temperature)


def sparse(
    divergence: Callable[..., Nats],
    student_logits: Logits,
    targets: SparseTargets,
    *,
    temperature: float = 1.0,
    **options: float,
) -> Nats:
    """Any divergence between the K stored tokens and the tail, on both sides: exact for these K+1 classes.

    ``divergence(student, teacher, **options)`` gets K+1 log-probabilities as logits. Teacher: the stored ones, and
    that of the tail. Student: log Q gathered at the ids, and the log-sum over exactly the tokens that are not stored.
    For the f-divergences (the KLs, skewed, generalised Jensen–Shannon, total variation, Jeffreys, α) and ``renyi`` the
    result is a lower bound of the full divergence, with equality where the tail holds one token or none, or where
    P/Q is constant on it. For ``alpha_beta`` with α+β ≠ 1, ``adaptive_kl``, ``entropy_aware_kl`` and ``taid`` it is the
    divergence of the K+1 classes and bounds nothing.

    Args:
      divergence: a function of ``distill.losses``, or one like it.
      student_logits: ``[..., V]``.
      targets: stored at the same temperature. An id outside [0, V) is NaN.
      temperature: T > 0 divides the student's logits, and must be the targets'. If all V tokens are stored, any T is
        exact, and they are brought to it.
      **options: of the divergence.

    Returns:
      ``[...]`` float32, what the divergence returns.

    Raises:
      UserError: another temperature than the targets', with less than V tokens; more than V tokens; or a divergence
        that compares logits (``logit_mse``, ``pearson``), which has no tail.

    Example:
      >>> teacher, student = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.zeros(3)
      >>> round(float(sparse(forward_kl, student, top_k_targets(teacher, 1))), 4)  # (.5, .5) against (1/3, 2/3)
      0.0589
    """
    if divergence in (logit_mse, pearson):
        raise UserError(f"sparse: {divergence.__name__} has no form with a tail; expected a divergence of P and Q.")
    log_q = _log_probs(student_logits, temperature)
    targets = _at_temperature(targets, temperature, student_logits.shape[-1])
    log_p = targets.log_probs.astype(jnp.float32)
    used = log_p != -jnp.inf
    tail_p = _log_of_the_rest(log_p) if targets.log_tail is None else targets.log_tail.astype(jnp.float32)
    kept_q, tail_q = _kept_and_tail(log_q, targets.ids, used)
    return divergence(_append(kept_q, tail_q), _append(log_p, tail_p), **options)


def top_k_forward_kl(student_logits: Logits, teacher_logits: Logits, *, k: int = 8, temperature: float = 1.0) -> Nats:
    """Forward KL of k+1 classes: the teacher's k most probable tokens, and a tail bucket for all others.

    Σ_{v in top k} P_v log(P_v/Q_v) + P_tail log(P_tail/Q_tail), with tails 1 − Σ P and 1 − Σ Q. Never negative, never
    more than ``forward_kl``, and equal to it for k ≥ V−1. What ``sparse(forward_kl, …)`` computes from stored targets,
    here from the teacher's logits.

    Args:
      student_logits: ``[..., V]``.
      teacher_logits: ``[..., V]``.
      k: tokens to keep, 1 ≤ k ≤ V.
      temperature: T > 0 divides both logits.

    Returns:
      ``[...]`` nats, float32, ≥ 0 up to rounding.

    Raises:
      UserError: k outside [1, V].

    Example:
      >>> teacher, student = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.zeros(3)
      >>> round(float(top_k_forward_kl(student, teacher, k=1)), 4)  # .5 log(.5·3) + .5 log(.5·3/2)
      0.0589
    """
    targets = top_k_targets(teacher_logits, k, temperature=temperature)
    return sparse(forward_kl, student_logits, targets, temperature=temperature)


def _kept_and_tail(log_probs: Logits, ids: Ids, used: Array) -> tuple[Kept, Nats]:
    """Log-probabilities of the used ids (−inf for the others), and of all tokens that are not among them."""
    vocab = log_probs.shape[-1]
    where = jnp.where(ids < 0, vocab, ids)  # a negative id must not wrap round to a real token
    picked = jnp.take_along_axis(log_probs, where, axis=-1, mode="fill", fill_value=jnp.nan)
    stored = jnp.zeros(log_probs.shape, bool)
    slots = jnp.where(used, where, vocab)
    stored = jnp.put_along_axis(stored, slots, True, axis=-1, inplace=False, mode="drop")
    rest = ~stored & (log_probs != -jnp.inf)
    return jnp.where(used, picked, -jnp.inf), _masked_logsumexp(log_probs, rest)


def _append(kept: Kept, tail: Nats) -> Logits:
    return jnp.concatenate([kept, tail[..., None]], axis=-1)


def _log_of_the_rest(log_probs: Kept) -> Nats:
    """log(1 − Σ exp): −inf where nothing is left."""
    log_sum = _masked_logsumexp(log_probs, log_probs != -jnp.inf)
    some = log_sum < 0.0
    return jnp.where(some, jnp.log(-jnp.expm1(jnp.where(some, log_sum, -1.0))), -jnp.inf)


def _at_temperature(targets: SparseTargets, temperature: float, vocab: int) -> SparseTargets:
    """The targets at another temperature, where that can be done exactly."""
    tokens = targets.ids.shape[-1]
    if tokens > vocab:
        raise UserError(f"sparse: {tokens} tokens are stored of a vocabulary of {vocab}; are these another teacher's?")
    if targets.temperature == temperature:
        return targets
    if tokens < vocab:
        raise UserError(
            f"sparse: temperature={temperature}, but the targets were stored at temperature={targets.temperature} with "
            f"{tokens} of {vocab} tokens, and the sum over the others cannot be brought to another temperature; store "
            f"them at {temperature}, or use {targets.temperature}."
        )
    log_probs = targets.log_probs.astype(jnp.float32)
    log_probs = _log_probs(log_probs, temperature / targets.temperature)
    return SparseTargets(targets.ids, log_probs, jnp.full(log_probs.shape[:-1], -jnp.inf), temperature)


# ---- samples


def sample_targets(
    key: Array, teacher_logits: Logits, n: int, *, temperature: float = 1.0, method: str = "systematic"
) -> SampledTargets:
    """n draws from the teacher at every position; a token drawn more than once is stored once, with its count.

    Sparse Logit Sampling (arXiv 2503.16870). Either way a token of probability p is drawn n·p times in the mean.
    ``"iid"``: independent draws. ``"systematic"``: the points (i + u)/n, i < n, of one uniform u are looked up in the
    cumulated probabilities of the tokens in a random order: a token is then drawn ⌊n·p⌋ or ⌈n·p⌉ times, and the
    variance is lower at equal size.

    Args:
      key: of ``jax.random``.
      teacher_logits: ``[..., V]``.
      n: draws per position, ≥ 1.
      temperature: T > 0 divides the logits; it is stored with the targets.
      method: ``"systematic"`` or ``"iid"``.

    Returns:
      ``SampledTargets`` with ``ids``, ``counts`` and ``log_probs [..., n]``; counts sum to n, unused slots have 0.

    Raises:
      UserError: n < 1, or another method.

    Example:
      >>> targets = sample_targets(jax.random.key(0), jnp.log(jnp.array([0.5, 0.25, 0.25])), 4)
      >>> [sum(c for i, c in zip(targets.ids.tolist(), targets.counts.tolist()) if i == v) for v in range(3)]
      [2, 1, 1]
    """
    if n < 1 or method not in ("systematic", "iid"):
        raise UserError(f'sample_targets: n={n}, method="{method}"; expected n ≥ 1 and "systematic" or "iid".')
    log_p = _log_probs(teacher_logits, temperature)
    rows = log_p.reshape(-1, log_p.shape[-1])
    draw = _systematic if method == "systematic" else _independent
    ids, counts = jax.vmap(lambda row_key, row: _count(draw(row_key, row, n)))(jax.random.split(key, len(rows)), rows)
    shape = (*log_p.shape[:-1], n)
    ids, counts = ids.reshape(shape), counts.reshape(shape)
    return SampledTargets(ids, counts, jnp.take_along_axis(log_p, ids, axis=-1), temperature)


def _systematic(key: Array, log_probs: Array, n: int) -> Array:
    order_key, offset_key = jax.random.split(key)
    order = jax.random.permutation(order_key, log_probs.shape[-1])
    points = (jnp.arange(n) + jax.random.uniform(offset_key)) / n
    return order[_look_up(log_probs[order], points)]


def _independent(key: Array, log_probs: Array, n: int) -> Array:
    return _look_up(log_probs, jax.random.uniform(key, (n,)))


def _look_up(log_probs: Array, points: Array) -> Array:
    """The first token whose cumulated probability exceeds the point: always one with probability."""
    total = jnp.cumsum(jnp.exp(log_probs))
    below_one = 1.0 - 2.0**-24
    return jnp.searchsorted(total / total[-1], jnp.minimum(points, below_one), side="right").astype(jnp.int32)


def _count(ids: Array) -> tuple[Array, Array]:
    """Sorted ids, and how often each occurs: at its first slot, 0 at the others."""
    ids = jnp.sort(ids)
    first = jnp.searchsorted(ids, ids, side="left")
    times = jnp.searchsorted(ids, ids, side="right") - first
    return ids, jnp.where(first == jnp.arange(len(ids)), times, 0).astype(jnp.int32)


def sampled_cross_entropy(student_logits: Logits, targets: SampledTargets, *, temperature: float = 1.0) -> Nats:
    """−Σ_k counts_k/N · log Q(id_k), N = Σ counts: unbiased for the cross-entropy −Σ_v P_v log Q_v.

    Its gradient, averaged over draws, is that of ``forward_kl``. Unlike ``sampled_forward_kl`` it needs no teacher
    probabilities, and is not 0 where student and teacher agree, but the teacher's entropy in the mean.

    Args:
      student_logits: ``[..., V]``.
      targets: drawn at the same temperature. A drawn id outside [0, V) is NaN.
      temperature: T > 0 divides the student's logits, and must be the targets'.

    Returns:
      ``[...]`` nats, float32, ≥ 0.

    Raises:
      UserError: another temperature than the targets'.

    Example:
      >>> targets = SampledTargets(jnp.array([0, 2]), jnp.array([3, 1]))
      >>> round(float(sampled_cross_entropy(jnp.log(jnp.array([0.5, 0.25, 0.25])), targets)), 4)  # ¾ log 2 + ¼ log 4
      0.8664
    """
    shares, log_q = _drawn(student_logits, targets, temperature)
    return jnp.sum(jnp.where(shares > 0.0, -shares * log_q, 0.0), axis=-1)


def sampled_forward_kl(student_logits: Logits, targets: SampledTargets, *, temperature: float = 1.0) -> Nats:
    """Σ_k counts_k/N · (log P(id_k) − log Q(id_k)): unbiased for KL(P‖Q), value and gradient.

    An estimate: it is 0 where student and teacher agree on the drawn tokens, but may be negative for one draw. The
    gradient is exactly that of ``sampled_cross_entropy``.

    Args:
      student_logits: ``[..., V]``.
      targets: drawn at the same temperature, with ``log_probs``. A drawn id outside [0, V) is NaN.
      temperature: T > 0 divides the student's logits, and must be the targets'.

    Returns:
      ``[...]`` nats, float32.

    Raises:
      UserError: another temperature than the targets', or targets without ``log_probs``.

    Example:
      >>> teacher = jnp.log(jnp.array([0.5, 0.25, 0.25]))
      >>> targets = SampledTargets(jnp.array([0, 2]), jnp.array([3, 1]), teacher[jnp.array([0, 2])])
      >>> abs(float(sampled_forward_kl(teacher, targets)))
      0.0
    """
    if targets.log_probs is None:
        raise UserError("sampled_forward_kl: the targets have no log_probs; expected them, or sampled_cross_entropy.")
    shares, log_q = _drawn(student_logits, targets, temperature)
    drawn = shares > 0.0
    difference = jnp.where(drawn, targets.log_probs.astype(jnp.float32), 0.0) - jnp.where(drawn, log_q, 0.0)
    return jnp.sum(jnp.where(drawn, shares * difference, 0.0), axis=-1)


def _drawn(student_logits: Logits, targets: SampledTargets, temperature: float) -> tuple[Kept, Kept]:
    """Shares counts/N, and the student's log-probabilities of the drawn tokens (0 in unused slots)."""
    if targets.temperature != temperature:
        raise UserError(
            f"sampled targets: temperature={temperature}, but they were drawn at temperature={targets.temperature}; "
            "draws cannot be brought to another; draw again, or use theirs."
        )
    counts = targets.counts.astype(jnp.float32)
    shares = counts / jnp.sum(counts, axis=-1, keepdims=True)
    log_q = _log_probs(student_logits, temperature)
    where = jnp.where(targets.ids < 0, log_q.shape[-1], targets.ids)
    picked = jnp.take_along_axis(log_q, where, axis=-1, mode="fill", fill_value=jnp.nan)
    return shares, jnp.where(shares > 0.0, picked, 0.0)
