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
        seconds = {name: seconds_per_step(folder, config) for name, folder in folders.items()}
        unit = config.training.dispatch
        steps = max(round(config.training.steps * seconds["distilled"] / seconds["alone"] / unit), 1) * unit
        write_json(file, {"steps": steps, "seconds_per_step": seconds})
    return json.loads(file.read_text())["steps"]


def seconds_per_step(folder: Path, config: TextConfig) -> float:
    """Median over the dispatches of a training, from its metrics."""
    speeds = [record["tokens_per_second"] for record in read_metrics(folder) if record["kind"] == "train"]
    return config.training.batch_size * config.data.length / float(np.median(speeds))


def training_of(folder: Path, config: TextConfig) -> dict[str, float]:
    """Tokens and seconds an arm learnt from."""
    steps = max(record["step"] for record in read_metrics(folder) if record["kind"] == "train")
    tokens = steps * config.training.batch_size * config.data.length
    return {"steps": steps, "training_tokens": tokens, "training_seconds": steps * seconds_per_step(folder, config)}
