"""Parameters: how a layer declares them, how they are drawn, and what a layer keeps for the backward pass."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from distill.shapes import Array

KERNELS = {"query": 1, "key": 1, "value": 1, "output": 2, "gate": 1, "up": 1, "down": 1}
"""Projection → number of input axes of its kernel, the leading axis of layers left out."""

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What a layer keeps from the forward to the backward pass: everything, its products with weights, its input only."""


def rematerialized(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """A layer, for ``nn.scan``, that keeps what ``REMAT`` names and recomputes the rest in the backward pass."""
    # prevent_cse: the loop over layers already keeps the compiler from undoing the recomputation.
    return block if remat == "none" else nn.remat(block, policy=REMAT[remat], prevent_cse=False)


class Parameter(nn.Partitioned):
    """One entry of the parameter specification: shape, logical axes and initial distribution.

    A parameter starts as ``mean + std · normal``.
    """

    std: float = struct.field(pytree_node=False, default=0.0)
    mean: float = struct.field(pytree_node=False, default=0.0)


def parameter(axes: tuple[str, ...], *, std: float = 0.0, mean: float = 0.0) -> Callable[..., Parameter]:
    """The Linen initialiser that declares a ``Parameter`` with these logical axis names."""
    return lambda _, shape: Parameter(jnp.zeros(shape, jnp.float32), names=axes, std=std, mean=mean)


def normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Normals with the same bits however they are sharded, under jit or not."""
    # Without the barrier XLA fuses the draw with what multiplies it; the last bit then depends on the sharding.
    return jax.lax.optimization_barrier(jax.random.normal(key, shape, jnp.float32))
