"""Fingerprints of weights: of the files they are read from, or of parameters wherever they lie on a mesh.

A fingerprint stands in the identity of a run, which must not go on with another teacher.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill.config import write_json
from distill.devices import processes
from distill.errors import MissingFile
from distill.shapes import Array

_SEEDS = (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F)
"""Of four sums of 32 bits for each leaf."""


def of_files(path: Path) -> str:
    """Hash of the weights of a Hugging Face folder, with its config.json, or of one file.

    A file is hashed once: its hash is kept in the user's cache under its path, size and time of modification. Of
    several processes the first reads.

    Raises:
      MissingFile: no weights there.
    """
    return processes.from_first(lambda: _of_files(path))


def _of_files(path: Path) -> str:
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("config.json")])
    if not any(file.name != "config.json" for file in files):
        raise MissingFile(f"{path}: no weights; expected a GGUF file, or a folder with *.safetensors.")
    cache = _cache_file()
    known = _read_cache(cache)
    marks = {file: f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files}
    new = {mark: _sha256(file) for file, mark in marks.items() if mark not in known}
    if new:
        known |= new
        with contextlib.suppress(OSError):  # a home that cannot be written, or another run that writes it now
            write_json(cache, known)
    parts = [f"{file.name if path.is_dir() else ''} {known[mark]}" for file, mark in marks.items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill" / "hashes.json"


def _read_cache(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):  # none yet, or a damaged one
        return {}


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def of_tree(tree: Any) -> str:
    """Hash of every leaf of a tree: names, shapes, types, bits.

    Every device adds up its own part of a leaf and nothing is gathered: the sums, of integers, do not depend on how
    the leaf is cut.

    Example:
      >>> of_tree({"w": np.arange(3)}) == of_tree({"w": jnp.arange(3)}) != of_tree({"w": jnp.arange(3)[::-1]})
      True
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.asarray(processes.fetch(_sums(leaf))).tobytes())
    return digest.hexdigest()[:16]


@jax.jit
def _sums(leaf: Array) -> Array:
    """Four sums over the entries of ``mix(bits, position)``, modulo 2³²."""
    bits = _bits(leaf)
    return jnp.stack([jnp.sum(_mixed(bits, seed), dtype=jnp.uint32) for seed in _SEEDS])


def _bits(leaf: Array) -> Array:
    """Bits of every entry as uint32."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    return jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)


def _mixed(bits: Array, seed: int) -> Array:
    """Each entry mixed with its place in the array, by the last steps of MurmurHash3."""
    place = jnp.full(bits.shape, seed, jnp.uint32)
    for axis in range(bits.ndim):
        place = _scrambled(place ^ jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis))
    return _scrambled(bits ^ place)


def _scrambled(x: Array) -> Array:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
