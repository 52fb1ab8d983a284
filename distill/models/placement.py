"""Sharding constraints on activations, where the compiler's choice would be worse."""

import math

import jax
from jax.sharding import AxisType, PartitionSpec

from distill.shapes import Array

ROW_AXES = ("dcn", "data", "fsdp")
"""Mesh axes over which the rows of a batch are sharded."""


def rows_apart(x_BLD: Array) -> Array:
    """Shards rows over their axes of the mesh in context and keeps widths whole; a no-op without a mesh or in pmap.

    Without the constraint the compiler may shard the width like the embedding, over fsdp. Then every device of fsdp
    computes all rows and exchanges activations instead of parameters.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
    axes = tuple(axis for axis in ROW_AXES if axis in left and mesh.shape[axis] > 1)
    if not axes or x_BLD.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x_BLD
    return jax.lax.with_sharding_constraint(x_BLD, PartitionSpec(axes, PartitionSpec.UNCONSTRAINED, None))
