"""``Batch``: what a step sees, and the shift from tokens to inputs and labels."""

from typing import Any, NamedTuple

import numpy as np

from distill.shapes import Array, Bool, Int


class Batch(NamedTuple):
    """What a step sees. ``labels[i]`` is the token after ``inputs[i]``; only positions where ``mask`` count."""

    inputs: Int[Array, "*batch L"]
    labels: Int[Array, "*batch L"]
    mask: Bool[Array, "*batch L"]
    positions: Int[Array, "*batch L"]
    segments: Int[Array, "*batch L"]
    """Tokens attend within their segment only; 0 is padding."""
    targets: Any = None
    """Any tree of per-position arrays ``[*batch, L, …]`` known beforehand, or None: what is stored of a teacher
    (``losses.DenseTargets``, ``SparseTargets``, ``SampledTargets``, ``HiddenTargets``), or whatever a term reads."""


def shift(tokens: np.ndarray, counts: np.ndarray, segments: np.ndarray | None = None) -> Batch:
    """The one place where labels become the next tokens.

    Args:
      tokens: ``[B, L+1]`` ids.
      counts: ``[B, L+1]`` bool, True where a token is to be predicted (answer, not prompt or padding).
      segments: ``[B, L+1]`` documents numbered from 1, 0 for padding; None: one document a row.

    Returns:
      Arrays ``[B, L]``. A label counts if its token counts and lies in the same segment as its input; positions start
      at 0 in every segment.
    """
    segments = np.ones_like(tokens) if segments is None else segments
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    starts = np.concatenate([np.ones_like(tokens[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    index = np.arange(tokens.shape[1])[None]
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return Batch(
        inputs=tokens[:, :-1].astype(np.int32),
        labels=tokens[:, 1:].astype(np.int32),
        mask=counts[:, 1:].astype(bool) & inside,
        positions=positions[:, :-1].astype(np.int32),
        segments=segments[:, :-1].astype(np.int32),
    )
