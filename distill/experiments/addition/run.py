"""An experiment on addition: teacher, student distilled from it, the same student alone, and their comparison.

Every stage keeps its result in the run folder and is skipped when it stands there already:

    RUN/teacher/     a model trained on the labels of the train side
    RUN/             the student, distilled on the train-side prompts
    RUN/student_hf/  the same, as ``distill.load(RUN)`` and transformers open it
    RUN/baseline/    the student alone on a few labels, the best of a sweep
    RUN/evaluation.json, RUN/summary.json
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill import losses
from distill.batch import Batch
from distill.checkpoint import Checkpoints, fingerprint, lock, refuse_changes, resumed
from distill.config import to_dict, write_json
from distill.data import addition
from distill.data.addition import TOKENIZER, Examples
from distill.evaluation import measures
from distill.experiments.addition import measure
from distill.experiments.addition import replicas as arms
from distill.experiments.addition.config import Config, Recipe
from distill.experiments.cost import Trained, cost, ledger, restore
from distill.experiments.folder import configured, read_config
from distill.experiments.preflight import Side, preflight, print_checks
from distill.features import feature_terms, projector_shapes, with_projectors, without_projectors
from distill.metrics import Writer
from distill.models import Model, decoder
from distill.objective import Terms, router_terms, task_term, terms_of
from distill.reports.addition_table import (
    print_summary as print_summary,  # part of what every kind of experiment has (kinds.py)
)
from distill.shapes import Params
from distill.students.start import Calibration, Start, outline, start
from distill.students.vocabulary import prune_model
from distill.train import Task, fit
from distill.vocab import align
from distill.weights import STUDENT, save
from distill.weights.families import family_of

PREFLIGHT_ROWS = 64
"""Additions on which teacher and student are looked at before the first step."""


def run_experiment(config: Config, run: Path) -> dict[str, Any]:
    """Does what is not done yet of an experiment; returns the summary."""
    with lock(run / ".experiment"), configured(run, config):
        sides = addition.load(config.data)
        labelled(config, sides["train"], 0)  # refuses too many labels, and
        learner(config)  # networks that cannot be compared, before anything is trained
        teacher = train_teacher(config, run, sides)
        student = distil(config, run, sides, teacher)
        baseline, chosen = train_baseline(config, run, sides)
        return evaluate_run(config, run, sides, teacher, student, baseline, chosen)


def identity(config: Config, *parts: str, **fingerprints: str) -> dict[str, Any]:
    """What may not change when a run goes on: some parts of the configuration, and fingerprints."""
    everything = to_dict(config)
    return {part: everything[part] for part in parts} | {"tokenizer": TOKENIZER.fingerprint()} | fingerprints


def train_alone(config: Config, recipe: Recipe, run: Path, sides: dict[str, Examples], role: str) -> Trained:
    """A model on the true answers of the whole train side."""
    model = network(recipe)
    task = Task(
        student=model,
        terms=[task_term(), *router_terms(model)],
        examples=sides["train"].batch(config.data),
        evaluate=_curve(model, config, sides["test"]),
        identity=identity(config, "data", role),
    )
    with cost(run, recipe.training.steps * _step_flops(recipe, config)):
        params = fit(run, task, recipe.training, parallel_config=config.parallel, log=config.log, label=role)
    return Trained(model, params)


def train_teacher(config: Config, run: Path, sides: dict[str, Examples]) -> Trained:
    """The teacher: read from ``config.teacher_run`` if given, else trained in RUN/teacher."""
    if config.teacher_run is None:
        return train_alone(config, config.teacher, run / "teacher", sides, "teacher")
    return restore(network(config.teacher), Path(config.teacher_run))


def network(recipe: Recipe) -> Model:
    """The decoder of a recipe; rows of its embedding that are no token of the tokenizer get no logit."""
    return decoder(recipe.model).with_vocabulary(TOKENIZER.vocab_size)


def transfer_set(config: Config, sides: dict[str, Examples], teacher: Trained) -> Examples:
    """The prompts of the train side with the answers the student is distilled on."""
    if config.answers == "labels":
        return sides["train"]
    written = measure.write_answers(*teacher, config.data, sides["train"])
    return sides["train"].with_answers(config.data, written)


def distil(config: Config, run: Path, sides: dict[str, Examples], teacher: Trained) -> Trained:
    """The student, from the teacher's soft targets on the transfer set."""
    addition.assert_disjoint(config.data, sides["train"], sides["test"])
    training, cached = config.student.training, config.teacher_signal == "cached"
    begin = started(config, teacher, sides["train"])
    model, terms = learner(config, begin.model)
    align(TOKENIZER.ids(), TOKENIZER.ids(), config.student.model.vocab_size, config.teacher.model.vocab_size)
    examples = transfer_set(config, sides, teacher).batch(config.data)
    flops = training.steps * _step_flops(config.student, config)
    reads = len(examples.inputs) if cached else training.steps * training.batch_size
    flops += reads * examples.inputs.shape[1] * _flops(config.teacher, config)
    if cached:
        examples = examples._replace(targets=losses.DenseTargets(measures.logits_on(*teacher, examples)))
    parts = ("data", "student", "objective", "answers", "teacher_signal")
    asked = identity(config, *parts, teacher_weights=fingerprint(teacher.params))
    task = Task(
        student=model,
        terms=terms,
        reduction=config.objective.reduction,
        examples=examples,
        teacher=None if cached else teacher.model,
        teacher_params=None if cached else teacher.params,
        base_params=begin.base,
        evaluate=_curve(model, config, sides["test"]),
        identity=asked | {"student_start": config.student_start.identity()},
    )
    look_before(config, run, begin, teacher, sides, terms)
    with cost(run, flops):
        params = fit(run, task, training, parallel_config=config.parallel, log=config.log, label="student")
    student = Trained(network(config.student), begin.plain(without_projectors(params)))
    export(run, *student)
    return student


def export(run: Path, model: Model, params: Params) -> None:
    """Writes RUN/student_hf, without the rows of the embedding that are no token.

    A decoder that no family of transformers has is said and passed over: the run goes on without the folder.

    Raises:
      ValueError: it cannot be written, such as for a full disk.
    """
    model, params = prune_model(model, params, np.arange(model.vocab_size))
    try:
        family = family_of(model.config)
    except ValueError as error:
        print(f"{run / STUDENT}: not written: {error}", file=sys.stderr)
        return
    save(run / STUDENT, model, params, family=family)


def look_before(config: Config, run: Path, begin: Start, teacher: Trained, sides: dict[str, Examples], terms: Terms):
    """Preflight of a student that has not begun, on a few test-side additions; prints it, writes RUN/preflight.json."""
    if (run / "checkpoints").exists():
        return
    few = jax.tree.map(jnp.asarray, sides["test"].take(slice(PREFLIGHT_ROWS)).batch(config.data))
    params = begin.whole(begin.model.init(jax.random.key(config.student.training.seed)))
    checks = preflight(Side(begin.model, params, TOKENIZER), Side(*teacher, TOKENIZER), few, terms, run=run)
    if config.log.progress:
        print_checks(checks)


def learner(config: Config, student: Model | None = None) -> tuple[Model, Terms]:
    """The student with the projectors it learns beside itself, and the terms of its objective.

    Without a ``student`` (``started``) it is only checked that there could be one; nothing is computed.
    """
    features, teacher = config.objective.features, network(config.teacher)
    student = student or outline(teacher, config.student.model, config.student_start)
    student = with_projectors(student, projector_shapes(features, student, teacher))
    return student, terms_of(
        config.objective,
        (*feature_terms(features, student, teacher), *router_terms(student, config.objective.router_weight)),
    )


def started(config: Config, teacher: Trained, train: Examples) -> Start:
    """The student before its first step; importance is measured by the cross-entropy of train-side answers."""

    def loss(model: Model, params: Params, batch: Batch) -> Any:
        logits = model.logits(params, batch.inputs, positions=batch.positions, segments=batch.segments)
        return losses.divide(losses.masked_sum(losses.cross_entropy(logits, batch.labels), batch.mask))

    def batches() -> Iterator[Batch]:
        for rows in np.array_split(np.arange(min(len(train.tokens), 1024)), 8):
            yield train.take(rows).batch(config.data)

    return start(*teacher, config.student.model, config.student_start, Calibration(loss, batches))


def labelled(config: Config, train: Examples, seed: int) -> tuple[Examples, Examples]:
    """The few labelled examples of the baseline and those it is tuned by: disjoint, drawn from the train side."""
    count, validation = config.baseline.labels, config.baseline.validation
    if count + validation > len(train.tokens):
        raise ValueError(
            f"baseline: labels={count} and validation={validation} ask for more than the {len(train.tokens)} examples."
        )
    order = np.random.default_rng([seed, 1]).permutation(len(train.tokens))
    return train.take(order[:count]), train.take(order[count : count + validation])


def train_baseline(config: Config, run: Path, sides: dict[str, Examples]) -> tuple[Trained, dict[str, Any]]:
    """The student alone: a sweep over learning rate × weight decay × steps, chosen on the validation split."""
    folder = run / "baseline"
    model, sweep, seed = network(config.student), config.baseline, config.student.training.seed
    asked = identity(config, "data", "baseline") | {"model": to_dict(config)["student"]["model"], "seed": seed}
    with lock(folder), resumed(folder) as checkpoints:
        if checkpoints.latest is not None:
            meta = checkpoints.meta()
            refuse_changes(folder, meta["identity"], asked)
            like = jax.eval_shape(model.init, jax.random.key(0))
            return Trained(model, checkpoints.params(like)), meta["chosen"]
        few, validation = labelled(config, sides["train"], seed)
        rates, decays = arms.grid(sweep.learning_rates, sweep.weight_decays)
        replicas = arms.Replicas(
            arms.stack([few.batch(config.data)] * sweep.runs), np.full(sweep.runs, seed), rates, decays
        )
        schedule = arms.Schedule(sweep.steps, sweep.batch_size, sweep.evaluate_every, config.student.training.optimizer)
        tokens = sweep.runs * sweep.steps * sweep.batch_size * replicas.examples.inputs.shape[2]
        terms = [task_term(), *router_terms(model)]
        with cost(folder, 3 * tokens * _flops(config.student, config)):
            outcome = arms.train(model, terms, replicas, schedule, config.data, [validation] * sweep.runs)
        best = int(np.argmax(outcome.curve.max(axis=1)))
        chosen = {
            "learning_rate": float(rates[best]),
            "weight_decay": float(decays[best]),
            "steps": int(outcome.steps[best]),
            "validation_exact_match": float(outcome.curve[best].max()),
        }
        params = arms.pick(outcome.params, best)
        _write_curve(folder, sweep.evaluate_every, outcome, best)
        checkpoints.save(sweep.steps, {"params": params}, {"identity": asked, "chosen": chosen})
    return Trained(model, params), chosen


def _write_curve(folder: Path, every: int, outcome: arms.Outcome, best: int) -> None:
    with contextlib.closing(Writer(folder)) as writer:
        for i, (loss, score) in enumerate(zip(outcome.losses[best], outcome.curve[best], strict=True)):
            writer.write("train", (i + 1) * every, {"loss": float(loss)})
            writer.write("eval", (i + 1) * every, {"exact_match": float(score)})


def evaluate_run(
    config: Config,
    run: Path,
    sides: dict[str, Examples],
    teacher: Trained,
    student: Trained,
    baseline: Trained | None = None,
    chosen: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes RUN/evaluation.json and RUN/summary.json; returns the summary."""
    models = {"teacher": teacher, "student": student} | ({"baseline": baseline} if baseline else {})
    test = sides["test"]
    with cost(run / "evaluation", None):
        evaluation = {name: measure.evaluate_model(*trained, config.data, test) for name, trained in models.items()}
        written = measure.write_answers(*teacher, config.data, test)
        heard = test.with_answers(config.data, written).batch(config.data)  # the text on which the two are compared
        said = {name: measures.logits_on(*trained, heard) for name, trained in models.items()}
        for name in models.keys() - {"teacher"}:
            evaluation[name] |= measures.agreement(said[name], said["teacher"], heard.mask)
        on_truth = {name: measures.logits_on(*trained, test.batch(config.data)) for name, trained in models.items()}
        evaluation["soft_targets"] = measure.soft_targets(on_truth, config.data, test)
    if baseline:
        evaluation["baseline"] |= {"labels": config.baseline.labels, "chosen": chosen, "runs": config.baseline.runs}
    evaluation["ledger"] = _ledger(config, run)
    write_json(run / "evaluation.json", evaluation)
    summary = summarize(evaluation)
    write_json(run / "summary.json", summary)
    return summary


def summarize(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The few numbers of summary.json. Gap closed = (student − baseline) / (teacher − baseline) in exact match."""
    keep = ("parameters", "exact_match", "flops_per_token", "latency_seconds", "tokens_per_second", "agreement", "kl")
    names = [name for name in ("teacher", "student", "baseline") if name in evaluation]
    summary: dict[str, Any] = {
        name: {key: evaluation[name][key] for key in keep if key in evaluation[name]} for name in names
    }
    teacher, student = (evaluation[name]["exact_match"] for name in ("teacher", "student"))
    if "baseline" in evaluation:
        alone = evaluation["baseline"]["exact_match"]
        summary["baseline"]["labels"] = evaluation["baseline"]["labels"]
        summary["gap_closed"] = (student - alone) / (teacher - alone) if teacher != alone else None
    summary["agreement"] = evaluation["student"]["agreement"]
    summary["seconds"] = sum(row["seconds"] for row in evaluation["ledger"]["rows"])
    return summary


def _ledger(config: Config, run: Path) -> dict[str, Any]:
    """What every stage cost, teacher and sweep included."""
    return ledger(
        {
            "teacher training": Path(config.teacher_run or run / "teacher"),
            "student distillation": run,
            f"baseline sweep ({config.baseline.runs} runs)": run / "baseline",
            "evaluation": run / "evaluation",
        }
    )


def _flops(recipe: Recipe, config: Config) -> float:
    return recipe.model.flops_per_token(config.data.prompt_length + config.data.answer_length - 1)


def _step_flops(recipe: Recipe, config: Config) -> float:
    tokens = recipe.training.batch_size * (config.data.prompt_length + config.data.answer_length - 1)
    return 3 * tokens * _flops(recipe, config)


def _curve(model: Model, config: Config, test: Examples):
    """Exact match for the learning curve; nothing is chosen by it."""
    return lambda params: {"exact_match": float(measure.is_correct(model, params, config.data, test).mean())}


def open_run(run: Path, best: str | None = None) -> tuple[Config, dict[str, Trained]]:
    """Configuration and trained models (teacher, student, baseline if there is one) of a run folder.

    ``best``: of the student, the checkpoint that is best by this metric.
    """
    config = read_config(run, Config)
    plain = network(config.student)
    models = {"teacher": restore(network(config.teacher), Path(config.teacher_run or run / "teacher"))}
    if config.student_start.plain:
        models["student"] = restore(plain, run, best)
    else:  # what is not in its checkpoint is made again
        begin = started(config, models["teacher"], addition.load(config.data)["train"])
        models["student"] = Trained(plain, begin.plain(restore(begin.model, run, best).params))
    if (run / "baseline" / "checkpoints").is_dir():
        models["baseline"] = restore(plain, run / "baseline")
    return config, models


def evaluate_folder(run: Path) -> dict[str, Any]:
    """``evaluate_run`` of what stands in a run folder."""
    config, models = open_run(run)
    chosen = None
    if "baseline" in models:
        with Checkpoints(run / "baseline") as checkpoints:
            chosen = checkpoints.meta()["chosen"]
    return evaluate_run(config, run, addition.load(config.data), **models, chosen=chosen)


def answer(run: Path, prompts: list[str], best: str | None = None) -> list[dict[str, str]]:
    """What the models of a run folder answer, as rows for a table; ``best`` as for ``open_run``."""
    config = read_config(run, Config)
    operands = [config.data.parse(prompt) for prompt in prompts]
    _, models = open_run(run, best)
    examples = addition.encode(config.data, np.array(operands))
    rows = [{"prompt": f"{a}+{b}=", "truth": str(a + b)} for a, b in operands]
    for name, trained in models.items():
        written = measure.write_answers(*trained, config.data, examples)
        for row, ids in zip(rows, written, strict=True):
            row[name] = config.data.value(TOKENIZER.decode(ids))
    return rows
