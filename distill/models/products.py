"""Products of activations with kernels, in the form that the backend multiplies fastest.

All forms are the einsum they are named for, within rounding.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill.devices import backend
from distill.shapes import Array

BLOCK = 64
"""Rows that are multiplied at a time where there is no kernel for groups of rows."""


def einsum(equation: str, x: Array, kernel: Array) -> Array:
    """``jnp.einsum(equation, x, kernel)``; on a CPU one product of two matrices.

    The equation sums the trailing axes of x, heads counted as trailing, over the leading axes of the kernel.
    """
    inputs, result = equation.split("->")
    of_x = inputs.split(",")[0]
    if of_x[0] != "b" or not backend.flatten_rows():
        return jnp.einsum(equation, x, kernel)
    x = x.swapaxes(1, 2) if of_x == "bhlk" else x
    batch, length = x.shape[:2]
    size = math.prod(x.shape[2:])
    y = x.reshape(-1, size) @ kernel.reshape(size, -1)
    y = y.reshape(batch, length, *kernel.shape[len(of_x) - 2 :])
    return y.swapaxes(1, 2) if result == "bhlk" else y


def low_rank(equation: str, x: Array, left: Array, right: Array) -> Array:
    """``(x · left) · right`` in place of ``x · kernel``: left ``[inputs…, r]``, right ``[r, outputs…]``."""
    inputs, result = equation.split("->")
    of_x, of_kernel = inputs.split(",")
    summed = "".join(axis for axis in of_kernel if axis in of_x)
    middle = "".join(axis for axis in of_x if axis not in summed) + "r"
    outputs = of_kernel.replace(summed, "")
    x_r = jnp.einsum(f"{of_x},{summed}r->{middle}", x, left)
    return jnp.einsum(f"{middle},r{outputs}->{result}", x_r, right)


# ---- groups of rows


def grouped_dot(x_RA: Array, kernels_EAB: Array, sizes_E: Array) -> Array:
    """``[R, B]``: the first ``sizes[0]`` rows times ``kernels[0]``, the next ``sizes[1]`` times ``kernels[1]``, …

    The sizes add up to R. This is ``jax.lax.ragged_dot``, which on a CPU multiplies every row by every kernel; there
    blocks of rows are multiplied one after the other.
    """
    return backend.by_platform(x_RA, kernels_EAB, sizes_E, cpu=_by_blocks, default=jax.lax.ragged_dot)


@jax.custom_vjp
def _by_blocks(x_RA: Array, kernels_EAB: Array, sizes_E: Array) -> Array:
    rows, padded_RA = x_RA.shape[0], _with_room(x_RA)

    def multiply(y_RB: Array, expert: Array, start: Array, _: Array) -> Array:
        # A block may reach into rows of the next expert; that expert's own block writes them again.
        return jax.lax.dynamic_update_slice_in_dim(y_RB, _block(padded_RA, start) @ kernels_EAB[expert], start, axis=0)

    return _over_blocks(sizes_E, multiply, jnp.zeros((rows + BLOCK, kernels_EAB.shape[2]), x_RA.dtype))[:rows]


def _forward(x_RA: Array, kernels_EAB: Array, sizes_E: Array):
    return _by_blocks(x_RA, kernels_EAB, sizes_E), (x_RA, kernels_EAB, sizes_E)


def _backward(saved, dy_RB: Array):
    x_RA, kernels_EAB, sizes_E = saved
    padded_RA, padded_RB = _with_room(x_RA), _with_room(dy_RB)

    def add(total_EAB: Array, expert: Array, start: Array, inside: Array) -> Array:
        rows = jnp.where(inside[:, None], _block(padded_RA, start), 0)
        product = jnp.einsum("ra,rb->ab", rows, _block(padded_RB, start), preferred_element_type=jnp.float32)
        return total_EAB.at[expert].add(product)

    d_kernels = _over_blocks(sizes_E, add, jnp.zeros(kernels_EAB.shape, jnp.float32))
    return _by_blocks(dy_RB, kernels_EAB.swapaxes(1, 2), sizes_E), d_kernels.astype(kernels_EAB.dtype), None


_by_blocks.defvjp(_forward, _backward)


def _over_blocks(sizes_E: Array, body: Callable[[Any, Array, Array, Array], Any], start: Any) -> Any:
    """``body(total, expert, first row, which of BLOCK rows are the expert's)`` over all blocks in the order of rows."""
    ends_E, blocks_E = jnp.cumsum(sizes_E), -(-sizes_E // BLOCK)
    until_E = jnp.cumsum(blocks_E)

    def one(n: Array, total: Any) -> Any:
        expert = jnp.searchsorted(until_E, n, side="right")
        first = ends_E[expert] - sizes_E[expert] + (n - until_E[expert] + blocks_E[expert]) * BLOCK
        return body(total, expert, first, first + jnp.arange(BLOCK) < ends_E[expert])

    return jax.lax.fori_loop(0, until_E[-1], one, start)


def _with_room(x_RA: Array) -> Array:
    return jnp.pad(x_RA, ((0, BLOCK), (0, 0)))


def _block(x_RA: Array, start: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(x_RA, start, BLOCK, axis=0)
