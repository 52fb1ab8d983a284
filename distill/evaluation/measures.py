"""Measures of distributions on given text: agreement, KL, calibration, nats per token."""

from typing import Any

import jax
import numpy as np

from distill.batch import Batch
from distill.devices import processes
from distill.generation import sampler
from distill.models.model import Model
from distill.shapes import Params

_logits = jax.jit(
    lambda model, params, batch: model.logits(params, batch.inputs, positions=batch.positions, segments=batch.segments),
    static_argnums=0,
)

_greedy = jax.jit(sampler.greedy, static_argnums=0, static_argnames=("max_new_tokens", "eos_ids", "pad_id"))


def continued(
    model: Model, params: Params, prompts: np.ndarray, count: int, *, eos_ids: tuple[int, ...], pad_id: int
) -> np.ndarray:
    """``[B, count]`` ids a model writes greedily after prompts ``[B, L]``, each row up to one of ``eos_ids``."""
    ids = _greedy(model, params, jax.device_put(prompts), max_new_tokens=count, eos_ids=eos_ids, pad_id=pad_id)
    return processes.fetch(ids)


def count_written(ids: np.ndarray, eos_ids: tuple[int, ...]) -> int:
    """Tokens of ``[B, T]`` that were written: of every row those up to and with its end, without the padding after it.

    Example:
      >>> count_written(np.array([[5, 2, 0, 0], [5, 6, 7, 8]]), (2,))
      6
    """
    ended = np.cumsum(np.isin(ids, eos_ids), axis=1) - np.isin(ids, eos_ids)
    return int(np.sum(ended == 0))


def logits_on(model: Model, params: Params, batch: Batch) -> np.ndarray:
    """``[examples, L, V]`` logits of a model on given text (small vocabularies)."""
    return processes.fetch(_logits(model, params, jax.device_put(batch)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def agreement(student_logits: np.ndarray, teacher_logits: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Share of counted positions with the same most likely token, and mean KL(teacher‖student) in nats per token."""
    log_q, log_p = log_softmax(student_logits[mask]), log_softmax(teacher_logits[mask])
    same = log_q.argmax(axis=-1) == log_p.argmax(axis=-1)
    return {"agreement": float(same.mean()), "kl": float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())}


def calibration(logits: np.ndarray, labels: np.ndarray, mask: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """Expected calibration error: Σ_bins (share of tokens) · |accuracy − mean confidence| (arXiv 1706.04599).

    Confidence is the probability of the most likely token; bins have equal width.
    """
    log_probs = log_softmax(logits[mask])
    confidence, right = np.exp(log_probs.max(axis=-1)), log_probs.argmax(axis=-1) == labels[mask]
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    rows = []
    for i in range(bins):
        inside = index == i
        if inside.any():
            rows.append(
                {
                    "confidence": float(confidence[inside].mean()),
                    "accuracy": float(right[inside].mean()),
                    "count": int(inside.sum()),
                }
            )
    total = sum(row["count"] for row in rows)
    ece = sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / max(total, 1)
    return {"ece": float(ece), "bins": rows}


def nats_per_token(logits: np.ndarray, labels: np.ndarray, mask: np.ndarray) -> float:
    """Mean negative log-likelihood of the counted labels."""
    log_probs = log_softmax(logits[mask])
    return float(-np.take_along_axis(log_probs, labels[mask][:, None], axis=-1).mean())
