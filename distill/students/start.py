"""The student before its first step, made from its teacher by one configuration.

====================  ================================================================================================
``kind``              the student
====================  ================================================================================================
``random``            drawn at random
``embeddings``        drawn at random, but with the teacher's embedding and head
``teacher``           cut out of the teacher: layers by ``layers`` or ``choice``, the rest by importance (``cut.py``)
``low_rank``          that, its kernels replaced by factors of rank ``rank`` (``factors.py``)
``lora``              that, frozen, with a correction of rank ``rank`` to learn (``lora.py``)
====================  ================================================================================================
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from distill.errors import UserError
from distill.models.config import DecoderConfig
from distill.models.decoder import decoder
from distill.models.model import Model
from distill.shapes import Array, Params
from distill.students.config import StartConfig
from distill.students.cut import Importance, importance, like
from distill.students.factors import factored, fisher_rows, low_rank
from distill.students.layers import CHOICES
from distill.students.lora import freeze, lora
from distill.trees import joined


class Calibration(NamedTuple):
    """Loss and batches by which importance is measured; called only where units are chosen by it."""

    loss: Callable[[Model, Params, Any], Array]
    """``(model, params, batch) -> scalar``, such as the cross-entropy of some text."""
    batches: Callable[[], Iterable[Any]]


class Start(NamedTuple):
    """A student before its first step."""

    model: Model
    """Its ``init(key)`` has the shapes of what is learnt; for lora and shared embeddings a part of all (``base``)."""
    params: Params | None
    """Learnt parameters it starts from; None: those that ``model.init`` draws."""
    base: Params | None
    """Parameters that are not learnt, given to the step in a ``Frozen``; None: all are learnt."""

    def learnt(self, key: Array) -> Params:
        """What is learnt, before the first step of a training with this key."""
        return self.model.init(key) if self.params is None else self.params

    def whole(self, learnt: Params) -> Params:
        """All parameters that ``model.apply`` takes."""
        return learnt if self.base is None else joined(self.base, learnt)

    def plain(self, learnt: Params) -> Params:
        """Parameters of ``decoder(student_config)``, with factors multiplied out."""
        whole = self.whole(learnt)
        return whole if self.model.merge is None else self.model.merge(whole)


def start(
    teacher: Model,
    teacher_params: Params,
    student: DecoderConfig,
    options: StartConfig,
    calibration: Calibration | None = None,
    *,
    seed: int = 0,
) -> Start:
    """The student of a configuration, before its first step.

    Args:
      teacher: a decoder.
      teacher_params: its parameters; not changed, and shared where the student is frozen.
      student: sizes of the student.
      options: where it starts.
      calibration: needed where units are chosen by importance or kernels are ``weighted``.
      seed: of the training; draws what ``embeddings`` does not take from the teacher.

    Raises:
      UserError: a student that cannot be made like this from this teacher; names what differs.

    Example:
      >>> import dataclasses
      >>> config = DecoderConfig(vocab_size=14, layers=4, width=8, heads=2, feed_forward=16)
      >>> teacher = decoder(config)
      >>> params, small = teacher.init(jax.random.key(0)), dataclasses.replace(config, layers=2)
      >>> student = start(teacher, params, small, StartConfig("teacher", layers=(0, 3)))
      >>> kernel = student.params["layers"]["mlp"]["up"]["kernel"]
      >>> bool((kernel[1] == params["layers"]["mlp"]["up"]["kernel"][3]).all())
      True
    """
    model, params = outline(teacher, student, options), None
    if options.cut:
        params = _cut_out(teacher, teacher_params, student, options, calibration)
    if options.kind == "lora":
        return Start(model, None, params)
    tables = {name: teacher_params[name] for name in ("embedding", "head") if options.tables and name in teacher_params}
    if options.share_embeddings:
        learnt = None if params is None else {name: value for name, value in params.items() if name not in tables}
        return Start(model, learnt, tables)
    if options.kind == "embeddings":
        params = model.init(jax.random.key(seed)) | tables
    return Start(model, params, None)


def outline(teacher: Model, student: DecoderConfig, options: StartConfig) -> Model:
    """The model of ``start``, from shapes alone: it needs no trained teacher, and raises what ``start`` would raise."""
    network = _network(teacher, student)
    if options.cut:
        config = _decoder_config(teacher)
        sizes = (config.layers, config.groups), (config.layers, config.feed_forward), (config.width,)

        def cut(params: Params) -> Params:
            nothing = Importance(*(np.zeros(size) for size in sizes))
            return like(config, params, student, lambda: nothing, _layers(config, student, options))[1]

        jax.eval_shape(cut, jax.eval_shape(teacher.init, jax.random.key(0)))
    if options.kind == "lora":
        return lora(network, options.rank, alpha=options.alpha, kernels=options.kernels)
    tables = _equal_tables(network, teacher) if options.tables else ()
    if options.kind == "low_rank":
        network = factored(network, options.rank, options.kernels)
    return freeze(network, tables) if options.share_embeddings else network


def _cut_out(
    teacher: Model, params: Params, student: DecoderConfig, options: StartConfig, calibration: Calibration | None
) -> Params:
    """The student's part of the teacher's parameters, for low_rank in factors."""
    config = _decoder_config(teacher)

    def measure() -> Importance:
        _check_calibration(calibration)
        return importance(config, params, lambda p, batch: calibration.loss(teacher, p, batch), calibration.batches())

    _, cut = like(config, params, student, measure, _layers(config, student, options))
    if options.kind != "low_rank":
        return cut
    network, rows = _network(teacher, student), None
    if options.weighted:
        _check_calibration(calibration)
        rows = fisher_rows(network, cut, lambda p, batch: calibration.loss(network, p, batch), calibration.batches())
    return low_rank(network, cut, options.rank, kernels=options.kernels, rows=rows)[1]


def _network(teacher: Model, student: DecoderConfig) -> Model:
    """The student's decoder; rows beyond the teacher's vocabulary get no logit."""
    network = decoder(student)
    return network.with_vocabulary(min(teacher.vocab_size, network.vocab_size))


def _decoder_config(teacher: Model) -> DecoderConfig:
    if not isinstance(teacher.config, DecoderConfig):
        raise UserError(
            f"student_start: a teacher with config {teacher.config!r}; a student can only be cut out of a decoder."
        )
    return teacher.config


def _check_calibration(calibration: Calibration | None) -> None:
    if calibration is None:
        raise UserError("start: this student needs a Calibration, a loss and batches to measure importance on.")


def _layers(teacher: DecoderConfig, student: DecoderConfig, options: StartConfig) -> tuple[int, ...]:
    if not options.layers:
        return CHOICES[options.choice](student.layers, teacher.layers)
    if len(options.layers) != student.layers:
        raise UserError(
            f"student_start: layers={options.layers} are {len(options.layers)}; the student has {student.layers}."
        )
    return options.layers


def _equal_tables(network: Model, teacher: Model) -> tuple[str, ...]:
    """Names of the embedding and the head, which student and teacher must have alike."""
    shapes = [jax.eval_shape(model.init, jax.random.key(0)) for model in (network, teacher)]
    tables = [{n: tree[n].shape for n in ("embedding", "head") if n in tree} for tree in shapes]
    if tables[0] != tables[1] or not tables[0]:
        raise UserError(
            f"student_start: the student's embeddings are {tables[0]}, the teacher's {tables[1]}; they can be shared "
            "where width, rows and tying are equal."
        )
    return tuple(tables[0])
