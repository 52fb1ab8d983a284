"""Structured pruning: a student with some of its teacher's layers, heads, feed-forward units and residual dimensions.

An importance measured on data decides what to keep: how much the loss would change, to first order, if a unit were
scaled to zero (arXiv 1906.10771). A unit ``u`` is multiplied by a gate that is 1; then

    ∂loss/∂gate_u = Σ w · ∂loss/∂w        over the weights w that read u

so one gradient with respect to the parameters gives the importance of all units. The logical axes of the parameters
(``Model.axes``) say where to cut.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill.errors import UserError
from distill.models.config import DecoderConfig
from distill.models.decoder import decoder
from distill.shapes import Array, Float, Params
from distill.students.layers import spread

Loss = Callable[[Params, Any], Array]
"""``(params, batch) -> scalar``."""


class Importance(NamedTuple):
    """Mean |∂loss/∂gate| over batches; larger is more important. N layers, G groups of heads, F units, D dimensions."""

    groups: Float[np.ndarray, "N G"]
    """Key/value heads with the query heads that share them: they stay or go together."""
    feed_forward: Float[np.ndarray, "N F"]
    width: Float[np.ndarray, " D"]
    """Residual dimensions, the same in all layers; the gate is where layers and head read them."""


def importance(config: DecoderConfig, params: Params, loss: Loss, batches: Iterable[Any]) -> Importance:
    """Importance of every group of heads, feed-forward unit and residual dimension of a decoder.

    Args:
      config: of ``params``.
      params: the teacher's.
      loss: ``(params, batch) -> scalar``, such as the cross-entropy of some text.
      batches: at least one; the importance is the mean over them of the absolute derivative by a gate.

    Raises:
      UserError: no batches.
    """

    axes = decoder(config).axes["layers"]

    @jax.jit
    def of_batch(batch: Any) -> Importance:
        gradients = jax.grad(loss)(params, batch)
        gates = jax.tree.map(jnp.multiply, params, gradients)
        layers, norm = gates["layers"], gates["norm"]
        by_head = _by_axis(layers["attention"]["output"]["kernel"], 0, 1)
        units = jnp.abs(_by_axis(layers["mlp"]["down"]["kernel"], 0, 1)) if _plain(axes) else jnp.zeros((0, 0))
        width = sum(norm.values()) + (gradients["norm"]["scale"] if config.norm_plus_one else 0.0)
        for branch, names in (("attention", ("query", "key", "value")), ("mlp", ("gate", "up"))):
            for name in names:
                if name in layers[branch]:
                    kernel = layers[branch][name]["kernel"]
                    width = width + _by_axis(kernel, axes[branch][name]["kernel"].index("embed"))
        return Importance(
            jnp.abs(by_head.reshape(config.layers, config.groups, -1).sum(axis=-1)), units, jnp.abs(width)
        )

    total, count = None, 0
    for batch in batches:
        values = of_batch(batch)
        total = values if total is None else jax.tree.map(jnp.add, total, values)
        count += 1
    if not count:
        raise UserError("importance: no batches; expected at least one to measure on.")
    return jax.tree.map(lambda value: np.asarray(value) / count, total)


def _plain(axes: Params) -> bool:
    """Whether every layer has one MLP, whose units can be chosen; a mixture of experts has not."""
    return axes.get("mlp", {}).get("down", {}).get("kernel") == ("layers", "mlp", "embed")


def _by_axis(x: Array, *kept: int) -> Array:
    """Sums over all axes but ``kept``."""
    return x.sum(axis=tuple(axis for axis in range(x.ndim) if axis not in kept))


def like(
    config: DecoderConfig,
    params: Params,
    student: DecoderConfig,
    measure: Callable[[], Importance],
    layers: Sequence[int] | None = None,
) -> tuple[DecoderConfig, Params]:
    """``student_from`` with the sizes of another configuration; ``measure`` is called only if units are dropped.

    ``layers`` names those to keep; None: evenly spread.

    Raises:
      UserError: a student that cannot be cut out of this teacher: more of something, or heads of another size.
    """
    sizes = {"kv_heads": student.groups, "feed_forward": student.feed_forward, "width": student.width}
    there = {"kv_heads": config.groups, "feed_forward": config.feed_forward, "width": config.width}
    measured = measure() if any(sizes[name] < there[name] for name in sizes) else None
    layers = spread(student.layers, config.layers) if layers is None else layers
    small, params = student_from(config, params, layers=layers, measured=measured, **sizes)
    free = ["kv_heads", "head_dim", "dtype"] + ["max_length"] * (config.positions == "rotary")
    fields, possible = vars(student), vars(small)
    different = [
        f"{name}={fields[name]} (a part of the teacher has {possible[name]})"
        for name in fields
        if name not in free and fields[name] != possible[name]
    ]
    if student.key_size != small.key_size:
        different.append(f"head_dim={student.key_size} (the teacher's is {small.key_size})")
    if different:
        raise UserError(f"a student cut out of its teacher cannot have {', '.join(different)}; change it to that.")
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
    """A smaller decoder cut out of a larger one; sizes that are not given stay.

    Norms are over the remaining dimensions; the width of a scaled embedding (Gemma) cannot change.

    Args:
      config: of the teacher.
      params: of the teacher; not changed.
      layers: their number, evenly spread with the first and the last included, or a list of those to keep, from 0.
      kv_heads: groups of heads to keep in every layer, each with all its query heads; the most important ones.
      feed_forward: units to keep in every layer, likewise.
      width: residual dimensions to keep, the same everywhere, likewise.
      measured: from ``importance``; needed unless only layers are left out.

    Returns:
      ``(config, params)`` of the student: the teacher's values, in their order.

    Raises:
      UserError: sizes larger than the teacher's, layers it has not, or no ``measured`` where it is needed.

    Example:
      >>> config = DecoderConfig(vocab_size=14, layers=4, width=8, heads=2, feed_forward=16)
      >>> small, params = student_from(config, decoder(config).init(jax.random.key(0)), layers=2)
      >>> small.layers, params["layers"]["mlp"]["up"]["kernel"].shape
      (2, (2, 8, 16))
    """
    small = part_of(config, layers=layers, kv_heads=kv_heads, feed_forward=feed_forward, width=width)
    sizes = ("kv_heads", small.groups, config.groups), ("feed_forward", small.feed_forward, config.feed_forward)
    fewer = [name for name, size, there in (*sizes, ("width", small.width, config.width)) if size < there]
    if measured is None and fewer:
        raise UserError("student_from: fewer heads, units or dimensions need measured=importance(…) to choose by.")
    axes = decoder(config).axes
    if "feed_forward" in fewer and not _plain(axes["layers"]):
        raise UserError("student_from: units of experts cannot be left out; keep feed_forward, or leave out layers.")
    kept = np.asarray(_kept(config, layers))
    chosen = {} if len(kept) == config.layers and (np.diff(kept) > 0).all() else {"layers": kept}
    if "kv_heads" in fewer:
        chosen["kv"] = _largest(measured.groups, kv_heads)[kept]
        per_group = config.heads // config.groups
        heads = chosen["kv"][..., None] * per_group + np.arange(per_group)
        chosen["heads"] = heads.reshape(len(kept), -1)
    if "feed_forward" in fewer:
        chosen["mlp"] = _largest(measured.feed_forward, feed_forward)[kept]
    if "width" in fewer:
        chosen["embed"] = chosen["norm"] = _largest(measured.width[None], width)[0]
    cut = jax.tree.map(lambda leaf, names: _cut(leaf, names, chosen), params, axes)
    _check_shapes(small, cut)
    return small, cut


def part_of(
    config: DecoderConfig,
    *,
    layers: int | Sequence[int] | None = None,
    kv_heads: int | None = None,
    feed_forward: int | None = None,
    width: int | None = None,
) -> DecoderConfig:
    """The configuration of ``student_from``: what differs by layer goes with its layer.

    Raises:
      UserError: sizes larger than the teacher's, layers it has not, or a width that cannot change.

    Example:
      >>> config = DecoderConfig(layers=3, sliding_window=8, window_layers=(True, False, True))
      >>> part_of(config, layers=(0, 1)).window_layers
      (True, False)
    """
    asked = {"kv_heads": (kv_heads, config.groups), "feed_forward": (feed_forward, config.feed_forward)}
    asked |= {"width": (width, config.width)}
    for name, (size, there) in asked.items():
        if size is not None and not 1 <= size <= there:
            raise UserError(f"student_from: {name}={size}; expected 1 … {there}, what the teacher has.")
    if config.scaled_embedding and width not in (None, config.width):
        raise UserError(
            f"student_from: width={width}; the embedding of this teacher counts √{config.width} times, which would "
            "change with the width; keep it."
        )
    kept = _kept(config, layers)
    by_layer = {"rope_layers": config.rope_layers, "window_layers": config.window_layers}
    groups = kv_heads or config.groups
    return dataclasses.replace(
        config,
        layers=len(kept),
        width=width or config.width,
        heads=groups * (config.heads // config.groups),
        kv_heads=groups,
        head_dim=config.key_size,
        feed_forward=feed_forward or config.feed_forward,
        **{name: tuple(pattern[layer] for layer in kept) if pattern else () for name, pattern in by_layer.items()},
    )


def _kept(config: DecoderConfig, layers: int | Sequence[int] | None) -> tuple[int, ...]:
    """The layers to keep, as a list."""
    if layers is None:
        return tuple(range(config.layers))
    kept = spread(layers, config.layers) if isinstance(layers, int) else tuple(layers)
    if not kept or not all(0 <= layer < config.layers for layer in kept):
        raise UserError(f"student_from: layers={kept}; expected some of 0 … {config.layers - 1}.")
    return kept


def _check_shapes(config: DecoderConfig, params: Params) -> None:
    """Raises UserError for a parameter whose shape is not that of this configuration."""
    wanted = jax.eval_shape(decoder(config).init, jax.random.key(0))
    for (path, leaf), want in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(wanted), strict=True):
        if leaf.shape != want.shape:
            raise UserError(
                f"student_from: {jax.tree_util.keystr(path)} is {leaf.shape} after the cut, a decoder of that size has "
                f"{want.shape}; a teacher with this option can only be cut by layers."
            )


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` largest values of every row, ascending."""
    return np.sort(np.argsort(-values, axis=-1, kind="stable")[..., :count], axis=-1)


def _cut(leaf: Array, names: tuple[str, ...], chosen: dict[str, np.ndarray]) -> Array:
    """The chosen part of a parameter; indices ``[N, …]`` differ by layer."""
    if "layers" in names and "layers" in chosen:
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
