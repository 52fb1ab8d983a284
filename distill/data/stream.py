"""Loader for rows that do not fit into memory: each batch reads its rows from array_record.

The order is that of ``Loader``: batch k is a pure function of k, so a run can resume at any k. The rows of a batch do
not depend on the number of processes that share it. ``feed.Ahead`` reads batches in advance.
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
from distill.errors import UserError
from distill.tokenizer import TextTokenizer


class StreamLoader:
    """Batches of rows that stay on disk.

    Args:
      source: rows by number, one or many at a time (``source[i]``, ``source.__getitems__([i, …])``), each a dict with
        the fields of ``Rows``; ``open_rows`` returns such a source.
      batch_size: global batch B.
      seed: of the order.
      own: positions in the batch that lie on this process's devices. Only these rows are read, the others are zeros.
        None: all rows.

    Raises:
      UserError: no rows, or positions outside the batch.
    """

    def __init__(self, source: Sequence[Any], batch_size: int, seed: int, *, own: np.ndarray | None = None):
        if not len(source) or batch_size < 1:
            raise UserError(f"StreamLoader: {len(source)} rows in batches of {batch_size}; expected ≥ 1 of both.")
        if own is not None and not ((own >= 0) & (own < batch_size)).all():
            raise UserError(f"StreamLoader: places {own.tolist()}; expected some of 0 … {batch_size - 1}.")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self._own = own

    def rows(self, k: int) -> np.ndarray:
        """Numbers ``[B]`` of the rows of batch k over all processes."""
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
    """Opens the prepared rows of a side for random access, without reading any.

    Raises:
      FileNotFoundError, ValueError: as ``prepare``.
    """
    return ready(config, tokenizer, data_dir).as_data_source(split=side)


def blocks(source: Sequence[Any], size: int = 4096) -> Iterator[Rows]:
    """Iterates over all rows of ``open_rows`` in order, ``size`` at a time."""
    for start in range(0, len(source), size):
        yield as_rows(source.__getitems__(range(start, min(start + size, len(source)))))
