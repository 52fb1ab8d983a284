"""Metrics: (sum, weight) pairs to numbers, and where the numbers are written."""

import json
import os
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from distill.config import to_json
from distill.devices import processes
from distill.errors import UserError


def averages(metrics: dict[str, tuple[Any, Any]]) -> dict[str, float]:
    """Pairs, each with any leading axes, to their overall means: Σ sums / Σ weights."""
    means = {}
    for name, (total, weight) in metrics.items():
        weight_sum = float(np.sum(weight))
        means[name] = float(np.sum(total)) / weight_sum if weight_sum else 0.0
    return means


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl; a last line that a kill cut short is skipped."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Writer:
    """Writer of RUN/metrics.jsonl, and of TensorBoard's files if asked.

    Args:
      run: the run folder.
      step: lines after this step are cut off first: a resumed run writes them again.
      tensorboard: also write RUN/tensorboard; needs tensorboardX.
    """

    def __init__(self, run: Path, step: int = 0, tensorboard: bool = False):
        first = processes.index() == 0  # the one that writes
        self.seconds = _cut(run, step) if first else 0.0
        """Of the lines that were there before: a resumed run counts on from them."""
        self._file: TextIO = open(run / "metrics.jsonl" if first else os.devnull, "a")  # noqa: SIM115 - see close()
        self._board = _tensorboard(run, step) if tensorboard and first else None

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One line ``{"kind": …, "step": …, …}``, on the disk (or in the kernel's hands) when this returns."""
        self._file.write(to_json({"kind": kind, "step": step} | values) + "\n")
        self._file.flush()
        for name, value in values.items() if self._board else ():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board:
            self._board.close()


def _cut(run: Path, step: int) -> float:
    """Leaves the lines up to a step, or the file as it was if it is killed; returns the seconds of the last line."""
    file, partial = run / "metrics.jsonl", run / "metrics.partial"
    kept = [record for record in read_metrics(run) if record["step"] <= step and step]
    partial.write_text("".join(to_json(record) + "\n" for record in kept))
    os.replace(partial, file)
    return max((record.get("seconds", 0.0) for record in kept), default=0.0)


def _tensorboard(run: Path, step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("--log.tensorboard needs tensorboardX: pip install 'distill[track]'.") from None
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
