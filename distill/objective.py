"""The objective: a weighted sum of terms, each a pure function of logits, each averaged as a (sum, weight) pair.

    loss = Σ_i weight_i · (Σ_counted positions term_i) / (number of counted positions in the whole global batch)

T² (Hinton et al., arXiv 1503.02531): softening by T divides the gradient of a divergence by about T², so the soft term
is multiplied by T². It is done here, once; a metric named after a divergence is the bare divergence, in nats.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax.numpy as jnp

from distill import losses
from distill.data.loader import Batch
from distill.losses.reduce import Pair
from distill.shapes import Labels, Logits, Nats

PerPosition = Callable[[Logits, Logits, Labels], Nats]
"""``(student_logits, teacher_logits, labels) -> nats``: any pure function, a user's own included."""


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of the objective.

    Example:
      >>> halved = Term("squared_error", lambda s, t, labels: 0.5 * ((s - t) ** 2).sum(-1), weight=0.1)
    """

    name: str
    per_position: PerPosition
    weight: float = 1.0
    needs_teacher: bool = True


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """kd_weight · T² · divergence(teacher, student; T) + task_weight · cross-entropy(labels)."""

    divergence: Literal["forward_kl", "reverse_kl", "generalized_jsd"] = "forward_kl"
    temperature: float = 1.0
    """T of the soft term (sampling has its own)."""
    beta: float = 0.5
    """Of generalized_jsd: 0 is forward KL, 1 reverse KL."""
    kd_weight: float = 1.0
    task_weight: float = 0.0
    temperature_squared: bool = True
    """Multiply the soft term by T²."""

    def __post_init__(self):
        if not self.temperature > 0.0:
            raise ValueError(f"objective: temperature={self.temperature}; expected a number above 0.")
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"objective: beta={self.beta}; expected a number in [0, 1].")
        if min(self.kd_weight, self.task_weight) < 0.0 or self.kd_weight + self.task_weight <= 0.0:
            raise ValueError(
                f"objective: kd_weight={self.kd_weight}, task_weight={self.task_weight}; expected ≥ 0, one above."
            )


def task_term(weight: float = 1.0) -> Term:
    """Cross-entropy with the labels."""
    return Term("cross_entropy", lambda s, t, labels: losses.cross_entropy(s, labels), weight, needs_teacher=False)


def distillation_term(config: ObjectiveConfig) -> Term:
    """The soft term, T² included in its weight."""
    options = {"temperature": config.temperature}
    if config.divergence == "generalized_jsd":
        options["beta"] = config.beta
    divergence = getattr(losses, config.divergence)
    factor = config.temperature**2 if config.temperature_squared else 1.0
    return Term(config.divergence, lambda s, t, labels: divergence(s, t, **options), config.kd_weight * factor)


def terms_of(config: ObjectiveConfig) -> tuple[Term, ...]:
    """The terms with a weight above 0."""
    terms = []
    if config.kd_weight:
        terms.append(distillation_term(config))
    if config.task_weight:
        terms.append(task_term(config.task_weight))
    return tuple(terms)


def select(logits: Logits, mask) -> Logits:
    """Logits with zeros where nothing counts: chosen BEFORE a loss is computed, so that no NaN comes back as 0·NaN."""
    return jnp.where(mask[..., None], logits, 0.0)


def evaluate_terms(
    terms: Sequence[Term], student_logits: Logits, teacher_logits: Logits | None, batch: Batch
) -> dict[str, Pair]:
    """Every term's (sum, weight) on a batch; positions outside ``batch.mask`` have no part in it.

    Raises:
      ValueError: a term needs a teacher and there is none.
    """
    student_logits = select(student_logits, batch.mask)
    teacher_logits = None if teacher_logits is None else select(teacher_logits, batch.mask)
    labels = jnp.where(batch.mask, batch.labels, 0)
    pairs = {}
    for term in terms:
        if term.needs_teacher and teacher_logits is None:
            raise ValueError(f"the term {term.name!r} needs a teacher; give the step one, or set needs_teacher=False.")
        pairs[term.name] = losses.masked_sum(term.per_position(student_logits, teacher_logits, labels), batch.mask)
    return pairs
