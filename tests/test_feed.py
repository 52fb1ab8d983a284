"""Feeds with late, missing or non-finite batches, and the speed that the loop reports."""

import dataclasses
import os
import re
import signal
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill import cli, train
from distill.checkpoint import Checkpoints
from distill.data import addition
from distill.data.feed import Ahead, DataTimeout
from distill.data.loader import Loader
from distill.devices import speed
from distill.losses import DenseTargets
from distill.metrics import read_metrics
from distill.models import DecoderConfig, decoder
from distill.objective import ObjectiveConfig, terms_of
from distill.optim import OptimizerConfig, optimizer
from distill.parallel import ParallelConfig
from distill.state import init_state
from distill.step import make_train_step
from distill.students.lora import freeze
from distill.train import Stopped, Task, fit
from distill.training import LogConfig, TrainingConfig

DATA = addition.AdditionConfig(digits=1)
MODEL = decoder(DecoderConfig(vocab_size=14, layers=1, width=8, heads=2, feed_forward=16))
TRAINING = TrainingConfig(
    steps=12, batch_size=8, steps_per_dispatch=2, evaluate_every=12, save_every=4, optimizer=OptimizerConfig()
)
SKIP = dataclasses.replace(TRAINING, on_nan="skip")
PATIENCE = 300.0  # seconds; any batch arrives sooner, even on a busy machine
ALONE = {"log": LogConfig(progress=False), "parallel_config": ParallelConfig(backend="one_device")}


@pytest.fixture(scope="module")
def loader():
    examples = addition.encode(DATA, addition.pairs(DATA)["train"]).batch(DATA)
    logits = np.random.default_rng(0).normal(size=(*examples.inputs.shape, 14)).astype(np.float32)
    return Loader(examples._replace(targets=DenseTargets(logits)), TRAINING.batch_size, TRAINING.seed)


def task(examples) -> Task:
    return Task(MODEL, terms_of(ObjectiveConfig()), examples)


def with_nan(loader, bad):
    """``k -> batch k``, with NaN in the targets of the batches in ``bad``."""

    def batch(k):
        good = loader.batch(k)
        return good._replace(targets=DenseTargets(good.targets.logits * np.float32(np.nan))) if k in bad else good

    return batch


def equal_bits(left, right) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


@pytest.fixture(scope="module")
def straight(loader, tmp_path_factory):
    run = tmp_path_factory.mktemp("straight")
    return fit(run, task(loader.examples), TRAINING, **ALONE), run


@pytest.mark.parametrize("backend", ["one_device", "mesh", "pmap"])
def test_batches_read_ahead_train_like_batches_in_memory(backend, loader, straight, tmp_path):
    got = fit(tmp_path, task(loader.batch), TRAINING, **ALONE | {"parallel_config": ParallelConfig(backend=backend)})
    if backend == "one_device":
        assert equal_bits(got, straight[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, straight[0])


# ---- not finite


def counted(opt_state) -> list[int]:
    """Steps that the schedules in an optimizer's state have counted."""
    found = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
    return [int(node.count) for node in found if isinstance(node, optax.ScaleByScheduleState)]


def without_schedules(opt_state):
    is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    return jax.tree.map(lambda node: None if is_schedule(node) else node, opt_state, is_leaf=is_schedule)


def test_a_skipped_step_changes_no_bit(loader):
    update = optimizer(TRAINING.optimizer, TRAINING.steps)
    plain, skipping = (
        jax.jit(make_train_step(MODEL, terms_of(ObjectiveConfig()), update, skip_not_finite=skip))
        for skip in (False, True)
    )
    before, _ = skipping(init_state(MODEL.init(jax.random.key(0)), update), None, loader.batch(0))
    after, metrics = skipping(before, None, with_nan(loader, {1})(1))
    assert equal_bits(before.params, after.params) and int(after.step) == 2
    assert equal_bits(*(without_schedules(state.opt_state) for state in (before, after)))
    assert counted(before.opt_state) == [1] and counted(after.opt_state) == [2]  # as state.step
    assert float(metrics["skipped"][0]) == 1.0 and float(metrics["loss"][1]) == 0.0
    after, metrics = skipping(before, None, loader.batch(1))
    want, _ = plain(before, None, loader.batch(1))
    assert equal_bits(after, want) and float(metrics["skipped"][0]) == 0.0
    assert "skipped" not in jax.eval_shape(plain, before, None, loader.batch(1))[1]  # plain steps have none


def test_after_a_skipped_step_every_schedule_is_at_the_step(loader):
    """The learning rate of step 3 is that of step 3, whether step 2 was skipped or not."""
    rate = optax.piecewise_constant_schedule(1.0, {2: 0.25, 3: 100.0})
    update = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(rate))
    step = jax.jit(make_train_step(MODEL, terms_of(ObjectiveConfig()), update, skip_not_finite=True))
    state, moved = init_state(MODEL.init(jax.random.key(0)), update), []
    for k in range(3):
        new, _ = step(state, None, with_nan(loader, {1})(k))
        moved.append(float(optax.tree.norm(jax.tree.map(jnp.subtract, new.params, state.params))))
        state = new
    assert moved[1] == 0.0 and 0.1 < moved[2] / moved[0] < 0.4  # Adam's updates are of about one size


def test_non_finite_gradients_with_a_finite_loss_are_skipped(loader):
    update = optimizer(TRAINING.optimizer, TRAINING.steps)
    step = jax.jit(make_train_step(MODEL, terms_of(ObjectiveConfig()), update, skip_not_finite=True))
    state = init_state(MODEL.init(jax.random.key(0)), update)
    params = jax.tree.map(lambda x: x * np.float32(1e30), state.params)
    after, metrics = step(state._replace(params=params), None, loader.batch(0))
    assert float(metrics["skipped"][0]) == 1.0 and equal_bits(after.params, params)


def test_skipped_steps_are_counted_in_the_metrics(loader, straight, tmp_path, capsys):
    log = {"log": LogConfig(progress=True)}
    got = fit(
        tmp_path,
        dataclasses.replace(task(with_nan(loader, {5, 8})), evaluate=lambda _: {"kl": 0.5}),
        SKIP,
        **ALONE | log,
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got)) and not equal_bits(got, straight[0])
    lines = [line for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert {line["step"]: line["skipped"] for line in lines} == {2: 0, 4: 0, 6: 1, 8: 0, 10: 1, 12: 0}
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert "2 skipped" in capsys.readouterr().out
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 12


def test_too_many_consecutive_skips_stop_the_run(loader, tmp_path):
    bad = dataclasses.replace(SKIP, skips_in_a_row=3)
    with pytest.raises(FloatingPointError, match=r"step 10 \(batch 9\): 3 batches in a row"):
        fit(tmp_path, task(with_nan(loader, {3, 7, 8, 9})), bad, **ALONE)
    assert [line["step"] for line in read_metrics(tmp_path) if line.get("skipped")] == [4, 8]


def test_a_run_stopped_by_nan_resumes_with_skipping(loader, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 6 \(batch 5\): the teacher's output is .*on_nan=skip"):
        fit(tmp_path / "a", task(with_nan(loader, {5})), TRAINING, **ALONE)
    fit(tmp_path / "b", task(with_nan(loader, {5})), SKIP, **ALONE)
    fit(tmp_path / "a", task(with_nan(loader, {5})), SKIP, **ALONE)
    lines = [[(line["step"], line["loss"]) for line in read_metrics(tmp_path / run)] for run in "ab"]
    assert lines[0] == lines[1] and len(lines[0]) == 6


# ---- a source that hangs or fails


def test_a_hung_source_saves_the_state_and_ends_the_run(loader, straight, tmp_path, monkeypatch):
    awake, now = threading.Event(), [0.0]
    # Time passes only while the source hangs, so that no other batch is late on a slow machine.
    monkeypatch.setitem(Ahead.__init__.__globals__, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def hangs(k):
        while k == 6 and not awake.wait(0.05):
            now[0] += 0.1
        return loader.batch(k)

    impatient = dataclasses.replace(TRAINING, data_timeout=0.3)
    with pytest.raises(DataTimeout, match=r"batch 6: nothing from the data for 0\.3 s; saved at step 6"):
        fit(tmp_path, task(hangs), impatient, **ALONE)
    awake.set()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 6  # although checkpoints are due at 4 and 8 only
    assert equal_bits(fit(tmp_path, task(loader.batch), TRAINING, **ALONE), straight[0])


def test_sigterm_stops_the_run_while_the_source_hangs(loader, straight, tmp_path, monkeypatch):
    asked, awake, ask = threading.Event(), threading.Event(), Ahead.__call__

    def watched(feed, step):
        if step == 6:
            asked.set()
        return ask(feed, step)

    def hangs(k):
        if k == 6:
            asked.wait()  # the steps before are dispatched, and the loop waits for this batch
            os.kill(os.getpid(), signal.SIGTERM)
            awake.wait()
        return loader.batch(k)

    monkeypatch.setattr(Ahead, "__call__", watched)
    with pytest.raises(Stopped, match="stopped at step 6 of 12"):
        fit(tmp_path, task(hangs), TRAINING, **ALONE)
    awake.set()
    assert equal_bits(fit(tmp_path, task(loader.batch), TRAINING, **ALONE), straight[0])


def test_batches_are_on_the_devices_before_they_are_requested(loader):
    placed = threading.Event()

    def place(batches):
        assert threading.current_thread() is not threading.main_thread()
        found = jax.device_put(batches)
        placed.set()
        return found

    feed = Ahead(loader.batch, range(0, 8, 2), place, timeout=PATIENCE)
    assert placed.wait(PATIENCE)
    _, batches = feed(0)
    assert isinstance(batches.inputs, jax.Array) and feed.length == batches.inputs.shape[-1]
    feed.close()


def test_a_batch_that_cannot_be_placed_raises_where_it_is_requested(loader):
    def place(batches):
        raise RuntimeError("no room")

    feed = Ahead(loader.batch, range(0, 8, 2), place, timeout=PATIENCE)
    with pytest.raises(RuntimeError, match="no room"):
        feed(0)
    feed.close()


def test_an_error_of_the_source_names_the_batch(loader):
    def fails(k):
        if k == 3:
            raise OSError("the disk is gone")
        return loader.batch(k)

    feed = Ahead(fails, range(0, 8, 2), lambda batches: batches, timeout=PATIENCE)
    np.testing.assert_array_equal(feed(0)[1].inputs[1], loader.batch(1).inputs)
    with pytest.raises(ValueError, match="batch 3: the data cannot be read: the disk is gone"):
        feed(2)


@pytest.mark.parametrize("bad", [{"data_timeout": 0.0}, {"skips_in_a_row": 0}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrainingConfig(**bad)


# ---- speed


def test_flops_count_the_teacher_forward_only(loader, straight, monkeypatch):
    length = loader.examples.inputs.shape[1]
    each = MODEL.config.flops_per_token(length)
    assert speed.flops_per_token(MODEL, MODEL, length) == 4 * each
    frozen = dataclasses.replace(MODEL, base=MODEL)
    assert speed.flops_per_token(frozen, None, length) == 2 * each
    shared = freeze(MODEL, ("embedding", "head"))  # its layers are learnt: only the head spares a gradient
    head = 2 * MODEL.config.width * MODEL.config.vocab_size
    assert speed.flops_per_token(shared, None, length) == 3 * each - head
    assert speed.flops_per_token(dataclasses.replace(MODEL, config=None), None, length) is None
    line = [line for line in read_metrics(straight[1]) if line["kind"] == "train"][-1]
    np.testing.assert_allclose(line["flops_per_second"], 3 * each * line["tokens_per_second"])
    assert "mfu" not in line  # the peak of a CPU is unknown
    monkeypatch.setattr(speed, "peak", lambda kind: 50.0)
    assert speed.utilisation(200.0, devices=8)["mfu"] == 0.5


@pytest.mark.parametrize(("kind", "want"), [("TPU v5p", 459e12), ("TPU v5 lite", 197e12), ("NVIDIA H100 PCIe", None)])
def test_the_longest_matching_device_name_is_used(kind, want):
    assert speed.peak(kind) == want


def test_the_steps_compile_once_and_their_state_is_donated(loader, tmp_path, monkeypatch):
    seen, placed = [], []
    wrap = train._wrap

    def watched(*args):
        seen.append(wrap(*args))
        place = seen[-1].place_state
        return dataclasses.replace(seen[-1], place_state=lambda state: placed.append(place(state)) or placed[-1])

    compiled = []

    def count(event, seconds, *, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(fun_name)

    monkeypatch.setattr(train, "_wrap", watched)
    evaluated = dataclasses.replace(TRAINING, evaluate_every=2, save_every=2)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        fit(tmp_path, dataclasses.replace(task(loader.examples), evaluate=lambda p: {"kl": 0.5}), evaluated, **ALONE)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert compiled.count(f"jit({seen[0].steps.__name__})") == 1, compiled
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(placed[0]))


def test_a_profile_reports_the_time_of_a_step_by_part(loader, tmp_path, capsys):
    training = dataclasses.replace(TRAINING, steps=8, evaluate_every=8, save_every=8)
    log = LogConfig(progress=False, profile=True)
    teacher = MODEL.init(jax.random.key(1))
    live = dataclasses.replace(task(loader.examples._replace(targets=None)), teacher=MODEL, teacher_params=teacher)
    profiled = fit(tmp_path / "a", live, training, **ALONE | {"log": log})
    printed = capsys.readouterr().out
    assert list((tmp_path / "a" / "profile").rglob("*.xplane.pb"))
    for part in ("teacher", "student, forward", "student, backward", "head and losses", "optimizer", "longest"):
        assert part in printed, printed
    shares = [float(share) for share in re.findall(r"^\S.* ([\d.]+)%$", printed.partition("longest")[0], re.M)]
    assert abs(sum(shares) - 100.0) < 1.0
    assert equal_bits(profiled, fit(tmp_path / "b", live, training, **ALONE))
    assert [cli.parse_config("", given)[1].log.profile for given in (["--profile"], [])] == [True, False]
