"""The objective: a weighted sum of terms, each a pure function, each averaged as a (sum, weight) pair.

    loss = Σ_i weight_i · (Σ_counted positions term_i) / (number of counted positions in the whole global batch)

T² (Hinton et al., arXiv 1503.02531): softening by T divides the gradient of a divergence by about T², so the soft term
is multiplied by T². It is done here, once; a metric named after a divergence is the bare divergence, in nats.
"""

import copy
import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from distill import losses
from distill.batch import Batch
from distill.errors import UserError, check_fields
from distill.features import FeatureConfig
from distill.models.model import Model
from distill.shapes import Array, Logits
from distill.term import BOTH_LOGITS, LOGITS, SIGNAL, Needs, Term, Terms, View

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
"""The soft terms that a configuration can name; any other loss is a ``Term`` that the user writes."""


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
        check_fields(self, "objective", self._read)
        temperatures = {"temperature": self.temperature, "final_temperature": self.final_temperature}
        for name, value in temperatures.items():
            if value is not None and not 0.0 < value < float("inf"):
                raise UserError(f"objective: {name}={value}; expected a finite number above 0.")
        if self.divergence == "taid" and not self.interpolation and not self.final_interpolation:
            raise UserError(
                "objective: taid with interpolation=0.0 compares the student with itself, so that nothing is learnt; "
                "set interpolation, or final_interpolation and schedule_steps."
            )
        if self.divergence != "alpha_beta" and not 0.0 <= self.beta <= 1.0:
            raise UserError(f"objective: beta={self.beta}; expected a number in [0, 1].")
        try:  # the hyperparameters, by the divergence itself; nothing is computed
            logits, label = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
            jax.eval_shape(distillation_term(self).value, View(logits, logits, label))
        except ValueError as error:
            raise UserError(f"objective: {error}") from error
        if self.router_weight is not None and self.router_weight < 0.0:
            raise UserError(f"objective: router_weight={self.router_weight}; expected at least 0, or None.")
        if self.final_interpolation is not None and not 0.0 <= self.final_interpolation <= 1.0:
            raise UserError(f"objective: final_interpolation={self.final_interpolation}; expected a number in [0, 1].")
        if self.final_kd_weight is not None and self.final_kd_weight < 0.0:
            raise UserError(f"objective: final_kd_weight={self.final_kd_weight}; expected ≥ 0.")
        if self.scheduled and self.schedule_steps < 1:
            raise UserError("objective: a final value needs schedule_steps ≥ 1; set --objective.schedule-steps.")
        outside = self.kd_weight + self.task_weight
        if min(self.kd_weight, self.task_weight) < 0.0 or not (outside > 0.0 or self.features.used):
            raise UserError(
                f"objective: kd_weight={self.kd_weight}, task_weight={self.task_weight}; expected ≥ 0, one above "
                "(or a weight of objective.features)."
            )

    def _read(self) -> dict[str, tuple[bool, str]]:
        """Hyperparameter → whether the divergence, or a schedule, reads it."""
        read = {}
        for name in ("temperature", "alpha", "beta", "mu", "interpolation"):
            readers = [key for key, function in DIVERGENCES.items() if name in inspect.signature(function).parameters]
            read[name] = self.divergence in readers, f"divergence {' or '.join(readers)}"
        read |= {f"final_{name}": read[name] for name in ("temperature", "interpolation")}
        finals = "final_temperature, final_kd_weight or final_interpolation"
        return read | {"schedule_steps": (self.scheduled, finals)}

    @property
    def distils(self) -> bool:
        """Does the soft term count, at any step?"""
        return self.kd_weight > 0.0 or bool(self.final_kd_weight)

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
    return Term("cross_entropy", weight, LOGITS, lambda view: losses.cross_entropy(view.student_logits, view.labels))


def distillation_term(config: ObjectiveConfig) -> Term:
    """The soft term, T² included in its weight.

    It compares the student with all logits of the teacher where they are there, live or stored, else with the stored
    targets (``losses.from_targets``).
    """
    divergence = DIVERGENCES[config.divergence]
    known = inspect.signature(divergence).parameters
    chosen = {name: vars(config)[name] for name in ("temperature", "alpha", "beta", "mu", "interpolation")}
    options = {name: value for name, value in chosen.items() if name in known and value is not None}
    factor = config.temperature**2 if config.temperature_squared else 1.0

    def value(view: View):
        if view.teacher_logits is not None:
            return divergence(view.student_logits, view.teacher_logits, **options)
        return losses.from_targets(divergence, view.student_logits, view.targets, **options)

    return Term(config.divergence, config.kd_weight * factor, SIGNAL, value)


def router_terms(student: Model, weight: float | None = None) -> tuple[Term, ...]:
    """The term that keeps a student's experts equally busy; none without experts or with a weight of 0.

    It looks at no label and at no teacher. The tokens are those of a batch, of all devices (of a micro-batch, where
    there are several: then their mean is taken, weighed by counted tokens).

    Args:
      student: the model, whose configuration has the number of experts.
      weight: None: the configuration's ``router_loss_weight``.

    Example:
      >>> from distill.models import DecoderConfig, decoder
      >>> [term.name for term in router_terms(decoder(DecoderConfig(experts=4, router_loss_weight=0.01)))]
      ['load_balancing']
    """
    if not getattr(student.config, "experts", 0):
        return ()
    weight = student.config.router_loss_weight if weight is None else weight

    def value(view: View):
        return losses.load_balancing(view.routing.counts, view.routing.probabilities, view.routed)

    return (Term("load_balancing", weight, Needs(routing=True), value),) if weight else ()


def terms_of(config: ObjectiveConfig, features: Sequence[Term] = ()) -> Terms:
    """The terms with a weight above 0 and ``features``; a function of the step if anything is scheduled."""
    task = (task_term(config.task_weight),) if config.task_weight else ()
    if config.scheduled:
        return lambda step: (distillation_term(config.at(step)), *task, *features)
    return (*((distillation_term(config),) if config.kd_weight else ()), *task, *features)


def terms_at(terms: Terms, step: Array) -> Sequence[Term]:
    """The terms at an optimizer step."""
    return terms(step) if callable(terms) else terms


# ---- evaluation


def _agreement(view: View) -> Array:
    below = (x - jnp.max(x, axis=-1, keepdims=True) for x in (view.student_logits, view.teacher_logits))
    same = jnp.max(sum(below), axis=-1) >= 0.0  # no argmax: XLA's CPU backend takes four times as long for two of them
    return same.astype(jnp.float32)


MEASURES = (
    Term("agreement", 0.0, BOTH_LOGITS, _agreement),
    Term(
        "teacher_cross_entropy", 0.0, BOTH_LOGITS, lambda view: losses.cross_entropy(view.teacher_logits, view.labels)
    ),
)
"""What is logged of student and teacher side by side; no part of the loss, and no gradient."""

RESERVED = frozenset({"loss", "gradient_norm", "skipped", "tokens"} | {term.name for term in MEASURES})
"""Metrics of every step; no term may have such a name."""


def evaluate(
    terms: Sequence[Term], student_logits: Logits | None, teacher_logits: Logits | None, view: View
) -> tuple[Array, dict[str, Array]]:
    """Σ weight · value of the terms, and by name every term's value and, with a teacher, the ``MEASURES``.

    The one place where terms are evaluated: the train step calls it on whole batches and, through ``losses.chunked``,
    on rows of positions; preflight calls it on held-out text.

    Args:
      terms: at one step.
      student_logits: ``[..., V]``; None where no term needs logits.
      teacher_logits: ``[..., V]``; None: those that ``view.targets`` holds, if any.
      view: everything else.

    Returns:
      The total and the values, per position ``[...]``, multiplied by ``view.weights``; a term's scalar as it is.

    Raises:
      UserError: a term needs what the view does not have.
    """
    teacher_logits = losses.logits_of(view.targets) if teacher_logits is None else teacher_logits
    view = view._replace(student_logits=student_logits, teacher_logits=teacher_logits)
    values, total = {}, jnp.float32(0.0)
    for term in terms:
        _check_needs(term, view)
        value = term.value(view)
        _check_value(term, value, student_logits)
        values[term.name] = value if view.weights is None or not value.ndim else view.weights * value
        total = total + term.weight * values[term.name]
    if student_logits is not None and teacher_logits is not None:
        for term in MEASURES:
            value = term.value(view)
            values[term.name] = value if view.weights is None else view.weights * value
    return total, values


def _check_needs(term: Term, view: View) -> None:
    if term.needs.teacher_logits and view.teacher_logits is None:
        raise UserError(
            f"the term {term.name!r} needs the teacher's logits; give the step a teacher, or stored DenseTargets or "
            "HiddenTargets."
        )
    if term.needs.signal and view.teacher_logits is None and view.targets is None:
        raise UserError(f"the term {term.name!r} needs a teacher; give the step one, or a batch with targets.")


def _check_value(term: Term, value: Any, student_logits: Logits | None) -> None:
    """Refuses what is neither one number per position nor a scalar."""
    shape = getattr(value, "shape", None)
    if shape is None:
        raise UserError(f"the term {term.name!r}: value gives a {type(value).__name__}; expected an array of nats.")
    if term.needs.head and student_logits is not None and shape not in ((), student_logits.shape[:-1]):
        raise UserError(
            f"the term {term.name!r}: value gives an array {shape} of logits {student_logits.shape}; expected one "
            f"number per position, {student_logits.shape[:-1]}, such as a sum over the last axis, or a scalar."
        )


def check_terms(terms: Sequence[Term]) -> None:
    """What is no term, and names that would be counted twice, or overwrite a metric.

    Raises:
      UserError: no terms, something else than a term, two of one name, or a reserved name.
    """
    if isinstance(terms, Term) or not all(isinstance(term, Term) for term in terms):
        raise UserError(f"make_train_step: terms={terms!r}; expected a list of Term, or a function that gives one.")
    if not terms:
        raise UserError("make_train_step: no terms; expected at least one, such as objective.task_term().")
    names = [term.name for term in terms]
    for name in names:
        if name in RESERVED:
            raise UserError(f"a term is named {name!r}, which is a metric of every step; choose another name.")
        if names.count(name) > 1:
            raise UserError(f"{names.count(name)} terms are named {name!r}; a name may stand once, choose others.")


def position_weights(reduction: str, batch: Batch) -> Array | None:
    """Weight of each position in the mean; None means uniform.

    Raises:
      UserError: an unknown reduction.
    """
    if reduction not in ("token_mean", "sequence_mean"):
        raise UserError(f"reduction={reduction!r}; expected 'token_mean' or 'sequence_mean'.")
    return losses.sequence_weights(batch.mask, batch.segments) if reduction == "sequence_mean" else None
