"""``Term``: one summand of the objective, as a pure function of what it may look at.

    loss = Σ weight · mean over counted positions of value(view)

A term declares what it needs; the train step computes that and nothing else, and asks no term for its class.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from distill.batch import Batch
from distill.errors import UserError
from distill.models.output import Collect, Routing
from distill.shapes import Array, Float, Labels, Logits, Nats, Params

Features = dict[str, dict[int, Any]]
"""``Output.collected``: by the names of ``Collect``, then by layer."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a term looks at.

    Terms that need logits alone are computed on rows of positions ``[..., V]``, in chunks where the head is chunked.
    """

    student_logits: bool = False
    teacher_logits: bool = False
    """All logits of the teacher: of a live one, or stored (``losses.DenseTargets``, ``losses.HiddenTargets``)."""
    signal: bool = False
    """What there is of the teacher's distribution: its logits, or any stored targets."""
    student_layers: Collect | None = None
    teacher_layers: Collect | None = None
    """Hidden states, attention maps or relations, kept on the way through the network."""
    routing: bool = False
    """Where a mixture of experts sent its tokens."""

    @property
    def head(self) -> bool:
        """Does it look at logits, or at what is stored of them?"""
        return self.student_logits or self.teacher_logits or self.signal

    @property
    def layers(self) -> bool:
        """Does it look inside the networks?"""
        return self.student_layers is not None or self.teacher_layers is not None or self.routing


LOGITS = Needs(student_logits=True)
"""The student's logits."""
BOTH_LOGITS = Needs(student_logits=True, teacher_logits=True)
"""The logits of student and teacher."""
SIGNAL = Needs(student_logits=True, signal=True)
"""The student's logits, and what there is of the teacher's distribution."""


class View(NamedTuple):
    """What a term may look at. What no term needs is None.

    Logits, labels, targets and weights share their leading axes: ``[B, L]``, or rows of positions ``[n]``. Features,
    batch, parameters and routing are those of the whole batch; views of rows have none.
    """

    student_logits: Logits | None = None
    teacher_logits: Logits | None = None
    labels: Labels | None = None
    """0 where nothing counts."""
    targets: Any = None
    """``Batch.targets``: per-position arrays, zeros where nothing counts."""
    weights: Float[Array, "*batch"] | None = None
    """Weight of each position in the mean; None means uniform. Terms do not read it: their values are multiplied."""
    student_features: Features | None = None
    teacher_features: Features | None = None
    batch: Batch | None = None
    params: Params | None = None
    """All parameters of the student, those not learnt among them."""
    routing: Routing | None = None
    """Of the student: counts of the whole global batch, probabilities of this device's tokens."""
    routed: Array | None = None
    """Tokens times layers of the whole global batch that went through a router."""


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of the objective.

    Example:
      >>> import jax.numpy as jnp
      >>> def squared(view):
      ...     return 0.5 * ((view.student_logits - view.teacher_logits) ** 2).sum(-1)
      >>> term = Term("squared_error", 0.1, BOTH_LOGITS, squared)
      >>> term.value(View(student_logits=jnp.ones((2, 3)), teacher_logits=jnp.zeros((2, 3))))
      Array([1.5, 1.5], dtype=float32)
    """

    name: str
    """Of its metric; unique in an objective."""
    weight: float
    needs: Needs
    value: Callable[[View], Nats]
    """``value(view) -> nats`` per position, or a scalar: this device's share of one number of the whole batch."""

    def __post_init__(self):
        if not isinstance(self.needs, Needs):
            raise UserError(f"term {self.name!r}: needs={self.needs!r}; expected Needs(…), such as term.BOTH_LOGITS.")
        if isinstance(self.weight, str) or not callable(self.value):
            raise UserError(
                f"term {self.name!r}: weight={self.weight!r}, value={self.value!r}; expected a number and a function."
            )


Terms = Sequence[Term] | Callable[[Array], Sequence[Term]]
"""Terms, or a function of the optimizer step that gives them: weights and temperatures may follow a schedule."""
