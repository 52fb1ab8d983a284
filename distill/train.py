"""The loop: data → step → metrics → evaluate → checkpoint.

Nothing in it waits for the device but reading the metrics of the dispatch BEFORE the one just sent, so the device is
never idle; evaluation and saving are the only other meeting points.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill import parallel
from distill.checkpoint import Checkpoints, lock, refuse_changes, resumed
from distill.config import LogConfig, TrainingConfig
from distill.data.loader import Batch, Loader
from distill.metrics import Writer, averages
from distill.models.factors import joined
from distill.models.model import Model
from distill.objective import Term
from distill.optim import optimizer
from distill.parallel import ParallelConfig, Wrapping
from distill.progress import Progress
from distill.shapes import Params
from distill.step import Frozen, TrainState, init_state, make_train_step

Evaluate = Callable[[Params], dict[str, float]]


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, Ctrl-C), saved, and can be continued."""


@dataclasses.dataclass(frozen=True)
class Task:
    """All of a training that is not a number: who learns what, from whom."""

    student: Model
    terms: Sequence[Term]
    examples: Batch
    teacher: Model | None = None
    teacher_params: Params | None = None
    base_params: Params | None = None
    """Parameters of the student that are not learnt (``Model.base``)."""
    evaluate: Evaluate = lambda params: {}
    """Metrics of the learning curve, such as exact match, from all of the student's parameters."""
    reduction: str = "token_mean"
    """Of every mean (``make_train_step``)."""
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Configuration and fingerprints; a run folder with another identity is refused."""

    @property
    def frozen(self) -> Params | Frozen | None:
        """The second argument of the step."""
        return self.teacher_params if self.base_params is None else Frozen(self.teacher_params, self.base_params)

    def measure(self, learnt: Params) -> dict[str, float]:
        """``evaluate`` from what is learnt."""
        return self.evaluate(learnt if self.base_params is None else joined(self.base_params, learnt))


def fit(
    run: Path | str,
    task: Task,
    training: TrainingConfig,
    *,
    parallel_config: ParallelConfig = ParallelConfig(),
    log: LogConfig = LogConfig(),
    label: str = "student",
) -> Params:
    """Trains, or goes on training, in a run folder; returns the final parameters (what is learnt of them).

    Args:
      run: the run folder; checkpoints and metrics.jsonl live there.
      task: what is learnt.
      training: steps, batch, optimizer, seed.
      parallel_config: how the devices are used.
      log: what is shown and written.
      label: in the progress line.

    Raises:
      ValueError: the folder holds a run with another identity, is in use, or the disk is full.
      FloatingPointError: the loss is not finite; names the step. The last checkpoint is from before it.
      Stopped: SIGTERM or Ctrl-C; the state was saved.
    """
    run = Path(run)
    update = optimizer(training.optimizer, training.steps)
    wrapping = _wrap(task, training, update, parallel_config)
    loader = Loader(task.examples, training.batch_size, training.seed)
    with lock(run), resumed(run, training.keep) as checkpoints, _stop_signal() as stop:
        state, step = _start(run, checkpoints, task, training, update, wrapping)
        if step == training.steps:
            return wrapping.fetch_state(state).params
        writer = Writer(run, step, log.tensorboard)
        with contextlib.closing(writer), Progress(label, training.steps, step, show=log.progress) as progress:
            state = _loop(state, step, task, training, wrapping, loader, checkpoints, writer, progress, stop)
        return wrapping.fetch_state(state).params


def lower(
    task: Task,
    training: TrainingConfig,
    parallel_config: ParallelConfig,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[Any, TrainState, Any]:
    """What ``fit`` would run, lowered on shapes alone, and the shapes of its state and of what is frozen in it.

    Args:
      task: of arrays, or of ``jax.ShapeDtypeStruct``.
      training: as for ``fit``.
      parallel_config: as for ``fit``.
      devices: that it will run on, which may be of a machine that is not here (``plan.py``); None: those there are.

    Returns:
      ``(lowered, state, frozen)``; on a mesh the shapes say how they lie on it.

    Raises:
      ValueError: pmap, whose arrays have one more axis.
    """
    if parallel_config.backend == "pmap":
        raise ValueError("lower: backend pmap; expected auto, mesh or one_device.")
    update = optimizer(training.optimizer, training.steps)
    state = jax.eval_shape(lambda: init_state(task.student.init(jax.random.key(0)), update))
    frozen, examples = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (task.frozen, task.examples))
    rows = jax.ShapeDtypeStruct((training.steps_per_dispatch, training.batch_size), np.dtype("int32"))
    wrapping = _wrap(task, training, update, parallel_config, devices)
    lowered = wrapping.steps.lower(state, frozen, examples, rows)
    if wrapping.places is not None:
        state, frozen = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (state, frozen), wrapping.places
        )
    return lowered, state, frozen


def _wrap(task: Task, training: TrainingConfig, update, config: ParallelConfig, devices=None) -> Wrapping:
    def make_step(axis_name: str | None, mesh=None):
        return make_train_step(
            task.student,
            task.terms,
            update,
            teacher=task.teacher,
            micro_batches=training.micro_batches,
            axis_name=axis_name,
            mesh=mesh,
            chunk_size=training.chunk_size,
            reduction=task.reduction,
            remat=training.remat,
        )

    return parallel.wrap(config, make_step, task.student, update, task.teacher, devices)


def _start(run: Path, checkpoints: Checkpoints, task: Task, training: TrainingConfig, update, wrapping: Wrapping):
    """The state to go on from: the newest checkpoint if there is one, else freshly drawn."""
    if checkpoints.latest is None:
        return parallel.draw_state(task.student, update, jax.random.key(training.seed), wrapping), 0
    refuse_changes(run, checkpoints.meta()["identity"], task.identity)
    state = checkpoints.restore(parallel.abstract_state(task.student, update, wrapping))
    return (state if wrapping.places is not None else wrapping.place_state(state)), checkpoints.latest


def _loop(
    state: TrainState,
    step: int,
    task: Task,
    training: TrainingConfig,
    wrapping: Wrapping,
    loader: Loader,
    checkpoints: Checkpoints,
    writer: Writer,
    progress: Progress,
    stop: dict[str, bool],
) -> TrainState:
    count = training.steps_per_dispatch
    frozen = None if task.frozen is None else wrapping.place_params(task.frozen)
    examples = wrapping.place_examples(loader.examples)
    recorder = _Recorder(writer, progress, training, task.examples)
    if step == 0:
        recorder.evaluated(0, task.measure(wrapping.fetch_state(state).params))
    while step < training.steps:
        rows = wrapping.place_rows(loader.rows(step, count))
        state, metrics = wrapping.steps(state, frozen, examples, rows)
        recorder.record()  # of the dispatch before, while this one computes
        recorder.pending = (step, wrapping.fetch_metrics(metrics))
        step += count
        if step % training.evaluate_every == 0 or step == training.steps:
            recorder.record()
            recorder.evaluated(step, task.measure(wrapping.fetch_state(state).params))
        if step % training.save_every == 0 or step == training.steps or stop["now"]:
            recorder.record()  # a state whose loss is not finite is never saved
            meta = {"identity": task.identity, "next_batch": step}
            checkpoints.save(step, wrapping.fetch_state(state), meta, recorder.measured.get(step))
        if stop["now"] and step < training.steps:
            raise Stopped(f"stopped at step {step} of {training.steps}; saved. Run the same command to continue.")
    return state


class _Recorder:
    """Reads metrics one dispatch late, checks them, writes them."""

    def __init__(self, writer: Writer, progress: Progress, training: TrainingConfig, examples: Batch):
        self.writer, self.progress, self.training = writer, progress, training
        self.pending: tuple[int, Any] | None = None
        self.measured: dict[int, dict[str, float]] = {}
        """Step of the last evaluation → its metrics."""
        self.started = self.last = time.perf_counter()
        self.tokens_per_step = training.batch_size * examples.inputs.shape[1]

    def record(self) -> None:
        if self.pending is None:
            return
        (first, metrics), self.pending = self.pending, None
        metrics = jax.device_get(metrics)
        _check_finite(first, metrics)
        now = time.perf_counter()
        count = self.training.steps_per_dispatch
        speed = {"seconds": now - self.started, "tokens_per_second": count * self.tokens_per_step / (now - self.last)}
        self.last = now
        values = averages(metrics)
        self.writer.write("train", first + count, values | speed)
        self.progress.update(first + count, loss=values["loss"], tokens_per_second=speed["tokens_per_second"])

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        keep = self.training.keep
        if keep.best and keep.metric not in values:
            raise ValueError(f"keep: best={keep.best!r}, but the evaluation measures {', '.join(values) or 'nothing'}.")
        self.measured = {step: values}
        if values:
            self.last = time.perf_counter()
            self.writer.write("eval", step, values | {"seconds": self.last - self.started})
            self.progress.evaluated(step, values)


def _check_finite(first: int, metrics: dict[str, Any]) -> None:
    bad = ~np.isfinite(np.asarray(metrics["loss"][0]))
    if not bad.any():
        return
    k = int(np.argmax(bad))
    teacher = metrics.get("teacher_cross_entropy")
    blame = "the loss" if teacher is None or np.isfinite(teacher[0][k]) else "the teacher's output"
    raise FloatingPointError(
        f"step {first + k + 1} (batch {first + k}): {blame} is not finite; nothing was saved since."
    )


@contextlib.contextmanager
def _stop_signal() -> Iterator[dict[str, bool]]:
    """``stop["now"]`` becomes True on SIGTERM or Ctrl-C. Outside the main thread signals are left alone."""
    stop = {"now": False}

    def ask(*_: Any) -> None:
        stop["now"] = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
