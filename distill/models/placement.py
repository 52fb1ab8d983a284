"""Where activations lie on a mesh, said to the compiler where it cannot be left to choose."""

import math

import jax
from jax.sharding import AxisType, PartitionSpec

from distill.shapes import Array

ROW_AXES = ("dcn", "data", "fsdp")
"""Axes of a mesh over which the rows of a batch lie."""


def rows_apart(x_BLD: Array) -> Array:
    """Rows over their axes of the mesh in context, widths whole; without a mesh, or within pmap, ``x_BLD`` as it is.

    Left to itself the compiler may cut the width as the embedding is cut, over fsdp, and then every device of fsdp
    computes all rows and exchanges activations in place of parameters.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]
    axes = tuple(axis for axis in ROW_AXES if axis in left and mesh.shape[axis] > 1)
    if not axes or x_BLD.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x_BLD
    return jax.lax.with_sharding_constraint(x_BLD, PartitionSpec(axes, PartitionSpec.UNCONSTRAINED, None))
