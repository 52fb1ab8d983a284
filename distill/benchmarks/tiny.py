"""Measurements: contestants in turn in one process, medians and ratios with their spread, start-up from outside."""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from distill import parallel
from distill.batch import Batch
from distill.benchmarks.rounds import Run, in_turn, ratio, speed, spread
from distill.data import addition
from distill.data.loader import Loader
from distill.models.config import DecoderConfig
from distill.models.decoder import decoder
from distill.objective import ObjectiveConfig, terms_of
from distill.optim import OptimizerConfig, optimizer
from distill.state import init_state
from distill.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Tiny:
    """One shape of the tiny regime: live teacher, forward KL, AdamW with clipping, on two-digit addition."""

    teacher: DecoderConfig
    student: DecoderConfig
    batch_size: int
    steps: int
    """Steps of one dispatch; four dispatches are a round."""


def _model(layers: int, width: int) -> DecoderConfig:
    return DecoderConfig(vocab_size=14, layers=layers, width=width, heads=width // 8, feed_forward=3 * width)


TINY = (
    Tiny(_model(2, 64), _model(2, 16), batch_size=256, steps=50),
    Tiny(_model(1, 32), _model(1, 16), batch_size=32, steps=200),
)


def ours(case: Tiny, examples: Batch, per_dispatch: int, pmapped: bool = False) -> Run:
    """The library: so many steps a dispatch; of one, the loss is read every time. On one device, or pmapped on all."""
    teacher, student = decoder(case.teacher), decoder(case.student)
    update = optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=0, schedule="constant"), 1)

    def step(axis_name: str | None):
        terms = terms_of(ObjectiveConfig(temperature=2.0))
        return make_train_step(student, terms, update, teacher=teacher, axis_name=axis_name)

    wrapping = parallel.pmapped(step) if pmapped else parallel.one_device(step(None))
    state = wrapping.place_state(init_state(student.init(jax.random.key(0)), update))
    frozen, data = wrapping.place_params(teacher.init(jax.random.key(1))), wrapping.place_examples(examples)
    loader, done = Loader(examples, case.batch_size, 0), 0

    def run(steps: int) -> None:
        nonlocal state, done
        for _ in range(steps // per_dispatch):
            rows = wrapping.place_rows(loader.rows(done, per_dispatch))
            state, metrics = wrapping.steps(state, frozen, data, rows)
            done += per_dispatch
            if per_dispatch == 1:
                float(metrics["loss"][0][0])
        jax.block_until_ready(state)

    return run


def tiny(peers: dict[str, Callable[[Tiny, Batch], Run]]) -> list[str]:
    """Lines of the tiny benchmark: steps per second against ``peers``, and start-up.

    Args:
      peers: name → ``(case, examples) -> run``; the same training in eager PyTorch, from scripts/peers.
    """
    data = addition.AdditionConfig()
    examples = addition.load(data)["train"].batch(data)
    lines = []
    for case in TINY:
        mine = {"distill": ours(case, examples, case.steps), "one step a call": ours(case, examples, 1)}
        if jax.device_count() > 1:
            mine[f"pmap, {jax.device_count()} devices"] = ours(case, examples, case.steps, pmapped=True)
        others = {name: peer(case, examples) for name, peer in peers.items()}
        speeds = in_turn(mine | others, 4 * case.steps)
        lines += [f"batch {case.batch_size}: {speed(name, values)}" for name, values in speeds.items()]
        lines += [
            f"batch {case.batch_size}: {name} / {other} = {spread(ratio(speeds, name, other))}"
            for name in mine
            for other in peers
        ]
    return lines + start_up()


def tiny_and_data(peers: dict[str, Callable[[Tiny, Batch], Run]]) -> list[str]:
    """Lines of the tiny benchmark, and what making its batches takes."""
    return [*tiny(peers), data_line()]


def start_up(rounds: int = 3) -> list[str]:
    """Seconds of a whole process that reads the data, draws both models, compiles and takes one step."""
    times: dict[str, list[float]] = {"cold": [], "with the compilation cache": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for name in times:
                times[name].append(_process_seconds(cache))
    return [f"start-up to the first step, {name}: {spread(values)} s" for name, values in times.items()]


def _process_seconds(cache: str) -> float:
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", "from distill import benchmark; benchmark.first_step()"]
    root = str(Path(__file__).parents[2])
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=root, env=environment | {"XDG_CACHE_HOME": cache}, capture_output=True)
    return time.perf_counter() - start


def first_step() -> None:
    """What ``start_up`` times: a distillation of the first tiny shape up to and with its first step."""
    from distill import cli

    cli.set_up_jax()
    data, case = addition.AdditionConfig(), TINY[0]
    ours(case, addition.load(data)["train"].batch(data), per_dispatch=1)(1)


def time_data(steps: int = 1000, batch_size: int = 256) -> float:
    """Milliseconds to compute the indices of one batch, over new epochs."""
    examples = addition.encode(addition.AdditionConfig(), np.array([[1, 2]] * 5000)).batch(addition.AdditionConfig())
    loader = Loader(examples, batch_size, seed=123_456)
    start = time.perf_counter()
    loader.rows(0, steps)
    return (time.perf_counter() - start) * 1e3 / steps


def data_line() -> str:
    """``time_data`` in words."""
    return f"indices of one batch of 256: {time_data():.2f} ms of Python, while the device computes"
