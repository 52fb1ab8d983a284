"""Contestants in turn in one run: rounds, ratios and their spread."""

import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

Run = Callable[[int], None]
"""``run(n)``: n training steps, waited for."""


def a_device_for_every_core() -> None:
    """Makes as many devices of the CPU as it has cores; before JAX is used."""
    jax.config.update("jax_num_cpu_devices", os.cpu_count())


def in_turn(contestants: dict[str, Run], steps: int, rounds: int = 7) -> dict[str, list[float]]:
    """Steps per second of every contestant in every round, one after the other within a round; one warm-up round."""
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run(steps)
            if i:
                speeds[name].append(steps / (time.perf_counter() - start))
    return speeds


def peers_of(folder: Path, module: str, extra: str) -> dict[str, Callable]:
    """``PEERS`` of a module of scripts/peers.

    Raises:
      ValueError: what it needs is not installed; ``extra`` would install it.
    """
    sys.path.append(str(folder))
    try:
        return importlib.import_module(module).PEERS
    except ImportError as error:
        raise ValueError(f"{error}: the peer is missing; pip install -e '.[{extra}]'.") from error


def speed(name: str, values: list[float]) -> str:
    """One line: a contestant's steps per second."""
    return f"{name:<26} {spread(values)} steps/s"


def ratio(speeds: dict[str, list[float]], ours: str, other: str) -> list[float]:
    """How many times as fast ``ours`` is as ``other``, round by round."""
    return [a / b for a, b in zip(speeds[ours], speeds[other], strict=True)]


def spread(values: list[float]) -> str:
    """Median [least, most]."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"
