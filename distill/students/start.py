"""Where a student starts: one call, one line of a configuration.

====================  ================================================================================================
``kind``              the student
====================  ================================================================================================
``random``            drawn at random
``embeddings``        drawn at random, but with the teacher's embedding and head
``teacher``           cut out of the teacher: layers by ``layers`` or ``choice``, the rest by importance (``init.py``)
``low_rank``          that, its kernels replaced by factors of rank ``rank`` (``factors.py``)
``lora``              that, frozen, with a correction of rank ``rank`` to learn (``factors.py``)
====================  ================================================================================================
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from distill.models.config import DecoderConfig
from distill.models.decoder import decoder
from distill.models.model import Model
from distill.shapes import Array, Params
from distill.students.cut import CHOICES, Importance, importance, like
from distill.students.factors import factored, fisher_rows, low_rank
from distill.students.lora import freeze, lora
from distill.trees import joined


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """Where the student starts (``distill/students/start.py``)."""

    kind: Literal["random", "embeddings", "teacher", "low_rank", "lora"] = "random"
    choice: Literal[*CHOICES] = "spread"
    """Which of the teacher's layers are kept: evenly spread with both ends, every n-th, first and last, the first."""
    layers: tuple[int, ...] = ()
    """Those to keep, counted from 0, as many as the student has; empty: by ``choice``."""
    rank: int = 8
    """Of the factors, for low_rank and lora."""
    alpha: float = 16.0
    """lora: the correction counts alpha/rank times."""
    kernels: tuple[str, ...] = ()
    """Those with factors (``factors.KERNELS``); empty: all in the layers."""
    weighted: bool = False
    """low_rank: rows of a kernel weigh by what an error in them costs on the calibration batches."""
    share_embeddings: bool = False
    """Embedding and head are the teacher's own arrays: not learnt, not held twice. The widths must be equal."""

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0.0:
            raise ValueError(f"student_start: rank={self.rank}, alpha={self.alpha}; expected rank ≥ 1 and alpha > 0.")
        read = {"choice": self.cut, "layers": self.cut, "rank": self.factors, "kernels": self.factors}
        read |= {"alpha": self.kind == "lora", "weighted": self.kind == "low_rank"}
        read |= {"share_embeddings": self.kind != "lora"}
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != field.default and not read.get(field.name, True):
                raise ValueError(
                    f"student_start: {field.name}={getattr(self, field.name)!r} means nothing with kind={self.kind}."
                )

    @property
    def cut(self) -> bool:
        """Is it cut out of the teacher?"""
        return self.kind in ("teacher", "low_rank", "lora")

    @property
    def factors(self) -> bool:
        """Has it factors?"""
        return self.kind in ("low_rank", "lora")

    @property
    def plain(self) -> bool:
        """Are all parameters of the student learnt, as they are?"""
        return not (self.factors or self.share_embeddings)

    def identity(self) -> Any:
        """As it stands in the identity of a run: the kind alone where nothing else is set."""
        plain = self == StartConfig(kind=self.kind)
        values = dataclasses.asdict(self) | {"layers": list(self.layers), "kernels": list(self.kernels)}
        return self.kind if plain and not self.factors else values


class Calibration(NamedTuple):
    """What importance is measured on; nothing of it is called unless units are chosen by it."""

    loss: Callable[[Model, Params, Any], Array]
    """``(model, params, batch) -> scalar``, such as the cross-entropy of some text."""
    batches: Callable[[], Iterable[Any]]


class Start(NamedTuple):
    """A student before its first step."""

    model: Model
    """``init(key)`` gives the parameters it learns from; for lora and shared embeddings only a part (``base``)."""
    base: Params | None
    """Parameters that are not learnt, to be given to the step in a ``Frozen``; None: all are learnt."""

    def whole(self, params: Params) -> Params:
        """All that ``model.apply`` takes, from what is learnt."""
        return params if self.base is None else joined(self.base, params)

    def plain(self, params: Params) -> Params:
        """Parameters of ``decoder(student_config)``, factors multiplied out, from what is learnt."""
        whole = self.whole(params)
        return whole if self.model.merge is None else self.model.merge(whole)


def start(
    teacher: Model,
    teacher_params: Params,
    student: DecoderConfig,
    options: StartConfig,
    calibration: Calibration | None = None,
) -> Start:
    """The student of a configuration, at its start.

    Args:
      teacher: a decoder.
      teacher_params: of it; not changed, and shared where the student is frozen.
      student: its sizes.
      options: where it starts.
      calibration: loss and batches, needed where units are chosen by importance or kernels are ``weighted``.

    Raises:
      ValueError: a student that cannot be made like this from this teacher; says what differs.

    Example:
      >>> config = DecoderConfig(vocab_size=14, layers=4, width=8, heads=2, feed_forward=16)
      >>> teacher = decoder(config)
      >>> params, small = teacher.init(jax.random.key(0)), dataclasses.replace(config, layers=2)
      >>> student = start(teacher, params, small, StartConfig("teacher", layers=(0, 3)))
      >>> learnt = student.model.init(jax.random.key(1))
      >>> bool((learnt["layers"]["mlp"]["up"]["kernel"][1] == params["layers"]["mlp"]["up"]["kernel"][3]).all())
      True
    """
    network = _network(teacher, student)
    if options.kind in ("random", "embeddings"):
        return _from_random(network, teacher, teacher_params, options)
    config = _decoder_config(teacher)

    def measure() -> Importance:
        _check_calibration(calibration)

        def loss(params: Params, batch: Any) -> Array:
            return calibration.loss(teacher, params, batch)

        return importance(config, teacher_params, loss, calibration.batches())

    _, params = like(config, teacher_params, student, measure, _layers(config, student, options))
    if options.kind == "lora":
        return Start(lora(network, options.rank, alpha=options.alpha, kernels=options.kernels), params)
    if options.kind == "low_rank":
        rows = None
        if options.weighted:
            _check_calibration(calibration)
            rows = fisher_rows(network, params, lambda p, b: calibration.loss(network, p, b), calibration.batches())
        network, params = low_rank(network, params, options.rank, kernels=options.kernels, rows=rows)
    return _shared(dataclasses.replace(network, init=lambda key: params), teacher, teacher_params, options)


def outline(teacher: Model, student: DecoderConfig, options: StartConfig) -> Model:
    """The student's model before there is a trained teacher: ``start`` on shapes alone, with its errors.

    Its ``init`` draws parameters of the right shapes at random.
    """
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
    if options.kind == "embeddings" or options.share_embeddings:
        names = _check_shared(network, teacher)
    if options.kind == "low_rank":
        network = factored(network, options.rank, options.kernels)
    return freeze(network, names) if options.share_embeddings else network


def _network(teacher: Model, student: DecoderConfig) -> Model:
    """The student's decoder; rows beyond the teacher's words get no logit."""
    network = decoder(student)
    return network.with_vocabulary(min(teacher.vocab_size, network.vocab_size))


def _decoder_config(teacher: Model) -> DecoderConfig:
    if not isinstance(teacher.config, DecoderConfig):
        raise ValueError(
            f"student_start: a teacher with config {teacher.config!r}; a student can only be cut out of a decoder."
        )
    return teacher.config


def _check_calibration(calibration: Calibration | None) -> None:
    if calibration is None:
        raise ValueError("start: this student needs a Calibration, a loss and batches to measure importance on.")


def _layers(teacher: DecoderConfig, student: DecoderConfig, options: StartConfig) -> tuple[int, ...]:
    if not options.layers:
        return CHOICES[options.choice](student.layers, teacher.layers)
    if len(options.layers) != student.layers:
        raise ValueError(
            f"student_start: layers={options.layers} are {len(options.layers)}; the student has {student.layers}."
        )
    return options.layers


def _from_random(network: Model, teacher: Model, teacher_params: Params, options: StartConfig) -> Start:
    if options.kind == "random" and not options.share_embeddings:
        return Start(network, None)
    names = _check_shared(network, teacher)
    taken = {name: teacher_params[name] for name in names}
    if not options.share_embeddings:
        network = dataclasses.replace(network, init=lambda key, model=network: model.init(key) | taken)
    return _shared(network, teacher, teacher_params, options)


def _shared(network: Model, teacher: Model, teacher_params: Params, options: StartConfig) -> Start:
    if not options.share_embeddings:
        return Start(network, None)
    names = _check_shared(network, teacher)
    return Start(freeze(network, names), {name: teacher_params[name] for name in names})


def _check_shared(network: Model, teacher: Model) -> tuple[str, ...]:
    """The names of the tables that student and teacher both have, if they have them alike."""
    shapes = [jax.eval_shape(model.init, jax.random.key(0)) for model in (network, teacher)]
    tables = [{n: tree[n].shape for n in ("embedding", "head") if n in tree} for tree in shapes]
    if tables[0] != tables[1] or not tables[0]:
        raise ValueError(
            f"student_start: the student's embeddings are {tables[0]}, the teacher's {tables[1]}; they can be shared "
            "where width, rows and tying are equal."
        )
    return tuple(tables[0])
