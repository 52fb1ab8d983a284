"""Batches of stored examples. Batch k is a pure function of k, so the position in the data is one number.

Examples that fit into memory are kept as arrays on the device. A batch is then a row of indices (``rows_of``), computed
without reading any example.
"""

import functools

import jax
import numpy as np

from distill.batch import Batch
from distill.errors import UserError

FEW = 2**16
"""Examples below which the order of a whole epoch is computed at once.

Grain's shuffle of a single index repeats until the result is in range, which takes longer the fewer examples there are.
"""


@functools.lru_cache(maxsize=64)
def _epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """Order of one epoch below ``FEW``. NumPy guarantees the stream of Philox, so resumed runs see the same order."""
    return np.argsort(np.random.Philox([seed % 2**32, epoch]).random_raw(examples), kind="stable")


def rows_of(examples: int, batch_size: int, seed: int, first: int, count: int) -> np.ndarray:
    """Indices ``[count, B]`` of the batches first … first + count − 1; each example occurs once per epoch.

    Below ``FEW`` examples the order of an epoch is drawn as a whole. From there on it is that of Grain's
    ``MapDataset.source(…).shuffle(seed).repeat().batch(B)``, computed index by index without holding the permutation.
    """
    start, stop = first * batch_size, (first + count) * batch_size
    if examples < FEW:
        epochs = range(start // examples, -(-stop // examples))
        order = np.concatenate([_epoch_order(examples, seed, epoch) for epoch in epochs])
        return order[start - epochs.start * examples :][: stop - start].reshape(count, batch_size)
    from grain.experimental import index_shuffle

    places = (divmod(place, examples) for place in range(start, stop))
    found = (index_shuffle(i, max_index=examples - 1, seed=(seed + epoch) % 2**32, rounds=4) for epoch, i in places)
    return np.fromiter(found, np.int64, stop - start).reshape(count, batch_size)


class Loader:
    """Batches of examples held as arrays.

    Args:
      examples: a ``Batch`` of all examples, ``[examples, L]`` each.
      batch_size: global batch B; where it exceeds the number of examples, a batch repeats some.
      seed: of the order.

    Raises:
      UserError: no examples, or a batch size below 1.

    Example:
      >>> from distill.batch import shift
      >>> tokens = np.arange(8).reshape(4, 2)
      >>> loader = Loader(shift(tokens, np.ones_like(tokens)), batch_size=2, seed=0)
      >>> bool((loader.batch(5).inputs == loader.batch(5).inputs).all())
      True
    """

    def __init__(self, examples: Batch, batch_size: int, seed: int):
        if not len(examples.inputs) or batch_size < 1:
            raise UserError(
                f"Loader: {len(examples.inputs)} examples in batches of {batch_size}; expected ≥ 1 of both."
            )
        self.examples, self.batch_size, self.seed = examples, batch_size, seed

    def rows(self, first: int, count: int) -> np.ndarray:
        """Indices ``[count, B]`` of the batches first … first + count − 1."""
        return rows_of(len(self.examples.inputs), self.batch_size, self.seed, first, count).astype(np.int32)

    def batch(self, k: int) -> Batch:
        """Batch k."""
        rows = self.rows(k, 1)[0]
        return jax.tree.map(lambda field: field[rows], self.examples)
