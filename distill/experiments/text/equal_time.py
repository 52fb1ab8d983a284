"""Seconds that an arm of an experiment on text trained, and the number of steps that take as long."""

import json
from pathlib import Path

import numpy as np

from distill.config import write_json
from distill.devices import processes
from distill.experiments.text.config import TextConfig
from distill.metrics import read_metrics


def equal_steps(config: TextConfig, run: Path) -> int:
    """Steps of cross-entropy that take as long as distilling did; decided once, kept in RUN/equal_time/steps.json."""
    return processes.from_first(lambda: _steps_of_equal_time(config, run))


def _steps_of_equal_time(config: TextConfig, run: Path) -> int:
    file = run / "equal_time" / "steps.json"
    if not file.exists():
        folders = {"distilled": run, "alone": run / "equal_tokens"}
        seconds = {name: seconds_per_step(folder) for name, folder in folders.items()}
        unit = config.training.dispatch
        steps = max(round(config.training.steps * seconds["distilled"] / seconds["alone"] / unit), 1) * unit
        write_json(file, {"steps": steps, "seconds_per_step": seconds})
    return json.loads(file.read_text())["steps"]


def seconds_per_step(folder: Path) -> float:
    """Median over the dispatches of a training, from its metrics."""
    lines = _dispatches(folder)
    seconds = [line["tokens"] / line["tokens_per_second"] for line in lines]
    return float(np.median(seconds)) * len(lines) / lines[-1]["step"]


def training_of(folder: Path) -> dict[str, float]:
    """Tokens, without padding, and seconds an arm learnt from."""
    lines = _dispatches(folder)
    steps, tokens = lines[-1]["step"], sum(line["tokens"] for line in lines)
    return {"steps": steps, "training_tokens": tokens, "training_seconds": steps * seconds_per_step(folder)}


def _dispatches(folder: Path) -> list[dict[str, float]]:
    return [record for record in read_metrics(folder) if record["kind"] == "train"]
