"""The loop: data → step → metrics → evaluate → checkpoint.

The loop reads the metrics of the dispatch BEFORE the one it has just sent, so the device is never idle. Evaluation and
saving are the only other points at which it waits.
"""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill import parallel
from distill.batch import Batch
from distill.checkpoint import Checkpoints, fingerprint, lock, refuse_changes, resumed
from distill.config import to_dict
from distill.data.feed import Ahead, DataTimeout, InMemory
from distill.data.loader import Loader
from distill.devices import backend, processes
from distill.devices.profiling import Profile
from distill.devices.speed import flops_per_token, shown_share, utilisation
from distill.errors import UserError
from distill.metrics import Writer, averages
from distill.models.model import Model
from distill.objective import terms_at
from distill.optim import optimizer
from distill.parallel import ParallelConfig, Wrapping
from distill.progress import Progress
from distill.shapes import Params
from distill.state import Frozen, TrainState, init_state
from distill.step import make_train_step
from distill.term import Terms
from distill.training import LogConfig, TrainingConfig
from distill.trees import joined

Evaluate = Callable[[Params], dict[str, float]]


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, Ctrl-C), saved, and can be continued.

    Args:
      message: for the user.
      by: the signal.
    """

    def __init__(self, message: str, by: signal.Signals = signal.SIGTERM):
        super().__init__(message)
        self.by = by


@dataclasses.dataclass(frozen=True)
class Task:
    """All of a training that is not a number: student, objective, examples and teacher."""

    student: Model
    terms: Terms
    examples: Batch | Callable[[int], Batch]
    """All examples, kept on the devices; or ``k -> batch k`` for data larger than memory, a pure function that a thread
    calls ahead, such as ``StreamLoader(…).batch`` with the training's batch size and seed."""
    teacher: Model | None = None
    teacher_params: Params | None = None
    params: Params | None = None
    """Where the student starts: values of the parameters it learns. None: drawn by ``student.init`` from the seed."""
    base_params: Params | None = None
    """Parameters of the student that are not learnt (``Model.base``)."""
    evaluate: Evaluate = lambda params: {}
    """Metrics of the learning curve, such as exact match, from all of the student's parameters."""
    reduction: str = "token_mean"
    """Of every mean (``make_train_step``)."""
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Configuration and fingerprints; a run folder with another identity is refused. Empty: what ``fit`` knows, that is
    the training, names and weights of the terms, and the student's shapes."""

    @property
    def frozen(self) -> Params | Frozen | None:
        """The second argument of the step."""
        return self.teacher_params if self.base_params is None else Frozen(self.teacher_params, self.base_params)

    def measure(self, learnt: Params, base: Params | None = None) -> dict[str, float]:
        """``evaluate`` from what is learnt, and from what is not, where the steps hold it."""
        return self.evaluate(learnt if base is None else joined(base, learnt))


def fit(
    run: Path | str,
    task: Task,
    training: TrainingConfig,
    *,
    parallel_config: ParallelConfig = ParallelConfig(),
    log: LogConfig = LogConfig(),
    label: str = "student",
) -> Params:
    """Train in a run folder, or resume there; returns the final values of the parameters that are learnt.

    Args:
      run: the run folder, with checkpoints and metrics.jsonl.
      task: student, objective, examples and teacher.
      training: steps, batch, optimizer, seed.
      parallel_config: how the devices are used.
      log: what is shown and written.
      label: name of the training in the progress line.

    Raises:
      UserError: the folder holds a run with another identity, is in use, or the disk is full.
      FloatingPointError: loss or gradients are not finite (or, with ``on_nan="skip"``, are not ``skips_in_a_row``
        times); names the step. The last checkpoint is from before it.
      DataTimeout: no data came for ``data_timeout`` seconds; the state was saved.
      Stopped: SIGTERM or Ctrl-C; the state was saved.
    """
    run = Path(run)
    update = optimizer(training.optimizer, training.steps)
    wrapping = _wrap(task, training, update, parallel_config)
    _agree(task, training)
    identity = _identity(task, training)
    with lock(run), resumed(run, training.keep) as checkpoints, _stop_signal() as stop:
        if checkpoints.latest is not None:
            refuse_changes(run, checkpoints.meta()["identity"], identity)
        state, step = _start(checkpoints, task, training, update, wrapping)
        if step == training.steps:
            return wrapping.fetch_state(state).params
        writer = Writer(run, step, log.tensorboard)
        progress = Progress(label, training.steps, step, show=log.progress)
        feed = _feed(task, training, wrapping, step, stop)
        profile = Profile(run / "profile" if log.profile else None)
        with contextlib.closing(writer), contextlib.closing(feed), contextlib.closing(profile), progress:
            recorder = _Recorder(writer, progress, training, task, feed, _devices_of(state))
            state = _Run(
                task=task,
                training=training,
                wrapping=wrapping,
                checkpoints=checkpoints,
                feed=feed,
                recorder=recorder,
                profile=profile,
                stop=stop,
                identity=identity,
                state=state,
                step=step,
            ).go()
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
      devices: of the machine it will run on, which need not be attached (``plan.py``); None: the attached ones.

    Returns:
      ``(lowered, state, frozen)``; on a mesh the shapes say how they lie on it.

    Raises:
      UserError: pmap, whose arrays have one more axis; a batch that the devices cannot share.
    """
    if parallel_config.backend == "pmap":
        raise UserError("lower: backend pmap; expected auto, mesh or one_device.")
    update = optimizer(training.optimizer, training.steps)
    state = jax.eval_shape(lambda: init_state(task.student.init(jax.random.key(0)), update))
    held, count = task.examples, training.dispatch
    if callable(held):
        rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), held(0))
        held = None
    else:
        rows = jax.ShapeDtypeStruct((count, training.batch_size), np.dtype("int32"))
    frozen, examples = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (task.frozen, held))
    wrapping = _wrap(task, training, update, parallel_config, devices)
    lowered = wrapping.steps.lower(state, frozen, examples, parallel.divisible(rows, wrapping.parts))
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
            skip_not_finite=training.on_nan == "skip",
        )

    return parallel.wrap(config, make_step, task.student, update, task.teacher, devices)


def _agree(task: Task, training: TrainingConfig) -> None:
    """Raises UserError where processes were started with unequal settings or data."""
    if processes.count() > 1:
        data = "" if callable(task.examples) else fingerprint(task.examples)
        processes.agree("configuration or data", f"{task.identity} {training} {data}")


def _identity(task: Task, training: TrainingConfig) -> dict[str, Any]:
    """What must be equal when a run resumes: the task's identity, or else what ``fit`` itself knows of a training.

    The value of a term cannot be compared; its name and its weight, which holds T², can.
    """
    shapes = jax.tree_util.tree_leaves_with_path(jax.eval_shape(task.student.init, jax.random.key(0)))
    known = {
        "training": to_dict(training),
        "terms": {term.name: float(term.weight) for term in terms_at(task.terms, np.int32(0))},
        "scheduled": callable(task.terms),
        "reduction": task.reduction,
        "student": {jax.tree_util.keystr(path): f"{leaf.shape} {leaf.dtype}" for path, leaf in shapes},
    }
    return task.identity or {"fit": known}


def _start(checkpoints: Checkpoints, task: Task, training: TrainingConfig, update, wrapping: Wrapping):
    """The state to go on from: the newest checkpoint if there is one, else freshly drawn."""
    if checkpoints.latest is None:
        key = jax.random.key(training.seed)
        return parallel.draw_state(task.student, update, key, wrapping, task.params), 0
    state = checkpoints.restore(parallel.abstract_state(task.student, update, wrapping))
    return (state if wrapping.places is not None else wrapping.place_state(state)), checkpoints.latest


def _feed(task: Task, training: TrainingConfig, wrapping: Wrapping, step: int, stop: dict[str, bool]):
    if callable(task.examples):
        steps, timeout = range(step, training.steps, training.dispatch), training.data_timeout
        return Ahead(task.examples, steps, wrapping.place_rows, timeout=timeout, stopped=lambda: stop["now"])
    loader = Loader(task.examples, training.batch_size, training.seed)
    return InMemory(loader, training.dispatch, wrapping.place_examples, wrapping.place_rows)


@dataclasses.dataclass
class _Run:
    """A training on its way: what ``fit`` has opened, and where it stands."""

    task: Task
    training: TrainingConfig
    wrapping: Wrapping
    checkpoints: Checkpoints
    feed: InMemory | Ahead
    recorder: "_Recorder"
    profile: Profile
    stop: dict[str, bool]
    identity: dict[str, Any]
    state: TrainState
    step: int
    """Steps that were sent to the devices."""

    def go(self) -> TrainState:
        """The state after the last step."""
        training = self.training
        frozen = None if self.task.frozen is None else self.wrapping.place_params(self.task.frozen)
        base = self.wrapping.fetch_state(frozen.student) if isinstance(frozen, Frozen) else None
        if self.step == 0:
            self.evaluate(base)
        while self.step < training.steps:
            batches = self.read()  # while the device computes what was sent before
            if batches is not None:
                self.dispatch(frozen, batches)
            self.stop["now"] |= processes.asked_to_stop()
            at_end = self.step == training.steps
            if batches is not None:
                due = at_end or self.step % training.evaluate_every == 0
                self.profile.after(self.state, due, training.dispatch)
                if due:
                    self.recorder.record()
                    self.evaluate(base)
            if at_end or self.step % training.save_every == 0 or self.stop["now"]:
                self.save()
            if self.stop["now"] and not at_end:
                message = f"stopped at step {self.step} of {training.steps}; saved. Run the same command to continue."
                raise Stopped(message, signal.SIGINT if self.stop["interrupted"] else signal.SIGTERM)
        return self.state

    def read(self) -> tuple | None:
        """What the next dispatch works on; None if the run was asked to stop while the source gave nothing."""
        try:
            return self.feed(self.step)
        except DataTimeout as error:
            if processes.count() > 1:
                raise  # to save takes all processes, and the others wait in a step
            self.save()
            again = f"{error}; saved at step {self.step}. See to it, then run the same command again."
            raise DataTimeout(again) from None

    def dispatch(self, frozen: Any, batches: tuple) -> None:
        """Sends the next steps to the devices; does not wait for them."""
        self.profile.before(self.wrapping.steps, (self.state, frozen, *batches))
        self.state, metrics = self.wrapping.steps(self.state, frozen, *batches)
        self.recorder.dispatched(self.step, self.wrapping.fetch_metrics(metrics))
        self.step += self.training.dispatch

    def evaluate(self, base: Params | None) -> None:
        """A point of the learning curve."""
        self.recorder.evaluated(self.step, self.task.measure(self.wrapping.fetch_state(self.state).params, base))

    def save(self) -> None:
        """Starts to write a checkpoint; a state whose loss is not finite is never saved."""
        self.recorder.record()
        meta = {"identity": self.identity, "next_batch": self.step}
        measured = self.recorder.measured.get(self.step)
        self.checkpoints.save(self.step, self.wrapping.fetch_state(self.state), meta, measured)


def _devices_of(state: TrainState) -> int:
    return len(jax.tree.leaves(state)[0].sharding.device_set)


class _Recorder:
    """Reads metrics one dispatch late if that spares a wait, checks them, writes them."""

    def __init__(self, writer: Writer, progress: Progress, training: TrainingConfig, task: Task, feed, devices: int):
        self.writer, self.progress, self.training, self.task, self.feed = writer, progress, training, task, feed
        self.skips, self.devices = _Skips(training), devices
        self.pending: tuple[int, Any] | None = None
        self.measured: dict[int, dict[str, float]] = {}
        """Step of the last evaluation → its metrics."""
        self.last = time.perf_counter()
        self.started = self.last - writer.seconds

    def dispatched(self, first: int, metrics: dict[str, Any]) -> None:
        """Records the dispatch before, while this one computes; this one too where it has ended with its call."""
        self.record()
        self.pending = first, metrics
        if backend.ends_in_call():
            self.record()

    def record(self) -> None:
        if self.pending is None:
            return
        (first, metrics), self.pending = self.pending, None
        metrics = jax.device_get(metrics)
        tokens = float(np.sum(metrics.pop("tokens")[0]))
        skipped = self.skips.count(first, metrics)
        values = averages(metrics)
        if "skipped" in metrics:  # of a dispatch of which every step was skipped nothing else is known
            values = (values if skipped < self.training.dispatch else {}) | {"skipped": skipped}
        step = first + self.training.dispatch
        speed = self._speed(tokens)
        self.writer.write("train", step, values | {"tokens": tokens} | speed)
        notes = shown_share(speed["mfu"]) + " MFU" if "mfu" in speed else ""
        notes += f"  {self.skips.in_all} skipped" if self.skips.in_all else ""
        shown = {"loss": values.get("loss", np.nan), "tokens_per_second": speed["tokens_per_second"], "notes": notes}
        self.progress.update(step, **shown)

    def _speed(self, tokens: float) -> dict[str, float]:
        """Of the dispatch whose metrics are here now: from those of the one before, or from an evaluation, to these.

        Tokens are counted without padding, FLOPs with it: the devices compute it too.
        """
        now, length = time.perf_counter(), self.feed.length
        spent, self.last = now - self.last, now
        speed = {"seconds": now - self.started, "tokens_per_second": tokens / spent}
        each = flops_per_token(self.task.student, self.task.teacher, length)
        flops = each * self.training.dispatch * self.training.batch_size * length / spent if each else None
        return speed | (utilisation(flops, self.devices) if flops else {})

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        keep = self.training.keep
        if keep.best and keep.metric not in values:
            raise UserError(f"keep: best={keep.best!r}, but the evaluation measures {', '.join(values) or 'nothing'}.")
        self.measured = {step: values}
        if values:
            self.last = time.perf_counter()
            self.writer.write("eval", step, values | {"seconds": self.last - self.started})
            self.progress.evaluated(step, values)


class _Skips:
    """What comes of steps that are not finite."""

    def __init__(self, training: TrainingConfig):
        self.skipping, self.limit, self.in_a_row = training.on_nan == "skip", training.skips_in_a_row, 0
        self.in_all = 0

    def count(self, first: int, metrics: dict[str, Any]) -> int:
        """How many steps of a dispatch were skipped. Raises FloatingPointError where one, or too many, end the run."""
        if self.skipping:
            bad = np.asarray(metrics["skipped"][0]) > 0
        else:
            bad = ~np.isfinite(metrics["loss"][0]) | ~np.isfinite(metrics["gradient_norm"][0])
        for k, one in enumerate(bad):
            self.in_a_row = self.in_a_row + 1 if one else 0
            if self.in_a_row >= (self.limit if self.skipping else 1):
                raise FloatingPointError(self._message(first + k, metrics, k))
        self.in_all += int(bad.sum())
        return int(bad.sum())

    def _message(self, k: int, metrics: dict[str, Any], i: int) -> str:
        if self.skipping:
            return (
                f"step {k + 1} (batch {k}): {self.limit} batches in a row were skipped: loss or gradients not finite."
            )
        teacher = metrics.get("teacher_cross_entropy")
        blame = "the gradient" if np.isfinite(metrics["loss"][0][i]) else "the loss"
        blame = blame if teacher is None or np.isfinite(teacher[0][i]) else "the teacher's output"
        return (
            f"step {k + 1} (batch {k}): {blame} is not finite; nothing was saved since. To go on without such batches: "
            "on_nan=skip in the training's configuration."
        )


@contextlib.contextmanager
def _stop_signal() -> Iterator[dict[str, bool]]:
    """``stop["now"]`` becomes True on SIGTERM or Ctrl-C, ``stop["interrupted"]`` on the latter.

    A second Ctrl-C does not wait for the running dispatch. Outside the main thread signals are left alone.

    Of several processes SIGTERM is JAX's: it tells all of them (``processes.asked_to_stop``).
    """
    stop = {"now": False, "interrupted": False}

    def ask(number: int, _: Any) -> None:
        if stop["interrupted"] and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop["interrupted"] |= number == signal.SIGINT
        if processes.count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            stop["now"] = True

    handlers = {signal.SIGINT: ask} | ({} if processes.count() > 1 else {signal.SIGTERM: ask})
    try:
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    except ValueError:
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
