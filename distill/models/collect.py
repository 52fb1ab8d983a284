"""Collecting what some layers compute, inside a scan over all of them.

A scan that returned the states of every layer would hold ``[N, B, L, D]``. Here the carry holds a buffer with one slot
for each wanted layer. Every layer writes into the slot of the next wanted layer, which overwrites it. After the last
wanted layer the slot keeps its value. There is no branch, and every index is known when tracing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill.models.config import NetworkConfig
from distill.models.output import Collect, Relations
from distill.shapes import Array

Kept = dict[str, Any]
"""By the names of ``Collect``: arrays, or ``Relations`` of arrays, with a leading axis of slots."""


def inside(collect: Collect, layers: int) -> dict[str, tuple[int, ...]]:
    """The wanted layers, in order, that the scan must keep; the first and last hidden states are outside it."""
    wanted = {name: tuple(sorted(set(numbers))) for name, numbers in collect.by_name().items()}
    wanted["hidden"] = tuple(n for n in wanted["hidden"] if 0 < n < layers)
    return {name: numbers for name, numbers in wanted.items() if numbers}


def empty(config: NetworkConfig, collect: Collect, batch: int, length: int, keys: int) -> Kept:
    """Buffers for ``inside(collect)``."""
    c = config

    def zeros(slots: int, *shape: int, dtype: Any = c.dtype) -> Array:
        return jnp.zeros((slots, batch, *shape), dtype)

    make = {
        "hidden": lambda n: zeros(n, length, c.width),
        "attention": lambda n: zeros(n, c.heads, length, keys, dtype=jnp.float32),
        "relations": lambda n: Relations(
            zeros(n, c.heads, length, c.key_size),
            zeros(n, c.groups, keys, c.key_size),
            zeros(n, c.groups, keys, c.key_size),
        ),
    }
    return {name: make[name](len(numbers)) for name, numbers in inside(collect, c.layers).items()}


def slots_of(collect: Collect, layers: int) -> dict[str, tuple[Array, Array]]:
    """Slot of each layer in every buffer, and whether it writes there: two arrays ``[N]`` for each name."""
    numbers, slots = np.arange(1, layers + 1), {}
    for name, wanted in inside(collect, layers).items():
        slot = np.minimum(np.searchsorted(wanted, numbers), len(wanted) - 1)  # the first wanted layer from here on
        slots[name] = (jnp.asarray(slot, jnp.int32), jnp.asarray(numbers <= wanted[-1]))
    return slots


def keep(kept: Kept, values: Kept, slots: dict[str, tuple[Array, Array]]) -> Kept:
    """The buffers after one layer; ``slots`` are that layer's."""

    def write(buffer: Array, value: Array, slot: Array, writes: Array) -> Array:
        there = jax.lax.dynamic_index_in_dim(buffer, slot, axis=0, keepdims=False)
        row = jnp.where(writes, value.astype(buffer.dtype), there)
        return jax.lax.dynamic_update_index_in_dim(buffer, row, slot, axis=0)

    return {
        name: jax.tree.map(lambda buffer, value, at=slots[name]: write(buffer, value, *at), buffers, values[name])
        for name, buffers in kept.items()
    }


def collected(collect: Collect, layers: int, kept: Kept | None, embedded_BLD: Array, last_BLD: Array) -> Kept:
    """``Output.collected``: by name, then by layer."""
    result: Kept = {"hidden": {}, "attention": {}, "relations": {}}
    for name, numbers in inside(collect, layers).items():
        for slot, number in enumerate(numbers):
            result[name][number] = jax.tree.map(lambda buffer, slot=slot: buffer[slot], kept[name])
    ends = {0: embedded_BLD, layers: last_BLD}
    result["hidden"] |= {number: ends[number] for number in collect.hidden if number in ends}
    return result
