"""Name tables: where each parameter of a network stands in a file, and how it lies there.

A family of models or a kind of file brings a ``Table`` and a ``Source``; ``assemble.py`` does the rest.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from distill.errors import UserError
from distill.models.config import NetworkConfig

ParameterPath = tuple[str, ...]
"""Names of the nested dicts on the way to a parameter, such as ``("layers", "attention", "query", "kernel")``."""
Shape = tuple[int, ...]


class Source(Protocol):
    """Named tensors, read one at a time."""

    def names(self) -> set[str]:
        """Every tensor's name."""
        ...

    def shape(self, name: str) -> Shape:
        """A tensor's shape, as ``get`` returns it; nothing is read."""
        ...

    def get(self, name: str) -> np.ndarray:
        """One tensor, read now."""
        ...


class Renamed:
    """A source by the names of a table: ``rename(name in the source)``.

    Raises:
      UserError: two names in the source that are one in the table.
    """

    def __init__(self, source: Source, rename: Callable[[str], str]):
        self.source, self.where = source, {}
        for name in sorted(source.names()):
            if (ours := rename(name)) in self.where:
                raise UserError(f"the file has {name} and {self.where[ours]}, which are one tensor; expected one.")
            self.where[ours] = name

    def names(self) -> set[str]:
        """The names of the table."""
        return set(self.where)

    def shape(self, name: str) -> Shape:
        """Its shape."""
        return self.source.shape(self.where[name])

    def get(self, name: str) -> np.ndarray:
        """The tensor of that name."""
        return self.source.get(self.where[name])

    def read_as(self, name: str, other: str) -> None:
        """From here on the tensor ``name`` has the name ``other``."""
        self.where[other] = self.where.pop(name)


class Completed:
    """A source with tensors added that the stacked parameters have and no file holds.

    Raises:
      UserError: the source has one of them.
    """

    def __init__(self, source: Source, added: Mapping[str, np.ndarray]):
        self.source, self.added = source, added
        if present := added.keys() & source.names():
            raise UserError(f"the file has {min(present)}; the first layer should have none.")

    def names(self) -> set[str]:
        """Names of the source and of what is added."""
        return self.source.names() | self.added.keys()

    def shape(self, name: str) -> Shape:
        """Its shape."""
        return self.added[name].shape if name in self.added else self.source.shape(name)

    def get(self, name: str) -> np.ndarray:
        """The tensor of that name."""
        return self.added[name] if name in self.added else self.source.get(name)


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one parameter (of one layer) lies in a file: three functions that belong together."""

    shape: Callable[[Shape], Shape]
    """Our shape → the shape in the file."""
    read: Callable[[np.ndarray, Shape], np.ndarray]
    """``read(array of the file, our shape)`` → our array."""
    write: Callable[[np.ndarray], np.ndarray]
    """Our array → the array of the file."""


same = Transform(lambda shape: shape, lambda array, shape: array, lambda array: array)
"""Unchanged: norms, embeddings, biases with one axis."""

flat = Transform(
    lambda shape: (math.prod(shape),), lambda array, shape: array.reshape(shape), lambda array: array.reshape(-1)
)
"""All axes as one: the biases of heads, ours ``[H, K]``, there ``[H·K]``."""


def linear(inputs: int = 1) -> Transform:
    """A PyTorch ``Linear``: ours ``[in..., out...]`` with ``inputs`` input axes, there ``[out, in]``.

    Example:
      >>> linear(1).shape((8, 4, 2)), linear(2).shape((4, 2, 8))  # a query kernel [D, H, K], an output kernel [H, K, D]
      ((8, 8), (8, 8))
      >>> linear().read(np.array([[1, 2, 3], [4, 5, 6]]), (3, 2)).tolist()
      [[1, 4], [2, 5], [3, 6]]
    """

    def sizes(shape: Shape) -> tuple[int, int]:
        return math.prod(shape[:inputs]), math.prod(shape[inputs:])

    return Transform(
        lambda shape: sizes(shape)[::-1],
        lambda array, shape: array.T.reshape(shape),
        lambda array: array.reshape(sizes(array.shape)).T,
    )


def conv1d(inputs: int = 1) -> Transform:
    """A matrix as GPT-2 keeps it: ``[in, out]``, not transposed."""

    def shape_in(shape: Shape) -> Shape:
        return math.prod(shape[:inputs]), math.prod(shape[inputs:])

    return Transform(
        shape_in, lambda array, shape: array.reshape(shape), lambda array: array.reshape(shape_in(array.shape))
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """One parameter of a tensor that holds several side by side."""

    index: int
    """Counted from 0."""
    axis: int = 0
    """Axis of the tensor in the file along which its parameters lie."""
    blocks: int = 1
    """Number of blocks, each with a piece of every parameter; GPT-NeoX has a block for each head."""

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """One tensor of all parts.

        Example:
          >>> Part(0, blocks=2).join([np.array([1, 2]), np.array([3, 4])]).tolist()
          [1, 3, 2, 4]
        """
        first = [np.moveaxis(array, self.axis, 0) for array in arrays]
        pieces = [a.reshape(self.blocks, len(a) // self.blocks, *a.shape[1:]) for a in first]
        joined = np.concatenate(pieces, axis=1)
        return np.moveaxis(joined.reshape(-1, *joined.shape[2:]), 0, self.axis)

    def take(self, array: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
        """This part of a tensor whose parts have these sizes."""
        first = np.moveaxis(array, self.axis, 0)
        blocks = first.reshape(self.blocks, len(first) // self.blocks, *first.shape[1:])
        start, size = (sum(some) // self.blocks for some in (sizes[: self.index], sizes[self.index : self.index + 1]))
        piece = blocks[:, start : start + size]
        return np.moveaxis(piece.reshape(-1, *piece.shape[2:]), 0, self.axis)


@dataclasses.dataclass(frozen=True)
class Row:
    """Where a parameter stands in a file."""

    name: str
    """The tensor's name, with ``{layer}`` (counted from 0) for what every layer has, ``{expert}`` for every expert."""
    transform: Transform = same
    part: Part | None = None
    """None: the tensor is this parameter alone."""


Table = dict[ParameterPath, Row]
"""A row for each parameter."""


class Opened(NamedTuple):
    """A file or folder of weights before its tensors are read."""

    config: NetworkConfig
    table: Table
    source: Source
    ignored: tuple[str, ...]
    """Regular expressions of tensors that are not needed."""
