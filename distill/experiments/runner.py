"""The runner: one experiment of any kind, from its configuration to its summary.

Every stage keeps its result in the run folder and is skipped when it is finished there:

    RUN/config.json           the configuration, and the kind of experiment
    RUN/preflight.json        what was checked before the first step
    RUN/checkpoints/          of the student; every other arm has its own folder
    RUN/metrics.jsonl         learning curve
    RUN/cost.json             what training cost
    RUN/student_hf/           the student as ``distill.load(RUN)`` and transformers open it
    RUN/evaluation.json, RUN/summary.json

A kind of experiment (``kinds.py``) is a module with what is its own:

    CONFIG                            class of its configuration, with ``kind``, ``parallel`` and ``log``
    prepare(config, run) -> world     reads what all arms share; finds mistakes before anything is trained
    arms(world, trained)              yields one ``Arm`` after the other; ``trained`` holds those before it
    evaluate(world, trained)          the content of evaluation.json
    summarize(evaluation)             that of summary.json
    write(world, trained, prompts)    what the models answer, as rows of a table
    NAMES, COLUMNS, notes(summary)    the table in the terminal: model → label, column → (key, format), lines below
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from distill.batch import Batch
from distill.checkpoint import lock
from distill.config import write_json
from distill.devices import processes
from distill.errors import MissingFile
from distill.experiments import kinds
from distill.experiments.cost import evaluation_cost, ledger, training_cost
from distill.experiments.folder import Trained, configured, read_config, restore
from distill.experiments.preflight import Side, memory_plan, preflight, print_checks
from distill.models.config import DecoderConfig
from distill.models.model import Model
from distill.reports.table import cells, print_rows
from distill.shapes import Params
from distill.train import Task, fit, lower
from distill.training import TrainingConfig
from distill.weights.families import family_of
from distill.weights.folder import STUDENT, save


class Look(NamedTuple):
    """Models and text that preflight checks."""

    student: Side
    """The student before its first step."""
    teacher: Side
    heldout: Batch | None
    """Text on which both are measured; None: of models that have no logits."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Everything needed to train an arm."""

    flops: float | None
    """Of the whole training; None: not known."""
    task: Task | None = None
    training: TrainingConfig | None = None
    look: Callable[[], Look] | None = None
    """Makes what preflight checks before the first step; None: no preflight."""
    plan: bool = False
    """Whether preflight compares the memory of the step with that of the device."""
    learn: Callable[[], Params] | None = None
    """In place of a ``task`` for ``fit``: trains or reads the parameters, and keeps its own checkpoints (a sweep)."""


def _all(params: Params) -> Params:
    return params


@dataclasses.dataclass(frozen=True)
class Arm:
    """One training of an experiment."""

    name: str
    title: str
    """Its line in the ledger."""
    folder: Path
    learns: Model
    """Model of the learnt parameters, as they are read from a checkpoint."""
    work: Callable[[], Work]
    """Called before ``fit``, which trains the arm or finds it finished, and not where the arm is only read."""
    model: Model
    """The model that is measured and exported."""
    plain: Callable[[Params], Params] = _all
    """Learnt parameters → those of ``model``."""
    export: Callable[[Trained], tuple[Any, ...]] | None = None
    """Arguments of ``export`` after the folder; None: not exported."""


def run_experiment(config: Any, run: Path) -> dict[str, Any]:
    """Does what is not done yet of an experiment; returns the summary.

    Raises:
      UserError: a mistake in the configuration, or a folder that holds another run.
    """
    kind = kinds.experiment_of(config)
    with lock(run / ".experiment"), configured(run, config):
        world, trained, stages = kind.prepare(config, run), {}, {}
        for arm in kind.arms(world, trained):
            trained[arm.name] = train(arm, config)
            stages[arm.title] = arm.folder
        return _evaluate(kind, world, trained, stages, run)


def train(arm: Arm, config: Any) -> Trained:
    """Trains an arm, or reads it where it is finished, and exports it.

    Args:
      arm: what is trained.
      config: of the experiment, for its ``parallel`` and ``log``.
    """
    with training_cost(arm.folder) as spent:
        work = arm.work()  # may run the teacher: to store its targets, or to write the student's answers
        spent["flops"] = work.flops
        if work.look is not None and not (arm.folder / "checkpoints").exists():
            look_before(arm, work, config)
        if work.learn is not None:
            learnt = work.learn()
        else:
            options = {"parallel_config": config.parallel, "log": config.log, "label": arm.name}
            learnt = fit(arm.folder, work.task, work.training, **options)
    trained = Trained(arm.model, arm.plain(learnt))
    if arm.export is not None:
        export(arm.folder, *arm.export(trained))
    return trained


def look_before(arm: Arm, work: Work, config: Any) -> None:
    """Checks an arm that has not begun (``preflight``); prints the checks, writes FOLDER/preflight.json."""
    plan = None
    if work.plan and config.parallel.backend != "pmap":
        plan = memory_plan(*lower(work.task, work.training, config.parallel))
    checks = preflight(*work.look(), work.task.terms, plan=plan, run=arm.folder)
    if config.log.progress:
        print_checks(checks)


def export(
    run: Path, model: Model, params: Params, tokenizer: Any = None, files: Mapping[str, str] | None = None
) -> None:
    """Writes RUN/student_hf, and in it ``files``: content by name.

    A decoder that no family of transformers has is reported and passed over: the run goes on without the folder.

    Raises:
      UserError: it cannot be written, such as for a full disk.
    """
    family = None
    if isinstance(model.config, DecoderConfig):
        try:
            family = family_of(model.config)
        except ValueError as error:
            print(f"{run / STUDENT}: not written: {error}", file=sys.stderr)
            return
    save(run / STUDENT, model, params, tokenizer, family=family)
    processes.from_first(lambda: _write(run / STUDENT, files or {}))


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def open_run(run: Path, best: str | None = None) -> tuple[Any, dict[str, Trained]]:
    """The world of a run folder and the models trained in it, by the names of their arms.

    Arms after the student's that have not begun are left out.

    Args:
      run: the folder.
      best: of the student, read the checkpoint that is best by this metric, not the newest.

    Raises:
      MissingFile: no run folder, or no teacher or student in it.
      UserError: its configuration or a checkpoint cannot be read, or none was measured by ``best``.
    """
    world, trained, _ = _open(kinds.experiment_in(run), run, best)
    return world, trained


def _open(kind: ModuleType, run: Path, best: str | None = None) -> tuple[Any, dict[str, Trained], dict[str, Path]]:
    config = read_config(run, kind.CONFIG)
    if not (run / "checkpoints").is_dir():
        raise MissingFile(f"{run}: no checkpoints; expected a run folder, made by scripts/distill.py.")
    world, trained, stages = kind.prepare(config, run), {}, {}
    for arm in kind.arms(world, trained):
        stages[arm.title] = arm.folder
        if "student" in trained and not (arm.folder / "checkpoints").is_dir():
            continue  # a control that has not begun
        found = restore(arm.learns, arm.folder, best if arm.name == "student" else None)
        trained[arm.name] = Trained(arm.model, arm.plain(found.params))
    return world, trained, stages


def evaluate_folder(run: Path) -> dict[str, Any]:
    """Measures the models of a run folder again; writes evaluation.json and summary.json, returns the summary."""
    kind = kinds.experiment_in(run)
    return _evaluate(kind, *_open(kind, run), run)


def _evaluate(
    kind: ModuleType, world: Any, trained: dict[str, Trained], stages: dict[str, Path], run: Path
) -> dict[str, Any]:
    with evaluation_cost(run / "evaluation"):
        evaluation = kind.evaluate(world, trained)
    evaluation["ledger"] = ledger(stages | {"evaluation": run / "evaluation"})
    write_json(run / "evaluation.json", evaluation)
    summary = kind.summarize(evaluation)
    write_json(run / "summary.json", summary)
    return summary


def answer(run: Path, prompts: list[str], best: str | None = None) -> list[dict[str, str]]:
    """Answers of the models of a run folder, as rows of a table; ``best`` as for ``open_run``."""
    kind = kinds.experiment_in(run)
    world, trained, _ = _open(kind, run, best)
    return kind.write(world, trained, prompts)


def print_summary(summary: dict[str, Any], run: Path) -> None:
    """Prints a row for each model, and the notes of the kind."""
    kind = kinds.experiment_in(run)
    rows = [
        [label.format(**summary[name]), *cells(summary[name], kind.COLUMNS)]
        for name, label in kind.NAMES.items()
        if name in summary
    ]
    print_rows(str(run), ("model", *kind.COLUMNS), rows)
    print(*kind.notes(summary), sep="\n")
