"""More float64 numpy twins, from the formulas of the papers, as sums over tokens. No jax here.

Every function takes ``student, teacher, temperature, frozen`` with finite logits ``[..., V]``; ``frozen`` is the
student where the loss treats it as a constant. The student may be complex: its imaginary part carries the
derivative (complex step), exact to the last digits without a closed form.
"""

import numpy as np


def without_impossible_tokens(function):
    """``value`` and ``gradient`` of a function, without the tokens that are −inf on both sides."""

    def prepare(student, teacher):
        student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
        impossible = np.isneginf(student) & np.isneginf(teacher)
        tokens = ~np.any(impossible.reshape(-1, student.shape[-1]), axis=0)
        assert np.all(impossible[..., ~tokens])  # the same tokens must be −inf in every row
        return student, teacher, tokens

    def value(student, teacher, temperature=1.0, frozen=None):
        student, teacher, tokens = prepare(student, teacher)
        frozen = student if frozen is None else frozen
        return function(student[..., tokens], teacher[..., tokens], temperature, frozen[..., tokens])

    def gradient(student, teacher, temperature=1.0):
        student, teacher, tokens = prepare(student, teacher)
        real, other = student[..., tokens], teacher[..., tokens]
        slopes = np.zeros(real.shape)
        for v in range(real.shape[-1]):
            moved = real.astype(complex)
            moved[..., v] += 1e-30j
            slopes[..., v] = np.imag(function(moved, other, temperature, real)) / 1e-30
        whole = np.zeros(student.shape)
        whole[..., tokens] = slopes
        return whole

    return value, gradient


def log_probs(logits, temperature):
    x = logits / temperature
    x = x - np.max(np.real(x), axis=-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def both(student, teacher, temperature):
    return log_probs(teacher, temperature), log_probs(student, temperature)


def size(x):
    """|x| with the derivative +1 at 0."""
    return np.where(np.real(x) >= 0.0, x, -x)


def kl(log_a, log_b):
    return np.sum(np.exp(log_a) * (log_a - log_b), axis=-1)


def forward_kl(student, teacher, temperature, frozen):
    log_p, log_q = both(student, teacher, temperature)
    return kl(log_p, log_q)


def log_mixture(log_a, log_b, share):
    """log(share·a + (1−share)·b)."""
    one, other = np.log(share) + log_a, np.log(1.0 - share) + log_b
    high = np.maximum(np.real(one), np.real(other))
    return high + np.log(np.exp(one - high) + np.exp(other - high))


def skewed_forward_kl(alpha):
    def function(student, teacher, temperature, frozen):
        log_p, log_q = both(student, teacher, temperature)
        return kl(log_p, log_mixture(log_p, log_q, alpha))

    return function


def skewed_reverse_kl(alpha):
    def function(student, teacher, temperature, frozen):
        log_p, log_q = both(student, teacher, temperature)
        return kl(log_q, log_mixture(log_q, log_p, alpha))

    return function


def total_variation(student, teacher, temperature, frozen):
    log_p, log_q = both(student, teacher, temperature)
    return 0.5 * np.sum(size(np.exp(log_p) - np.exp(log_q)), axis=-1)


def jeffreys(student, teacher, temperature, frozen):
    log_p, log_q = both(student, teacher, temperature)
    return np.sum((np.exp(log_p) - np.exp(log_q)) * (log_p - log_q), axis=-1)


def alpha_beta(alpha, beta):
    """The definition of Cichocki et al., case by case."""

    def function(student, teacher, temperature, frozen):
        log_p, log_q = both(student, teacher, temperature)

        def power(log, exponent):
            return np.exp(exponent * log)

        total = alpha + beta
        if alpha == beta == 0.0:
            terms = (log_p - log_q) ** 2 / 2.0
        elif beta == 0.0:
            terms = power(log_p, alpha) * alpha * (log_p - log_q) - power(log_p, alpha) + power(log_q, alpha)
            terms = terms / alpha**2
        elif alpha == 0.0:
            terms = power(log_q, beta) * beta * (log_q - log_p) - power(log_q, beta) + power(log_p, beta)
            terms = terms / beta**2
        elif total == 0.0:
            terms = (alpha * (log_q - log_p) + power(log_p - log_q, alpha) - 1.0) / alpha**2
        else:
            product = np.exp(alpha * log_p + beta * log_q)
            ends = alpha / total * power(log_p, total) + beta / total * power(log_q, total)
            terms = -(product - ends) / (alpha * beta)
        return np.sum(terms, axis=-1)

    return function


def log_sum_of_powers(log_p, log_q, alpha):
    exponent = alpha * log_p + (1.0 - alpha) * log_q
    high = np.max(np.real(exponent), axis=-1)
    return high + np.log(np.sum(np.exp(exponent - high[..., None]), axis=-1))


def alpha_divergence(alpha):
    def function(student, teacher, temperature, frozen):
        log_p, log_q = both(student, teacher, temperature)
        if alpha in (0.0, 1.0):
            return kl(log_p, log_q) if alpha else kl(log_q, log_p)
        return (1.0 - np.exp(log_sum_of_powers(log_p, log_q, alpha))) / (alpha * (1.0 - alpha))

    return function


def renyi(alpha):
    def function(student, teacher, temperature, frozen):
        log_p, log_q = both(student, teacher, temperature)
        return kl(log_p, log_q) if alpha == 1.0 else log_sum_of_powers(log_p, log_q, alpha) / (alpha - 1.0)

    return function


def adaptive_kl(mu):
    def function(student, teacher, temperature, frozen):
        log_p, log_q = both(student, teacher, temperature)
        p, q = np.exp(log_p), np.exp(log_probs(frozen, temperature))
        vocab = p.shape[-1]
        share = np.empty(p.shape[:-1])
        for row in np.ndindex(share.shape):
            gaps, mass = [0.0, 0.0], 0.0
            for rank, v in enumerate(sorted(range(vocab), key=lambda v, row=row: (-teacher[row][v], v))):
                mass += p[row][v]
                gaps[0 if rank == 0 or mass <= mu else 1] += abs(p[row][v] - q[row][v])
            share[row] = gaps[0] / sum(gaps) if sum(gaps) else 0.5
        return share * kl(log_p, log_q) + (1.0 - share) * kl(log_q, log_p)

    return function


def entropy_aware_kl(student, teacher, temperature, frozen):
    log_p, log_q = both(student, teacher, temperature)
    share = -np.sum(np.exp(log_p) * log_p, axis=-1) / np.log(log_p.shape[-1])
    return share * kl(log_p, log_q) + (1.0 - share) * kl(log_q, log_p)


def taid(t):
    def function(student, teacher, temperature, frozen):
        log_r = log_probs((1.0 - t) * frozen + t * teacher, temperature)
        return kl(log_r, log_probs(student, temperature))

    return function


def logit_mse(student, teacher, temperature, frozen):
    x, y = student / temperature, teacher / temperature
    x, y = x - np.mean(x, axis=-1, keepdims=True), y - np.mean(y, axis=-1, keepdims=True)
    return np.mean((x - y) ** 2, axis=-1) / 2.0


def pearson(student, teacher, temperature, frozen):
    p, q = (np.exp(log) for log in both(student, teacher, temperature))
    a, b = p - np.mean(p, axis=-1, keepdims=True), q - np.mean(q, axis=-1, keepdims=True)
    return 1.0 - np.sum(a * b, axis=-1) / np.sqrt(np.sum(a * a, axis=-1) * np.sum(b * b, axis=-1))


def top_k_forward_kl(k):
    """Forward KL over the teacher's k most probable tokens and one class for all others."""

    def function(student, teacher, temperature, frozen):
        log_p, log_q = both(student, teacher, temperature)
        order = np.argsort(-teacher, axis=-1, kind="stable")
        a, b = np.take_along_axis(log_p, order, axis=-1), np.take_along_axis(log_q, order, axis=-1)

        def classes(log):
            tail, high = log[..., k:], np.max(np.real(log[..., k:]), axis=-1, keepdims=True)
            tail = high + np.log(np.sum(np.exp(tail - high), axis=-1, keepdims=True))
            return np.concatenate([log[..., :k], tail], axis=-1)

        return kl(classes(a), classes(b))

    return function
