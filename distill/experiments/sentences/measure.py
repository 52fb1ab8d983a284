"""Similarity of sentence embeddings, as two encoders see it."""

import functools

import jax
import numpy as np

from distill.models.encoder import Kind, embed
from distill.models.model import Model
from distill.shapes import Array, Params

ROWS = 100
"""Sentences embedded at a time."""


@functools.partial(jax.jit, static_argnums=(0, 4))
def _embed(model: Model, params: Params, tokens: Array, segments: Array, kind: Kind) -> Array:
    return embed(model, params, tokens, segments, kind)


def embeddings(
    model: Model, params: Params, tokens: np.ndarray, segments: np.ndarray, kind: Kind = "mean"
) -> np.ndarray:
    """Sentence embeddings ``[n, D]``, ``ROWS`` at a time; compiled once for a model. Arguments as for ``embed``."""
    rows = [np.pad(x, ((0, -len(tokens) % ROWS), (0, 0))) for x in (tokens, segments)]
    parts = [
        np.asarray(_embed(model, params, *(x[i : i + ROWS] for x in rows), kind)) for i in range(0, len(rows[0]), ROWS)
    ]
    return np.concatenate(parts)[: len(tokens)]


def compare(student: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """How alike two encoders find the same sentences, from unit vectors ``[n, D]``.

    Returns:
      ``pearson`` and ``spearman`` of the cosines of all pairs, ``nearest``: share of sentences whose nearest other one
      is the same, ``cosine``: mean cosine of the two embeddings of a sentence (widths must be equal).
    """
    cosines = [vectors @ vectors.T for vectors in (student, teacher)]
    pairs = [matrix[np.triu_indices(len(matrix), 1)] for matrix in cosines]
    ranks = [np.argsort(np.argsort(values, kind="stable")) for values in pairs]
    return {
        "pearson": float(np.corrcoef(*pairs)[0, 1]),
        "spearman": float(np.corrcoef(*ranks)[0, 1]),
        "nearest": float(np.mean(nearest(student) == nearest(teacher))),
        "cosine": float(np.mean(np.sum(student * teacher, axis=1))),
    }


def nearest(vectors: np.ndarray) -> np.ndarray:
    """For each of ``[n, D]`` unit vectors, the index of the nearest other one."""
    return np.argmax(vectors @ vectors.T - 3.0 * np.eye(len(vectors)), axis=1)
