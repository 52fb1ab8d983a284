"""Which modules an experiment is run, evaluated and reported by: told by the kind of its configuration.

A configuration carries its kind (``Config.kind``), a run folder has it in ``config.json``; none there means addition.
"""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """Two modules, imported when they are asked for."""

    experiment: str
    """Has ``run_experiment(config, run)``, ``evaluate_folder(run)`` and ``print_summary(summary, run)``, which prints
    what the two return, and ``answer(run, prompts, best=None)``: what the models say, as rows of a table,
    the student the newest or the best by a metric."""
    report: str
    """Has ``write_report(runs)``; imports no jax."""


KINDS = {
    "addition": Kind("distill.experiments.addition.run", "distill.reports.addition"),
    "sentences": Kind("distill.experiments.sentences.run", "distill.reports.sentences"),
    "text": Kind("distill.experiments.text.run", "distill.reports.text"),
}


def experiment_of(config: Any) -> ModuleType:
    """The module that runs a configuration.

    Raises:
      ValueError: a configuration that is no experiment.
    """
    kind = getattr(config, "kind", None)
    if kind not in KINDS:
        raise ValueError(
            f"a {type(config).__name__} is no experiment that can be run so; expected a configuration of kind "
            f"{', '.join(KINDS)}. Several seeds and arms: scripts/reproduce.py."
        )
    return importlib.import_module(KINDS[kind].experiment)


def experiment_in(run: Path) -> ModuleType:
    """The module that made a run folder."""
    return importlib.import_module(_kind_in(run).experiment)


def report_in(*runs: Path) -> ModuleType:
    """The module that reports on run folders, which are all of one kind.

    Raises:
      ValueError: folders of two kinds, which no one page compares.
    """
    kinds = [_kind_in(run) for run in runs]
    for run, kind in zip(runs, kinds, strict=True):
        if kind != kinds[0]:
            names = {kind: name for name, kind in KINDS.items()}
            raise ValueError(
                f"{runs[0]} and {run} are runs of two kinds ({names[kinds[0]]}, {names[kind]}); expected runs of one "
                "kind, which a page can compare. Write a report of each: two commands."
            )
    return importlib.import_module(kinds[0].report)


def _kind_in(run: Path) -> Kind:
    """By config.json; what is wrong with a file that cannot be read is said by who reads it whole."""
    try:
        kind = json.loads((run / "config.json").read_text()).get("kind", "addition")
    except (OSError, ValueError, AttributeError):
        kind = "addition"
    if kind not in KINDS:
        raise ValueError(f"{run / 'config.json'}: kind {kind!r}; expected one of {', '.join(KINDS)}.")
    return KINDS[kind]
