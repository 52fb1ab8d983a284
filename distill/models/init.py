"""A student from its teacher: some of its layers, heads, feed-forward units and residual dimensions.

What to keep is decided by an importance measured on data: how much the loss would change, to first order, if a unit
were scaled away (arXiv 1906.10771). A unit ``u`` is multiplied by a gate that is 1; then

    ∂loss/∂gate_u = Σ w · ∂loss/∂w        over the weights w that carry what u gives

so one gradient with respect to the parameters tells it of all units at once, without looking inside the network. Where
to cut is told by the logical axes of the parameters (``Model.axes``).
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill.models.config import DecoderConfig
from distill.models.decoder import decoder
from distill.shapes import Array, Float, Params

Loss = Callable[[Params, Any], Array]
"""``(params, batch) -> scalar``."""


class Importance(NamedTuple):
    """Mean |∂loss/∂gate| over batches; larger is more important. N layers, G groups of heads, F units, D dimensions."""

    groups: Float[np.ndarray, "N G"]
    """Key/value heads with the query heads that share them: they stay or go together."""
    feed_forward: Float[np.ndarray, "N F"]
    width: Float[np.ndarray, " D"]
    """Residual dimensions, the same in all layers; the gate is where the norms read them."""


def importance(config: DecoderConfig, params: Params, loss: Loss, batches: Iterable[Any]) -> Importance:
    """Importance of every group of heads, feed-forward unit and residual dimension of a decoder.

    Args:
      config: of ``params``.
      params: the teacher's.
      loss: ``(params, batch) -> scalar``, such as the cross-entropy of some text.
      batches: at least one; the importance is the mean over them of the absolute derivative by a gate.

    Raises:
      ValueError: no batches.
    """

    @jax.jit
    def of_batch(batch: Any) -> Importance:
        gradient = jax.grad(loss)(params, batch)
        gates = jax.tree.map(jnp.multiply, params, gradient)
        layers = gates["layers"]
        by_head = _by_axis(layers["attention"]["output"]["kernel"], 0, 1)
        reads = [_norm_gate(config, gates["norm"], gradient["norm"])]
        if config.norm_place == "after":  # no norm reads: the kernels do
            kernels = [layers["attention"][name]["kernel"] for name in ("query", "key", "value")]
            kernels += [layers["mlp"][name]["kernel"] for name in ("gate", "up") if name in layers["mlp"]]
            reads += [_by_axis(kernel, 1) for kernel in kernels]
        else:
            names = ("attention_norm", "mlp_norm")
            reads += [_norm_gate(config, layers[name], gradient["layers"][name]) for name in names]
        return Importance(
            jnp.abs(by_head.reshape(config.layers, config.groups, -1).sum(axis=-1)),
            jnp.abs(_by_axis(layers["mlp"]["down"]["kernel"], 0, 1)),
            jnp.abs(sum(read.reshape(-1, config.width).sum(axis=0) for read in reads)),
        )

    total, count = None, 0
    for batch in batches:
        values = of_batch(batch)
        total = values if total is None else jax.tree.map(jnp.add, total, values)
        count += 1
    if not count:
        raise ValueError("importance: no batches; expected at least one to measure on.")
    return jax.tree.map(lambda value: np.asarray(value) / count, total)


def _norm_gate(config: DecoderConfig, gate: Params, gradient: Params) -> Array:
    """The derivative by a gate on what a norm gives, ``[..., D]``, from its scale's and its bias's own."""
    scale = gate["scale"] + gradient["scale"] if config.norm_plus_one else gate["scale"]
    return scale + gate["bias"] if "bias" in gate else scale


def _by_axis(x: Array, *kept: int) -> Array:
    """Sums over all axes but ``kept``."""
    return x.sum(axis=tuple(axis for axis in range(x.ndim) if axis not in kept))


def spread(layers: int, of: int) -> tuple[int, ...]:
    """``layers`` of ``of`` layers, counted from 0, evenly spread, the first and the last among them.

    Example:
      >>> spread(4, 10), spread(1, 10)
      ((0, 3, 6, 9), (0,))
    """
    _check_count(layers, of)
    return tuple(round(i * (of - 1) / max(layers - 1, 1)) for i in range(layers))


def every(layers: int, of: int) -> tuple[int, ...]:
    """Every n-th of ``of`` layers from the first on, n as large as ``layers`` of them allow (arXiv 1910.01108).

    Example:
      >>> every(3, 6), every(3, 8)
      ((0, 2, 4), (0, 2, 4))
    """
    _check_count(layers, of)
    return tuple(range(0, of, of // layers))[:layers]


def ends(layers: int, of: int) -> tuple[int, ...]:
    """The first and the last of ``of`` layers, one more of the first if ``layers`` is odd.

    Example:
      >>> ends(2, 6), ends(3, 6)
      ((0, 5), (0, 1, 5))
    """
    _check_count(layers, of)
    first = -(-layers // 2)
    return (*range(first), *range(of - layers + first, of))


def first(layers: int, of: int) -> tuple[int, ...]:
    """The first of ``of`` layers.

    Example:
      >>> first(2, 6)
      (0, 1)
    """
    _check_count(layers, of)
    return tuple(range(layers))


def _check_count(layers: int, of: int) -> None:
    if not 1 <= layers <= of:
        raise ValueError(f"{layers} layers of {of}; expected 1 … {of}.")


CHOICES = {"spread": spread, "every": every, "ends": ends, "first": first}
"""Ways to choose a number of layers."""


def like(
    config: DecoderConfig,
    params: Params,
    student: DecoderConfig,
    measure: Callable[[], Importance],
    layers: Sequence[int] | None = None,
) -> tuple[DecoderConfig, Params]:
    """``student_from`` with the sizes of another configuration; ``measure`` is called if units are chosen by it.

    ``layers`` names those to keep; None: evenly spread.

    Raises:
      ValueError: a student that cannot be cut out of this teacher: more of something, or heads of another size.
    """
    sizes = {"kv_heads": student.groups, "feed_forward": student.feed_forward, "width": student.width}
    there = {"kv_heads": config.groups, "feed_forward": config.feed_forward, "width": config.width}
    measured = measure() if any(sizes[name] < there[name] for name in sizes) else None
    layers = spread(student.layers, config.layers) if layers is None else layers
    small, params = student_from(config, params, layers=layers, measured=measured, **sizes)
    names = [field.name for field in dataclasses.fields(DecoderConfig)]
    different = [
        f"{name}={getattr(student, name)} (a part of the teacher has {getattr(small, name)})"
        for name in names
        if name not in ("kv_heads", "head_dim", "dtype") and getattr(student, name) != getattr(small, name)
    ]
    if student.key_size != small.key_size:
        different.append(f"head_dim={student.key_size} (the teacher's is {small.key_size})")
    if different:
        raise ValueError(f"a student cut out of its teacher cannot have {', '.join(different)}; change it to that.")
    return small, params


def student_from(
    config: DecoderConfig,
    params: Params,
    *,
    layers: int | Sequence[int] | None = None,
    kv_heads: int | None = None,
    feed_forward: int | None = None,
    width: int | None = None,
    measured: Importance | None = None,
) -> tuple[DecoderConfig, Params]:
    """A smaller decoder cut out of a larger one; what is not given stays whole.

    Norms are over what is left of their dimensions, and a scaled embedding is scaled by the student's own √width.

    Args:
      config: of the teacher.
      params: of the teacher; not changed.
      layers: how many, evenly spread with the first and the last among them, or a list of those to keep, from 0.
      kv_heads: groups of heads to keep in every layer, each with all its query heads; the most important ones.
      feed_forward: units to keep in every layer, likewise.
      width: residual dimensions to keep, the same everywhere, likewise.
      measured: from ``importance``; needed unless only layers are left out.

    Returns:
      ``(config, params)`` of the student: parameters in the order they had, of the teacher's values.

    Raises:
      ValueError: sizes larger than the teacher's, layers it has not, or no ``measured`` where it is needed.

    Example:
      >>> config = DecoderConfig(vocab_size=14, layers=4, width=8, heads=2, feed_forward=16)
      >>> small, params = student_from(config, decoder(config).init(jax.random.key(0)), layers=2)
      >>> small.layers, params["layers"]["mlp"]["up"]["kernel"].shape
      (2, (2, 8, 16))
    """
    asked = {"kv_heads": (kv_heads, config.groups), "feed_forward": (feed_forward, config.feed_forward)}
    asked |= {"width": (width, config.width)}
    for name, (size, there) in asked.items():
        if size is not None and not 1 <= size <= there:
            raise ValueError(f"student_from: {name}={size}; expected 1 … {there}, what the teacher has.")
    if measured is None and any(size not in (None, there) for size, there in asked.values()):
        raise ValueError("student_from: fewer heads, units or dimensions need measured=importance(…) to choose by.")
    kept_layers = tuple(range(config.layers)) if layers is None else layers
    kept_layers = spread(layers, config.layers) if isinstance(layers, int) else tuple(kept_layers)
    if not kept_layers or not all(0 <= layer < config.layers for layer in kept_layers):
        raise ValueError(f"student_from: layers={kept_layers}; expected some of 0 … {config.layers - 1}.")
    chosen = {"layers": np.asarray(kept_layers)}
    if kv_heads not in (None, config.groups):
        chosen["kv"] = _largest(measured.groups, kv_heads)[chosen["layers"]]
        per_group = config.heads // config.groups
        heads = chosen["kv"][..., None] * per_group + np.arange(per_group)
        chosen["heads"] = heads.reshape(len(kept_layers), -1)
    if feed_forward not in (None, config.feed_forward):
        chosen["mlp"] = _largest(measured.feed_forward, feed_forward)[chosen["layers"]]
    if width not in (None, config.width):
        chosen["embed"] = chosen["norm"] = _largest(measured.width[None], width)[0]
    groups = config.groups if kv_heads is None else kv_heads
    small = dataclasses.replace(
        config,
        layers=len(kept_layers),
        width=width or config.width,
        heads=groups * (config.heads // config.groups),
        kv_heads=groups,
        head_dim=config.key_size,
        feed_forward=feed_forward or config.feed_forward,
        rope_layers=_of_layers(config.rope_layers, kept_layers),
        window_layers=_of_layers(config.window_layers, kept_layers),
    )
    axes = decoder(config).axes
    return small, jax.tree.map(lambda leaf, names: _cut(leaf, names, chosen), params, axes)


def _of_layers(pattern: tuple[bool, ...], layers: Sequence[int]) -> tuple[bool, ...]:
    """A pattern by layer, for the layers that are kept; an empty one means all alike."""
    return tuple(pattern[layer] for layer in layers) if pattern else ()


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` largest of every row, in the order they stand in."""
    return np.sort(np.argsort(-values, axis=-1, kind="stable")[..., :count], axis=-1)


def _cut(leaf: Array, names: tuple[str, ...], chosen: dict[str, np.ndarray]) -> Array:
    """The chosen part of a parameter; indices ``[N, …]`` differ by layer."""
    if "layers" in names:
        leaf = leaf[chosen["layers"]]  # the first axis of what is stacked
    for axis, name in enumerate(names):
        index = chosen.get(name)
        if index is None or name == "layers":
            continue
        if index.ndim == 1:
            leaf = jnp.take(leaf, index, axis=axis)
        else:
            leaf = jax.vmap(lambda part, rows, axis=axis: jnp.take(part, rows, axis=axis - 1))(leaf, index)
    return leaf
