"""Safetensors files: read one tensor at a time, written in shards. Pickled files are never opened."""

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from distill.errors import MissingFile, UserError, shown
from distill.weights.files import INDEX, SINGLE, check_beside_index, json_object, only_file

_SHARD = re.compile(r"[\w.-]+\.safetensors")
_KINDS = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}
_KINDS["BF16"] = jnp.dtype(jnp.bfloat16)
"""Types that are read, by their names in the file."""
_EXPONENTS = {
    "float64": np.uint64(0x7FF0_0000_0000_0000),
    "float32": np.uint32(0x7F80_0000),
    "float16": np.uint16(0x7C00),
    "bfloat16": np.uint16(0x7F80),
}
"""Type → its exponent bits: all set in infinity and NaN only (NumPy's ``isfinite`` is slow for bfloat16)."""


class SafetensorsSource:
    """The tensors of a folder: of the files in its index, or of its one file.

    Args:
      folder: holds ``model.safetensors``, or ``model.safetensors.index.json`` and its shards, or one ``*.safetensors``.

    Raises:
      MissingFile: no such folder, or a shard of the index is missing.
      UserError: no safetensors file (weights that would have to be unpickled are not read), several without an index,
        a file that is cut off or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise MissingFile(f"{folder}: no such folder.")
        index = self.folder / INDEX
        if index.exists():
            where = _read_index(index)
            check_beside_index(self.folder, set(where.values()))
            self._headers = {file: _header(self.folder / file) for file in sorted(set(where.values()))}
            for name, file in sorted(where.items()):
                if name not in self._headers[file]:
                    raise UserError(f"{self.folder / file}: lacks {name}, which {INDEX} places there.")
        else:
            file = only_file(self.folder)
            self._headers = {file: _header(self.folder / file)}
            where = dict.fromkeys(self._headers[file], file)
        self._where = where

    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._where)

    def same(self, one: str, other: str, piece: int = 2**20) -> bool:
        """Whether two tensors hold the same numbers; a piece at a time."""
        (kind, shape, start), (other_kind, other_shape, other_start) = map(self._place, (one, other))
        if shape != other_shape or not {kind, other_kind} <= _KINDS.keys():
            return False
        size, ours, theirs = math.prod(shape), _KINDS[kind], _KINDS[other_kind]
        for first in range(0, size, piece):
            count = min(piece, size - first)
            a = np.fromfile(self._path(one), ours, count, offset=start + first * ours.itemsize)
            b = np.fromfile(self._path(other), theirs, count, offset=other_start + first * theirs.itemsize)
            if not np.array_equal(a.astype(np.float64), b.astype(np.float64)):
                return False
        return True

    def _path(self, name: str) -> Path:
        return self.folder / self._where[name]

    def _place(self, name: str) -> tuple[str, tuple[int, ...], int]:
        return self._headers[self._where[name]][name]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, by the header."""
        return self._place(name)[1]

    def get(self, name: str) -> np.ndarray:
        """One tensor, read now, in the file's type; the file is not mapped, so the rest of it is not in memory.

        Raises:
          UserError: a type that is no float of 16 bits or more, such as a quantised one; NaN or infinity.
        """
        path, (kind, shape, start) = self._path(name), self._place(name)
        if kind not in _KINDS:
            raise UserError(
                f"{path}: tensor {name} has type {kind}; expected floats of 16 bits or more, not quantised."
            )
        array = np.fromfile(path, _KINDS[kind], math.prod(shape), offset=start).reshape(shape)
        refuse_nonfinite(array, path, name)
        return array


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Tensor → type, shape, and where its bytes begin; ``safe_open`` checks that the file is whole."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise MissingFile(f"{path}: missing; {INDEX}, or a link, names it. Was the download cut off?")
    if not path.is_file():
        raise UserError(f"{path}: no regular file; expected one.")
    try:
        with safe_open(path, framework="numpy") as opened:
            names = set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not readable as safetensors: cut off or damaged ({error}).") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    tensors = {name: header[name] for name in names}
    return {n: (t["dtype"], tuple(t["shape"]), 8 + size + t["data_offsets"][0]) for n, t in tensors.items()}


def refuse_nonfinite(array: np.ndarray, path: Path, name: str, piece: int = 2**18) -> None:
    """Raises UserError with the name of a tensor of ``path`` that holds NaN or infinity; a piece at a time."""
    exponent = _EXPONENTS[array.dtype.name]
    bits = array.reshape(-1).view(exponent.dtype)
    for start in range(0, bits.size, piece):
        wrong = bits[start : start + piece] & exponent == exponent
        if wrong.any():
            at = tuple(map(int, np.unravel_index(start + int(wrong.argmax()), array.shape)))
            raise UserError(
                f"{path}: tensor {name} holds {float(array[at])} at {list(at)}; expected finite numbers: the training "
                "that wrote it diverged, or the file is damaged."
            )


def _read_index(index: Path) -> dict[str, str]:
    where = json_object(index).get("weight_map")
    if not isinstance(where, dict):
        raise UserError(f"{index}: not readable; expected a weight_map from names to files, got {shown(where)}.")
    strange = sorted({str(file) for file in where.values() if not (isinstance(file, str) and _SHARD.fullmatch(file))})
    if strange or not where:
        raise UserError(f"{index}: names {shown(strange) if strange else 'nothing'}; expected files beside it.")
    return where


def is_weights(name: str) -> bool:
    """Whether ``write`` writes a file of this name."""
    return name in (INDEX, SINGLE) or re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name) is not None


def write(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = 5_000_000_000) -> None:
    """Writes tensors as ``model.safetensors``, or as shards with an index if they are larger than ``shard_bytes``.

    One shard is held in memory. Files are renamed to their names when all are written.

    Args:
      folder: exists, without weights.
      tensors: names and C-contiguous arrays, each name once.
      shard_bytes: most bytes of one file, unless a single tensor has more.

    Raises:
      OSError: not written, such as for a full disk.
    """
    partial, where, total = [], [], 0
    for shard in _shards(tensors, shard_bytes):
        partial.append(_write_one(folder / f"{len(partial) + 1}.partial", shard))
        where.append(list(shard))
        total += sum(array.nbytes for array in shard.values())
    count = len(partial)
    names = [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for path, name in zip(partial, names, strict=True):
        os.replace(path, folder / name)
    if count > 1:
        weight_map = {tensor: name for name, tensors in zip(names, where, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Iterable[tuple[str, np.ndarray]], most: int):
    shard, size = {}, 0
    for name, array in tensors:
        if shard and size + array.nbytes > most:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard


def _write_one(path: Path, shard: dict[str, np.ndarray]) -> Path:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(shard, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error
    return path
