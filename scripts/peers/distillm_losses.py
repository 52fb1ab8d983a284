"""DistiLLM's losses, reimplemented in numpy from arXiv 2402.03898 and the functions of its public ``losses.py``.

DistiLLM cannot be installed as a package. As there, the losses compute in float32: softmax of both logits (no
temperature), a product of probabilities and log-probabilities, zeros at the tokens where a *logit* is infinite, a sum
over the vocabulary, and Σ x·mask / Σ mask over the positions whose label is not −100. λ is the weight that each
function calls ``lam``.
"""

import numpy as np


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float32)
    x = x - np.max(x, axis=-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def _mean(terms: np.ndarray, infinite: np.ndarray, labels: np.ndarray) -> float:
    """Mean over counted positions of the sum over the vocabulary; multiplies by the mask instead of selecting."""
    mask = (labels != -100).astype(np.float32)
    return float(np.sum(np.where(infinite, np.float32(0.0), terms).sum(axis=-1) * mask) / np.sum(mask))


def forward_kl(student, teacher, labels):
    """−Σ P log Q: cross-entropy with the teacher; its entropy is not subtracted."""
    return -_mean(np.exp(_log_softmax(teacher)) * _log_softmax(student), np.isinf(student), labels)


def reverse_kl(student, teacher, labels):
    """KL(Q‖P)."""
    log_p, log_q = _log_softmax(teacher), _log_softmax(student)
    return _mean(np.exp(log_q) * (log_q - log_p), np.isinf(student) | np.isinf(teacher), labels)


def symmetric_kl(student, teacher, labels, lam=0.9):
    """(1−λ)·forward_kl + λ·reverse_kl."""
    return (1.0 - lam) * forward_kl(student, teacher, labels) + lam * reverse_kl(student, teacher, labels)


def js_distance(student, teacher, labels, lam=0.9):
    """λ·KL(Q‖M) + (1−λ)·KL(P‖M), M = (1−λ)P + λQ: λ is the student's share."""
    log_p, log_q = _log_softmax(teacher), _log_softmax(student)
    p, q, infinite = np.exp(log_p), np.exp(log_q), np.isinf(student) | np.isinf(teacher)
    log_m = np.log(np.float32(1.0 - lam) * p + np.float32(lam) * q)
    return lam * _mean(q * (log_q - log_m), infinite, labels) + (1.0 - lam) * _mean(
        p * (log_p - log_m), infinite, labels
    )


def tv_distance(student, teacher, labels):
    """½ Σ |P − Q|."""
    p, q = np.exp(_log_softmax(teacher)), np.exp(_log_softmax(student))
    return _mean(0.5 * np.abs(p - q), np.isinf(student) | np.isinf(teacher), labels)


def skewed_forward_kl(student, teacher, labels, lam=0.1):
    """−Σ P log(λP + (1−λ)Q): the teacher's entropy is not subtracted."""
    p, q = np.exp(_log_softmax(teacher)), np.exp(_log_softmax(student))
    log_m = np.log(np.float32(lam) * p + np.float32(1.0 - lam) * q)
    return -_mean(p * log_m, np.isinf(student) | np.isinf(teacher), labels)


def skewed_reverse_kl(student, teacher, labels, lam=0.1):
    """KL(Q ‖ (1−λ)P + λQ)."""
    log_q = _log_softmax(student)
    p, q = np.exp(_log_softmax(teacher)), np.exp(log_q)
    log_m = np.log(np.float32(1.0 - lam) * p + np.float32(lam) * q)
    return _mean(q * (log_q - log_m), np.isinf(student) | np.isinf(teacher), labels)


def value(row):
    """Value of these functions on a row of ``distill/reproduce/conformance.py``; None: DistiLLM lacks the loss."""
    case, options = row.case, dict(row.options)
    functions = {
        "forward_kl": (forward_kl, {}),
        "reverse_kl": (reverse_kl, {}),
        "generalized_jsd": (js_distance, {"lam": 1.0 - options.get("beta", 0.0)}),
        "skewed_forward_kl": (skewed_forward_kl, {"lam": options.get("alpha")}),
        "skewed_reverse_kl": (skewed_reverse_kl, {"lam": options.get("alpha")}),
        "jeffreys": (symmetric_kl, {"lam": 0.5}),
        "total_variation": (tv_distance, {}),
    }
    if row.loss not in functions:
        return None
    function, arguments = functions[row.loss]
    with np.errstate(all="ignore"):
        return function(case.student, case.teacher, case.labels, **arguments)
