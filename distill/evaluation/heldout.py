"""Held-out text, read once by the teacher: how near a student is to it, and to the text."""

import contextlib
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill import losses
from distill.batch import Batch
from distill.devices import processes
from distill.errors import UserError
from distill.models.model import Model
from distill.models.placement import ROW_AXES
from distill.shapes import Array, Params

ROWS = 8
"""Rows of text measured at a time; on a mesh the next multiple of the devices that share them."""


def rows_at_a_time(parts: int) -> int:
    """Rows measured at a time by a number of devices.

    Example:
      >>> rows_at_a_time(1), rows_at_a_time(3), rows_at_a_time(64)
      (8, 9, 64)
    """
    return -(-ROWS // parts) * parts


class Heldout:
    """Rows of text with the teacher's last hidden states on them, kept: the teacher reads each row once.

    All measures are means over counted tokens, in nats: ``kl`` = KL(teacher‖student), ``nll`` = −log student(label),
    ``perplexity`` = exp(nll), ``agreement`` = share of tokens at which both find the same token most likely.

    On a mesh every device reads, keeps and compares its own rows.

    Args:
      teacher: a model with a head.
      params: its parameters; on a mesh, there.
      batch: all rows.
      mesh: of the run; None: one device.

    Raises:
      UserError: nothing to predict.
    """

    def __init__(self, teacher: Model, params: Params, batch: Batch, mesh: Mesh | None = None):
        self.tokens = int(batch.mask.sum())
        if not self.tokens:
            raise UserError("held-out text without a token to predict; give more of it.")
        self.batch, self.mesh = batch, mesh
        axes = () if mesh is None else tuple(axis for axis in ROW_AXES if axis in mesh.shape)
        parts = math.prod(mesh.shape[axis] for axis in axes)
        self._rows, self._places = rows_at_a_time(parts), PartitionSpec(axes or None)
        self._teacher, self._params = teacher, self._placed(params)
        self._head = teacher.head(self._params)
        self._hidden: list[Any] = [None] * -(-len(batch.inputs) // self._rows)

    def measure(self, student: Model, params: Params, rows: int | None = None) -> dict[str, float]:
        """``kl``, ``nll``, ``perplexity`` and ``agreement`` of a student, on all rows or the first ones."""
        params = self._placed(params)
        parts = []
        for i, batch in self._batches(rows):
            sums = _compare(student, self.mesh, params, self._head, self._states(i), batch)
            parts.append(processes.fetch(sums))
        weight = sum(float(part["weight"]) for part in parts)
        means = {key: sum(float(part[key]) for part in parts) / weight for key in ("kl", "nll", "agreement")}
        return means | {"perplexity": float(np.exp(means["nll"]))}

    def of_teacher(self) -> dict[str, float]:
        """``nll`` and ``perplexity`` of the teacher."""
        parts = [
            processes.fetch(_nll(self.mesh, self._head, self._states(i), batch)) for i, batch in self._batches(None)
        ]
        nll = sum(float(value) for value, _ in parts) / sum(float(weight) for _, weight in parts)
        return {"nll": nll, "perplexity": float(np.exp(nll))}

    def states(self) -> list[jax.Array]:
        """The teacher's states that are kept by now."""
        return [states for states in self._hidden if states is not None]

    def _batches(self, rows: int | None):
        """Number and rows of every batch of the first ``rows``; those beyond count nothing."""
        end = len(self.batch.inputs) if rows is None else min(rows, len(self.batch.inputs))
        for i in range(-(-end // self._rows)):
            yield i, self._spread(_padded(self.batch, i * self._rows, self._rows, end))

    def _states(self, i: int) -> jax.Array:
        if self._hidden[i] is None:
            # All its rows, whatever part of them is measured now: they are kept for the next time.
            batch = _padded(self.batch, i * self._rows, self._rows, len(self.batch.inputs))
            self._hidden[i] = _states(self._teacher, self.mesh, self._places, self._params, self._spread(batch))
        return self._hidden[i]

    def _spread(self, batch: Batch) -> Batch:
        """A batch with its rows over the devices."""
        return batch if self.mesh is None else processes.spread(batch, NamedSharding(self.mesh, self._places))

    def _placed(self, params: Params) -> Params:
        """Parameters on the mesh: where they lie there, or else whole on every device."""
        if self.mesh is None:
            return params
        whole = NamedSharding(self.mesh, PartitionSpec())

        def one(leaf: Any) -> Any:
            place = getattr(leaf, "sharding", None)
            there = isinstance(place, NamedSharding) and place.mesh == self.mesh
            return leaf if there else processes.spread(leaf, whole)

        return jax.tree.map(one, params)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _states(teacher: Model, mesh: Mesh | None, places: PartitionSpec, params: Params, batch: Batch) -> Array:
    states = _hidden(teacher, mesh, params, batch)
    return states if mesh is None else jax.lax.with_sharding_constraint(states, NamedSharding(mesh, places))


def _hidden(model: Model, mesh: Mesh | None, params: Params, batch: Batch) -> Array:
    # The layers place activations on the mesh in context.
    context = contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    with context:
        return model.apply(params, batch.inputs, positions=batch.positions, segments=batch.segments).hidden


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compare(student: Model, mesh: Mesh | None, params: Params, head, states: Array, batch: Batch) -> dict[str, Array]:
    """Sums over the counted tokens of a batch."""

    def per_position(student_logits, teacher_logits, labels):
        same = jnp.argmax(student_logits, axis=-1) == jnp.argmax(teacher_logits, axis=-1)
        nll = losses.cross_entropy(student_logits, labels)
        return losses.forward_kl(student_logits, teacher_logits), {"nll": nll, "agreement": same.astype(jnp.float32)}

    sides = (_hidden(student, mesh, params, batch), student.head(params)), (states, head)
    (kl, weight), rest = losses.chunked(per_position, *sides, batch.labels, batch.mask, has_aux=True, mesh=mesh)
    return rest | {"kl": kl, "weight": weight}


@functools.partial(jax.jit, static_argnums=0)
def _nll(mesh: Mesh | None, head, states: Array, batch: Batch) -> tuple[Array, Array]:
    def per_position(logits, _, labels):
        return losses.cross_entropy(logits, labels)

    return losses.chunked(per_position, (states, head), None, batch.labels, batch.mask, mesh=mesh)


def _padded(batch: Batch, first: int, count: int, end: int) -> Batch:
    """``count`` rows from ``first`` on; those from ``end`` on count nothing."""
    rows = np.arange(first, first + count)
    part = jax.tree.map(lambda field: field[np.where(rows < len(batch.inputs), rows, 0)], batch)
    return part._replace(mask=part.mask & (rows < end)[:, None])
