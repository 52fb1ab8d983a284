"""From named tensors to parameters and back, by a table: one row for each parameter, whatever the file.

A family of models or a kind of file brings a table and a ``Source``; what is stacked, checked and cast is here alone.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from distill.models import DecoderConfig, decoder
from distill.shapes import Array, Params

Path = tuple[str, ...]
Shape = tuple[int, ...]
Place = Callable[[Path, np.ndarray], Array]
"""``place(path, array) -> array on its devices``; the array of a layer's parameter is stacked: ``[N, ...]``."""


class Source(Protocol):
    """Named tensors, read one at a time."""

    def names(self) -> set[str]:
        """Every tensor's name."""
        ...

    def get(self, name: str) -> np.ndarray:
        """One tensor, read now."""
        ...


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


@dataclasses.dataclass(frozen=True)
class Row:
    """Where a parameter stands in a file."""

    name: str
    """The tensor's name, with ``{layer}`` (counted from 0) for what every layer has."""
    transform: Transform = same


Table = dict[Path, Row]
"""Our parameter, such as ``("layers", "attention", "query", "kernel")`` → its row."""


def shapes_of(config: DecoderConfig) -> dict[Path, Shape]:
    """The shape of every parameter of a decoder; those of layers are stacked, ``[N, ...]``."""
    leaves = jax.tree_util.tree_leaves_with_path(decoder(config).axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    paths = [tuple(key.key for key in path) for path, _ in leaves]
    shapes = jax.eval_shape(decoder(config).init, jax.random.key(0))
    return {path: _at(shapes, path).shape for path in paths}


def assemble(
    config: DecoderConfig,
    table: Table,
    source: Source,
    place: Place | None = None,
    *,
    dtype: Any = np.float32,
    ignored: Sequence[str] = (),
) -> Params:
    """The parameters of a decoder from named tensors: nested dicts, layers stacked.

    Tensors are read one at a time; beside what is placed already, the host holds one parameter of all layers.

    Args:
      config: the decoder.
      table: a row for every parameter of this decoder.
      source: the tensors.
      place: puts one finished parameter onto its devices; None: ``jnp.asarray``.
      dtype: of the parameters; None: as in the source (the first layer's, for a stacked one).
      ignored: regular expressions of names (matched whole) that a source may have and nobody needs.

    Raises:
      ValueError: names that are missing or left over, a tensor of another shape, a table that does not fit.
    """
    place = place or (lambda path, array: jnp.asarray(array))
    shapes = shapes_of(config)
    wanted = _wanted(config, table, shapes)
    _check_names(set(wanted), source.names(), ignored)
    params: Params = {}
    for path, shape in shapes.items():
        array = _read(config, table[path], source, path, shape, None if dtype is None else jnp.dtype(dtype))
        _put(params, path, place(path, array))
    return params


def disassemble(config: DecoderConfig, table: Table, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """``(name, array)`` of every tensor of a file, one at a time, in the parameters' own types.

    ``assemble`` of these tensors gives the same bits.

    Raises:
      ValueError: parameters that are not those of this decoder, a table that does not fit.
    """
    shapes = shapes_of(config)
    _wanted(config, table, shapes)
    for path, shape in shapes.items():
        leaf = _at(params, path)
        if tuple(leaf.shape) != shape:
            raise ValueError(f"parameter {'/'.join(path)} has shape {tuple(leaf.shape)}; this decoder has {shape}.")
        row = table[path]
        if "{layer}" not in row.name:
            yield row.name, np.ascontiguousarray(row.transform.write(np.asarray(leaf)))
            continue
        for layer in range(config.layers):
            yield row.name.format(layer=layer), np.ascontiguousarray(row.transform.write(np.asarray(leaf[layer])))


def _wanted(config: DecoderConfig, table: Table, shapes: dict[Path, Shape]) -> list[str]:
    """The names a file must have; a table that lacks a parameter or names a tensor twice is an error."""
    if table.keys() != shapes.keys():
        wrong = sorted("/".join(path) for path in table.keys() ^ shapes.keys())
        raise ValueError(f"the name table does not fit this decoder; only one of them has {_some(wrong)}.")
    names = []
    for path, row in table.items():
        if ("{layer}" in row.name) != (path[0] == "layers"):
            raise ValueError(f"{'/'.join(path)}: {row.name!r} must hold {{layer}} exactly if every layer has it.")
        repeats = config.layers if path[0] == "layers" else 1
        names += [row.name.format(layer=layer) for layer in range(repeats)]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"the name table uses {_some(twice)} twice.")
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


def _read(config: DecoderConfig, row: Row, source: Source, path: Path, shape: Shape, dtype: Any) -> np.ndarray:
    if path[0] != "layers":
        array = _one(row, row.name, source, path, shape)
        return np.ascontiguousarray(array, array.dtype if dtype is None else dtype)
    stacked = None
    for layer in range(config.layers):
        array = _one(row, row.name.format(layer=layer), source, path, shape[1:])
        if stacked is None:
            stacked = np.empty(shape, array.dtype if dtype is None else dtype)
        stacked[layer] = array
    return stacked


def _one(row: Row, name: str, source: Source, path: Path, shape: Shape) -> np.ndarray:
    array, expected = source.get(name), row.transform.shape(shape)
    if tuple(array.shape) != tuple(expected):
        raise ValueError(
            f"{name}: shape {tuple(array.shape)}; expected {tuple(expected)} for {'/'.join(path)} {tuple(shape)}."
        )
    return row.transform.read(array, shape)


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
