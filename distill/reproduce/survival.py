"""What a run survives: ``kill -9`` at any moment, and the failures that are announced. The numbers of REPRODUCE.md.

A small experiment on addition (``scripts/distill.py``: teacher, student, baseline) runs once undisturbed. Then it is
killed again and again, taken up again and again, and must end with the same bits and the same metrics.
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill.data import addition
from distill.data.feed import DataTimeout
from distill.data.loader import Loader
from distill.experiments import runner
from distill.losses import DenseTargets
from distill.metrics import read_metrics
from distill.models.config import DecoderConfig
from distill.models.decoder import decoder
from distill.objective import ObjectiveConfig, terms_of
from distill.reproduce.page import made_on, write_section
from distill.train import Task, fit
from distill.training import LogConfig, TrainingConfig

SMALL = (
    *("--data.digits=2", "--data.max-examples=2000", "--data.test-fraction=0.8", "--log.no-progress"),
    *("--teacher.model.layers=1", "--teacher.model.width=32", "--student.model.layers=1"),
    *("--teacher.training.batch-size=16", "--student.training.batch-size=16"),
    *("--teacher.training.steps=200", "--teacher.training.evaluate-every=50", "--teacher.training.save-every=50"),
    *("--student.training.steps=400", "--student.training.evaluate-every=100", "--student.training.save-every=50"),
    *("--baseline.labels=20", "--baseline.validation=20", "--baseline.steps=20", "--baseline.evaluate-every=20"),
    "--baseline.batch-size=20",
)
"""The experiment; with 1 600 additions to answer at every evaluation: it lasts long enough to be killed in."""

PHASES = ("start", "data", "compile", "train", "evaluate", "save")
AIMS = ("anywhere", "save", "evaluate", "compile", "data", "train")
"""Moments that are waited for, in turn; what was hit is read off the stacks of the process, not believed."""

_LAUNCH = """
import os, runpy, sys, threading

def stack(frame):
    while frame is not None:
        yield f'File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_name}'
        frame = frame.f_back

def answer(to):
    while os.read(0, 1):
        threads = (stack(frame) for frame in sys._current_frames().values())
        os.write(to, "\\n\\n".join("\\n".join(lines) for lines in threads).encode() + b"\\0")

threading.Thread(target=answer, args=(os.dup(1),), daemon=True).start()
os.dup2(2, 1)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A script that answers a byte on stdin with the stacks of its threads, on stdout. A thread of its own reads them,
while no other runs: a signal handler may find them half changed, and ends the process so."""


@dataclasses.dataclass
class Run:
    """A run folder and the processes started in it."""

    folder: Path
    overrides: Sequence[str]
    environment: dict[str, str]

    def start(self, *, asked: bool = False, **options: Any) -> subprocess.Popen:
        """``scripts/distill.py`` in this folder; ``asked``: it can be asked what it does (``_look``)."""
        script = str(Path(__file__).parents[2] / "scripts" / "distill.py")
        launch = ["-c", _LAUNCH, script] if asked else [script]
        command = [sys.executable, *launch, "--run", str(self.folder), *self.overrides]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        pipes |= {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0} if asked else {}
        return subprocess.Popen(command, env=os.environ | self.environment, **pipes | options)

    def finish(self) -> tuple[int, str]:
        """Runs to the end; exit code and what was said."""
        process = self.start(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said, _ = process.communicate()
        return process.returncode, said

    def lines(self) -> dict[str, list[tuple]]:
        """Kind, step and loss of every line of the metrics."""
        folders = {"teacher": self.folder / "teacher", "student": self.folder}
        return {
            name: [(line["kind"], line["step"], line.get("loss")) for line in read_metrics(folder)]
            for name, folder in folders.items()
        }

    def differs(self, other: "Run") -> str:
        """Where this run ended otherwise than another, in words; empty where every weight and metric is equal."""
        mine, others = (runner.open_run(run.folder)[1] for run in (self, other))
        for name, trained in others.items():
            for a, b in zip(jax.tree.leaves(trained.params), jax.tree.leaves(mine[name].params), strict=True):
                if not np.array_equal(a, b):
                    return f"the weights of the {name}"
        return "" if self.lines() == other.lines() else "the metrics"


def kills(count: int, folder: Path, straight: Run, rng: np.random.Generator) -> tuple[dict[str, int], int]:
    """``kill -9``, ``count`` times in all, each followed by the same command again.

    Args:
      count: kills; a run that comes to its end before they are spent is followed by a new one.
      folder: where runs are made.
      straight: the same run, undisturbed.
      rng: draws the moments.

    Returns:
      Kills in each of ``PHASES``, and runs that were killed on their way and ended equal to ``straight``.

    Raises:
      RuntimeError: a run ends otherwise, or cannot be taken up.
    """
    hit, done, equal = collections.Counter({phase: 0 for phase in PHASES}), 0, 0
    aims, number = itertools.cycle(AIMS), itertools.count()
    while done < count:
        before = done
        run = Run(folder / f"killed{next(number)}", straight.overrides, dict(straight.environment))
        while done < count:
            aim = next(aims)
            aimed = dataclasses.replace(run, environment=run.environment | _surroundings(aim, folder, done))
            with aimed.start(asked=True) as process:
                found = _kill(process) if _wait_for(aim, aimed, process, rng) else None
            if found is None:
                break
            hit[found] += 1
            done += 1
            if aim == "data":  # what was half prepared is taken up by those that follow
                run = aimed
        if process.wait() not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{run.folder}: cannot be taken up after a kill: {run.finish()[1]}")
        code, said = run.finish()
        if code or (differs := run.differs(straight)):
            raise RuntimeError(f"{run.folder}: {said if code else f'{differs} differ from the undisturbed run'}")
        equal += done > before  # a run may be too fast to be hit
    return dict(hit), equal


def _surroundings(aim: str, folder: Path, number: int) -> dict[str, str]:
    """What makes a moment last: data that is not prepared, a cache of programs that holds those of earlier kills."""
    return {
        "data": {"TFDS_DATA_DIR": str(folder / f"data{number}")},
        "compile": {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")},
    }.get(aim, {})


def _wait_for(aim: str, run: Run, process: subprocess.Popen, rng: np.random.Generator) -> bool:
    """Waits for a moment, then a little; False when the process ended before."""
    folders, began = (run.folder, run.folder / "teacher"), time.time()

    def shows() -> bool:
        trains = any(_changed(folder / "metrics.jsonl") > began for folder in folders)
        return trains and phase(_look(process)) == aim

    def saves() -> bool:
        return any(_changed(path) > began for folder in folders for path in (folder / "checkpoints").glob("*tmp*"))

    def fills(variable: str) -> Callable[[], bool]:
        path = Path(run.environment.get(variable, "."))
        before = len(list(path.rglob("*")))
        return lambda: len(list(path.rglob("*"))) > before

    happens, spread = {
        "anywhere": (lambda: True, 12.0),
        "save": (saves, 0.01),
        "evaluate": (shows, 0.03),
        "train": (shows, 0.005),
        "compile": (fills("JAX_COMPILATION_CACHE_DIR"), 1.0),
        "data": (fills("TFDS_DATA_DIR"), 0.2),
    }[aim]
    skip = int(rng.integers(4)) if aim in ("save", "evaluate", "train") else 0  # not always the first one
    while not (happens() and (skip := skip - 1) < 0):
        while skip >= 0 and happens() and process.poll() is None:
            time.sleep(0.002)
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(float(rng.uniform(0.0, spread)))
    return process.poll() is None


def _changed(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _kill(process: subprocess.Popen) -> str | None:
    """``kill -9``; returns the phase in which the process was, None where it ended by itself just before."""
    stacks = _look(process)
    process.kill()
    return phase(stacks) if process.wait() == -signal.SIGKILL else None


def _look(process: subprocess.Popen) -> str:
    """The stacks of all threads of a process now; nothing where it has ended."""
    answer = b""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(b"?")
    while not answer.endswith(b"\0") and select.select([process.stdout], [], [], 10.0)[0]:
        part = os.read(process.stdout.fileno(), 2**16)
        if not part:
            break
        answer += part
    return answer.decode().removesuffix("\0")


def phase(stacks: str) -> str:
    """Which of ``PHASES`` a process was in, from the stacks of its threads; one that imports a module starts.

    Example:
      >>> phase('File "distill/checkpoint.py", line 1 in _seal')
      'save'
    """
    marks = {
        "save": r'distill/checkpoint\.py", line \d+ in (save|_seal|_settle|__exit__)|orbax/\S+(sav|sync|writ)',
        "compile": r"jax/_src/(compiler|pjit|interpreters/(pxla|mlir|partial_eval)|compilation_cache)\.py",
        "evaluate": r"distill/evaluation/|addition/measure\.py|in measure$",
        "data": r"distill/data/|tensorflow_datasets|array_record",
        "train": r'in (go|record)$|addition/replicas\.py", line \d+ in train$',
    }
    works = "\n".join(thread for thread in stacks.split("\n\n") if "importlib._bootstrap" not in thread)
    found = (name for name, mark in marks.items() if re.search(mark, works, re.M))
    return next(found, "start")


def announced(folder: Path, straight: Run) -> Iterator[tuple[str, str, str]]:
    """Failures that are said: what was done, what came of it, and how the run ended when it was taken up.

    Raises RuntimeError where it is not as it should be.
    """
    run = Run(folder / "sigterm", straight.overrides, straight.environment)
    process = run.start(stderr=subprocess.PIPE, text=True)
    while not (lines := read_metrics(run.folder)) or lines[-1]["step"] < 100:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1].strip().splitlines()[-1]
    yield "SIGTERM", _expect(said, process.returncode, "stopped at step", 0), _ends_equal(run, straight)

    run = Run(folder / "full", straight.overrides, straight.environment)
    limit = 2**15
    process = run.start(stderr=subprocess.PIPE, text=True)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))  # of every file it writes
    said = process.communicate()[1].strip().splitlines()[-1]
    yield "no room for a checkpoint", _expect(said, process.returncode, "disk is full", 2), _ends_equal(run, straight)

    run = Run(folder / "sigterm", straight.overrides, straight.environment)
    newest = max((run.folder / "checkpoints").glob("[0-9]*0"), key=lambda path: int(path.name))
    file = max(newest.glob("state/**/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, said = run.finish()
    line = next((line for line in said.splitlines() if "damaged checkpoint" in line), said)
    yield "one bit of a checkpoint flipped", _expect(line, code, "damaged checkpoint", 0), _ends_equal(run, straight)


def _expect(said: str, code: int, words: str, wanted: int) -> str:
    if code != wanted or words not in said:
        raise RuntimeError(f"exit code {code}, {said!r}; expected {wanted} and {words!r}.")
    return f"exit code {code}, “{_short(said)}”"


def _short(said: str) -> str:
    """Without the folders this machine happened to use."""
    return re.sub(r"(?<![\w.])/\S+/(?=\w)", "", said).replace("|", "/")


def _ends_equal(run: Run, straight: Run) -> str:
    code, said = run.finish()
    if code or (differs := run.differs(straight)):
        raise RuntimeError(f"{run.folder}: {said if code else f'{differs} differ from the undisturbed run'}")
    return "equal to the bit"


def data_failures(folder: Path) -> Iterator[tuple[str, str, str]]:
    """A batch that is not a number, and a source that hangs, in a training of their own: rows as of ``announced``."""
    data = addition.AdditionConfig(digits=1)
    examples = addition.encode(data, addition.pairs(data)["train"]).batch(data)
    logits = np.random.default_rng(0).normal(size=(*examples.inputs.shape, 14)).astype(np.float32)
    training = TrainingConfig(steps=40, batch_size=8, steps_per_dispatch=5, evaluate_every=40, save_every=10)
    loader = Loader(examples._replace(targets=DenseTargets(logits)), training.batch_size, training.seed)
    model = decoder(DecoderConfig(vocab_size=14, layers=1, width=8, heads=2, feed_forward=16))
    awake = threading.Event()

    def nan(k: int):
        good = loader.batch(k)
        return good._replace(targets=DenseTargets(good.targets.logits * np.float32(np.nan))) if k == 17 else good

    def hangs(k: int):
        if k == 25:
            awake.wait()
        return loader.batch(k)

    def train(name: str, batch: Callable, **changes: Any) -> tuple[Any, str]:
        task = Task(model, terms_of(ObjectiveConfig()), batch)
        try:
            params = fit(folder / name, task, dataclasses.replace(training, **changes), log=LogConfig(progress=False))
        except (FloatingPointError, DataTimeout) as error:
            return None, f"{type(error).__name__}: {error}"
        return params, f"{sum(line.get('skipped', 0) for line in read_metrics(folder / name))} step skipped, counted"

    def same(left: Any, right: Any) -> str:
        if not all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)):
            raise RuntimeError(f"{folder}: a run that was taken up differs from one that was not disturbed.")
        return "equal to the bit"

    whole, skips = train("whole", loader.batch)[0], train("skips", nan, on_nan="skip")
    stopped = train("nan", nan)[1]
    yield "NaN in batch 17, on_nan=stop", stopped, f"{same(train('nan', nan, on_nan='skip')[0], skips[0])}, skipping"
    yield "NaN in batch 17, on_nan=skip", skips[1], "the step touches no bit (tests/test_feed.py)"
    hung = train("hung", hangs, data_timeout=2.0)[1]
    awake.set()
    yield "a data source that hangs at batch 25", hung, same(train("hung", loader.batch)[0], whole)


def survive(folder: Path, count: int = 50, overrides: Sequence[str] = SMALL) -> list[str]:
    """All of it; lines of the section, from what happened.

    Raises RuntimeError where anything is lost or differs.
    """
    began = time.monotonic()
    straight = Run(folder / "straight", overrides, {"TFDS_DATA_DIR": str(folder / "data")})
    code, said = straight.finish()
    if code:
        raise RuntimeError(said)
    hit, runs = kills(count, folder, straight, np.random.default_rng(0))
    cases = [*announced(folder, straight), *data_failures(folder)]
    return [
        f"{count} times `kill -9` of `scripts/distill.py` on two-digit addition, each followed by the same command, in "
        f"{runs} runs;",
        "all came to their end, every weight of teacher, student and baseline and every metric equal to those of the",
        "undisturbed run. The phase is read off the stacks of the process in the moment it is killed.",
        "",
        "| " + " | ".join(hit) + " |",
        "|" + "---:|" * len(hit),
        "| " + " | ".join(map(str, hit.values())) + " |",
        "",
        "| what happens | what is said | taken up again |",
        "|---|---|---|",
        *(f"| {what} | {_short(said)} | {then} |" for what, said, then in cases),
        "",
        f"{(time.monotonic() - began) / 60:.0f} minutes in all.",
    ]


def section(page: Path, count: int = 50) -> None:
    """Kills, failures and resumes; prints their lines and writes their section."""
    with tempfile.TemporaryDirectory() as folder:
        lines = survive(Path(folder), count)
    print(*lines, sep="\n")
    heading = "## Survival: `python scripts/reproduce.py survival`"
    write_section(page, "\n".join([heading, "", *lines, f"{made_on()}."]) + "\n")
