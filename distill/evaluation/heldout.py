"""Held-out text, read once by the teacher: how near a student is to it, and what it makes of the text."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill import losses
from distill.batch import Batch
from distill.devices import processes
from distill.models.model import Model
from distill.shapes import Params

ROWS = 8
"""Rows of text measured at a time."""


class Heldout:
    """Rows of text with the teacher's last hidden states on them, kept: the teacher reads each row once.

    All measures are means over counted tokens, in nats: ``kl`` = KL(teacher‖student), ``nll`` = −log student(label),
    ``perplexity`` = exp(nll), ``agreement`` = share of tokens at which both find the same word most likely.

    Args:
      teacher: a model with a head.
      params: its parameters.
      batch: all rows.

    Raises:
      ValueError: nothing to predict.
    """

    def __init__(self, teacher: Model, params: Params, batch: Batch):
        self.tokens = int(batch.mask.sum())
        if not self.tokens:
            raise ValueError("held-out text without a token to predict; give more of it.")
        self.batch = batch
        self._head = teacher.head(params)
        self._batches = [_padded(batch, first) for first in range(0, len(batch.inputs), ROWS)]
        self._hidden: list[Any] = [None] * len(self._batches)
        self._read = jax.jit(_hidden_of(teacher))
        self._params: Params | None = params
        self._compiled: dict[int, Any] = {}

    def measure(self, student: Model, params: Params, rows: int | None = None) -> dict[str, float]:
        """``kl``, ``nll``, ``perplexity`` and ``agreement`` of a student, on all rows or the first ones."""
        if id(student) not in self._compiled:
            self._compiled[id(student)] = student, jax.jit(_compare(student))  # the model is kept: its id stays its own
        compare = self._compiled[id(student)][1]
        batches = range(len(self._batches) if rows is None else min(-(-rows // ROWS), len(self._batches)))
        parts = [processes.fetch(compare(params, self._head, self._of(i), self._batches[i])) for i in batches]
        weight = sum(float(part["weight"]) for part in parts)
        means = {key: sum(float(part[key]) for part in parts) / weight for key in ("kl", "nll", "agreement")}
        return means | {"perplexity": float(np.exp(means["nll"]))}

    def of_teacher(self) -> dict[str, float]:
        """``nll`` and ``perplexity`` of the teacher."""
        judge = jax.jit(_nll)
        parts = [processes.fetch(judge(self._head, self._of(i), batch)) for i, batch in enumerate(self._batches)]
        nll = sum(float(value) for value, _ in parts) / sum(float(weight) for _, weight in parts)
        return {"nll": nll, "perplexity": float(np.exp(nll))}

    def _of(self, i: int) -> jax.Array:
        if self._hidden[i] is None:
            self._hidden[i] = self._read(self._params, self._batches[i])
        return self._hidden[i]


def _hidden_of(model: Model):
    return lambda params, batch: (
        model.apply(params, batch.inputs, positions=batch.positions, segments=batch.segments).hidden
    )


def _compare(student: Model):
    hidden_of = _hidden_of(student)

    def per_position(student_logits, teacher_logits, labels):
        same = jnp.argmax(student_logits, axis=-1) == jnp.argmax(teacher_logits, axis=-1)
        nll = losses.cross_entropy(student_logits, labels)
        return losses.forward_kl(student_logits, teacher_logits), {"nll": nll, "agreement": same.astype(jnp.float32)}

    def compare(params: Params, teacher_head, teacher_hidden, batch: Batch):
        sides = (hidden_of(params, batch), student.head(params)), (teacher_hidden, teacher_head)
        (kl, weight), rest = losses.chunked(per_position, *sides, batch.labels, batch.mask, has_aux=True)
        return rest | {"kl": kl, "weight": weight}

    return compare


def _nll(head, hidden, batch: Batch):
    def per_position(logits, _, labels):
        return losses.cross_entropy(logits, labels)

    return losses.chunked(per_position, (hidden, head), None, batch.labels, batch.mask)


def _padded(batch: Batch, first: int) -> Batch:
    """``ROWS`` rows from ``first`` on; those beyond the end count nothing."""
    rows = np.arange(first, first + ROWS)
    inside = rows < len(batch.inputs)
    part = jax.tree.map(lambda field: field[np.where(inside, rows, 0)], batch)
    return part._replace(mask=part.mask & inside[:, None])
