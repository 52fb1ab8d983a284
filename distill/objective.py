"""The objective: a weighted sum of terms, each a pure function of logits, each averaged as a (sum, weight) pair.

    loss = Σ_i weight_i · (Σ_counted positions term_i) / (number of counted positions in the whole global batch)

T² (Hinton et al., arXiv 1503.02531): softening by T divides the gradient of a divergence by about T², so the soft term
is multiplied by T². It is done here, once; a metric named after a divergence is the bare divergence, in nats.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from distill import losses
from distill.batch import Batch
from distill.features import FeatureConfig, FeatureTerm
from distill.losses.reduce import Pair
from distill.models.model import Model
from distill.shapes import Array, Labels, Logits, Nats

DIVERGENCES = {
    function.__name__: function
    for function in (
        losses.forward_kl,
        losses.reverse_kl,
        losses.generalized_jsd,
        losses.skewed_forward_kl,
        losses.skewed_reverse_kl,
        losses.jeffreys,
        losses.total_variation,
        losses.alpha_beta,
        losses.alpha_divergence,
        losses.renyi,
        losses.adaptive_kl,
        losses.entropy_aware_kl,
        losses.taid,
        losses.logit_mse,
        losses.pearson,
    )
}
"""The soft terms a configuration can name; any other goes into a ``Term`` of one's own."""

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
class RouterTerm:
    """The load-balancing loss of a student that is a mixture of experts (``losses.load_balancing``).

    It looks at no label and at no teacher; the tokens are those of a batch, of all devices (of a micro-batch, where
    there are several: then their mean is taken, weighed by counted tokens).
    """

    weight: float
    name: str = "load_balancing"


AnyTerm = Term | FeatureTerm | RouterTerm
Terms = Sequence[AnyTerm] | Callable[[Array], Sequence[AnyTerm]]
"""Terms, or a function of the optimizer step that gives them: weights and temperatures may follow a schedule."""


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """kd_weight · T² · divergence(teacher, student; T) + task_weight · cross-entropy(labels)."""

    divergence: Literal[*DIVERGENCES] = "forward_kl"
    temperature: float = 1.0
    """T of the soft term (sampling has its own)."""
    beta: float = 0.5
    """Of generalized_jsd (0 is forward KL, 1 reverse KL) and of alpha_beta."""
    alpha: float | None = None
    """Of skewed_forward_kl, skewed_reverse_kl, alpha_beta, alpha_divergence and renyi; None: the divergence's own."""
    mu: float = 0.5
    """Of adaptive_kl: the teacher's mass that counts as head."""
    interpolation: float = 0.5
    """Of taid: 0 is the student itself, 1 the teacher."""
    final_interpolation: float | None = None
    """interpolation goes linearly to this value in ``schedule_steps``, as TAID wants it; None: constant."""
    kd_weight: float = 1.0
    task_weight: float = 0.0
    temperature_squared: bool = True
    """Multiply the soft term by T²."""
    final_temperature: float | None = None
    """T goes linearly to this value in ``schedule_steps`` optimizer steps, and stays; None: constant."""
    final_kd_weight: float | None = None
    """kd_weight likewise."""
    schedule_steps: int = 0
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """token_mean: every counted token of the global batch weighs the same; sequence_mean: every sequence does."""
    router_weight: float | None = None
    """Of the load-balancing loss, for a student with experts; None: its own ``router_loss_weight``."""
    features: FeatureConfig = FeatureConfig()
    """Terms between hidden states, attention maps and relations; they need a live teacher."""

    def __post_init__(self):
        if not self.temperature > 0.0:
            raise ValueError(f"objective: temperature={self.temperature}; expected a number above 0.")
        if self.divergence != "alpha_beta" and not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"objective: beta={self.beta}; expected a number in [0, 1].")
        try:  # the hyperparameters, by the divergence itself; nothing is computed
            logits, label = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
            jax.eval_shape(distillation_term(self).per_position, logits, logits, label)
        except ValueError as error:
            raise ValueError(f"objective: {error}") from error
        if self.router_weight is not None and self.router_weight < 0.0:
            raise ValueError(f"objective: router_weight={self.router_weight}; expected at least 0, or None.")
        if self.final_temperature is not None and not self.final_temperature > 0.0:
            raise ValueError(f"objective: final_temperature={self.final_temperature}; expected a number above 0.")
        if self.final_interpolation is not None and not 0.0 <= self.final_interpolation <= 1.0:
            raise ValueError(f"objective: final_interpolation={self.final_interpolation}; expected a number in [0, 1].")
        if self.final_kd_weight is not None and self.final_kd_weight < 0.0:
            raise ValueError(f"objective: final_kd_weight={self.final_kd_weight}; expected ≥ 0.")
        if self.scheduled and self.schedule_steps < 1:
            raise ValueError("objective: a final value needs schedule_steps ≥ 1; set --objective.schedule-steps.")
        outside = self.kd_weight + self.task_weight
        if min(self.kd_weight, self.task_weight) < 0.0 or not (outside > 0.0 or self.features.used):
            raise ValueError(
                f"objective: kd_weight={self.kd_weight}, task_weight={self.task_weight}; expected ≥ 0, one above "
                "(or a weight of objective.features)."
            )

    @property
    def scheduled(self) -> bool:
        """Does anything change with the step?"""
        finals = (self.final_temperature, self.final_kd_weight, self.final_interpolation)
        return any(final is not None for final in finals)

    def at(self, step: Array) -> "ObjectiveConfig":
        """The objective at an optimizer step, its scheduled numbers as arrays."""
        done = jnp.clip(step / self.schedule_steps, 0.0, 1.0)

        def value(start: float, end: float | None):
            return start if end is None else start + (end - start) * done

        now = copy.copy(self)  # no __post_init__: arrays cannot be checked
        object.__setattr__(now, "temperature", value(self.temperature, self.final_temperature))
        object.__setattr__(now, "interpolation", value(self.interpolation, self.final_interpolation))
        object.__setattr__(now, "kd_weight", value(self.kd_weight, self.final_kd_weight))
        return now


def task_term(weight: float = 1.0) -> Term:
    """Cross-entropy with the labels."""
    return Term("cross_entropy", lambda s, t, labels: losses.cross_entropy(s, labels), weight, needs_teacher=False)


def distillation_term(config: ObjectiveConfig) -> Term:
    """The soft term, T² included in its weight."""
    divergence = DIVERGENCES[config.divergence]
    known = inspect.signature(divergence).parameters
    chosen = {name: getattr(config, name) for name in ("temperature", "alpha", "beta", "mu", "interpolation")}
    options = {name: value for name, value in chosen.items() if name in known and value is not None}
    factor = config.temperature**2 if config.temperature_squared else 1.0
    return Term(config.divergence, lambda s, t, labels: divergence(s, t, **options), config.kd_weight * factor)


def router_terms(student: Model, weight: float | None = None) -> tuple[RouterTerm, ...]:
    """The term that keeps a student's experts equally busy; none without experts or with a weight of 0.

    Args:
      student: its configuration says whether it has experts.
      weight: None: the configuration's ``router_loss_weight``.

    Example:
      >>> from distill.models import DecoderConfig, decoder
      >>> router_terms(decoder(DecoderConfig(experts=4, router_loss_weight=0.01)))
      (RouterTerm(weight=0.01, name='load_balancing'),)
    """
    if not getattr(student.config, "experts", 0):
        return ()
    weight = student.config.router_loss_weight if weight is None else weight
    return (RouterTerm(weight),) if weight else ()


def terms_of(config: ObjectiveConfig, features: Sequence[FeatureTerm | RouterTerm] = ()) -> Terms:
    """The terms with a weight above 0 and ``features``; a function of the step if anything is scheduled."""
    task = (task_term(config.task_weight),) if config.task_weight else ()
    if config.scheduled:
        return lambda step: (distillation_term(config.at(step)), *task, *features)
    return (*((distillation_term(config),) if config.kd_weight else ()), *task, *features)


def terms_at(terms: Terms, step: Array) -> Sequence[AnyTerm]:
    """The terms at an optimizer step."""
    return terms(step) if callable(terms) else terms


def per_position(terms: Sequence[Term], student_logits: Logits, teacher_logits: Logits | None, labels: Labels):
    """Every term's nats, by name.

    Raises:
      ValueError: a term needs a teacher and there is none.
    """
    for term in terms:
        if term.needs_teacher and teacher_logits is None:
            raise ValueError(f"the term {term.name!r} needs a teacher; give the step one, or set needs_teacher=False.")
    return {term.name: term.per_position(student_logits, teacher_logits, labels) for term in terms}


def total(terms: Sequence[AnyTerm], values: dict[str, Array]) -> Array:
    """Σ weight · value."""
    return sum((term.weight * values[term.name] for term in terms), start=jnp.float32(0.0))


def position_weights(reduction: str, batch: Batch) -> Array | None:
    """What a position weighs in a mean; None: all that count weigh 1.

    Raises:
      ValueError: an unknown reduction.
    """
    if reduction not in ("token_mean", "sequence_mean"):
        raise ValueError(f"reduction={reduction!r}; expected 'token_mean' or 'sequence_mean'.")
    return losses.sequence_weights(batch.mask, batch.segments) if reduction == "sequence_mean" else None


def evaluate_terms(
    terms: Sequence[Term],
    student_logits: Logits,
    teacher_logits: Logits | None,
    batch: Batch,
    weights: Array | None = None,
) -> dict[str, Pair]:
    """Every term's (sum, weight) on a batch; positions outside ``batch.mask`` have no part in it."""
    student_logits = losses.select(student_logits, batch.mask)
    teacher_logits = None if teacher_logits is None else losses.select(teacher_logits, batch.mask)
    labels = jnp.where(batch.mask, batch.labels, 0)
    nats = per_position(terms, student_logits, teacher_logits, labels)
    return {name: losses.masked_sum(values, batch.mask, weights) for name, values in nats.items()}
