"""The numbers of REPRODUCE.md: runs, tables, and how they were made."""

import dataclasses
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill.experiments.addition.config import ProtocolConfig
from distill.experiments.addition.protocol import run_protocol
from distill.experiments.text import run as text_experiment
from distill.experiments.text.config import TextConfig
from distill.reproduce.survival import survive

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
    """Runs what is missing of the addition protocol and writes the page; returns arms.json's contents.

    On a CPU its models are too small for more than one thread: a second one costs CPU time and saves none. So
    every core takes rows of its own.
    """
    results = run_protocol(config, run, workers=os.cpu_count() if jax.default_backend() == "cpu" else 0)
    write_section(page, addition_page(results))
    return results


def text(config: TextConfig, run: Path, page: Path, seeds: int = 3) -> list[dict[str, Any]]:
    """Runs what is missing of an experiment on text with other held-out documents and batches.

    Its section is written after every seed and says how many there are, so that a run that is stopped leaves its own.
    """
    summaries = []
    for seed in range(seeds):
        training = dataclasses.replace(config.training, seed=seed)
        data = dataclasses.replace(config.data, split_seed=seed)
        one, folder = dataclasses.replace(config, training=training, data=data), run / f"seed{seed}"
        done = folder / "summary.json"
        summaries.append(json.loads(done.read_text()) if done.exists() else text_experiment.run_experiment(one, folder))
        write_section(page, text_page(config, summaries))
    return summaries


def text_page(config: TextConfig, summaries: list[dict[str, Any]]) -> str:
    """The section of a finished experiment on text, means over seeds."""
    columns = text_experiment.COLUMNS
    seconds = np.mean([summary["seconds"] for summary in summaries])
    lines = [
        f"## {config.teacher} on text: `python scripts/reproduce.py smollm2`",
        "",
        f"Seeds: {len(summaries)}, each with its own held-out documents and order of batches; means, in brackets the",
        "smallest and the largest. The arms are described in `distill/experiments/text/run.py`, the settings stand in",
        "`distill/configs/smollm2_text.py`. KL(teacher‖student) and cross-entropy in nats per held-out token.",
        "",
        f"Made on {_machine()}; jax {jax.__version__}; commit {_commit()}; {seconds / 60:.0f} minutes a seed.",
        "",
        "| model | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, title in text_experiment.NAMES.items():
        rows = [summary[name] for summary in summaries if name in summary]
        cells = [_spread([row[key] for row in rows if key in row], how) for key, how in columns.values()]
        lines += ["| " + " | ".join([title, *cells]) + " |"] if rows else []
    verdicts = [f"- seed {i}: {line}" for i, summary in enumerate(summaries) for line in summary["verdict"]]
    return "\n".join([*lines, "", *verdicts]) + "\n"


def _spread(values: list[float], how: str) -> str:
    if not values:
        return "–"
    low, high = format(min(values), how), format(max(values), how)
    mean = format(float(np.mean(values)), how)
    return mean if low == high else f"{mean} [{low}, {high}]"


def write_section(page: Path, section: str) -> None:
    """Puts a section, from its ``## heading`` on, into a page, in place of the one with this heading."""
    old = page.read_text() if page.exists() else "# Reproduced numbers\n"
    first, *parts = re.split(r"^(?=## )", old, flags=re.M)
    heading = section.partition("\n")[0]
    same = [part.partition("\n")[0] == heading for part in parts]
    parts = [section if here else part for here, part in zip(same, parts, strict=True)]
    parts += [] if any(same) else [section]
    page.write_text("\n\n".join(part.strip() for part in (first, *parts)) + "\n")


def addition_page(results: dict[str, Any]) -> str:
    """The section of a finished protocol."""
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


def survival(folder: Path, page: Path, count: int = 50) -> list[str]:
    """Kills, failures and resumes (``survival.py``); writes their section; returns its lines."""
    lines = survive(folder, count)
    made = f"Made on {_machine()}; jax {jax.__version__}; commit {_commit()}."
    write_section(page, "\n".join(["## Survival: `python scripts/reproduce.py survival`", "", *lines, made]) + "\n")
    return lines


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
