"""Conversion between named tensors and parameters by a name table."""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from distill.errors import UserError, some
from distill.shapes import Params
from distill.weights.place import Place
from distill.weights.table import ParameterPath, Part, Row, Shape, Source, Table

Shapes = Mapping[ParameterPath, Shape]
"""The shape of every parameter of a network; those of layers are stacked, ``[N, ...]``."""


def assemble(
    shapes: Shapes,
    table: Table,
    source: Source,
    place: Place | None = None,
    *,
    dtype: Any = np.float32,
    ignored: Sequence[str] = (),
) -> Params:
    """The parameters of a network from named tensors: nested dicts, layers stacked.

    Tensors are read one at a time. The host holds a few layers of one parameter (``place.PIECE``).

    Args:
      shapes: of every parameter (``networks.shapes_of``).
      table: a row for every parameter.
      source: the tensors.
      place: puts parameters onto their devices; None: onto the default one.
      dtype: of the parameters; None: as in the source (the first layer's, for a stacked one).
      ignored: regular expressions of names (matched whole) of tensors that are not needed.

    Raises:
      UserError: names that are missing or left over, a tensor of another shape, a table that does not fit.
    """
    place = place or Place()
    _check_number(table, shapes, source.names())
    _check_names(set(_wanted(table, shapes)), source.names(), ignored)
    params: Params = {}
    beside = _beside(table, shapes)
    for path, shape in shapes.items():
        one = functools.partial(_one, table[path], source, path, beside[path])
        read = functools.partial(_read, _names(table[path].name, shape), one, shape, dtype)
        _put(params, path, place(path, shape, read))
    return params


def disassemble(shapes: Shapes, table: Table, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """``(name, array)`` of every tensor of a file, one at a time, in the parameters' own types.

    ``assemble`` of these tensors gives the same bits.

    Raises:
      UserError: parameters that are not those of this decoder, a table that does not fit.
    """
    _wanted(table, shapes)
    for path, shape in shapes.items():
        if tuple((leaf := _at(params, path)).shape) != shape:
            raise UserError(f"parameter {'/'.join(path)} has shape {tuple(leaf.shape)}; this decoder has {shape}.")
    for name, members in _tensors(table, shapes).items():
        for full_name, index in _names(name, shapes[members[0]]):
            arrays = [_at(params, path)[index] if index else _at(params, path) for path in members]
            arrays = [table[path].transform.write(np.asarray(a)) for path, a in zip(members, arrays, strict=True)]
            part = table[members[0]].part
            array = arrays[0] if part is None else part.join(arrays)
            yield full_name, np.ascontiguousarray(array)


def _names(name: str, shape: Shape) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors of a row: the name of each, and its index in the stacked parameter."""
    stacked = _stacked(name)
    counts = shape[: len(stacked)]
    return [(name.format(**dict(zip(stacked, index, strict=True))), index) for index in np.ndindex(*counts)]


def _stacked(name: str) -> list[str]:
    return [axis for axis in ("layer", "expert") if f"{{{axis}}}" in name]


def _tensors(table: Table, paths: Iterable[ParameterPath]) -> dict[str, list[ParameterPath]]:
    """Tensor → the parameters in it, in order: one, or its parts."""
    tensors: dict[str, list[ParameterPath]] = {}
    for path in paths:
        tensors.setdefault(table[path].name, []).append(path)
    return {
        name: sorted(paths, key=lambda path: (table[path].part or Part(0)).index) for name, paths in tensors.items()
    }


def _beside(table: Table, shapes: Shapes) -> dict[ParameterPath, list[Shape]]:
    """For each parameter, the shapes in the file of all that share its tensor: of one layer."""
    there = {p: table[p].transform.shape(shape[len(_stacked(table[p].name)) :]) for p, shape in shapes.items()}
    return {path: [there[p] for p in paths] for paths in _tensors(table, shapes).values() for path in paths}


def _wanted(table: Table, shapes: Shapes) -> list[str]:
    """The names a file must have. Raises UserError for a table that lacks a parameter or names a tensor twice."""
    if table.keys() != shapes.keys():
        wrong = sorted("/".join(path) for path in table.keys() ^ shapes.keys())
        raise UserError(f"the name table does not fit this decoder; only one of them has {some(wrong)}.")
    names = []
    for name, paths in _tensors(table, shapes).items():
        if ("{layer}" in name) != (paths[0][0] == "layers"):
            raise UserError(f"{'/'.join(paths[0])}: {name!r} must hold {{layer}} exactly if every layer has it.")
        parts = [table[path].part for path in paths]
        if len(paths) > 1 and [part and part.index for part in parts] != list(range(len(paths))):
            raise UserError(f"the name table uses {name.format(layer=0, expert=0)} twice.")
        names += [full_name for full_name, _ in _names(name, shapes[paths[0]])]
    return names


def _check_number(table: Table, shapes: Shapes, there: set[str]) -> None:
    """Compares numbers before a name is made for every tensor: those of a damaged configuration may be astronomical."""
    known = [path for path in shapes if path in table]
    number = sum(math.prod(shapes[path][: len(_stacked(table[path].name))]) for path in known)
    if number > 100 * (len(there) + 100):
        raise UserError(f"the model has {number} tensors, the files {len(there)}; expected the same number.")


def _check_names(wanted: set[str], there: set[str], ignored: Sequence[str]) -> None:
    missing = sorted(wanted - there)
    left_over = sorted(n for n in there - wanted if not any(re.fullmatch(pattern, n) for pattern in ignored))
    complaints = {"missing": missing, "not understood": left_over}
    complaints = [f"{what}: {some(names)}" for what, names in complaints.items() if names]
    if complaints:
        raise UserError(f"the tensors are not those of this model; {'; '.join(complaints)}.")


def _read(names: list, one: Callable[[str, Shape], np.ndarray], shape: Shape, dtype: Any, first: int, last: int):
    """Layers first … last − 1, stacked; or the one tensor of a parameter without layers."""
    if not names[0][1]:
        return np.ascontiguousarray(one(names[0][0], shape), dtype)
    each, stacked = len(names) // shape[0], None
    for name, (layer, *expert) in names[first * each : last * each]:
        array = one(name, shape[1 + len(expert) :])
        if stacked is None:
            stacked = np.empty((last - first, *shape[1:]), array.dtype if dtype is None else dtype)
        stacked[(layer - first, *expert)] = array
    return stacked


def _one(row: Row, source: Source, path: ParameterPath, beside: list[Shape], name: str, shape: Shape) -> np.ndarray:
    """One parameter (of one layer) from a tensor that holds parameters of the shapes ``beside``."""
    found, expected = tuple(source.shape(name)), tuple(beside[0])
    if row.part is not None:
        sizes = [other[row.part.axis] for other in beside]
        along = row.part.axis % len(expected)
        expected = tuple(sum(sizes) if n == along else size for n, size in enumerate(expected))
    if found != expected:  # before it is read: that of a damaged header may be astronomical
        raise UserError(f"{name}: shape {found}; expected {expected} for {'/'.join(path)} {tuple(shape)}.")
    array = source.get(name)
    return row.transform.read(array if row.part is None else row.part.take(array, sizes), shape)


def _at(tree: Any, path: ParameterPath) -> Any:
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            raise UserError(f"there is no parameter {'/'.join(path)}.")
        tree = tree[name]
    return tree


def _put(tree: Params, path: ParameterPath, leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf
