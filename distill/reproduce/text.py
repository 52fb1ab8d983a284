"""The section of a distillation on text in REPRODUCE.md, over seeds."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from distill.experiments.runner import run_experiment
from distill.experiments.text.config import TextConfig
from distill.reports.table import written
from distill.reports.text import COLUMNS, NAMES
from distill.reproduce.page import made_on, write_section


def text(config: TextConfig, run: Path, page: Path, seeds: int = 3) -> list[dict[str, Any]]:
    """Runs the missing seeds of an experiment on text; a seed chooses the held-out documents and the batches.

    The section is written after every seed with the number of seeds, so that a run that is stopped leaves a valid one.
    """
    summaries = []
    for seed in range(seeds):
        training = dataclasses.replace(config.training, seed=seed)
        data = dataclasses.replace(config.data, split_seed=seed)
        one, folder = dataclasses.replace(config, training=training, data=data), run / f"seed{seed}"
        done = folder / "summary.json"
        summaries.append(json.loads(done.read_text()) if done.exists() else run_experiment(one, folder))
        write_section(page, text_page(config, summaries))
    return summaries


def text_page(config: TextConfig, summaries: list[dict[str, Any]]) -> str:
    """Formats the section of an experiment on text, with means over seeds."""
    seconds = np.mean([summary["seconds"] for summary in summaries])
    lines = [
        f"## {config.teacher} on text: `python scripts/reproduce.py smollm2`",
        "",
        f"Seeds: {len(summaries)}, each with its own held-out documents and order of batches; means, in brackets the",
        "smallest and the largest. The arms are described in `distill/experiments/text/run.py`, the settings stand in",
        "`distill/configs/smollm2_text.py`. KL(teacher‖student) and cross-entropy in nats per held-out token.",
        "",
        f"{made_on()}; {seconds / 60:.0f} minutes a seed.",
        "",
        "| model | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for name, (title, *_) in NAMES.items():
        rows = [summary[name] for summary in summaries if name in summary]
        cells = [_spread([row[key] for row in rows if key in row], how) for key, how in COLUMNS.values()]
        lines += ["| " + " | ".join([title, *cells]) + " |"] if rows else []
    verdicts = [f"- seed {i}: {line}" for i, summary in enumerate(summaries) for line in summary["verdict"]]
    return "\n".join([*lines, "", *verdicts]) + "\n"


def _spread(values: list[float], how: str) -> str:
    if not values:
        return "–"
    low, high = written(min(values), how), written(max(values), how)
    mean = written(float(np.mean(values)), how)
    return mean if low == high else f"{mean} [{low}, {high}]"
