"""Benchmark of a whole distillation step beside other libraries: separate processes, one computing at a time."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.benchmarks.rounds import spread
from distill.errors import UserError

BATCH, LENGTH = 8, 256
SHAPE = {"student": (4, 256), "teacher": (8, 512)}
"""Layers and width; head size 64, feed-forward 3 · width, untied heads, float32."""

PRODUCTS = 100 * 2 * 2048 * 512 * 1536
"""FLOPs of one step of matmul_step.py."""

SCRIPTS = {
    "distill": ("distill_step", ()),
    "PyTorch": ("torch_step", ("torch", "transformers")),
    "TRL": ("trl_step", ("torch", "trl")),
    "Tunix": ("tunix_step", ("tunix",)),
    "EasyDeL": ("easydel_step", ("easydel", "torch", "PIL")),
    "matmul": ("matmul_step", ()),
}
"""Contestant → its script in scripts/peers and the modules it requires."""

LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Environment of every contestant unless set: XLA and PyTorch allocate memory anew in every step."""

REST = 3.0
"""Seconds of rest before every turn.

Two seconds after memory is freed, Linux returns it to the host of a virtual machine (free page reporting). Without a
rest that work would fall into the turn of the next contestant.
"""

FILE = Path("runs/benchmark_step.json")

_FIND = "import importlib.util as u, sys; sys.exit(' '.join(n for n in sys.argv[1:] if u.find_spec(n) is None))"


def flops(vocab: int) -> float:
    """FLOPs of one step's matrix products: the teacher's forward pass, three of the student's; causal scores halved."""
    from distill.models.config import DecoderConfig

    def one(layers: int, width: int) -> float:
        sizes = {"layers": layers, "width": width, "heads": width // 64, "feed_forward": 3 * width}
        return DecoderConfig(vocab_size=vocab, **sizes).flops_per_token(LENGTH)

    return BATCH * LENGTH * (one(*SHAPE["teacher"]) + 3 * one(*SHAPE["student"]))


def missing(python: str, modules: tuple[str, ...]) -> str:
    """Names of the modules that the interpreter lacks, as text; empty if it has all."""
    try:
        found = subprocess.run([python, "-c", _FIND, *modules], capture_output=True, text=True)
    except OSError as error:
        return f"{python}: {error.strerror}"
    return found.stderr.strip()


def commands(folder: Path, pythons: Sequence[str], task: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Contestant → command, and contestant → modules that its interpreter lacks.

    Args:
      folder: path of scripts/peers.
      pythons: ``NAME=PATH``, the interpreter of a contestant; the default is the running one.
      task: JSON argument of the scripts.

    Raises:
      UserError: an argument of another form, or an unknown contestant.
    """
    others = [name for name, (_, modules) in SCRIPTS.items() if modules]
    for one in pythons:
        name, _, path = one.partition("=")
        if name not in others or not path:
            raise UserError(f"--python {one}: write NAME=PATH with a NAME of {', '.join(others)}.")
    chosen = dict(one.split("=", 1) for one in pythons)
    found, lacks = {}, {}
    for name, (script, modules) in SCRIPTS.items():
        python = chosen.get(name, sys.executable)
        if lack := missing(python, modules):
            lacks[name] = lack
        else:
            found[name] = [python, str(folder / f"{script}.py"), task]
    return found, lacks


def race(commands: Mapping[str, list[str]], rounds: int) -> dict[str, list[list[float]]]:
    """Seconds and memory of every contestant in every round, in turn, after two rounds of warm-up.

    A turn is a rest of ``REST`` seconds and two steps, of which the second counts (scripts/peers/step_worker.py).

    Raises:
      RuntimeError: a contestant ended without an answer.
    """
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = LARGE_PAGES | os.environ
    workers = {name: subprocess.Popen(command, env=environment, **pipes) for name, command in commands.items()}
    answers: dict[str, list[list[float]]] = {name: [] for name in commands}
    try:
        for i in range(rounds + 2):
            for name, worker in workers.items():
                time.sleep(REST)
                with contextlib.suppress(BrokenPipeError):  # the empty answer below is the error
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


def table(vocab: int, answers: Mapping[str, list[list[float]]]) -> list[str]:
    """Lines of a table: seconds, ratio of ours to theirs, share of the measured peak, memory."""
    answers = dict(answers)
    # The best rate of plain products in this run stands for the machine's peak.
    peak = max(PRODUCTS / one[0] for one in answers.pop("matmul"))
    ours = [one[0] for one in answers["distill"]]
    lines = ["| V | who | seconds | distill / it | MFU | peak resident MB |", "|---:|---|---:|---:|---:|---:|"]
    for name, rows in answers.items():
        seconds = [one[0] for one in rows]
        ratios = spread([a / b for a, b in zip(ours, seconds, strict=True)])
        share = flops(vocab) / statistics.median(seconds) / peak
        memory = max(one[1] for one in rows)
        lines.append(f"| {vocab} | {name} | {spread(seconds)} | {ratios} | {share:.0%} | {memory:.0f} |")
    return [
        *lines,
        f"V={vocab}: {flops(vocab) / 1e9:.0f} GFLOP a step; peak of float32 products {peak / 1e9:.0f} GFLOP/s",
    ]


def step(vocab: int, rounds: int, peers: Path, pythons: Sequence[str], file: Path = FILE) -> list[str]:
    """Runs the benchmark for one vocabulary size and adds the numbers to ``file``. Returns the lines of its table.

    Args:
      vocab: vocabulary size.
      rounds: measured rounds, after two of warm-up.
      peers: path of scripts/peers.
      pythons: see ``commands``.
      file: JSON, vocabulary size → contestant → [seconds, MB] of every round.

    Raises:
      UserError: fewer than 2 tokens or no round; an interpreter as in ``commands``.
      RuntimeError: a contestant ended without an answer.
    """
    if vocab < 2 or rounds < 1:
        raise UserError(f"--vocab {vocab} --rounds {rounds}: at least 2 tokens and 1 round are needed.")
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "ids.npy"
        np.save(ids, np.random.default_rng(0).integers(0, vocab, (BATCH, LENGTH + 1)).astype(np.int32))
        found, lacks = commands(peers, pythons, json.dumps(SHAPE | {"vocab": vocab, "ids": str(ids)}))
        answers = race(found, rounds)
    file.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | {str(vocab): answers}, indent=1))
    return [*table(vocab, answers), *(f"missing: {name}: {lack}" for name, lack in lacks.items())]
