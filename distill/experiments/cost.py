"""Cost of the stages of an experiment: FLOPs, seconds, CPU-seconds and, on a CPU, modelled energy."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from distill.config import write_json

WATTS_PER_CORE = 10.0
"""Assumed power of one busy CPU core, in watts; energy is modelled from CPU time, ± 40 %, not measured."""


@contextlib.contextmanager
def training_cost(folder: Path) -> Iterator[dict[str, Any]]:
    """Adds what the block spends to FOLDER/cost.json, if it trained at all; the block fills in ``flops``.

    A finished training that is run again writes no metrics and changes nothing. A session that is killed loses its
    seconds.
    """
    before, started, about = _changed(folder), _clocks(), {"flops": None}
    try:
        yield about
    finally:
        if _changed(folder) != before:
            file = folder / "cost.json"
            spent = json.loads(file.read_text()) if file.exists() else {}
            now = _spent(started)
            write_json(file, about | now | {key: now[key] + spent.get(key, 0.0) for key in _CLOCKS})


@contextlib.contextmanager
def evaluation_cost(folder: Path) -> Iterator[None]:
    """Writes what the block spends to FOLDER/cost.json, in place of an earlier evaluation."""
    started = _clocks()
    yield
    write_json(folder / "cost.json", {"flops": None} | _spent(started))


def ledger(stages: dict[str, Path]) -> dict[str, Any]:
    """Cost of every stage that has one, and the joules of those that ran on a CPU alone.

    Args:
      stages: name → folder.
    """
    rows = []
    for what, folder in stages.items():
        if (folder / "cost.json").exists():
            spent = json.loads((folder / "cost.json").read_text())
            # Of an accelerator's run the CPU-seconds are those of the host, which waits: they say nothing of energy.
            joules = {} if "platform" in spent else {"joules": spent["cpu_seconds"] * WATTS_PER_CORE}
            rows.append({"what": what} | spent | joules)
    return {"rows": rows, "watts_per_core": WATTS_PER_CORE, "uncertainty": 0.4}


_CLOCKS = ("seconds", "cpu_seconds")


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _spent(started: tuple[float, float]) -> dict[str, Any]:
    spent = {key: now - then for key, now, then in zip(_CLOCKS, _clocks(), started, strict=True)}
    platform = jax.default_backend()
    return spent if platform == "cpu" else spent | {"platform": platform}


def _changed(folder: Path) -> int | None:
    """Time at which a training last wrote its metrics; None where it has not begun."""
    file = folder / "metrics.jsonl"
    return file.stat().st_mtime_ns if file.exists() else None
