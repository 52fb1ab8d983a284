"""The header of a GGUF file, walked once and compared with the file's length before anything is allocated.

    "GGUF"  version: u32  tensors: u64  keys: u64
    keys    × (name, type: u32, value)                      name: length: u64, UTF-8; an array: type: u32, count: u64, …
    tensors × (name, dimensions: u32, sizes: u64 …, type: u32, offset: u64)
    padding to ``general.alignment``, then the tensors one after the other, each padded to it

llama.cpp refuses a file whose offsets are not those; so does this. Little-endian files of versions 2 and 3 are read.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from distill.errors import UserError

ALIGNMENT = "general.alignment"
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a value → bytes of one; 8 is a text, 9 an array."""
_TEXT, _ARRAY, _UINT32 = 8, 9, 4
_DIMENSIONS = 4
"""Most axes of a tensor."""


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def check_header(path: Path) -> None:
    """Refuses a file whose header does not describe the file.

    Raises:
      UserError: no GGUF file, a byte order or a version that is not read, a length, count, type or offset that does not
        fit into the file, a name that stands twice; says which.
    """
    with path.open("rb") as file:
        _Walk(path, file).check()


class _Walk:
    """A position in a file, which never goes beyond its end."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file, self.size = path, file, os.fstat(file.fileno()).st_size

    def refuse(self, message: str) -> UserError:
        return UserError(f"{self.path}: not readable as GGUF: {message}")

    def check(self) -> None:
        magic = self.file.read(4)
        if magic != b"GGUF":
            raise UserError(f"{self.path}: no GGUF file; it starts with {magic!r}, expected b'GGUF'.")
        version = self.number("<I", "version")
        if version & 0xFFFF == 0:
            raise self.refuse("its numbers are big-endian; convert it first: gguf-convert-endian FILE little.")
        if version not in (2, 3):
            raise self.refuse(f"version {version}; expected 2 or 3.")
        tensors, keys = self.number("<Q", "number of tensors"), self.number("<Q", "number of keys")
        self.fits(tensors, 24, "tensors")
        self.fits(keys, 13, "keys")
        alignment, names = 32, set()
        for _ in range(keys):
            name = self.text("name of a key")
            if name in names:
                raise self.refuse(f"the key {name} stands twice.")
            names.add(name)
            value = self.value(self.number("<I", f"type of {name}"), name)
            if name == ALIGNMENT:
                alignment = value
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.refuse(f"{ALIGNMENT} = {alignment}; expected a power of two.")
        self.layout([self.tensor() for _ in range(tensors)], alignment)

    def layout(self, tensors: list[_Tensor], alignment: int) -> None:
        """Every tensor begins where the one before it ends, and the last one ends inside the file."""
        names, start = set(), _padded(self.file.tell(), alignment)
        expected = 0
        for name, shape, kind, offset in tensors:
            if name in names:
                raise self.refuse(f"the tensor {name} stands twice.")
            names.add(name)
            if offset != expected:
                raise self.refuse(f"the tensor {name} begins at {offset}; the one before it ends at {expected}.")
            length = self.bytes_of(name, shape, kind)
            if start + offset + length > self.size:
                raise self.refuse(f"cut off: the tensor {name} ends at byte {start + offset + length} of {self.size}.")
            expected = _padded(offset + length, alignment)

    def bytes_of(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise self.refuse(f"the tensor {name} has the unknown type {kind}.") from None
        if not shape or shape[0] % block:
            raise self.refuse(f"the tensor {name} has rows of {shape[:1]} numbers; its type has blocks of {block}.")
        return math.prod(shape) // block * size

    def tensor(self) -> _Tensor:
        name = self.text("name of a tensor")
        count = self.number("<I", f"dimensions of {name}")
        if count > _DIMENSIONS:
            raise self.refuse(f"the tensor {name} has {count} dimensions; expected at most {_DIMENSIONS}.")
        shape = tuple(self.number("<Q", f"sizes of {name}") for _ in range(count))
        if not all(shape):
            raise self.refuse(f"the tensor {name} has the shape {shape}.")
        return _Tensor(name, shape, self.number("<I", f"type of {name}"), self.number("<Q", f"offset of {name}"))

    def value(self, kind: int, name: str) -> int | None:
        """Passes over a value; returns it if it is a u32."""
        if kind == _UINT32:
            return self.number("<I", name)
        if kind == _TEXT:
            self.text(name)
        elif kind == _ARRAY:
            self.array(name)
        elif kind in _SIZES:
            self.skip(_SIZES[kind], name)
        else:
            raise self.refuse(f"{name} has the unknown type {kind}.")
        return None

    def array(self, name: str) -> None:
        kind, count = self.number("<I", name), self.number("<Q", name)
        if kind == _TEXT:
            self.fits(count, 8, f"texts of {name}")
            for _ in range(count):
                self.text(name)
        elif kind in _SIZES:
            self.fits(count, _SIZES[kind], f"numbers of {name}")
            self.skip(count * _SIZES[kind], name)
        else:
            raise self.refuse(f"{name} is an array of type {kind}; expected numbers or texts.")

    def text(self, what: str) -> str:
        length = self.number("<Q", what)
        self.fits(length, 1, f"bytes of {what}")
        try:
            return self.file.read(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.refuse(f"{what} is no UTF-8.") from None

    def number(self, form: str, what: str) -> Any:
        size = struct.calcsize(form)
        self.fits(1, size, what)
        return struct.unpack(form, self.file.read(size))[0]

    def skip(self, size: int, what: str) -> None:
        self.fits(1, size, what)
        self.file.seek(size, os.SEEK_CUR)

    def fits(self, count: int, size: int, what: str) -> None:
        """Refuses more than what is left of the file."""
        left = self.size - self.file.tell()
        if count * size > left:
            raise self.refuse(f"cut off or damaged: {what}: {count} of {size} bytes, and {left} bytes are left.")


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
