"""Placing parameters on devices a few layers at a time: the host never holds a whole stacked parameter."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill.shapes import Array, Params

PIECE = 2**23
"""Bytes of a stacked parameter that the host holds at a time; one layer where a layer is larger."""

Read = Callable[[int, int], np.ndarray]
"""``read(first, last)`` → layers first … last − 1 of a stacked parameter; of one without layers, all of it."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Places parameters on their devices.

    Example:
      >>> Place(piece=8)(("layers", "scale"), (3, 2), lambda first, last: np.ones((last - first, 2), np.float32)).shape
      (3, 2)
    """

    shardings: Params | None = None
    """A sharding for every parameter; None: the default device."""
    advance: Callable[[int], None] = lambda numbers: None
    """Called with the number of values that were placed."""
    piece: int = PIECE
    finish: Callable[[tuple[str, ...], Array], Any] = lambda path, array: array
    """``finish(path, array)`` converts a placed parameter, such as ``models.int8.quantizer``."""

    def __call__(self, path: tuple[str, ...], shape: tuple[int, ...], read: Read) -> Any:
        """The parameter on its devices; each process reads all of it and keeps its part.

        A parameter larger than a piece starts as zeros and is written layer after layer, in place.
        """
        sharding = functools.reduce(lambda tree, name: tree[name], path, self.shardings) if self.shardings else None
        layers = self._layers_of_a_piece(path, shape, sharding)
        array = _put(read(0, layers), sharding) if layers == shape[0] else None
        if array is None:
            for first in range(0, shape[0], layers):
                piece = read(first, min(first + layers, shape[0]))
                array = _zeros(shape, piece.dtype, sharding) if array is None else array
                piece = piece.astype(array.dtype, copy=False)  # layers may differ: the first one's type
                array = jax.block_until_ready(_written(array, _put(piece, sharding), first, sharding))
                self.advance(piece.size)
        else:
            self.advance(math.prod(shape))
        return self.finish(path, array)

    def _layers_of_a_piece(self, path: tuple[str, ...], shape: tuple[int, ...], sharding: Any) -> int:
        split = sharding is not None and sharding.shard_shape(shape)[0] != shape[0]
        if path[0] != "layers" or split:
            return shape[0]
        return min(max(self.piece // (4 * math.prod(shape[1:])), 1), shape[0])


def _put(array: np.ndarray, sharding: Any) -> Array:
    """Places an array; works when devices span processes."""
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.partial(jax.jit, static_argnames="sharding", donate_argnums=0)
def _written(whole: Array, piece: Array, first: Any, sharding: Any) -> Array:
    whole = jax.lax.dynamic_update_slice_in_dim(whole, piece, first, axis=0)
    return whole if sharding is None else jax.lax.with_sharding_constraint(whole, sharding)
