"""Benchmark of scaling: the same steps on 1 to 8 devices and in two processes, and the cost of larger sizes.

The devices are parts of one machine's CPU, so the comparison is of losses and bytes. The time of several such devices
predicts nothing about a slice and is not printed.
"""

import functools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from distill import parallel
from distill.batch import Batch, shift
from distill.benchmarks.rounds import spread
from distill.config import write_json
from distill.data.loader import Loader
from distill.devices import processes
from distill.errors import UserError
from distill.models.config import DecoderConfig
from distill.models.decoder import decoder
from distill.models.model import Model
from distill.objective import ObjectiveConfig, terms_of
from distill.optim import OptimizerConfig, optimizer
from distill.parallel import ParallelConfig, Wrapping
from distill.planning.hlo import collectives
from distill.reports import page
from distill.state import TrainState
from distill.step import make_train_step

STEPS = 10
DEVICES = 8
MIB = 2**20


class Shape(NamedTuple):
    """Sizes of a step; the teacher is twice as wide as the student."""

    batch: int = 16
    length: int = 32
    layers: int = 2
    width: int = 32
    vocab: int = 512

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch * self.length

    def models(self) -> tuple[Model, Model]:
        """Teacher and student."""
        return self._decoder(2 * self.width), self._decoder(self.width)

    def flops(self) -> float:
        """FLOPs of a step: the teacher's forward pass and three of the student's."""
        teacher, student = (model.config.flops_per_token(self.length) for model in self.models())
        return self.tokens * (teacher + 3 * student)

    def _decoder(self, width: int) -> Model:
        return decoder(DecoderConfig(self.vocab, self.layers, width, heads=width // 16, feed_forward=3 * width))


MESHES = {
    "1": (1, ParallelConfig("mesh")),
    "2 data": (2, ParallelConfig("mesh")),
    "4 data": (4, ParallelConfig("mesh")),
    "8 data": (8, ParallelConfig("mesh")),
    "8 fsdp": (8, ParallelConfig("mesh", fsdp=8)),
    "4 fsdp × 2 tensor": (8, ParallelConfig("mesh", fsdp=4, tensor=2)),
}
"""Name → number of devices and their mesh."""

SWEEPS = {
    "tokens": [Shape(batch=n, length=64, width=64, vocab=4096) for n in (4, 8, 16, 32)],
    "layers": [Shape(batch=8, length=64, width=64, vocab=4096, layers=n) for n in (1, 2, 4, 8)],
    "vocab": [Shape(batch=8, length=64, width=64, vocab=n) for n in (2048, 4096, 8192, 16_384)],
}
"""Name of the size that grows → shapes."""


class Program(NamedTuple):
    """A compiled dispatch of steps with its arguments."""

    compiled: Any
    wrapping: Wrapping
    state: TrainState
    frozen: Any
    examples: Batch
    loader: Loader

    def losses(self, steps: int) -> list[float]:
        """Losses of the first steps; donates the state, so call it once."""
        _, metrics = self.compiled(self.state, self.frozen, self.examples, self._rows(steps))
        total, weight = (np.asarray(processes.fetch(part)) for part in metrics["loss"])
        return (total / weight).tolist()

    def seconds(self, rounds: int) -> list[float]:
        """Seconds of dispatches of one step, after one of warm-up."""
        state, found = self.state, []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            state, _ = jax.block_until_ready(self.compiled(state, self.frozen, self.examples, self._rows(1)))
            found.append(time.perf_counter() - start)
        return found[1:]

    def _rows(self, steps: int) -> Any:
        return self.wrapping.place_rows(self.loader.rows(0, steps))


def program(shape: Shape, config: ParallelConfig, devices: Sequence[jax.Device], steps: int) -> Program:
    """Compiles the train step of a shape on some devices with ``steps`` steps per dispatch; weights are random."""
    teacher, student = shape.models()
    update = optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant"), 1)
    make_step = functools.partial(_make_step, teacher, student, update)
    wrapping = parallel.wrap(config, make_step, student, update, teacher, devices)
    state = parallel.draw_state(student, update, jax.random.key(0), wrapping)
    frozen = wrapping.place_params(teacher.init(jax.random.key(1)))
    loader = Loader(_examples(shape), shape.batch, seed=0)
    examples = wrapping.place_examples(loader.examples)
    rows = wrapping.place_rows(loader.rows(0, steps))
    compiled = wrapping.steps.lower(state, frozen, examples, rows).compile()
    return Program(compiled, wrapping, state, frozen, examples, loader)


def _make_step(teacher: Model, student: Model, update: Any, axis_name: str | None, mesh: Any = None):
    terms = terms_of(ObjectiveConfig(temperature=2.0))
    return make_train_step(student, terms, update, teacher=teacher, axis_name=axis_name, mesh=mesh)


def _examples(shape: Shape) -> Batch:
    """Random tokens, with a different number of counted tokens in every row."""
    tokens = np.random.default_rng(0).integers(0, shape.vocab, (4 * shape.batch, shape.length + 1))
    first = np.arange(len(tokens)) * 5 % (shape.length - 1)
    return shift(tokens, np.arange(shape.length + 1) > first[:, None])


# ---- devices and processes


def measure(name: str, devices: Sequence[jax.Device], shape: Shape | None = None) -> dict[str, Any]:
    """Losses of ``STEPS`` steps, and MiB that a device sends per step: by formula and by the compiled program."""
    config, shape = MESHES[name][1], shape or Shape()
    made = program(shape, config, devices, STEPS)
    kinds: dict[str, float] = {}
    for one in collectives(made.compiled.as_text()):
        kinds[one.kind] = kinds.get(one.kind, 0.0) + one.times() * one.sent / STEPS / MIB
    return {"losses": made.losses(STEPS), "computed": sent(shape, config, len(devices)) / MIB, "compiled": kinds}


def sent(shape: Shape, config: ParallelConfig, devices: int) -> float:
    """Bytes in float32 that a device must send in a step on a ring.

    With P parameters of the student and Q of the teacher on n devices: data 2·4P·(n − 1)/n, an all-reduce of the
    gradients; fsdp 4·(3P + Q)·(n − 1)/n, which gathers the student's parameters in both passes and the teacher's once,
    and reduce-scatters the gradients. NaN for a mesh with a tensor axis, which also exchanges activations.
    """
    teacher, student = (model.parameter_count() for model in shape.models())
    if config.tensor > 1:
        return math.nan
    count = 2 * student if config.fsdp == 1 else 3 * student + teacher
    return 4 * count * (devices - 1) / devices


def two_processes(name: str = "8 data") -> dict[str, Any]:
    """Runs ``measure`` in two processes with half of the devices each; returns the result of process 0.

    Raises:
      RuntimeError: a process failed; its message is on stderr.
    """
    with socket.socket() as place, tempfile.TemporaryDirectory() as folder:
        place.bind(("localhost", 0))
        port, answer = place.getsockname()[1], Path(folder) / "answer.json"
        place.close()
        command = [sys.executable, "-c", "from distill.benchmarks import scaling; scaling.worker()"]
        shared = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
        shared |= {"XLA_FLAGS": _flags(DEVICES // 2), "SCALING": json.dumps([name, str(answer)])}
        options: dict[str, Any] = {"cwd": Path(__file__).parents[2], "stdout": subprocess.DEVNULL}
        both = [
            subprocess.Popen(command, env=os.environ | shared | {"JAX_PROCESS_ID": str(index)}, **options)
            for index in (0, 1)
        ]
        try:
            codes = [one.wait(600) for one in both]
        finally:
            for one in both:
                one.kill()
        if any(codes):
            raise RuntimeError(f"scaling: the two processes ended with {codes}; their own messages are above.")
        return json.loads(answer.read_text())


def worker() -> None:
    """One process of ``two_processes``, with its index and its task in environment variables."""
    processes.start()
    name, answer = json.loads(os.environ["SCALING"])
    found = measure(name, jax.devices())
    if processes.index() == 0:
        Path(answer).write_text(json.dumps(found))


def _flags(devices: int) -> str:
    """Value of XLA_FLAGS for this number of CPU devices."""
    others = (flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag)
    return " ".join([*others, f"--xla_force_host_platform_device_count={devices}"])


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of a table with a row per case; losses are compared with those of one device."""
    lines = [
        "| devices | loss 1 … last | differs by | computed MiB | compiled MiB | of these |",
        "|---|---|---:|---:|---:|---|",
    ]
    first = np.array(found["1"]["losses"])
    for name, one in found.items():
        losses, kinds = np.array(one["losses"]), one["compiled"]
        differs = np.max(np.abs(losses - first) / np.abs(first))
        parts = ", ".join(f"{kind} {size:.2f}" for kind, size in sorted(kinds.items()) if size >= 0.005)
        computed = "–" if math.isnan(one["computed"]) else f"{one['computed']:.2f}"
        lines.append(
            f"| {name} | {losses[0]:.6f} … {losses[-1]:.6f} | {differs:.1e} | {computed} | {sum(kinds.values()):.2f} | "
            f"{parts or '–'} |"
        )
    return lines


# ---- cost of larger sizes


def curves(rounds: int, folder: Path, sweeps: dict[str, list[Shape]] = SWEEPS) -> tuple[list[str], dict[str, Any]]:
    """Measures a step on one device as tokens, layers and vocabulary grow; draws PNGs.

    Returns lines of a table and their numbers: seconds, temporary memory and FLOPs.
    """
    lines = ["| grows | to | ms a step | temporary MiB | GFLOP computed |", "|---|---:|---:|---:|---:|"]
    numbers: dict[str, Any] = {}
    for what, shapes in sweeps.items():
        rows = []
        for shape in shapes:
            made = program(shape, ParallelConfig("one_device"), jax.devices()[:1], 1)
            memory = made.compiled.memory_analysis().temp_size_in_bytes / MIB
            seconds = made.seconds(rounds)
            rows.append({"at": getattr(shape, what), "seconds": seconds, "temporary": memory, "flops": shape.flops()})
            milliseconds = spread([1e3 * one for one in seconds])
            lines.append(f"| {what} | {rows[-1]['at']:,} | {milliseconds} | {memory:.1f} | {shape.flops() / 1e9:.2f} |")
        numbers[what] = rows
        drawn = {"median": [1e3 * statistics.median(row["seconds"]) for row in rows]}
        page.curves(folder / f"benchmark_scaling_{what}.png", [row["at"] for row in rows], drawn, what, "ms a step")
    return lines, numbers


def scaling(rounds: int, folder: Path = Path("runs")) -> list[str]:
    """Lines of the benchmark; writes numbers to FOLDER/benchmark_scaling.json and curves to PNGs beside it.

    Args:
      rounds: rounds of the timings.
      folder: created if it does not exist.

    Raises:
      UserError: JAX is already initialised with too few devices.
    """
    os.environ["XLA_FLAGS"] = _flags(DEVICES)
    os.environ.setdefault("NPROC", "16")  # threads enough for eight devices to wait for each other
    jax.config.update("jax_platforms", "cpu")
    if len(jax.devices()) < DEVICES:
        raise UserError(f"scaling: JAX runs with {len(jax.devices())} devices already; expected {DEVICES} on the CPU.")
    found = {name: measure(name, jax.devices()[:count]) for name, (count, _) in MESHES.items()}
    found["2 processes × 4 data"] = two_processes()
    grown, numbers = curves(rounds, folder)
    file = folder / "benchmark_scaling.json"
    write_json(file, {"devices": found, "sizes": numbers})
    shape = Shape()
    teacher, student = (model.parameter_count() for model in shape.models())
    return [
        f"student {student:,} parameters, teacher {teacher:,}, {shape.tokens} tokens a step, {STEPS} steps; MiB that a "
        "device sends in a step:",
        *table(found),
        "",
        "one device:",
        *grown,
        f"written: {file} and benchmark_scaling_*.png beside it",
    ]
