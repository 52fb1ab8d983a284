"""One update of the student, as a pure function.

    train_step(state, teacher_params, batch) -> (state, metrics)

The teacher is a separate argument: not in the state, the optimizer, the gradient or the checkpoint. ``parallel.py``
wraps this function for one device, a mesh or ``pmap``; ``vmap`` over it trains several students at once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from distill import losses
from distill.batch import Batch
from distill.devices.backend import flatten_rows as as_matrices
from distill.features import FeatureTerm, collect_of
from distill.losses.reduce import Pair, masked_sum
from distill.models.config import EncoderConfig
from distill.models.model import Model
from distill.models.output import Collect, Output, Routing
from distill.objective import AnyTerm, RouterTerm, Term, Terms, per_position, position_weights, terms_at, total
from distill.shapes import Array, Int, Params
from distill.trees import joined

Metrics = dict[str, Pair]
CHUNKED_FROM = 1024
"""Words from which on the head is worked through in chunks: there it is 1.5 to 2.2 times as fast as all logits at once,
at half as many it is slower (``scripts/benchmark.py head``)."""
TrainStep = Callable[["TrainState", "Params | Frozen | None", Batch], tuple["TrainState", Metrics]]


class TrainState(NamedTuple):
    """All that changes while the student learns."""

    step: Int[Array, ""]
    """Optimizer steps done: the one counter from which schedules and the position in the data derive."""
    params: Params
    opt_state: optax.OptState


class Frozen(NamedTuple):
    """What a step reads and never changes, for a student that learns only a part of its parameters (``Model.base``)."""

    teacher: Params | None
    student: Params
    """The part that is not learnt; it may hold the teacher's own arrays."""


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), params, optimizer.init(params))


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
      student: what is trained.
      terms: of the objective, or a function of the step that gives them.
      optimizer: an optax transformation.
      teacher: gives ``teacher_logits``; None: ``batch.teacher_logits`` are used if there are any, and
        ``teacher_params`` is ignored.
      micro_batches: the batch is worked through in so many parts, one update at the end; must divide it.
      axis_name: of the ``pmap`` or ``shard_map`` around the step, each device holding its part of the batch.
      mesh: the step will be compiled for; the chunked head then works on every device's own tokens.
      chunk_size: positions whose logits are alive at a time (``losses.chunked``); 0: all logits at once; None: chunks
        from a vocabulary of ``CHUNKED_FROM`` words on, where both models know their head.
      reduction: of every mean: ``token_mean``, or ``sequence_mean`` (``losses.sequence_weights``).
      remat: what the student's layers keep for the backward pass (``TrainingConfig.remat``).
      skip_not_finite: where loss or gradients are not finite, parameters and optimizer stay as they are, to the bit;
        the step counts, its batch is spent, and the metric ``skipped`` is 1.

    Returns:
      ``train_step(state, teacher_params, batch) -> (state, metrics)``; metrics are (sum, weight) pairs, global:
      ``loss``, every term by its name, ``agreement`` (share of top-1 tokens equal to the teacher's) and
      ``teacher_cross_entropy`` when there is a teacher, ``gradient_norm``. For a student with a ``base`` the second
      argument is ``Frozen(teacher_params, base_params)``.
    """
    _check_terms(terms, student, teacher)
    chunks = _chunks(chunk_size, student, teacher)

    def global_sum(tree):
        return jax.lax.psum(tree, axis_name) if axis_name else tree

    def whole(terms, sides: _Sides, batch: Batch, weights: Array | None) -> tuple[Array, Metrics]:
        """Σ weight · sum of the terms, and sums, from all logits at once."""
        student_logits, teacher_logits = sides.logits(student, teacher, batch)
        mask, labels = _as_rows(batch.mask), _as_rows(jnp.where(batch.mask, batch.labels, 0))
        nats = per_position(terms, student_logits, teacher_logits, labels)
        nats |= {} if teacher_logits is None else _beside(student_logits, teacher_logits, labels)
        weights = None if weights is None else _as_rows(weights)
        pairs = {name: masked_sum(values, mask, weights) for name, values in nats.items()}
        return total(terms, {name: value for name, (value, _) in pairs.items()}), pairs

    def in_chunks(terms, sides: _Sides, batch: Batch, weights: Array | None) -> tuple[Array, Metrics]:
        """The same from hidden states; no array of tokens · words."""

        def loss(student_logits, teacher_logits, inputs):
            labels, weights = inputs
            nats = per_position(terms, student_logits, teacher_logits, labels)
            nats |= {} if teacher_logits is None else _beside(student_logits, teacher_logits, labels)
            nats = nats if weights is None else {name: weights * values for name, values in nats.items()}
            return jnp.broadcast_to(total(terms, nats), labels.shape), nats

        states, head = sides.of_student.hidden, student.head(sides.student_params)
        of_teacher = (None, None)
        if teacher is not None:
            of_teacher = sides.of_teacher.hidden, teacher.head(sides.teacher_params)
        options = {"chunk_size": chunk_size or None, "mesh": mesh, "has_aux": True}
        inputs = batch.labels, weights
        (value, weight), sums = losses.chunked(loss, states, head, *of_teacher, inputs, batch.mask, **options)
        weight = weight if weights is None else jnp.sum(weights, dtype=jnp.float32)
        return value, {name: (part, weight) for name, part in sums.items()}

    def loss_of(params: Params, teacher_params: Params | None, batch: Batch, weight: Array, step: Array):
        now, weights = terms_at(terms, step), position_weights(reduction, batch)
        if student.base is not None:
            teacher_params, params = teacher_params.teacher, joined(teacher_params.student, params)
        inside = [term for term in now if isinstance(term, FeatureTerm)]
        teacher_params = jax.lax.stop_gradient(teacher_params)
        sides = _forward(student, params, teacher, teacher_params, batch, inside, remat)
        evaluate = in_chunks if chunks and batch.teacher_logits is None else whole
        outside = [term for term in now if isinstance(term, Term)]
        headless = isinstance(student.config, EncoderConfig) and not outside  # and so without logits
        with jax.named_scope("head"):
            loss, pairs = (jnp.float32(0.0), {}) if headless else evaluate(outside, sides, batch, weights)
        for term in inside:
            features = sides.of_student.collected, sides.of_teacher.collected
            pairs[term.name] = masked_sum(term.per_position(*features, batch, params), batch.mask, weights)
        counted = jnp.sum(batch.mask if weights is None else weights, dtype=jnp.float32)
        routers = [term for term in now if isinstance(term, RouterTerm)]
        pairs |= {term.name: _balance(sides.of_student.routing, counted, global_sum) for term in routers}
        loss = loss + total([*inside, *routers], {name: value for name, (value, _) in pairs.items()})
        return loss / jnp.where(weight > 0, weight, 1.0), {"loss": (loss, pairs[now[0].name][1])} | pairs

    def gradients_of(params: Params, teacher_params: Params | None, batch: Batch, weight: Array, step: Array):
        (_, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, teacher_params, batch, weight, step)
        return gradients, metrics

    def train_step(state: TrainState, teacher_params: Params | None, batch: Batch) -> tuple[TrainState, Metrics]:
        weights = position_weights(reduction, batch)
        weight = global_sum(jnp.sum(batch.mask if weights is None else weights, dtype=jnp.float32))
        if micro_batches == 1:
            gradients, metrics = gradients_of(state.params, teacher_params, batch, weight, state.step)
        else:
            parts = jax.tree.map(lambda x: _split(x, micro_batches), batch)
            gradients, metrics = _accumulate(
                lambda part: gradients_of(state.params, teacher_params, part, weight, state.step), parts
            )
        gradients, metrics = global_sum((gradients, metrics))
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            metrics["gradient_norm"] = (optax.tree.norm(gradients), jnp.float32(1.0))
            new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        return _or_skipped(state, new, metrics) if skip_not_finite else (new, metrics)

    return train_step


def _or_skipped(old: TrainState, new: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
    """The new state where the step was finite, else the old one and metrics without weight."""
    fine = jnp.isfinite(metrics["loss"][0]) & jnp.isfinite(metrics["gradient_norm"][0])
    kept = jax.tree.map(lambda a, b: jnp.where(fine, a, b), new[1:], old[1:])
    counted = jax.tree.map(lambda x: jnp.where(fine, x, jnp.zeros_like(x)), metrics)
    return TrainState(new.step, *kept), counted | {"skipped": (1.0 - fine.astype(jnp.float32), jnp.float32(1.0))}


class _Sides(NamedTuple):
    """Both networks on a batch."""

    student_params: Params
    of_student: Output
    teacher_params: Params | None
    of_teacher: Output | None

    def logits(self, student: Model, teacher: Model | None, batch: Batch) -> tuple[Array, Array | None]:
        """All logits of the student, and of the teacher: live, stored, or none; finite where nothing counts."""

        def of(model: Model, params: Params, hidden: Array) -> Array:
            if model.head is not None:
                return model.unembed(params, _as_rows(losses.select(hidden, batch.mask)))
            hidden = jnp.where(batch.mask[..., None], hidden, 1.0)  # not 0, where dividing by a norm has no slope
            return _as_rows(losses.select(model.unembed(params, hidden), batch.mask))

        of_student = of(student, self.student_params, self.of_student.hidden)
        if self.of_teacher is not None:
            return of_student, of(teacher, self.teacher_params, self.of_teacher.hidden)
        stored = batch.teacher_logits
        return of_student, None if stored is None else _as_rows(losses.select(stored, batch.mask))


def _as_rows(x: Array) -> Array:
    """``[B, L, …] -> [B·L, …]`` on a CPU, where losses of few words are quicker on matrices (``as_matrices``)."""
    return x.reshape(-1, *x.shape[2:]) if as_matrices() else x


def _forward(
    student: Model,
    params: Params,
    teacher: Model | None,
    teacher_params: Params | None,
    batch: Batch,
    inside: list[FeatureTerm],
    remat: str,
) -> _Sides:
    """What both networks make of a batch, with the features that terms ask for."""

    def run(model: Model, params: Params, collect: Collect | None, remat: str = "none") -> Output:
        options: dict[str, Any] = {} if collect is None else {"collect": collect}
        options |= {} if remat == "none" else {"remat": remat}
        return model.apply(params, batch.inputs, positions=batch.positions, segments=batch.segments, **options)

    with jax.named_scope("student"):  # as traces call it (profiling.py)
        of_student = run(student, params, collect_of(inside, "student"), remat)
    with jax.named_scope("teacher"):
        of_teacher = None if teacher is None else run(teacher, teacher_params, collect_of(inside, "teacher"))
    return _Sides(params, of_student, teacher_params, of_teacher)


def _balance(routing: Routing, counted: Array, global_sum: Callable) -> Pair:
    """This device's part of the load-balancing loss of all devices' tokens, so that sums over devices are the loss."""
    tokens = jax.lax.stop_gradient(jnp.sum(routing.probabilities))
    counts, tokens, everywhere = global_sum((routing.counts, tokens, counted))
    return losses.load_balancing(counts, routing.probabilities, tokens) * everywhere, counted


def _check_terms(terms: Terms, student: Model, teacher: Model | None) -> None:
    """What can be said before anything is traced.

    Raises:
      ValueError: no terms, features without a live teacher, or two vocabularies.
    """
    if not terms:
        raise ValueError("make_train_step: no terms; expected at least one, such as objective.task_term().")
    listed: Sequence[AnyTerm] = terms(jnp.int32(0)) if callable(terms) else terms
    inside = [term.name for term in listed if isinstance(term, FeatureTerm)]
    if inside and teacher is None:
        raise ValueError(
            f"make_train_step: {', '.join(inside)} look inside the teacher; give the step a teacher (in a "
            "configuration: --teacher-signal live)."
        )
    if any(isinstance(term, RouterTerm) for term in listed) and not getattr(student.config, "experts", 0):
        raise ValueError("make_train_step: a term balances experts, and the student has none; leave it out.")
    if teacher is not None and teacher.vocab_size != student.vocab_size:
        raise ValueError(
            f"make_train_step: the student has {student.vocab_size} words, the teacher {teacher.vocab_size}; cut both "
            "to the ids they share: model.with_vocabulary(vocab.align(…).vocab_size)."
        )


def _chunks(chunk_size: int | None, student: Model, teacher: Model | None) -> bool:
    """Whether the head is worked through in chunks."""
    known = student.head is not None and (teacher is None or teacher.head is not None)
    if chunk_size and not known:
        raise ValueError(
            "make_train_step: chunk_size is set, but a model has no head(params); set it, or chunk_size=0."
        )
    if chunk_size is None:
        return known and student.vocab_size >= CHUNKED_FROM
    return chunk_size > 0


def _beside(student_logits: Array, teacher_logits: Array, labels: Array) -> dict[str, Array]:
    """What is logged of student and teacher side by side, per position; no gradient."""
    below = (x - jnp.max(x, axis=-1, keepdims=True) for x in (student_logits, teacher_logits))
    same = jnp.max(sum(below), axis=-1) >= 0.0  # no argmax: XLA's CPU backend takes four times as long for two of them
    nats = losses.cross_entropy(teacher_logits, labels)
    return {"agreement": same.astype(jnp.float32), "teacher_cross_entropy": nats}


def _split(x: Array, parts: int) -> Array:
    """``[B, …] -> [parts, B / parts, …]``, rows dealt in turn: a batch sharded over devices stays where it is."""
    if x.shape[0] % parts:
        raise ValueError(f"a batch of {x.shape[0]} cannot be split into {parts} equal micro-batches.")
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _accumulate(function: Callable, parts: Batch):
    """Sum of ``function(part)`` over the leading axis, one part in memory at a time."""
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None), zeros, parts)[0]


def scan_steps(train_step: TrainStep) -> Callable:
    """Several steps in one program: ``(state, teacher_params, examples, rows [K, B]) -> (state, metrics [K])``.

    ``examples`` is a ``Batch`` of all examples; step k trains on ``examples[rows[k]]``. Where they are None, ``rows``
    are the batches themselves, a ``Batch`` of ``[K, B, …]``. One dispatch for K small steps: on tiny models Python
    would otherwise be the bottleneck.
    """

    def steps(state: TrainState, teacher_params: Params | None, examples: Batch | None, rows: Array | Batch):
        def one(state: TrainState, row: Array | Batch):
            batch = row if examples is None else jax.tree.map(lambda field: field[row], examples)
            return train_step(state, teacher_params, batch)

        return jax.lax.scan(one, state, rows)

    return steps
