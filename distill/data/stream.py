"""Rows that do not fit into memory: read from array_record where a batch needs them (ahead of it: ``feed.Ahead``).

The order is that of ``Loader``: batch k is a pure function of k, so a run continues at any k. Which rows are in a
batch does not depend on how many processes share it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.batch import Batch
from distill.data.loader import rows_of
from distill.data.packing import Rows
from distill.data.prepared import as_rows, ready
from distill.data.text import Side, TextDataConfig
from distill.tokenizer import TextTokenizer


class StreamLoader:
    """Batches of rows that stay on the disk.

    Args:
      source: rows by number, one or many at a time (``source[i]``, ``source.__getitems__([i, …])``), each a dict with
        the fields of ``Rows``: what ``open_rows`` gives.
      batch_size: global batch B.
      seed: of the order.
      process_index: which of the processes this is.
      process_count: how many there are; each reads its own part of every batch.

    Raises:
      ValueError: no rows, a batch size that the processes do not divide, or a process that is none of them.
    """

    def __init__(
        self, source: Sequence[Any], batch_size: int, seed: int, *, process_index: int = 0, process_count: int = 1
    ):
        if not len(source) or batch_size < 1:
            raise ValueError(f"StreamLoader: {len(source)} rows in batches of {batch_size}; expected ≥ 1 of both.")
        if not 0 <= process_index < process_count or batch_size % process_count:
            raise ValueError(
                f"StreamLoader: process {process_index} of {process_count}, batch_size={batch_size}; expected a "
                "process below their number, and a number that divides the batch."
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        part = batch_size // process_count
        self._part = slice(process_index * part, (process_index + 1) * part)

    def rows(self, k: int) -> np.ndarray:
        """Numbers ``[B]`` of the rows of batch k, of all processes."""
        return rows_of(len(self.source), self.batch_size, self.seed, k, 1)[0]

    def batch(self, k: int) -> Batch:
        """This process's part of batch k, ``[B / processes, L]``; together they are batch k."""
        return self._read(k).batch()

    def _read(self, k: int) -> Rows:
        return as_rows(self.source.__getitems__(self.rows(k)[self._part].tolist()))


def open_rows(
    config: TextDataConfig, tokenizer: TextTokenizer, side: Side = "train", data_dir: str | Path | None = None
) -> Sequence[Any]:
    """The prepared rows of a side, on the disk: random access, nothing is read yet.

    Raises:
      FileNotFoundError, ValueError: as ``prepare``.
    """
    return ready(config, tokenizer, data_dir).as_data_source(split=side)


def blocks(source: Sequence[Any], size: int = 4096) -> Iterator[Rows]:
    """All rows of ``open_rows`` in their order, so many at a time."""
    for start in range(0, len(source), size):
        yield as_rows(source.__getitems__(range(start, min(start + size, len(source)))))
