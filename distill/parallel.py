"""Devices: the mesh, which logical axis lies on which mesh axis, and the three wrappings of the step.

====================  ====================================================================================
``one_device``        jit
``on_mesh``           jit with shardings: dcn, data, fsdp, sequence and tensor axes (the default on several devices)
``pmapped``           pmap: pure data parallelism, the form papers print
====================  ====================================================================================

All give the same weights (tested). Each is a ``Wrapping``: how state, teacher and batches are placed, and the steps
compiled for them. The state is donated, the teacher never. On a mesh a state is drawn, or restored, in parts where it
will live (``draw_state``, ``abstract_state``): no device ever holds all of it.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import jax_utils, struct
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from distill.batch import Batch
from distill.devices import backend, processes
from distill.errors import UserError, check_fields
from distill.models.model import Model
from distill.models.placement import ROW_AXES
from distill.shapes import Array, Params
from distill.state import Frozen, TrainState, TrainStep, in_float32, init_state

Rules = Mapping[str, str | tuple[str, ...] | None]
"""Logical axis → the mesh axis, or axes, it is cut over; None: not cut."""

MESH_AXES: Rules = {
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
"""Every logical axis a model declares stands here."""

RULES: dict[str, Rules] = {
    "split": MESH_AXES,
    "gathered": dict.fromkeys(MESH_AXES) | {"embed": ("fsdp", "tensor")},
    "replicated": dict.fromkeys(MESH_AXES),
}
"""Ways for a model to lie on a mesh. ``split``: heads, feed-forward and vocabulary are worked on in parts, widths are
gathered when used. ``gathered``: widths lie over all of fsdp × tensor and are gathered when used; nothing else is cut,
so that 7 heads may meet 2 devices. ``replicated``: whole on every device, for a student that is small beside its
teacher."""

AXES = ("dcn", "data", "fsdp", "sequence", "tensor")
"""Of a mesh, the slowest network first."""


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes over which the examples of a batch lie."""
    return tuple(axis for axis in ROW_AXES if axis in mesh.shape)


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the devices are used."""

    backend: Literal["auto", "one_device", "mesh", "pmap"] = "auto"
    """auto: a mesh where there are several devices, else one device."""
    fsdp: int = 1
    """Devices over which parameters and optimizer state are sharded; the batch is too."""
    tensor: int = 1
    """Devices over which heads, feed-forward and vocabulary are split."""
    sequence: int = 1
    """Devices over which the positions of every text lie (long texts); must divide their length."""
    dcn: int = 1
    """Slices, or groups of devices, joined by a slow network: pure data parallelism between them."""
    student: Literal["split", "gathered", "replicated"] = "split"
    """How the student and its optimizer lie over fsdp and tensor (``RULES``)."""
    teacher: Literal["split", "gathered", "replicated"] = "split"
    """Likewise the teacher."""

    @property
    def sizes(self) -> dict[str, int]:
        """Axis of the mesh → its devices; data takes what these leave."""
        return {axis: vars(self)[axis] for axis in AXES if axis != "data"}

    def __post_init__(self):
        check_fields(self, "parallel")
        sizes = self.sizes
        if min(sizes.values()) < 1:
            raise UserError(f"parallel: {_listed(sizes)}; expected at least 1.")
        if self.backend in ("one_device", "pmap") and math.prod(sizes.values()) > 1:
            raise UserError(
                f"parallel: {self.backend} cannot shard: {_listed(sizes)}; use backend=mesh, or 1 for each of them."
            )


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


@dataclasses.dataclass(frozen=True)
class Wrapping:
    """A compiled ``steps(state, teacher_params, examples, rows) -> (state, metrics)`` and where its arguments live."""

    steps: Callable[..., Any]
    place_state: Callable[[TrainState], TrainState]
    place_params: Callable[[Params], Params]
    """For the teacher, or a ``Frozen``."""
    place_examples: Callable[[Batch], Batch]
    place_rows: Callable[[Any], Any]
    """``[K, B]`` indices of K batches, or a ``Batch`` of ``[K, B, …]``: K batches themselves."""
    fetch_state: Callable[[TrainState], TrainState] = lambda state: state
    """The state as one global tree, for checkpoints and evaluation."""
    fetch_metrics: Callable[[Any], Any] = lambda metrics: metrics
    places: tuple[Any, Any] | None = None
    """Shardings of the state and of what is frozen; None: they are whole on every device."""
    parts: int = 1
    """Number of parts into which a batch is dealt."""


def make_mesh(config: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of ``AXES`` over the devices; data takes what the others leave.

    Where the devices are of several slices, dcn goes from slice to slice and every other axis stays inside one.

    Raises UserError where the axes do not divide the number of devices, or dcn is not the number of TPU slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.sizes
    inner = math.prod(sizes.values())
    if len(devices) % inner:
        raise UserError(
            f"parallel: {_listed(sizes)}: their product {inner} does not divide the {len(devices)} devices there are."
        )
    sizes["data"] = len(devices) // inner
    shape = tuple(sizes[axis] for axis in AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and slices != config.dcn and devices[0].platform == "tpu":
        raise UserError(f"parallel: dcn={config.dcn}, and the devices are of {slices} slices; set dcn={slices}.")
    if slices == 1 or slices != config.dcn:
        return jax.make_mesh(shape, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))
    across = (config.dcn, *[1] * (len(AXES) - 1))
    placed = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), across, devices)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def param_shardings(model: Model, mesh: Mesh | AbstractMesh, rules: Rules = MESH_AXES) -> Params:
    """One ``NamedSharding`` per parameter.

    Raises UserError where a dimension cannot be divided over its mesh axes, or two dimensions of one parameter ask
    for the same axis.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    if model.axes is None:
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes)

    def one(path, shape, names: tuple[str, ...]) -> NamedSharding:
        return _sharding(jax.tree_util.keystr(path), shape.shape, names, mesh, rules)

    return jax.tree_util.tree_map_with_path(one, shapes, model.axes)


def _sharding(
    path: str, shape: tuple[int, ...], names: tuple[str, ...], mesh: Mesh | AbstractMesh, rules: Rules
) -> NamedSharding:
    asked = [rules[name] or () for name in names]
    asked = [(axes,) if isinstance(axes, str) else axes for axes in asked]
    axes = [tuple(axis for axis in several if mesh.shape[axis] > 1) for several in asked]
    used = [axis for several in axes for axis in several]
    if len(used) != len(set(used)):
        raise UserError(f"parameter {path}: logical axes {names} put two dimensions on one mesh axis: {axes}.")
    for size, name, several in zip(shape, names, axes, strict=True):
        parts = math.prod(mesh.shape[axis] for axis in several)
        if size % parts:
            over = " × ".join(several)
            raise UserError(
                f"parameter {path}: {name}={size} cannot be divided over {over}={parts} devices; "
                f"choose {over} so that it divides {size}."
            )
    return NamedSharding(
        mesh, PartitionSpec(*[several[0] if len(several) == 1 else several or None for several in axes])
    )


def state_shardings(
    model: Model, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh, rules: Rules = MESH_AXES
) -> TrainState:
    """Shardings of a ``TrainState``: moments lie where their parameters lie, counters everywhere."""
    params = param_shardings(model, mesh, rules)
    everywhere = NamedSharding(mesh, PartitionSpec())
    opt_state = jax.eval_shape(lambda: optimizer.init(model.init(jax.random.key(0))))
    opt_state = optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, opt_state, params, transform_non_params=lambda _: everywhere
    )
    return TrainState(everywhere, params, opt_state)


def draw_state(
    student: Model,
    optimizer: optax.GradientTransformation,
    key: Array,
    wrapping: Wrapping,
    params: Params | None = None,
) -> TrainState:
    """The state before the first step, where ``wrapping`` wants it.

    Args:
      student: draws the parameters where none are given; on a mesh every device draws its own parts, with bits that do
        not depend on the mesh.
      optimizer: draws nothing; its state is made from the parameters.
      key: of the draw.
      wrapping: says where the state lives.
      params: where the student starts; they are copied, since the steps delete their state. None: drawn.
    """
    if wrapping.places is None:
        return wrapping.place_state(init_state(student.init(key) if params is None else params, optimizer))
    if params is None:
        draw = jax.jit(lambda key: init_state(student.init(key), optimizer), out_shardings=wrapping.places[0])
        return draw(key)
    placed = processes.spread(_owned(in_float32(params)), wrapping.places[0].params)
    make = jax.jit(lambda params: init_state(params, optimizer), out_shardings=wrapping.places[0], donate_argnums=0)
    return make(placed)


def abstract_state(student: Model, optimizer: optax.GradientTransformation, wrapping: Wrapping) -> TrainState:
    """Shapes, types and places of a state: what ``Checkpoints.restore`` reads it straight into."""
    shapes = jax.eval_shape(lambda: init_state(student.init(jax.random.key(0)), optimizer))
    here = SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.map(lambda _: here, shapes) if wrapping.places is None else wrapping.places[0]
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def scan_steps(
    train_step: TrainStep,
    *,
    unpack: Callable[[Any], Params | Frozen | None] | None = None,
    cut: Callable[[Batch], Batch] | None = None,
    mesh: Mesh | None = None,
) -> Callable:
    """Several steps in one program: ``(state, teacher_params, examples, rows [K, B]) -> (state, metrics [K])``.

    One dispatch for K small steps: on tiny models Python would otherwise be the bottleneck.

    Args:
      train_step: one update.
      unpack: makes the teacher's parameters of the form in which they are kept between programs.
      cut: how a batch lies over the devices.
      mesh: the step is traced for; layers ask for it.

    Returns:
      A function of ``examples``, a ``Batch`` of all examples, and ``rows``: step k trains on ``examples[rows[k]]``.
      Where the examples are None, ``rows`` are the batches themselves, a ``Batch`` of ``[K, B, …]``.
    """
    context = None if mesh is None else mesh.abstract_mesh

    def steps(state: TrainState, frozen: Any, examples: Batch | None, rows: Array | Batch):
        def one(state: TrainState, row: Array | Batch):
            batch = row if examples is None else jax.tree.map(lambda field: field[row], examples)
            batch = batch if cut is None else cut(batch)
            with contextlib.nullcontext() if context is None else jax.sharding.use_abstract_mesh(context):
                return train_step(state, frozen if unpack is None else unpack(frozen), batch)

        return jax.lax.scan(one, state, rows)

    return steps


def one_device(train_step: TrainStep, device: jax.Device | None = None) -> Wrapping:
    """jit on one device; None: the default one."""

    steps = scan_steps(train_step, unpack=_stacked)

    def place(tree: Any) -> Any:
        return jax.device_put(tree, device)

    return Wrapping(
        steps=jax.jit(steps, donate_argnums=0, compiler_options=backend.compiler_options()),
        place_state=lambda tree: place(_owned(tree)),
        place_params=lambda frozen: place(_one_by_one(frozen)),
        place_examples=place,
        place_rows=place,
    )


@struct.dataclass
class _Layers:
    """One parameter of all layers, as one array a layer."""

    each: tuple[Array, ...]


def _one_by_one(frozen: Params | Frozen | None) -> Any:
    """The teacher with its layers apart, where they will be written out one after the other (``backend.unroll``).

    XLA's CPU backend copies a layer out of a stack before it multiplies by it, all of the teacher in every step.
    ``_stacked`` puts them together again: of that nothing is left in the compiled step. A student's frozen part stays
    as it is: its layers may be computed again (remat), and are then a loop.
    """
    if isinstance(frozen, Frozen):
        return frozen._replace(teacher=_one_by_one(frozen.teacher))

    def apart(path, x: Array):
        inside = any(getattr(key, "key", None) == "layers" for key in path)
        return _Layers(tuple(np.asarray(x))) if inside and x.ndim and backend.unroll(x.shape[0]) > 1 else x

    return jax.tree_util.tree_map_with_path(apart, frozen)


def _stacked(frozen: Any) -> Params | Frozen | None:
    def together(x):
        return jnp.stack(x.each) if isinstance(x, _Layers) else x

    return jax.tree.map(together, frozen, is_leaf=lambda x: isinstance(x, _Layers))


def on_mesh(
    train_step: TrainStep,
    student: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    teacher: Model | None = None,
    *,
    rules: Rules = MESH_AXES,
    teacher_rules: Rules = MESH_AXES,
) -> Wrapping:
    """jit on a mesh: parameters sharded by rules, examples over dcn, data and fsdp, their positions over sequence."""
    state = state_shardings(student, optimizer, mesh, rules)
    frozen = None if teacher is None else param_shardings(teacher, mesh, teacher_rules)
    if student.base is not None:
        frozen = Frozen(frozen, param_shardings(student.base, mesh, rules))
    everywhere = NamedSharding(mesh, PartitionSpec())
    over = batch_axes(mesh)
    rows = NamedSharding(mesh, PartitionSpec(None, over))
    texts = NamedSharding(mesh, PartitionSpec(over, "sequence"))

    long, parts = mesh.shape.get("sequence", 1), math.prod(mesh.shape[axis] for axis in over)

    def cut(batch: Batch) -> Batch:
        return jax.tree.map(lambda field: jax.lax.with_sharding_constraint(field, texts), batch)

    steps = scan_steps(train_step, cut=cut if long > 1 else None, mesh=mesh)
    shardings = {"in_shardings": (state, frozen, everywhere, rows), "out_shardings": (state, everywhere)}
    return Wrapping(
        steps=jax.jit(steps, donate_argnums=0, **shardings),
        place_state=lambda tree: processes.spread(_owned(tree), state),
        place_params=lambda tree: processes.spread(tree, frozen),
        place_examples=lambda tree: processes.spread(_cuttable(tree, long), everywhere),
        place_rows=lambda array: processes.spread(divisible(array, parts), rows),
        places=(state, frozen),
        parts=parts,
    )


def pmapped(make_step: Callable[[str], TrainStep], devices: Sequence[jax.Device] | None = None) -> Wrapping:
    """pmap over the devices: every device holds the whole state and a part of the batch.

    Args:
      make_step: ``axis_name -> train_step``, a step that sums over that axis.
      devices: None: all.
    """
    devices = jax.devices() if devices is None else devices
    steps = jax.pmap(scan_steps(make_step("data")), axis_name="data", devices=list(devices), donate_argnums=0)
    place = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))

    def replicate(tree):  # as the steps give it back: they are compiled once
        return jax.device_put(jax_utils.replicate(tree, devices), place)

    def place_rows(rows):
        def parts(x: np.ndarray) -> np.ndarray:
            return np.swapaxes(x.reshape(x.shape[0], len(devices), -1, *x.shape[2:]), 0, 1)

        dealt = jax.tree.map(parts, divisible(rows, len(devices)))
        return jax.device_put(dealt, place)

    return Wrapping(
        steps=steps,
        place_state=replicate,
        place_params=replicate,
        place_examples=replicate,
        place_rows=place_rows,
        fetch_state=jax_utils.unreplicate,
        fetch_metrics=jax_utils.unreplicate,
        parts=len(devices),
    )


def divisible(rows: Any, devices: int) -> Any:
    """The rows ``[K, B, …]`` unchanged; ValueError where B cannot be divided over the devices."""
    batch_size = jax.tree.leaves(rows)[0].shape[1]
    if batch_size % devices:
        raise UserError(f"batch_size={batch_size} cannot be divided over {devices} devices.")
    return rows


def _cuttable(examples: Batch, devices: int) -> Batch:
    length = examples.inputs.shape[1]
    if length % devices:
        raise UserError(
            f"texts of {length} tokens cannot be divided over sequence={devices} devices; choose a length that can."
        )
    return examples


def _owned(tree):
    """A copy: the steps donate (delete) the state, which must not share arrays with anything else."""
    return jax.tree.map(lambda x: jax.numpy.array(x, copy=True), tree)


def uses_mesh(config: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> bool:
    """Whether a run lies on a mesh: asked for, or, with ``auto``, where there are several devices or should be."""
    several = len(devices or jax.devices()) > 1 or math.prod(config.sizes.values()) > 1
    return config.backend == "mesh" or (config.backend == "auto" and several)


def everywhere(tree: Any, config: ParallelConfig) -> Any:
    """Arrays as they are, or whole on every device of the run's mesh: beside what was trained there."""
    if not uses_mesh(config):
        return tree
    return processes.spread(tree, NamedSharding(make_mesh(config), PartitionSpec()))


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
        backend = "mesh" if uses_mesh(config, devices) else "one_device"
    if processes.count() > 1 and backend != "mesh":
        raise UserError(f"parallel: backend={backend} with {processes.count()} processes; expected mesh, or auto.")
    if backend == "pmap":
        return pmapped(make_step, devices)
    if backend == "one_device":
        return one_device(make_step(None), devices[0] if devices else None)
    mesh = make_mesh(config, devices)
    rules = {"rules": RULES[config.student], "teacher_rules": RULES[config.teacher]}
    return on_mesh(make_step(None, mesh=mesh), student, optimizer, mesh, teacher, **rules)
