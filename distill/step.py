"""One update of the student, as a pure function.

    train_step(state, teacher_params, batch) -> (state, metrics)

The teacher is a separate argument: not in the state, the optimizer, the gradient or the checkpoint. ``parallel.py``
wraps this function for one device, a mesh or ``pmap``; ``vmap`` over it trains several students at once.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from distill import losses
from distill.batch import Batch
from distill.devices import backend
from distill.errors import UserError
from distill.features import collect_of
from distill.losses.reduce import masked_sum
from distill.models.model import Model
from distill.models.output import Output, Routing
from distill.objective import check_terms, evaluate, position_weights, terms_at
from distill.shapes import Array, Params
from distill.state import Frozen, Metrics, TrainState, TrainStep, check_float32
from distill.term import Term, Terms, View
from distill.trees import joined

CHUNKED_FROM = 1024
"""Vocabulary size from which the head is computed in chunks."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """What a step is made of: everything but its arrays."""

    student: Model
    terms: Terms
    optimizer: optax.GradientTransformation
    teacher: Model | None
    micro_batches: int
    axis_name: str | None
    mesh: Mesh | None
    chunk_size: int | None
    in_chunks: bool
    reduction: str
    remat: str
    skip_not_finite: bool

    def global_sum(self, tree):
        """The sum over the devices of ``axis_name``; without one a sum is global already."""
        return jax.lax.psum(tree, self.axis_name) if self.axis_name else tree


def make_train_step(
    student: Model,
    terms: Terms,
    optimizer: optax.GradientTransformation,
    *,
    teacher: Model | None = None,
    micro_batches: int = 1,
    axis_name: str | None = None,
    mesh: Mesh | None = None,
    chunk_size: int | None = None,
    reduction: str = "token_mean",
    remat: str = "none",
    skip_not_finite: bool = False,
) -> TrainStep:
    """The train step of a student.

    The loss is Σ weight · sum / W with W the number of counted tokens (of sequences, with ``sequence_mean``) of the
    WHOLE global batch: over micro-batches and, with ``axis_name``, over devices. W does not depend on the parameters,
    so gradients of sums are added.

    Args:
      student: the model that is trained.
      terms: the objective, or a function of the step that gives its terms.
      optimizer: an optax transformation.
      teacher: a live teacher, or the model whose head reads stored ``HiddenTargets``; None: the teacher's signal is
        what ``batch.targets`` holds, if anything, and ``teacher_params`` is ignored.
      micro_batches: number of parts in which a batch is computed, with one update at the end; must divide it.
      axis_name: axis of the ``pmap`` or ``shard_map`` around the step, each device holding its part of the batch.
      mesh: mesh the step will be compiled for; the chunked head then works on every device's own tokens.
      chunk_size: positions whose logits are alive at a time (``losses.chunked``); 0: all logits at once; None: chunks
        from a vocabulary of ``CHUNKED_FROM`` on, where both models know their head.
      reduction: of every mean: ``token_mean``, or ``sequence_mean`` (``losses.sequence_weights``).
      remat: what the student's layers keep for the backward pass (``TrainingConfig.remat``).
      skip_not_finite: skip a step whose loss or gradients are not finite; parameters and optimizer stay bit-identical,
        the step counts, also for the learning rate, its batch is spent, and the metric ``skipped`` is 1.

    Returns:
      ``train_step(state, teacher_params, batch) -> (state, metrics)``; metrics are (sum, weight) pairs, global:
      ``loss``, every term by its name, ``agreement`` (share of top-1 tokens equal to the teacher's) and
      ``teacher_cross_entropy`` where the teacher's logits are known, ``gradient_norm``, and ``tokens``, those of the
      batch that are no padding. For a student with a ``base`` the second argument is
      ``Frozen(teacher_params, base_params)``.

    Raises:
      UserError: terms that name a metric twice, look inside a teacher that is not live, or balance experts that the
        student does not have; two vocabularies; a chunk size where a model has no head.
    """
    listed = terms_at(terms, jnp.int32(0))
    _check(listed, student, teacher)
    step = _Step(
        student=student,
        terms=terms,
        optimizer=optimizer,
        teacher=teacher,
        micro_batches=micro_batches,
        axis_name=axis_name,
        mesh=mesh,
        chunk_size=chunk_size or None,
        in_chunks=_in_chunks(chunk_size, listed, student, teacher),
        reduction=reduction,
        remat=remat,
        skip_not_finite=skip_not_finite,
    )
    return functools.partial(_train_step, step)


def _train_step(
    step: _Step, state: TrainState, teacher_params: Params | Frozen | None, batch: Batch
) -> tuple[TrainState, Metrics]:
    check_float32(state.params)
    weight = step.global_sum(_counted(batch, position_weights(step.reduction, batch)))
    differentiate = jax.grad(_loss_of, has_aux=True)
    if step.micro_batches == 1:
        gradients, metrics = differentiate(state.params, step, teacher_params, batch, weight, state.step)
    else:
        parts = jax.tree.map(lambda x: _split(x, step.micro_batches), batch)
        gradients, metrics = _accumulate(
            lambda part: differentiate(state.params, step, teacher_params, part, weight, state.step), parts
        )
    gradients, metrics = step.global_sum((gradients, metrics))
    with jax.named_scope("optimizer"):
        updates, opt_state = step.optimizer.update(gradients, state.opt_state, state.params)
        metrics["gradient_norm"] = (optax.tree.norm(gradients), jnp.float32(1.0))
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
    new, metrics = _or_skipped(state, new, metrics) if step.skip_not_finite else (new, metrics)
    return new, metrics | {"tokens": (step.global_sum(_tokens(batch)), jnp.float32(1.0))}


def _loss_of(
    params: Params, step: _Step, frozen: Params | Frozen | None, batch: Batch, weight: Array, at: Array
) -> tuple[Array, Metrics]:
    """The loss of a batch or a micro-batch, divided by the weight of the whole batch, and its metrics."""
    terms, weights = terms_at(step.terms, at), position_weights(step.reduction, batch)
    of_head = [term for term in terms if term.needs.head]
    others = [term for term in terms if not term.needs.head]
    sides = _forward(step, params, frozen, batch, terms)
    counted = _counted(batch, weights)
    view = _view(step, sides, terms, batch, counted)
    loss, pairs = jnp.float32(0.0), {}
    with jax.named_scope("head"):  # as traces call it (profiling.py)
        if of_head and step.in_chunks:
            rows = View(labels=batch.labels, targets=view.targets, weights=weights)
            per_position = functools.partial(evaluate, of_head)
            arguments = *_heads(step, sides), rows, batch.mask, step.chunk_size
            (loss, _), sums = losses.chunked(per_position, *arguments, mesh=step.mesh, has_aux=True)
            pairs = {name: (value, counted) for name, value in sums.items()}
        elif of_head:
            by_rows = backend.as_rows if not any(term.needs.layers for term in of_head) else lambda x: x
            logits, view_of_head, mask = _whole(step, sides, view, weights, by_rows)
            _, values = evaluate(of_head, *logits, view_of_head)
            pairs = _pairs(step, values, mask, counted)
            loss = _total(of_head, pairs)
    _, values = evaluate(others, None, None, view._replace(weights=weights))
    pairs |= _pairs(step, values, batch.mask, counted)
    loss = loss + _total(others, pairs)
    return loss / jnp.where(weight > 0, weight, 1.0), {"loss": (loss, counted)} | pairs


class _Sides(NamedTuple):
    """Both networks on a batch."""

    student_params: Params
    of_student: Output
    teacher_params: Params | None
    of_teacher: Output | None
    """None without a teacher; of stored ``HiddenTargets`` the hidden states alone."""


def _forward(
    step: _Step, params: Params, frozen: Params | Frozen | None, batch: Batch, terms: Sequence[Term]
) -> _Sides:
    """What both networks make of a batch, with the features that terms ask for."""
    teacher_params = frozen
    if step.student.base is not None:
        teacher_params, params = frozen.teacher, joined(frozen.student, params)
    teacher_params = jax.lax.stop_gradient(teacher_params)

    def run(model: Model, params: Params, side: str, remat: str = "none") -> Output:
        collect = collect_of(terms, side)
        options: dict[str, Any] = {} if collect is None else {"collect": collect}
        options |= {} if remat == "none" else {"remat": remat}
        return model.apply(params, batch.inputs, positions=batch.positions, segments=batch.segments, **options)

    with jax.named_scope("student"):
        of_student = run(step.student, params, "student", step.remat)
    _check_targets(step.teacher, batch.targets)
    if isinstance(batch.targets, losses.HiddenTargets):
        return _Sides(params, of_student, teacher_params, Output(batch.targets.hidden))
    with jax.named_scope("teacher"):
        of_teacher = None if step.teacher is None else run(step.teacher, teacher_params, "teacher")
    return _Sides(params, of_student, teacher_params, of_teacher)


def _heads(step: _Step, sides: _Sides) -> tuple[Any, Any]:
    """Hidden states and head of the student, and of the teacher or None."""
    student = sides.of_student.hidden, step.student.head(sides.student_params)
    if sides.of_teacher is None:
        return student, None
    return student, (sides.of_teacher.hidden, step.teacher.head(sides.teacher_params))


def _check_targets(teacher: Model | None, targets: Any) -> None:
    if isinstance(targets, losses.HiddenTargets) and teacher is None:
        raise UserError("the targets are hidden states of a teacher; give the step the teacher, whose head reads them.")
    if isinstance(targets, losses.DenseTargets) and teacher is not None:
        raise UserError(
            "the targets hold the teacher's logits, and the step has a live teacher; leave one of them out."
        )


def _view(step: _Step, sides: _Sides, terms: Sequence[Term], batch: Batch, counted: Array) -> View:
    """What terms may look at, logits and weights aside."""
    routing, routed = None, None
    if any(term.needs.routing for term in terms):
        # Shares of the tokens of all devices: sums over devices of what each makes of them are then the loss.
        counts, probabilities = sides.of_student.routing
        counts, routed = step.global_sum((counts, jax.lax.stop_gradient(jnp.sum(probabilities))))
        routing = Routing(counts, probabilities)
    return View(
        labels=batch.labels,
        targets=None if isinstance(batch.targets, losses.HiddenTargets) else batch.targets,
        student_features=sides.of_student.collected,
        teacher_features=None if sides.of_teacher is None else sides.of_teacher.collected,
        batch=batch,
        params=sides.student_params,
        routing=routing,
        routed=routed,
    )


def _whole(
    step: _Step, sides: _Sides, view: View, weights: Array | None, by_rows: Callable[[Array], Array]
) -> tuple[tuple[Array, Array | None], View, Array]:
    """All logits of student and teacher, the view and the mask beside them; zeros where nothing counts.

    Selected BEFORE a loss is computed: a NaN of padding would come back from it as 0 · NaN.
    """
    mask = view.batch.mask

    def logits(model: Model, params: Params, hidden: Array) -> Array:
        if model.head is not None:
            return model.unembed(params, by_rows(losses.select(hidden, mask)))
        hidden = jnp.where(mask[..., None], hidden, 1.0)  # not 0, where dividing by a norm has no slope
        return by_rows(losses.select(model.unembed(params, hidden), mask))

    of_student = logits(step.student, sides.student_params, sides.of_student.hidden)
    of_teacher = None
    if sides.of_teacher is not None:
        of_teacher = logits(step.teacher, sides.teacher_params, sides.of_teacher.hidden)

    def selected(x: Array) -> Array:
        return by_rows(jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim)), x, 0))

    view = view._replace(
        labels=selected(view.labels),
        targets=jax.tree.map(selected, view.targets),
        weights=None if weights is None else by_rows(weights),
    )
    return (of_student, of_teacher), view, by_rows(mask)


def _tokens(batch: Batch) -> Array:
    """Tokens of a batch that are no padding, whether they are predicted or not."""
    if batch.segments is None:
        return jnp.float32(batch.inputs.size)
    return jnp.sum(batch.segments > 0, dtype=jnp.float32)


def _counted(batch: Batch, weights: Array | None) -> Array:
    return jnp.sum(batch.mask if weights is None else weights, dtype=jnp.float32)


def _pairs(step: _Step, values: dict[str, Array], mask: Array, counted: Array) -> Metrics:
    """Sum and weight of every value; a scalar is this device's share of one number of the whole batch."""
    scalars = any(not value.ndim for value in values.values())
    everywhere = step.global_sum(counted) if scalars else None
    sums = {name: masked_sum(value, mask)[0] if value.ndim else value * everywhere for name, value in values.items()}
    return {name: (value, counted) for name, value in sums.items()}


def _total(terms: Sequence[Term], pairs: Metrics) -> Array:
    return sum((term.weight * pairs[term.name][0] for term in terms), start=jnp.float32(0.0))


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def _or_skipped(old: TrainState, new: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
    """The new state where the step was finite, else the old one and metrics without weight."""
    fine = jnp.isfinite(metrics["loss"][0]) & jnp.isfinite(metrics["gradient_norm"][0])

    def kept(a: Any, b: Any) -> Any:
        # The learning rate goes on, as every other schedule does: their one counter is the step.
        return a if _is_schedule(a) else jnp.where(fine, a, b)

    params, opt_state = jax.tree.map(kept, new[1:], old[1:], is_leaf=_is_schedule)
    counted = jax.tree.map(lambda x: jnp.where(fine, x, jnp.zeros_like(x)), metrics)
    return TrainState(new.step, params, opt_state), counted | {
        "skipped": (1.0 - fine.astype(jnp.float32), jnp.float32(1.0))
    }


def _check(terms: Sequence[Term], student: Model, teacher: Model | None) -> None:
    """What can be known before anything is traced."""
    check_terms(terms)
    inside = [term.name for term in terms if term.needs.teacher_layers is not None]
    if inside and teacher is None:
        raise UserError(
            f"make_train_step: {', '.join(inside)} look inside the teacher; give the step a teacher (in a "
            "configuration: --signal.kind live)."
        )
    if any(term.needs.routing for term in terms) and not getattr(student.config, "experts", 0):
        raise UserError("make_train_step: a term balances experts, and the student has none; leave it out.")
    if teacher is not None and teacher.vocab_size != student.vocab_size:
        raise UserError(
            f"make_train_step: the student's vocabulary has {student.vocab_size} tokens, the teacher's "
            f"{teacher.vocab_size}; cut both to the ids they share: "
            "model.with_vocabulary(vocab.align(…).vocab_size)."
        )


def _in_chunks(chunk_size: int | None, terms: Sequence[Term], student: Model, teacher: Model | None) -> bool:
    """Whether the head is computed in chunks."""
    known = student.head is not None and (teacher is None or teacher.head is not None)
    mixed = [term.name for term in terms if term.needs.head and term.needs.layers]
    if chunk_size and not known:
        raise UserError("make_train_step: chunk_size is set, but a model has no head(params); set it, or chunk_size=0.")
    if chunk_size and mixed:
        raise UserError(
            f"make_train_step: {', '.join(mixed)} look at logits and inside the networks, which chunks of positions "
            "cannot show together; set chunk_size=0."
        )
    if chunk_size is None:
        return known and not mixed and student.vocab_size >= CHUNKED_FROM
    return chunk_size > 0


def _split(x: Array, parts: int) -> Array:
    """``[B, …] -> [parts, B / parts, …]``, rows dealt in turn: a batch sharded over devices stays where it is."""
    if x.shape[0] % parts:
        raise UserError(f"a batch of {x.shape[0]} cannot be split into {parts} equal micro-batches.")
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _accumulate(function: Callable, parts: Batch):
    """Sum of ``function(part)`` over the leading axis, in float32, one part in memory at a time."""
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes)
    return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None), zeros, parts)[0]
