"""Rows that do not fit into memory: read from array_record where a batch needs them (ahead of it: ``feed.Ahead``).

The order is that of ``Loader``: batch k is a pure function of k, so a run continues at any k. Which rows are in a
batch does not depend on how many processes share it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
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
      own: places in a batch whose rows are read, those that lie on this process's devices; the others are zeros.
        None: all.

    Raises:
      ValueError: no rows, or places outside the batch.
    """

    def __init__(self, source: Sequence[Any], batch_size: int, seed: int, *, own: np.ndarray | None = None):
        if not len(source) or batch_size < 1:
            raise ValueError(f"StreamLoader: {len(source)} rows in batches of {batch_size}; expected ≥ 1 of both.")
        if own is not None and not ((own >= 0) & (own < batch_size)).all():
            raise ValueError(f"StreamLoader: places {own.tolist()}; expected some of 0 … {batch_size - 1}.")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self._own = own

    def rows(self, k: int) -> np.ndarray:
        """Numbers ``[B]`` of the rows of batch k, of all processes."""
        return rows_of(len(self.source), self.batch_size, self.seed, k, 1)[0]

    def batch(self, k: int) -> Batch:
        """Batch k, ``[B, L]``."""
        numbers = self.rows(k)
        if self._own is None:
            return as_rows(self.source.__getitems__(numbers.tolist())).batch()
        own = as_rows(self.source.__getitems__(numbers[self._own].tolist()))
        return jax.tree.map(self._in_its_place, own).batch()

    def _in_its_place(self, own: np.ndarray) -> np.ndarray:
        whole = np.zeros((self.batch_size, *own.shape[1:]), own.dtype)
        whole[self._own] = own
        return whole


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
