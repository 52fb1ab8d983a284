"""Survival: runs that are killed at any moment, or that fail, resume to the same result. A section of REPRODUCE.md.

A small experiment on addition (``scripts/distill.py``: teacher, student, baseline) runs once undisturbed. Then it is
killed and resumed repeatedly, and must end with bit-identical weights and equal metrics.
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
"""Overrides of the experiment. Every evaluation answers 1 600 additions, long enough to be killed in."""

PHASES = ("start", "data", "compile", "train", "evaluate", "save")
AIMS = ("anywhere", "save", "evaluate", "compile", "data", "train")
"""Moments to aim for, in turn. The phase that was hit is read from the stacks of the process."""

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
"""A launcher that answers each byte on stdin with the stacks of all threads on stdout.

A separate thread reads the stacks while it holds the GIL. A signal handler may find them half changed, which would end
the process.
"""


@dataclasses.dataclass
class Run:
    """A run folder and the processes started in it."""

    folder: Path
    overrides: Sequence[str]
    environment: dict[str, str]

    def start(self, *, asked: bool = False, **options: Any) -> subprocess.Popen:
        """Starts ``scripts/distill.py`` in this folder; with ``asked`` it answers ``_look``."""
        script = str(Path(__file__).parents[2] / "scripts" / "distill.py")
        launch = ["-c", _LAUNCH, script] if asked else [script]
        command = [sys.executable, *launch, "--run", str(self.folder), *self.overrides]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        pipes |= {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0} if asked else {}
        return subprocess.Popen(command, env=os.environ | self.environment, **pipes | options)

    def finish(self) -> tuple[int, str]:
        """Runs to the end and returns the exit code and the output."""
        process = self.start(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output, _ = process.communicate()
        return process.returncode, output

    def lines(self) -> dict[str, list[tuple]]:
        """Kind, step and loss of every line of the metrics."""
        folders = {"teacher": self.folder / "teacher", "student": self.folder}
        return {
            name: [(line["kind"], line["step"], line.get("loss")) for line in read_metrics(folder)]
            for name, folder in folders.items()
        }

    def differs(self, other: "Run") -> str:
        """Names what differs from another run at its end; empty where every weight and metric is equal."""
        mine, others = (runner.open_run(run.folder)[1] for run in (self, other))
        for name, trained in others.items():
            for a, b in zip(jax.tree.leaves(trained.params), jax.tree.leaves(mine[name].params), strict=True):
                if not np.array_equal(a, b):
                    return f"the weights of the {name}"
        return "" if self.lines() == other.lines() else "the metrics"


def kills(count: int, folder: Path, straight: Run, rng: np.random.Generator) -> tuple[dict[str, int], int]:
    """Sends ``kill -9`` ``count`` times in all, each followed by the same command again.

    Args:
      count: number of kills; a new run is started whenever one finishes before they are used up.
      folder: parent of the run folders.
      straight: the undisturbed run.
      rng: draws the moments.

    Returns:
      Kills in each of ``PHASES``, and the number of runs that were killed and ended equal to ``straight``.

    Raises:
      RuntimeError: a run ends differently, or cannot be resumed.
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
            if aim == "data":  # the following runs resume from the half-prepared data
                run = aimed
        if process.wait() not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{run.folder}: cannot be resumed after a kill: {run.finish()[1]}")
        code, output = run.finish()
        if code or (differs := run.differs(straight)):
            raise RuntimeError(f"{run.folder}: {output if code else f'{differs} differ from the undisturbed run'}")
        equal += done > before  # a run may finish before any kill hits it
    return dict(hit), equal


def _surroundings(aim: str, folder: Path, number: int) -> dict[str, str]:
    """Environment that prolongs a phase: a folder without prepared data, or a separate compilation cache."""
    return {
        "data": {"TFDS_DATA_DIR": str(folder / f"data{number}")},
        "compile": {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")},
    }.get(aim, {})


def _wait_for(aim: str, run: Run, process: subprocess.Popen, rng: np.random.Generator) -> bool:
    """Waits for the moment, then for a random short time; False if the process ended before."""
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
    skip = int(rng.integers(4)) if aim in ("save", "evaluate", "train") else 0  # not always the first occurrence
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
    """Kills the process; returns the phase it was in, or None if it had already ended by itself."""
    stacks = _look(process)
    process.kill()
    return phase(stacks) if process.wait() == -signal.SIGKILL else None


def _look(process: subprocess.Popen) -> str:
    """The current stacks of all threads of a process; empty if it has ended."""
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
    """The phase of a process, one of ``PHASES``, from the stacks of its threads.

    A thread that imports a module does not count: its frames lie in modules of other phases.

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
    """Failures that are reported: yields what was done, the message, and how the resumed run ended.

    Raises RuntimeError if a message, an exit code or a resumed run is not as expected.
    """
    run = Run(folder / "sigterm", straight.overrides, straight.environment)
    process = run.start(stderr=subprocess.PIPE, text=True)
    while not (lines := read_metrics(run.folder)) or lines[-1]["step"] < 100:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    message = process.communicate()[1].strip().splitlines()[-1]
    yield "SIGTERM", _expect(message, process.returncode, "stopped at step", 0), _ends_equal(run, straight)

    run = Run(folder / "full", straight.overrides, straight.environment)
    limit = 2**15
    process = run.start(stderr=subprocess.PIPE, text=True)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))  # the limit applies to every file it writes
    message = _expect(process.communicate()[1].strip().splitlines()[-1], process.returncode, "disk is full", 2)
    yield "no room for a checkpoint", message, _ends_equal(run, straight)

    run = Run(folder / "sigterm", straight.overrides, straight.environment)
    newest = max((run.folder / "checkpoints").glob("[0-9]*0"), key=lambda path: int(path.name))
    file = max(newest.glob("state/**/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, output = run.finish()
    line = next((line for line in output.splitlines() if "damaged checkpoint" in line), output)
    yield "one bit of a checkpoint flipped", _expect(line, code, "damaged checkpoint", 0), _ends_equal(run, straight)


def _expect(message: str, code: int, part: str, wanted: int) -> str:
    if code != wanted or part not in message:
        raise RuntimeError(f"exit code {code}, {message!r}; expected {wanted} and {part!r}.")
    return f"exit code {code}, “{_short(message)}”"


def _short(message: str) -> str:
    """Removes the folders of this machine from a message."""
    return re.sub(r"(?<![\w.])/\S+/(?=\w)", "", message).replace("|", "/")


def _ends_equal(run: Run, straight: Run) -> str:
    code, output = run.finish()
    if code or (differs := run.differs(straight)):
        raise RuntimeError(f"{run.folder}: {output if code else f'{differs} differ from the undisturbed run'}")
    return "equal to the bit"


def data_failures(folder: Path) -> Iterator[tuple[str, str, str]]:
    """A batch with NaN, and a data source that hangs, each in a separate training; yields rows as ``announced``."""
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
            raise RuntimeError(f"{folder}: a resumed run differs from the undisturbed one.")
        return "equal to the bit"

    whole, skips = train("whole", loader.batch)[0], train("skips", nan, on_nan="skip")
    stopped = train("nan", nan)[1]
    yield "NaN in batch 17, on_nan=stop", stopped, f"{same(train('nan', nan, on_nan='skip')[0], skips[0])}, skipping"
    yield "NaN in batch 17, on_nan=skip", skips[1], "the skipped step changes no bit (tests/test_feed.py)"
    hung = train("hung", hangs, data_timeout=2.0)[1]
    awake.set()
    yield "a data source that hangs at batch 25", hung, same(train("hung", loader.batch)[0], whole)


def survive(folder: Path, count: int = 50, overrides: Sequence[str] = SMALL) -> list[str]:
    """Runs all kills and failures and returns the lines of the section.

    Raises RuntimeError if anything is lost or differs.
    """
    began = time.monotonic()
    straight = Run(folder / "straight", overrides, {"TFDS_DATA_DIR": str(folder / "data")})
    code, output = straight.finish()
    if code:
        raise RuntimeError(output)
    hit, runs = kills(count, folder, straight, np.random.default_rng(0))
    cases = [*announced(folder, straight), *data_failures(folder)]
    return [
        f"{count} times `kill -9` of `scripts/distill.py` on two-digit addition, each followed by the same command, in "
        f"{runs} runs;",
        "all finished, with every weight of teacher, student and baseline and every metric as in the undisturbed run.",
        "The phase is read from the stacks of the process at the moment of the kill.",
        "",
        "| " + " | ".join(hit) + " |",
        "|" + "---:|" * len(hit),
        "| " + " | ".join(map(str, hit.values())) + " |",
        "",
        "| failure | reported | resumed |",
        "|---|---|---|",
        *(f"| {what} | {_short(message)} | {then} |" for what, message, then in cases),
        "",
        f"{(time.monotonic() - began) / 60:.0f} minutes in all.",
    ]


def section(page: Path, count: int = 50) -> None:
    """Runs kills and failures; prints the lines of their section and writes it."""
    with tempfile.TemporaryDirectory() as folder:
        lines = survive(Path(folder), count)
    print(*lines, sep="\n")
    heading = "## Survival: `python scripts/reproduce.py survival`"
    write_section(page, "\n".join([heading, "", *lines, f"{made_on()}."]) + "\n")
