"""Devices: the mesh, which logical axis lies on which mesh axis, and the three wrappings of the step.

====================  ====================================================================================
``one_device``        jit
``on_mesh``           jit with shardings: data, fsdp and tensor axes (the default on several devices)
``pmapped``           pmap: pure data parallelism, the form papers print
====================  ====================================================================================

All give the same weights (tested). Each is a ``Wrapping``: how state, teacher and batches are placed, and the steps
compiled for them. The state is donated, the teacher never.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
import optax
from flax import jax_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distill.data.loader import Batch
from distill.models.model import Model
from distill.shapes import Params
from distill.step import Frozen, TrainState, TrainStep, scan_steps

MESH_AXES = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    "experts": None,
    "head": None,
    "layers": None,
    "rank": None,
    "norm": None,
    "position": None,
}
"""Logical axis → mesh axis. Every axis a model declares stands here."""

BATCH = PartitionSpec(("data", "fsdp"))


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the devices are used."""

    backend: Literal["auto", "one_device", "mesh", "pmap"] = "auto"
    """auto: a mesh where there are several devices, else one device."""
    fsdp: int = 1
    """Devices over which parameters and optimizer state are sharded; the batch is too."""
    tensor: int = 1
    """Devices over which heads, feed-forward and vocabulary are split."""

    def __post_init__(self):
        if min(self.fsdp, self.tensor) < 1:
            raise ValueError(f"parallel: fsdp={self.fsdp}, tensor={self.tensor}; expected at least 1.")
        if self.backend in ("one_device", "pmap") and self.fsdp * self.tensor > 1:
            raise ValueError(f"parallel: {self.backend} cannot shard parameters; use backend=mesh, or fsdp=tensor=1.")


@dataclasses.dataclass(frozen=True)
class Wrapping:
    """A compiled ``steps(state, teacher_params, examples, rows) -> (state, metrics)`` and where its arguments live."""

    steps: Callable[..., Any]
    place_state: Callable[[TrainState], TrainState]
    place_params: Callable[[Params], Params]
    """For the teacher, or a ``Frozen``."""
    place_examples: Callable[[Batch], Batch]
    place_rows: Callable[[np.ndarray], Any]
    """``[K, B]`` indices of K batches."""
    fetch_state: Callable[[TrainState], TrainState]
    """The state as one global tree, for checkpoints and evaluation."""
    fetch_metrics: Callable[[Any], Any] = lambda metrics: metrics
    places: tuple[Any, Any] | None = None
    """Shardings of the state and of what is frozen; None: they are whole on every device."""


def make_mesh(config: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of axes (data, fsdp, tensor) over the devices; data takes what the others leave.

    Raises ValueError where fsdp × tensor does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    inner = config.fsdp * config.tensor
    if len(devices) % inner:
        raise ValueError(f"parallel: fsdp × tensor = {inner} does not divide the {len(devices)} devices there are.")
    shape = (len(devices) // inner, config.fsdp, config.tensor)
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), devices=devices, axis_types=(AxisType.Auto,) * 3)


def param_shardings(model: Model, mesh: Mesh) -> Params:
    """One ``NamedSharding`` per parameter.

    Raises ValueError where a dimension cannot be divided over its mesh axis, or two dimensions of one parameter ask
    for the same axis.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    if model.axes is None:
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes)
    return jax.tree_util.tree_map_with_path(
        lambda path, shape, names: _sharding(jax.tree_util.keystr(path), shape.shape, names, mesh), shapes, model.axes
    )


def _sharding(path: str, shape: tuple[int, ...], names: tuple[str, ...], mesh: Mesh) -> NamedSharding:
    axes = [MESH_AXES[name] for name in names]
    axes = [axis if axis and mesh.shape[axis] > 1 else None for axis in axes]
    used = [axis for axis in axes if axis]
    if len(used) != len(set(used)):
        raise ValueError(f"parameter {path}: logical axes {names} put two dimensions on one mesh axis: {axes}.")
    for size, name, axis in zip(shape, names, axes, strict=True):
        if axis and size % mesh.shape[axis]:
            raise ValueError(
                f"parameter {path}: {name}={size} cannot be divided over {axis}={mesh.shape[axis]} devices; "
                f"choose {axis} so that it divides {size}."
            )
    return NamedSharding(mesh, PartitionSpec(*axes))


def state_shardings(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shardings of a ``TrainState``: moments lie where their parameters lie, counters everywhere."""
    params = param_shardings(model, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    opt_state = jax.eval_shape(lambda: optimizer.init(model.init(jax.random.key(0))))
    opt_state = optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, opt_state, params, transform_non_params=lambda _: everywhere
    )
    return TrainState(everywhere, params, opt_state)


def one_device(train_step: TrainStep) -> Wrapping:
    """jit on the default device."""
    steps = jax.jit(scan_steps(train_step), donate_argnums=0)
    place = jax.device_put
    return Wrapping(steps, _owned, place, place, place, lambda state: state)


def on_mesh(
    train_step: TrainStep,
    student: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    teacher: Model | None = None,
) -> Wrapping:
    """jit on a mesh: parameters sharded by ``MESH_AXES``, the batch over (data, fsdp)."""
    state = state_shardings(student, optimizer, mesh)
    frozen = None if teacher is None else param_shardings(teacher, mesh)
    if student.base is not None:
        frozen = Frozen(frozen, param_shardings(student.base, mesh))
    everywhere = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(None, *BATCH))

    def step(state: TrainState, teacher_params: Params | None, batch: Batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # attention asks for it
            return train_step(state, teacher_params, batch)

    steps = jax.jit(
        scan_steps(step),
        donate_argnums=0,
        in_shardings=(state, frozen, everywhere, rows),
        out_shardings=(state, everywhere),
    )
    return Wrapping(
        steps,
        lambda tree: jax.device_put(_owned(tree), state),
        lambda tree: jax.device_put(tree, frozen),
        lambda tree: jax.device_put(tree, everywhere),
        lambda array: jax.device_put(_divisible(array, mesh.shape["data"] * mesh.shape["fsdp"]), rows),
        lambda tree: tree,
        places=(state, frozen),
    )


def pmapped(make_step: Callable[[str], TrainStep], devices: list[jax.Device] | None = None) -> Wrapping:
    """pmap over the devices: every device holds the whole state and a part of the batch.

    Args:
      make_step: ``axis_name -> train_step``, a step that sums over that axis.
      devices: None: all.
    """
    devices = jax.devices() if devices is None else devices
    steps = jax.pmap(scan_steps(make_step("data")), axis_name="data", devices=devices, donate_argnums=0)

    def replicate(tree):
        return jax_utils.replicate(tree, devices)

    def place_rows(rows: np.ndarray):
        rows = _divisible(rows, len(devices))
        parts = np.swapaxes(rows.reshape(rows.shape[0], len(devices), -1), 0, 1)
        return jax.device_put(parts, NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data")))

    return Wrapping(steps, replicate, replicate, replicate, place_rows, jax_utils.unreplicate, jax_utils.unreplicate)


def _divisible(rows: np.ndarray, devices: int) -> np.ndarray:
    if rows.shape[1] % devices:
        raise ValueError(f"batch_size={rows.shape[1]} cannot be divided over {devices} devices.")
    return rows


def _owned(tree):
    """A copy of its own: the steps donate (delete) the state, which must not share arrays with anything else."""
    return jax.tree.map(lambda x: jax.numpy.array(x, copy=True), tree)


def wrap(
    config: ParallelConfig,
    make_step: Callable[..., TrainStep],
    student: Model,
    optimizer: optax.GradientTransformation,
    teacher: Model | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Wrapping:
    """The wrapping a configuration asks for; ``make_step(axis_name, mesh=None)`` builds the pure step.

    ``devices``: None: all there are.
    """
    backend = config.backend
    if backend == "auto":
        backend = "mesh" if len(devices or jax.devices()) > 1 else "one_device"
    if backend == "pmap":
        return pmapped(make_step)
    if backend == "one_device":
        return one_device(make_step(None))
    mesh = make_mesh(config, devices)
    return on_mesh(make_step(None, mesh=mesh), student, optimizer, mesh, teacher)
