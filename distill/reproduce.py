"""The numbers of REPRODUCE.md: runs, tables, and how they were made."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill import experiment
from distill.config import ProtocolConfig
from distill.protocol import run_protocol

COLUMNS = (
    "student",
    "parameters",
    "arm",
    "labels",
    "mean",
    "95 % interval",
    "worst seed",
    "gap closed",
    "agreement",
    "KL (nats)",
)


def addition(config: ProtocolConfig, run: Path, page: Path) -> dict[str, Any]:
    """Runs what is missing of the addition protocol and writes the page; returns arms.json's contents."""
    results = run_protocol(config, run)
    page.write_text(addition_page(results))
    return results


def addition_page(results: dict[str, Any]) -> str:
    """The Markdown page of a finished protocol."""
    teacher, rows = results["teacher"], results["rows"]
    cpu = teacher["cpu_seconds"] + sum(row["cpu_seconds"] for row in rows)
    scores = teacher["seeds"]
    lines = [
        "# Reproduced numbers",
        "",
        "## Two-digit addition: `python scripts/reproduce.py addition`",
        "",
        f"{len(scores)} seeds, each with its own split by unordered pair, teachers and initial weights. Exact match",
        "of greedy decoding on 5 000 pairs nobody trained on. Interval: 95 % of the mean (Student's t). Gap closed is",
        "(arm − alone) / (teacher − alone), at the same number of labels; for arms without labels, at the fewest.",
        "The arms are described in `distill/protocol.py`, their settings in `distill/configs/addition_arms.py`.",
        "",
        f"Made on {_machine()}; jax {jax.__version__}; commit {_commit()}.",
        f"{cpu / 60:.0f} CPU minutes in all, {results['sweep']['cpu_seconds'] / 60:.0f} of them for the",
        f"{results['sweep']['runs']} runs of the sweeps of `alone` and `same_prompts` (one grid for both).",
        "",
        f"Teacher: {teacher['parameters']:,} parameters, exact match {np.mean(scores):.4f}, worst {min(scores):.4f}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|---:|---|---:|---:|---|---:|---:|---:|---:|",
        *(_line(row) for row in sorted(rows, key=lambda r: (-r["parameters"], r["labels"] or 10**9))),
    ]
    return "\n".join(lines) + "\n"


def kills(count: int, folder: Path, overrides: Sequence[str] = (), seconds: tuple[float, float] = (4.0, 16.0)) -> int:
    """``kill -9`` at ``count`` random moments of scripts/distill.py; every run that ends must equal an undisturbed one.

    Args:
      count: kills in all; a run that ends before they are spent is followed by a new one.
      folder: empty; the runs are made here.
      overrides: of the configuration.
      seconds: after how long a process is killed, at least and at most.

    Returns:
      The number of runs that were killed on their way and compared equal to the bit: teacher, student and baseline.

    Raises:
      RuntimeError: a run differs, or cannot be taken up.
    """
    rng = np.random.default_rng(0)
    straight = folder / "straight"
    _distill(straight, overrides).wait()
    want, done, compared = experiment.open_run(straight)[1], 0, 0
    while done < count:
        run = folder / f"killed{compared}"
        while (process := _distill(run, overrides)) and done < count:
            try:
                process.wait(float(rng.uniform(*seconds)))
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
        if process.wait() and _distill(run, overrides).wait():
            raise RuntimeError(f"{run}: cannot be taken up after a kill.")
        _compare(run, want, experiment.open_run(run)[1])
        compared += 1
    return compared


def _distill(run: Path, overrides: Sequence[str]) -> subprocess.Popen:
    script = Path(__file__).parents[1] / "scripts" / "distill.py"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, str(script), "--run", str(run), *overrides], **quiet)


def _compare(run: Path, want: dict[str, Any], got: dict[str, Any]) -> None:
    for name, trained in want.items():
        for a, b in zip(jax.tree.leaves(trained.params), jax.tree.leaves(got[name].params), strict=True):
            if not np.array_equal(a, b):
                raise RuntimeError(f"{run}: the {name} differs from that of the run that was not disturbed.")


def _line(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    gap = "–" if row["gap_closed"] is None else f"{row['gap_closed']:.1%}"
    return (
        f"| {row['student']} | {row['parameters']:,} | {row['arm']} | {row['labels'] or '–'} | {row['mean']:.4f} | "
        f"{low:.4f} … {high:.4f} | {row['worst']:.4f} | {gap} | {row['agreement']:.4f} | {row['kl']:.4f} |"
    )


def _machine() -> str:
    device = f"{jax.device_count()} {jax.devices()[0].platform} device"
    return f"{device} ({os.cpu_count()} cores, {platform.machine()}), Python {platform.python_version()}"


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
