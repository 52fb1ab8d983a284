"""A whole distillation step beside other libraries: every contestant a process of its own, one computing at a time."""

import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from distill.benchmark import spread

SHAPE = {"batch": 8, "length": 256, "student": (4, 256), "teacher": (8, 512)}
"""Layers and widths; heads of 64, feed-forward of three widths, untied heads, float32."""


def flops(vocab: int) -> float:
    """Multiplications and additions of one step: the teacher's forward pass, three of the student's."""
    from distill.models import DecoderConfig

    def one(layers: int, width: int) -> float:
        sizes = {"layers": layers, "width": width, "heads": width // 64, "feed_forward": 3 * width}
        return DecoderConfig(vocab_size=vocab, **sizes).flops_per_token(SHAPE["length"])

    return SHAPE["batch"] * SHAPE["length"] * (one(*SHAPE["teacher"]) + 3 * one(*SHAPE["student"]))


def work(vocab: int) -> None:
    """The library's contestant: serves ``go`` lines of stdin."""
    import jax
    import jax.numpy as jnp

    from distill.data.loader import Batch
    from distill.models import DecoderConfig, decoder
    from distill.objective import ObjectiveConfig, terms_of
    from distill.optim import OptimizerConfig, optimizer
    from distill.step import init_state, make_train_step

    def model(layers: int, width: int):
        return decoder(DecoderConfig(vocab, layers, width, heads=width // 64, feed_forward=3 * width))

    student, teacher = model(*SHAPE["student"]), model(*SHAPE["teacher"])
    update = optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=0, schedule="constant"), 1)
    step = make_train_step(student, terms_of(ObjectiveConfig(temperature=2.0)), update, teacher=teacher)
    shape = SHAPE["batch"], SHAPE["length"]
    ids = np.random.default_rng(0).integers(0, vocab, (shape[0], shape[1] + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = Batch(
        inputs=ids[:, :-1],
        labels=ids[:, 1:],
        mask=np.ones(shape, bool),
        positions=positions,
        segments=np.ones(shape, np.int32),
    )
    batch = jax.tree.map(jnp.asarray, batch)
    state = init_state(student.init(jax.random.key(0)), update)
    teacher_params, program = teacher.init(jax.random.key(1)), jax.jit(step, donate_argnums=0)

    def once() -> None:
        nonlocal state
        state, _ = program(state, teacher_params, batch)
        jax.block_until_ready(state)

    serve(once)


def serve(once: Callable[[], None]) -> None:
    """For every line of stdin: one step; answers seconds and the peak of resident memory in MB."""
    for _ in sys.stdin:
        start = time.perf_counter()
        once()
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]), flush=True)


def race(commands: dict[str, list[str]], rounds: int) -> dict[str, list[list[float]]]:
    """Seconds and memory of every contestant in every round, in turn; two rounds of warm-up.

    Raises:
      RuntimeError: a contestant ended before it answered.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {name: subprocess.Popen(command, **pipes) for name, command in commands.items()}
    answers: dict[str, list[list[float]]] = {name: [] for name in commands}
    try:
        for i in range(rounds + 2):
            for name, worker in workers.items():
                with contextlib.suppress(BrokenPipeError):  # said below
                    worker.stdin.write("go\n")
                    worker.stdin.flush()
                line = worker.stdout.readline()
                if not line:
                    raise RuntimeError(f"step: {name} ended without an answer; its own message is above.")
                if i > 1:
                    answers[name].append(json.loads(line))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
            worker.wait()
    return answers


def step(vocab: int, peers: dict[str, list[str]], file: Path, rounds: int = 7) -> list[str]:
    """Lines of the table for one vocabulary; ``peers``: name → command. Adds the numbers to ``file``."""
    ours = [sys.executable, "-c", f"from distill import benchmark_step; benchmark_step.work({vocab})"]
    answers = race({"distill": ours} | peers, rounds)
    seconds = {name: [one[0] for one in rows] for name, rows in answers.items()}
    lines = ["| V | who | seconds | distill / it | peak resident MB |", "|---|---|---|---|---|"]
    for name, rows in answers.items():
        times = [a / b for a, b in zip(seconds["distill"], seconds[name], strict=True)]
        lines.append(
            f"| {vocab} | {name} | {spread(seconds[name])} | {spread(times)} | {max(r[1] for r in rows):.0f} |"
        )
    rate = flops(vocab) / statistics.median(seconds["distill"]) / 1e9
    file.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | {str(vocab): answers}, indent=1))
    return [*lines, f"V={vocab}: distill computes {rate:.0f} GFLOP/s"]
