"""From named tensors to parameters and back, by a table: one row for each parameter, whatever the file.

A family of models or a kind of file brings a table and a ``Source``; what is stacked, checked and cast is here alone.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import jax
import numpy as np

from distill.models import DecoderConfig, EncoderConfig, Model, decoder, encoder
from distill.shapes import Params
from distill.weights.place import Place

NetworkConfig = DecoderConfig | EncoderConfig
Path = tuple[str, ...]
Shape = tuple[int, ...]


class Source(Protocol):
    """Named tensors, read one at a time."""

    def names(self) -> set[str]:
        """Every tensor's name."""
        ...

    def get(self, name: str) -> np.ndarray:
        """One tensor, read now."""
        ...


class Renamed:
    """A source whose names are not those of the table: ``rename(name in the source)`` is."""

    def __init__(self, source: Source, rename: Callable[[str], str]):
        self.source, self.where = source, {rename(name): name for name in source.names()}

    def names(self) -> set[str]:
        """The names of the table."""
        return set(self.where)

    def get(self, name: str) -> np.ndarray:
        """The tensor of that name."""
        return self.source.get(self.where[name])


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
"""As it is: norms, embeddings, biases with one axis."""

flat = Transform(
    lambda shape: (math.prod(shape),), lambda array, shape: array.reshape(shape), lambda array: array.reshape(-1)
)
"""All axes as one: the biases of heads, ours ``[H, K]``, there ``[H·K]``."""


def linear(inputs: int = 1) -> Transform:
    """A PyTorch ``Linear``: ours ``[in..., out...]`` with so many input axes, there ``[out, in]``.

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
    """Of a tensor that holds several parameters side by side: which one it is, and how they lie."""

    index: int
    """Counted from 0."""
    axis: int = 0
    """Of the tensor in the file."""
    blocks: int = 1
    """So many times, one after the other, a piece of every parameter: GPT-NeoX has one for each head."""

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


Table = dict[Path, Row]
"""Our parameter, such as ``("layers", "attention", "query", "kernel")`` → its row."""


def network(config: NetworkConfig) -> Model:
    """The decoder or encoder of a configuration."""
    return encoder(config) if isinstance(config, EncoderConfig) else decoder(config)


@functools.lru_cache(maxsize=8)  # tracing a decoder takes longer than reading a small one
def shapes_of(config: NetworkConfig) -> Mapping[Path, Shape]:
    """The shape of every parameter of a network; those of layers are stacked, ``[N, ...]``."""
    shapes = jax.eval_shape(network(config).init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return MappingProxyType({tuple(key.key for key in path): leaf.shape for path, leaf in leaves})


def assemble(
    config: NetworkConfig,
    table: Table,
    source: Source,
    place: Place | None = None,
    *,
    dtype: Any = np.float32,
    ignored: Sequence[str] = (),
) -> Params:
    """The parameters of a decoder from named tensors: nested dicts, layers stacked.

    Tensors are read one at a time; beside what is placed already, the host holds a few layers of one parameter
    (``place.PIECE``).

    Args:
      config: the decoder.
      table: a row for every parameter of this decoder.
      source: the tensors.
      place: puts parameters onto their devices; None: onto the default one.
      dtype: of the parameters; None: as in the source (the first layer's, for a stacked one).
      ignored: regular expressions of names (matched whole) that a source may have and nobody needs.

    Raises:
      ValueError: names that are missing or left over, a tensor of another shape, a table that does not fit.
    """
    place = place or Place()
    shapes = shapes_of(config)
    wanted = _wanted(config, table, shapes)
    _check_names(set(wanted), source.names(), ignored)
    params: Params = {}
    beside = _beside(table, shapes)
    for path, shape in shapes.items():
        one = functools.partial(_one, table[path], source, path, beside[path])
        read = functools.partial(_read, _names(config, table[path].name), one, shape, dtype)
        _put(params, path, place(path, shape, read))
    return params


def disassemble(config: NetworkConfig, table: Table, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """``(name, array)`` of every tensor of a file, one at a time, in the parameters' own types.

    ``assemble`` of these tensors gives the same bits.

    Raises:
      ValueError: parameters that are not those of this decoder, a table that does not fit.
    """
    shapes = shapes_of(config)
    _wanted(config, table, shapes)
    for path, shape in shapes.items():
        if tuple((leaf := _at(params, path)).shape) != shape:
            raise ValueError(f"parameter {'/'.join(path)} has shape {tuple(leaf.shape)}; this decoder has {shape}.")
    for name, members in _tensors(table, shapes).items():
        for full_name, index in _names(config, name):
            arrays = [_at(params, path)[index] if index else _at(params, path) for path in members]
            arrays = [table[path].transform.write(np.asarray(a)) for path, a in zip(members, arrays, strict=True)]
            part = table[members[0]].part
            array = arrays[0] if part is None else part.join(arrays)
            yield full_name, np.ascontiguousarray(array)


def _names(config: NetworkConfig, name: str) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors of a row: the name of each, and where it lies in the stacked parameter."""
    stacked = _stacked(name)
    counts = (getattr(config, {"layer": "layers", "expert": "experts"}[axis]) for axis in stacked)
    return [(name.format(**dict(zip(stacked, index, strict=True))), index) for index in np.ndindex(*counts)]


def _stacked(name: str) -> list[str]:
    return [axis for axis in ("layer", "expert") if f"{{{axis}}}" in name]


def _tensors(table: Table, paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Tensor → the parameters in it, in order: one, or its parts."""
    tensors: dict[str, list[Path]] = {}
    for path in paths:
        tensors.setdefault(table[path].name, []).append(path)
    return {
        name: sorted(paths, key=lambda path: (table[path].part or Part(0)).index) for name, paths in tensors.items()
    }


def _beside(table: Table, shapes: Mapping[Path, Shape]) -> dict[Path, list[Shape]]:
    """For each parameter, the shapes in the file of all that share its tensor: of one layer."""
    there = {p: table[p].transform.shape(shape[len(_stacked(table[p].name)) :]) for p, shape in shapes.items()}
    return {path: [there[p] for p in paths] for paths in _tensors(table, shapes).values() for path in paths}


def _wanted(config: NetworkConfig, table: Table, shapes: Mapping[Path, Shape]) -> list[str]:
    """The names a file must have; a table that lacks a parameter or names a tensor twice is an error."""
    if table.keys() != shapes.keys():
        wrong = sorted("/".join(path) for path in table.keys() ^ shapes.keys())
        raise ValueError(f"the name table does not fit this decoder; only one of them has {_some(wrong)}.")
    names = []
    for name, paths in _tensors(table, shapes).items():
        if ("{layer}" in name) != (paths[0][0] == "layers"):
            raise ValueError(f"{'/'.join(paths[0])}: {name!r} must hold {{layer}} exactly if every layer has it.")
        parts = [table[path].part for path in paths]
        if len(paths) > 1 and [part and part.index for part in parts] != list(range(len(paths))):
            raise ValueError(f"the name table uses {name.format(layer=0, expert=0)} twice.")
        names += [full_name for full_name, _ in _names(config, name)]
    return names


def _check_names(wanted: set[str], there: set[str], ignored: Sequence[str]) -> None:
    missing = sorted(wanted - there)
    left_over = sorted(n for n in there - wanted if not any(re.fullmatch(pattern, n) for pattern in ignored))
    complaints = {"missing": missing, "not understood": left_over}
    complaints = [f"{what}: {_some(names)}" for what, names in complaints.items() if names]
    if complaints:
        raise ValueError(f"the tensors are not those of this model; {'; '.join(complaints)}.")


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _read(names: list, one: Callable[[str, Shape], np.ndarray], shape: Shape, dtype: Any, first: int, last: int):
    """Layers first … last − 1, stacked; without layers, the one tensor."""
    if not names[0][1]:
        return np.ascontiguousarray(one(names[0][0], shape), dtype)
    each, stacked = len(names) // shape[0], None
    for name, (layer, *expert) in names[first * each : last * each]:
        array = one(name, shape[1 + len(expert) :])
        if stacked is None:
            stacked = np.empty((last - first, *shape[1:]), array.dtype if dtype is None else dtype)
        stacked[(layer - first, *expert)] = array
    return stacked


def _one(row: Row, source: Source, path: Path, beside: list[Shape], name: str, shape: Shape) -> np.ndarray:
    """One parameter (of one layer) from a tensor that holds parameters of the shapes ``beside``."""
    array, expected = source.get(name), tuple(beside[0])
    if row.part is not None:
        sizes = [other[row.part.axis] for other in beside]
        expected = tuple(sum(sizes) if n == row.part.axis else size for n, size in enumerate(expected))
    if tuple(array.shape) != expected:
        raise ValueError(
            f"{name}: shape {tuple(array.shape)}; expected {expected} for {'/'.join(path)} {tuple(shape)}."
        )
    return row.transform.read(array if row.part is None else row.part.take(array, sizes), shape)


def _at(tree: Any, path: Path) -> Any:
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            raise ValueError(f"there is no parameter {'/'.join(path)}.")
        tree = tree[name]
    return tree


def _put(tree: Params, path: Path, leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf
