"""Addition: teacher, student distilled from it, the same student alone, and their comparison (``runner.py``).

    RUN/teacher/     a model trained on the labels of the train side
    RUN/             the student, distilled on the train-side prompts
    RUN/baseline/    the student alone on a few labels, the best of a sweep

``replicas.py`` trains many small models side by side, ``protocol.py`` compares more arms over seeds.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill import parallel
from distill.checkpoint import Checkpoints
from distill.data import addition
from distill.data.addition import TOKENIZER, Examples
from distill.evaluation import measures
from distill.experiments import fingerprints
from distill.experiments.addition import baseline, measure, student
from distill.experiments.addition.config import Config, Recipe
from distill.experiments.addition.measure import network
from distill.experiments.folder import Trained, restore
from distill.experiments.learner import first_params, learner
from distill.experiments.preflight import Side
from distill.experiments.runner import Arm, Look, Work
from distill.features import without_projectors
from distill.models.model import Model
from distill.objective import router_terms, task_term
from distill.shapes import Params
from distill.students.start import Start, outline
from distill.teacher.signal import signal
from distill.train import Evaluate, Task
from distill.vocab import align

CONFIG = Config
PREFLIGHT_ROWS = 64
"""Additions on which teacher and student are compared before the first step."""


class World(NamedTuple):
    """Everything that the arms share."""

    config: Config
    run: Path
    sides: dict[str, Examples]


def prepare(config: Config, run: Path) -> World:
    """The additions; refuses too many labels, and networks that cannot be compared."""
    sides = addition.load(config.data)
    addition.assert_disjoint(config.data, sides["train"], sides["test"])
    sides |= addition.split_heldout(config.data, sides["test"])
    baseline.labelled(config, sides["train"], 0)
    teacher = network(config.teacher.model)
    learner(config.objective, outline(teacher, config.student.model, config.student_start), teacher)
    align(TOKENIZER.ids(), TOKENIZER.ids(), config.student.model.vocab_size, config.teacher.model.vocab_size)
    return World(config, run, sides)


def arms(world: World, trained: dict[str, Trained]) -> Iterator[Arm]:
    """Teacher, student, baseline."""
    config, run = world.config, world.run
    if config.teacher_run is None:
        yield alone(world, config.teacher, run / "teacher", "teacher")
    else:
        folder, model = Path(config.teacher_run), network(config.teacher.model)
        read = Work(None, learn=lambda: parallel.everywhere(restore(model, folder).params, config.parallel))
        yield Arm("teacher", "teacher training", folder, learns=model, work=lambda: read, model=model)
    yield student_arm(world, trained["teacher"])
    title, folder = f"baseline sweep ({config.baseline.runs} runs)", run / "baseline"
    model = network(config.student.model)
    learn = functools.partial(baseline.learn, config, folder, world.sides["train"])
    sweep = Work(baseline.flops(config), learn=learn)
    yield Arm("baseline", title, folder, learns=model, work=lambda: sweep, model=model)


def alone(world: World, recipe: Recipe, folder: Path, role: str) -> Arm:
    """A model on the true answers of the whole train side: a teacher, or a student without one."""
    config, model = world.config, network(recipe.model)

    def work() -> Work:
        task = Task(
            student=model,
            terms=[task_term(), *router_terms(model)],
            examples=world.sides["train"].batch(config.data),
            evaluate=_curve(model, world),
            identity=measure.identity_of(config, "data", role),
        )
        return Work(student.training_flops(model, recipe.training, config), task, recipe.training)

    return Arm(role, f"{role} training", folder, learns=model, work=work, model=model)


def student_arm(world: World, teacher: Trained) -> Arm:
    """The student, from the teacher's soft targets on the transfer set."""
    config, model = world.config, network(world.config.student.model)
    begin = functools.cache(lambda: student.started(config, teacher, world.sides["train"]))
    outlined = outline(teacher.model, config.student.model, config.student_start)

    def plain(learnt: Params) -> Params:
        learnt = without_projectors(learnt)
        # What is not in the checkpoint of such a student is made again.
        return learnt if config.student_start.plain else begin().plain(learnt)

    work = functools.partial(distillation, world, teacher, begin)
    student_of = {"learns": outlined, "model": model, "plain": plain, "export": tuple}
    return Arm("student", "student distillation", world.run, work=work, **student_of)


def distillation(world: World, teacher: Trained, begin: Callable[[], Start]) -> Work:
    """Task of the student; ``begin()`` is its ``Start``."""
    config, sides, training = world.config, world.sides, world.config.student.training
    key, stored = jax.random.key(training.seed), config.signal.kind == "stored"
    model, terms = learner(config.objective, begin().model, teacher.model)
    examples = student.transfer_set(config, sides, teacher).batch(config.data)
    reads = len(examples.inputs) if stored else training.steps * training.batch_size
    flops = student.training_flops(begin().model, training, config)
    flops += reads * measure.row_flops(config.teacher.model, config.data)
    given = signal(config.signal, *teacher, examples, temperature=config.objective.temperature, seed=training.seed)
    parts = ("data", "student", "objective", "answers", "signal", "student_start")
    task = Task(
        student=model,
        terms=terms,
        reduction=config.objective.reduction,
        examples=given.examples,
        teacher=given.teacher,
        teacher_params=given.params,
        params=first_params(model, begin().params, key),
        base_params=begin().base,
        evaluate=_curve(model, world),
        identity=measure.identity_of(config, *parts, teacher_weights=fingerprints.of_tree(teacher.params)),
    )

    def look() -> Look:
        few = jax.tree.map(jnp.asarray, sides["validation"].take(slice(PREFLIGHT_ROWS)).batch(config.data))
        first = Side(begin().model, begin().whole(begin().learnt(key)), TOKENIZER)
        return Look(first, Side(*teacher, TOKENIZER), few)

    return Work(flops, task, training, look)


def _curve(model: Model, world: World) -> Evaluate:
    """Exact match on the validation side, for the learning curve and the choice of a checkpoint."""
    data, validation = world.config.data, world.sides["validation"]
    return lambda params: {"exact_match": float(measure.is_correct(model, params, data, validation).mean())}


def evaluate(world: World, trained: dict[str, Trained]) -> dict[str, Any]:
    """Every model on additions nobody trained on, and student and baseline beside the teacher."""
    config, test = world.config, world.sides["test"]
    evaluation = {name: measure.evaluate_model(*one, config.data, test) for name, one in trained.items()}
    written = measure.write_answers(*trained["teacher"], config.data, test)
    heard = test.with_answers(config.data, written).batch(config.data)  # the text on which the two are compared
    logits = {name: measures.logits_on(*one, heard) for name, one in trained.items()}
    for name in trained.keys() - {"teacher"}:
        evaluation[name] |= measures.agreement(logits[name], logits["teacher"], heard.mask)
    on_truth = {name: measures.logits_on(*one, test.batch(config.data)) for name, one in trained.items()}
    evaluation["soft_targets"] = measure.soft_targets(on_truth, config.data, test)
    if "baseline" in trained:
        with Checkpoints(world.run / "baseline") as checkpoints:
            chosen = checkpoints.meta()["chosen"]
        evaluation["baseline"] |= {"labels": config.baseline.labels, "chosen": chosen, "runs": config.baseline.runs}
    return evaluation


def summarize(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The few numbers of summary.json. Gap closed = (student − baseline) / (teacher − baseline) in exact match."""
    keep = ("parameters", "exact_match", "flops_per_token", "latency_seconds", "tokens_per_second", "agreement", "kl")
    names = [name for name in NAMES if name in evaluation]
    summary: dict[str, Any] = {
        name: {key: evaluation[name][key] for key in keep if key in evaluation[name]} for name in names
    }
    best, distilled = (evaluation[name]["exact_match"] for name in ("teacher", "student"))
    if "baseline" in evaluation:
        without = evaluation["baseline"]["exact_match"]
        summary["baseline"]["labels"] = evaluation["baseline"]["labels"]
        summary["gap_closed"] = (distilled - without) / (best - without) if best != without else None
    summary["agreement"] = evaluation["student"]["agreement"]
    summary["seconds"] = sum(row["seconds"] for row in evaluation["ledger"]["rows"])
    return summary


def write(world: World, trained: dict[str, Trained], prompts: list[str]) -> list[dict[str, str]]:
    """Additions with their true sums and the sums that the models write."""
    data = world.config.data
    operands = [data.parse(prompt) for prompt in prompts]
    examples = addition.encode(data, np.array(operands))
    rows = [{"prompt": f"{a}+{b}=", "truth": str(a + b)} for a, b in operands]
    for name, one in trained.items():
        for row, ids in zip(rows, measure.write_answers(*one, data, examples), strict=True):
            row[name] = data.value(TOKENIZER.decode(ids))
    return rows


NAMES = {"teacher": "teacher", "student": "student", "baseline": "baseline (alone, {labels} labels)"}
COLUMNS = {
    "parameters": ("parameters", ","),
    "exact match": ("exact_match", ".2%"),
    "agreement": ("agreement", ".2%"),
    "FLOPs/token": ("flops_per_token", ",.0f"),
    "answer alone": ("latency_seconds", lambda seconds: f"{seconds * 1e3:.2f} ms"),
    "tokens/s": ("tokens_per_second", ",.0f"),
}


def notes(summary: dict[str, Any]) -> list[str]:
    """Size of the student, and the share of the gap that it closes."""
    ratio = summary["teacher"]["parameters"] / summary["student"]["parameters"]
    gap = summary.get("gap_closed")
    closed = "" if gap is None else f", gap closed {gap:.1%}"
    return [f"student {ratio:.1f}x smaller{closed}, {summary['seconds']:.0f} s of computing"]
