"""The kinds of experiments: which modules run one and report on it.

A configuration carries its kind (``Config.kind``); a run folder has it in ``config.json``.
"""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from distill.errors import MissingFile, UserError


class Kind(NamedTuple):
    """Two modules, imported when they are needed, and what a script must know before it starts JAX."""

    experiment: str
    """What is the kind's own of a run; ``runner.py`` lists its functions."""
    report: str
    """Has ``write_report(runs)``; imports no jax."""
    large_steps: bool = True
    """Whether a step is so large that a process on a CPU keeps freed memory between steps (``backend.keep_memory``)."""


KINDS = {
    "addition": Kind("distill.experiments.addition.run", "distill.reports.addition", large_steps=False),
    "sentences": Kind("distill.experiments.sentences.run", "distill.reports.sentences"),
    "text": Kind("distill.experiments.text.run", "distill.reports.text"),
}


def kind_of(config: Any) -> Kind:
    """The kind of a configuration.

    Raises:
      UserError: a configuration that is no experiment.
    """
    kind = getattr(config, "kind", None)
    if kind not in KINDS:
        raise UserError(
            f"a {type(config).__name__} is no experiment that can be run so; expected a configuration of kind "
            f"{', '.join(KINDS)}. Several seeds and arms: scripts/reproduce.py."
        )
    return KINDS[kind]


def experiment_of(config: Any) -> ModuleType:
    """The module of a configuration's kind.

    Raises:
      UserError: a configuration that is no experiment.
    """
    return importlib.import_module(kind_of(config).experiment)


def experiment_in(run: Path) -> ModuleType:
    """The module of the kind of a run folder.

    Raises:
      MissingFile: no run folder.
      UserError: a config.json that cannot be read, or names no kind.
    """
    return importlib.import_module(_kind_in(run).experiment)


def report_in(*runs: Path) -> ModuleType:
    """The module that reports on run folders, which are all of one kind.

    Raises:
      FileNotFoundError, ValueError: as ``experiment_in``; folders of two kinds, which no one page compares.
    """
    kinds = [_kind_in(run) for run in runs]
    for run, kind in zip(runs, kinds, strict=True):
        if kind != kinds[0]:
            names = {kind: name for name, kind in KINDS.items()}
            raise UserError(
                f"{runs[0]} and {run} are runs of two kinds ({names[kinds[0]]}, {names[kind]}); expected runs of one "
                "kind, which a page can compare. Write a report of each: two commands."
            )
    return importlib.import_module(kinds[0].report)


def _kind_in(run: Path) -> Kind:
    file = run / "config.json"
    if not file.is_file():
        raise MissingFile(f"{run}: no config.json; expected a run folder, made by scripts/distill.py.")
    try:
        kind = json.loads(file.read_text()).get("kind")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); expected the configuration of a run.") from error
    if kind not in KINDS:
        raise UserError(f"{file}: kind {kind!r}; expected one of {', '.join(KINDS)}.")
    return KINDS[kind]
