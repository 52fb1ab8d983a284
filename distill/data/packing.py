"""Packing: documents → rows of L+1 tokens. Documents in one row are segments and do not attend to each other.

Rows are filled by best fit, the longest document first, within windows of documents, so that memory holds one window.
A document longer than a row is cut according to the configuration.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from distill.batch import Batch, shift
from distill.data.text import Encoded
from distill.errors import UserError

WINDOW = 16_384
"""Number of pieces that are packed together."""


@dataclasses.dataclass
class Summary:
    """Counts of what packing did."""

    documents: int = 0
    tokens: int = 0
    """Tokens of the documents before cutting."""
    cut: int = 0
    """Documents longer than a row."""
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    """Reason → number of documents, turns or parts of them that do not count or are not learnt as they stand."""
    lost: int = 0
    """Tokens left out: cut off, or of pieces in which no token counts."""
    empty: int = 0
    """Documents without a token to predict."""
    rows: int = 0
    counted: int = 0
    """Tokens to predict."""
    fill: float = 0.0
    """Share of positions of the rows that hold a token."""

    def __str__(self) -> str:
        return (
            f"{self.documents} documents, {self.tokens} tokens → {self.rows} rows, {self.fill:.1%} filled, "
            f"{self.counted} tokens to predict; {self.cut} documents were longer than a row, {self.empty} had nothing "
            f"to predict, {self.lost} tokens left out"
        )


class Rows(NamedTuple):
    """Packed documents."""

    tokens: np.ndarray
    """``[n, L+1]`` ids, int32, or uint16 where the vocabulary allows."""
    counts: np.ndarray
    """``[n, L+1]`` bool: tokens to predict."""
    segments: np.ndarray
    """``[n, L+1]`` number of the document within its row, from 1; 0 is padding."""

    def batch(self) -> Batch:
        """All rows as one ``Batch``."""
        return shift(*self)

    def take(self, rows: np.ndarray | slice) -> "Rows":
        """Selects some of the rows."""
        return Rows(*(field[rows] for field in self))

    @property
    def fill(self) -> float:
        """Share of positions that hold a token."""
        return float((self.segments > 0).mean())


def cut(
    document: Encoded,
    length: int,
    overflow: Literal["split", "keep_start", "keep_end"],
    start: tuple[int, ...] = (),
) -> list[Encoded]:
    """Cuts a document into pieces of at most ``length`` + 1 tokens.

    Args:
      document: its tokens.
      length: L.
      overflow: ``split``: every piece begins with ``start`` and the last token of the previous one, and predicts
        neither; ``keep_start``, ``keep_end``: one piece.
      start: ids with which every piece of a document begins that itself begins with them (the beginning-of-text token).

    Raises:
      UserError: no room for a token beside ``start``.

    Example:
      >>> text = Encoded(np.arange(5), np.ones(5, bool))
      >>> [piece.ids.tolist() for piece in cut(text, 2, "split")]
      [[0, 1, 2], [2, 3, 4]]
      >>> [piece.ids.tolist() for piece in cut(text, 2, "keep_end", start=(0,))]
      [[0, 3, 4]]
      >>> [piece.ids.tolist() for piece in cut(text, 2, "split", start=(0,))]
      [[0, 1, 2], [0, 2, 3], [0, 3, 4]]
    """
    ids, counts = document
    if len(ids) <= length + 1:
        return [document]
    begin = _begin(document, start)
    if len(begin) >= length:
        raise UserError(f"data: length={length}; expected more than the {len(begin)} tokens with which a row begins.")
    if overflow == "keep_start":
        return [Encoded(ids[: length + 1], counts[: length + 1])]
    if overflow == "keep_end":
        kept = np.concatenate([np.arange(len(begin)), np.arange(len(ids))[-(length + 1 - len(begin)) :]])
        return [Encoded(ids[kept], counts[kept])]
    whole = [Encoded(ids[: length + 1], counts[: length + 1])]
    not_again = np.zeros(len(begin) + 1, bool)
    step = length - len(begin)
    for first in range(length, len(ids) - 1, step):
        rest = slice(first + 1, first + 1 + step)
        again = np.concatenate([begin, ids[first : first + 1], ids[rest]]).astype(ids.dtype)
        whole.append(Encoded(again, np.concatenate([not_again, counts[rest]])))
    return whole


def _begin(document: Encoded, start: tuple[int, ...]) -> np.ndarray:
    """``start`` if the document begins with it."""
    return np.asarray(start if tuple(document.ids[: len(start)].tolist()) == start else (), np.int32)


def pack(
    found: Iterable[Encoded],
    length: int,
    *,
    overflow: Literal["split", "keep_start", "keep_end"] = "split",
    pad_id: int = 0,
    start: tuple[int, ...] = (),
    summary: Summary | None = None,
    window: int = WINDOW,
) -> Iterator[Rows]:
    """Packs documents into rows of ``length`` + 1 tokens, one window at a time.

    Args:
      found: documents.
      length: L.
      overflow: what happens to a document longer than a row (``cut``).
      pad_id: fills the end of a row. Any id works, as padding is masked.
      start: ids with which every piece begins (``cut``).
      summary: receives the counts.
      window: pieces packed together; larger windows fill rows better.

    Yields:
      ``Rows`` of one window. Pieces without a token to predict are left out.
    """
    summary = Summary() if summary is None else summary
    pieces: list[Encoded] = []
    used = 0
    for document in found:
        whole = cut(document, length, overflow, start)
        kept = [bool(part.counts[1:].any()) for part in whole]
        parts = [part for part, there in zip(whole, kept, strict=True) if there]
        summary.documents += 1
        summary.tokens += len(document.ids)
        summary.cut += len(document.ids) > length + 1
        summary.empty += not parts
        # A piece repeats the last token of the one before it, and its first ones, which must not hide a lost one.
        inside, begin = sum(len(part.ids) for part in parts), len(_begin(document, start))
        again = sum(map(all, itertools.pairwise(kept))) + begin * max(len(parts) - 1, 0)
        used += inside
        summary.lost += len(document.ids) - inside + again
        pieces += parts
        if len(pieces) >= window:
            yield _fill(pieces, length, pad_id, summary)
            pieces = []
    if pieces:
        yield _fill(pieces, length, pad_id, summary)
    summary.fill = used / max(summary.rows * (length + 1), 1)


def best_fit(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: indices of ``sizes`` by bin. Each item goes into the fullest bin with room.

    Example:
      >>> best_fit(np.array([2, 5, 3, 1, 4]), capacity=5)
      [[1], [4, 3], [2, 0]]
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r: some bin has room r. The lowest set bit above the size finds the fullest one in O(1).
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        by_room[room - size].append(chosen)
        rooms |= 1 << (room - size)
    return bins


def _fill(pieces: list[Encoded], length: int, pad_id: int, summary: Summary) -> Rows:
    bins = best_fit(np.array([len(piece.ids) for piece in pieces]), length + 1)
    shape = (len(bins), length + 1)
    rows = Rows(np.full(shape, pad_id, np.int32), np.zeros(shape, bool), np.zeros(shape, np.int32))
    for number, items in enumerate(bins):
        at = 0
        for segment, item in enumerate(items, start=1):
            ids, counts = pieces[item]
            here = slice(at, at + len(ids))
            rows.tokens[number, here], rows.segments[number, here] = ids, segment
            rows.counts[number, here] = counts
            rows.counts[number, at] = False  # the first token of a document has no context to be predicted from
            at += len(ids)
    summary.rows += len(bins)
    summary.counted += int(rows.counts.sum())
    return rows
