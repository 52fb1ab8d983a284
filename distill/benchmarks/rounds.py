"""Rounds in which contestants are timed in turn, speed ratios, and their spread."""

import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

from distill.errors import UserError

Run = Callable[[int], None]
"""``run(n)`` takes n training steps and blocks until they are computed."""


def a_device_for_every_core() -> None:
    """Splits the CPU into one device per core; call it before JAX is used."""
    jax.config.update("jax_num_cpu_devices", os.cpu_count())


def in_turn(contestants: dict[str, Run], steps: int, rounds: int = 7) -> dict[str, list[float]]:
    """Steps per second of every contestant in every round, after one round of warm-up.

    Contestants alternate within a round, so that a change in the machine's speed meets all of them.
    """
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run(steps)
            if i:
                speeds[name].append(steps / (time.perf_counter() - start))
    return speeds


def peers_of(folder: Path, module: str, extra: str) -> dict[str, Callable]:
    """Imports ``PEERS`` from a module of scripts/peers.

    Raises:
      UserError: a library of the peers is missing; ``extra`` installs it.
    """
    sys.path.append(str(folder))
    try:
        return importlib.import_module(module).PEERS
    except ImportError as error:
        raise UserError(f"{error}: the peer is missing; pip install -e '.[{extra}]'.") from error


def speed(name: str, values: list[float]) -> str:
    """Formats the steps per second of a contestant as one line."""
    return f"{name:<26} {spread(values)} steps/s"


def ratio(speeds: dict[str, list[float]], ours: str, other: str) -> list[float]:
    """Speed of ``ours`` relative to ``other``, round by round."""
    return [a / b for a, b in zip(speeds[ours], speeds[other], strict=True)]


def spread(values: list[float]) -> str:
    """Formats values as median [least, most]."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"
