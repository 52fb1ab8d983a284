"""The section of the addition protocol in REPRODUCE.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from distill.devices import backend
from distill.experiments.addition.config import ProtocolConfig
from distill.experiments.addition.protocol import run_protocol
from distill.reproduce.page import made_on, write_section

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


def addition(config: ProtocolConfig, run: Path, page: Path, set_up: Callable[[], None] | None = None) -> dict[str, Any]:
    """Runs the missing parts of the addition protocol and writes its section; returns the content of arms.json.

    On a CPU one model is too small for more than one thread, so each core trains different rows in a worker process.
    Every worker calls ``set_up`` first.
    """
    results = run_protocol(config, run, workers=backend.worker_processes(), set_up=set_up)
    write_section(page, addition_page(results))
    return results


def addition_page(results: dict[str, Any]) -> str:
    """Formats the section of a finished protocol."""
    teacher, rows = results["teacher"], results["rows"]
    cpu = teacher["cpu_seconds"] + sum(row["cpu_seconds"] for row in rows)
    scores = teacher["seeds"]
    lines = [
        "## Two-digit addition: `python scripts/reproduce.py addition`",
        "",
        f"{len(scores)} seeds, each with its own split by unordered pair, teachers and initial weights. Exact match",
        "of greedy decoding on 5 000 pairs nobody trained on. Interval: 95 % of the mean (Student's t). Gap closed is",
        "(arm − alone) / (teacher − alone), at the same number of labels; for arms without labels, at the fewest.",
        "The arms are described in `distill/experiments/addition/protocol.py`, their settings in",
        "`distill/configs/addition_arms.py`.",
        "",
        f"{made_on()}.",
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


def _line(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    gap = "–" if row["gap_closed"] is None else f"{row['gap_closed']:.1%}"
    return (
        f"| {row['student']} | {row['parameters']:,} | {row['arm']} | {row['labels'] or '–'} | {row['mean']:.4f} | "
        f"{low:.4f} … {high:.4f} | {row['worst']:.4f} | {gap} | {row['agreement']:.4f} | {row['kl']:.4f} |"
    )
