"""The arms of the addition protocol, over seeds: what of a student's accuracy is the teacher's doing?

====================  ================================================================================================
teacher               cross-entropy on the labels of the train side; one for each seed, each with a split of its own
alone                 the student on n labels, tuned over learning rate × weight decay × steps on a validation split
same_prompts          distilled on those n prompts, tuned over as many runs on the same split
unlabelled            distilled on all train-side prompts, answers written by the teacher; no label is used
skyline               cross-entropy on all train-side labels
permuted_teacher      control: as unlabelled, the teacher's soft targets dealt to other prompts
independent_teacher   control, for agreement: distilled from another teacher of the same split, compared with the first
====================  ================================================================================================

Test pairs reach neither teacher nor transfer set (asserted). RUN/arms.json grows row by row and is taken up again;
RUN/teachers holds the teachers.
"""

import dataclasses
import functools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from distill.batch import Batch
from distill.checkpoint import lock, refuse_changes, resumed
from distill.config import to_dict, write_json
from distill.data import addition
from distill.data.addition import AdditionConfig, Examples
from distill.evaluation import measures
from distill.experiments.addition import measure
from distill.experiments.addition import replicas as arms
from distill.experiments.addition.config import ProtocolConfig, Recipe
from distill.experiments.addition.measure import network
from distill.experiments.addition.replicas import Replicas, Schedule, pick, stack
from distill.losses import DenseTargets
from distill.models.model import Model
from distill.objective import task_term, terms_of
from distill.shapes import Params


class World(NamedTuple):
    """One seed: its split, its teacher, and an independent teacher of the same split."""

    seed: int
    config: AdditionConfig
    train: Examples
    test: Examples
    teacher: Params
    independent: Params


def run_protocol(
    config: ProtocolConfig,
    run: Path,
    say: Callable[[str], None] = print,
    workers: int = 0,
    set_up: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Trains every arm that is not in RUN/arms.json yet; returns the content of that file.

    Args:
      config: teacher, students, arms, seeds.
      run: the run folder.
      say: prints a line for each row.
      workers: processes that share the rows between them; 0: this one trains them all.
      set_up: called first in each worker, such as ``cli.set_up_jax``.
    """
    with lock(run):
        results = _open_results(config, run)
        worlds = make_worlds(config, run, results)
        done = {(row["student"], row["arm"], row["labels"]) for row in results["rows"]}
        asked = [(name, *arm) for name in config.students for arm in _arms_of(config)]
        for row in _rows(config, worlds, [one for one in asked if one not in done], workers, set_up):
            results["rows"].append(row)
            close_gaps(results, config)
            write_json(run / "arms.json", results)
            what = f"{row['student']:>5} {row['arm']:<20} n={row['labels'] or '-':<5}"
            say(f"{what} mean {row['mean']:.4f} worst {row['worst']:.4f}")
    return results


def _rows(
    config: ProtocolConfig, worlds: list[World], missing: list[tuple], workers: int, set_up: Callable[[], None] | None
) -> Iterator[dict[str, Any]]:
    """``run_arm`` of each, in their order."""
    if not workers or not missing:
        yield from (run_arm(config, worlds, *one) for one in missing)
        return
    one = functools.partial(run_arm, config, jax.device_get(worlds))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=set_up) as pool:
        yield from pool.map(one, *zip(*missing, strict=True))


def _arms_of(config: ProtocolConfig) -> list[tuple[str, int | None]]:
    tuned = [(arm, labels) for labels in config.labels for arm in ("alone", "same_prompts")]
    return tuned + [(arm, None) for arm in ("unlabelled", "skyline", "permuted_teacher", "independent_teacher")]


def _open_results(config: ProtocolConfig, run: Path) -> dict[str, Any]:
    asked, file = to_dict(config), run / "arms.json"
    results = json.loads(file.read_text()) if file.exists() else {"config": asked, "rows": []}
    refuse_changes(run, results["config"], asked)
    write_json(run / "config.json", asked | {"kind": "addition", "name": run.name})
    return results


def make_worlds(config: ProtocolConfig, run: Path, results: dict[str, Any]) -> list[World]:
    """Splits and two teachers for every seed; teachers are read from RUN/teachers where they are trained."""
    model, training = network(config.teacher.model), config.teacher.training
    splits = [dataclasses.replace(config.data, split_seed=seed) for seed in range(config.seeds)]
    sides = [{side: addition.encode(split, rows) for side, rows in addition.pairs(split).items()} for split in splits]
    for split, world in zip(splits, sides, strict=True):
        addition.assert_disjoint(split, world["train"], world["test"])
    shape = jax.eval_shape(model.init, jax.random.key(0))
    twice = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2 * config.seeds, *leaf.shape), leaf.dtype), shape)
    with resumed(run / "teachers") as checkpoints:
        if checkpoints.latest is None:
            wall, cpu = time.perf_counter(), time.process_time()
            replicas = _replicas([world["train"].batch(config.data) for world in sides] * 2, config.teacher, start=1000)
            schedule = Schedule(training.steps, training.batch_size, training.evaluate_every, training.optimizer)
            params = arms.train(model, [task_term()], replicas, schedule, config.data).params
            checkpoints.save(training.steps, {"params": params}, {"seeds": config.seeds})
            spent = {"seconds_spent": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
            scores = [_score(model, pick(params, s), config.data, sides[s]["test"]) for s in range(config.seeds)]
            results["teacher"] = {"parameters": model.parameter_count(), "seeds": scores} | spent
            write_json(run / "arms.json", results)
        else:
            params = checkpoints.params(twice)
    return [
        World(s, splits[s], sides[s]["train"], sides[s]["test"], pick(params, s), pick(params, config.seeds + s))
        for s in range(config.seeds)
    ]


def _replicas(examples: list[Batch], recipe: Recipe, start: int = 0) -> Replicas:
    optimizer, count = recipe.training.optimizer, len(examples)
    rates, decays = np.full(count, optimizer.learning_rate), np.full(count, optimizer.weight_decay)
    return Replicas(stack(examples), np.arange(start, start + count), rates, decays)


def _score(model: Model, params: Params, config: AdditionConfig, test: Examples) -> float:
    return float(measure.is_correct(model, params, config, test).mean())


def run_arm(config: ProtocolConfig, worlds: list[World], student: str, arm: str, labels: int | None) -> dict[str, Any]:
    """One arm of one student over all seeds: its row."""
    wall, cpu = time.perf_counter(), time.process_time()
    recipe = config.students[student]
    model, teacher = network(recipe.model), network(config.teacher.model)
    tuned = labels is not None
    train = _train_tuned if tuned else _train_untuned
    params, chosen = train(config, recipe, worlds, arm, labels)
    row: dict[str, Any] = {"student": student, "arm": arm, "labels": labels}
    row |= {"parameters": model.parameter_count(), "runs": config.seeds}
    if tuned:
        row |= {"runs": config.seeds * config.sweep.runs, "chosen": chosen}
    scores = [_score(model, params[w.seed], config.data, w.test) for w in worlds]
    said = [_compare(model, params[w.seed], teacher, config.data, w) for w in worlds]
    spent = {"seconds_spent": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    means = {key: float(np.mean([pair[key] for pair in said])) for key in ("agreement", "kl")}
    worst = {"worst_agreement": min(pair["agreement"] for pair in said)}
    return (
        row
        | {"seeds": scores}
        | statistics(scores)
        | means
        | worst
        | spent
        | {"flops": _flops(config, recipe, tuned, labels)}
    )


def transfer(teacher: Model, params: Params, config: AdditionConfig, prompts: Examples) -> Batch:
    """Prompts with the teacher's answers and its logits on them."""
    batch = prompts.with_answers(config, measure.write_answers(teacher, params, config, prompts)).batch(config)
    return batch._replace(targets=DenseTargets(measures.logits_on(teacher, params, batch)))


def _train_untuned(config: ProtocolConfig, recipe: Recipe, worlds: list[World], arm: str, _: None):
    model, teacher = network(recipe.model), network(config.teacher.model)

    def examples(world: World) -> Batch:
        if arm == "skyline":
            return world.train.batch(config.data)
        source = world.independent if arm == "independent_teacher" else world.teacher
        batch = transfer(teacher, source, config.data, world.train)
        if arm == "permuted_teacher":
            order = np.random.default_rng([world.seed, 2]).permutation(len(batch.inputs))
            batch = batch._replace(targets=DenseTargets(batch.targets.logits[order]))
        return batch

    terms = [task_term()] if arm == "skyline" else terms_of(config.unlabelled)
    training = recipe.training
    schedule = Schedule(training.steps, training.batch_size, training.evaluate_every, training.optimizer)
    replicas = _replicas([examples(world) for world in worlds], recipe)
    params = arms.train(model, terms, replicas, schedule, config.data).params
    return [pick(params, world.seed) for world in worlds], None


def _train_tuned(config: ProtocolConfig, recipe: Recipe, worlds: list[World], arm: str, labels: int):
    model, teacher = network(recipe.model), network(config.teacher.model)
    sweep, examples, validation = config.sweep, [], []
    for world in worlds:
        order = np.random.default_rng([world.seed, 1]).permutation(len(world.train.tokens))
        few = world.train.take(order[:labels])
        batch = few.batch(config.data)
        if arm == "same_prompts":
            batch = batch._replace(targets=DenseTargets(measures.logits_on(teacher, world.teacher, batch)))
        examples += [batch] * sweep.runs
        validation += [world.train.take(order[max(config.labels) :][: sweep.validation])] * sweep.runs
    rates, decays = arms.grid(sweep.learning_rates, sweep.weight_decays)
    seeds = np.repeat([world.seed for world in worlds], sweep.runs)
    replicas = Replicas(stack(examples), seeds, np.tile(rates, len(worlds)), np.tile(decays, len(worlds)))
    schedule = Schedule(sweep.steps, sweep.batch_size, sweep.evaluate_every, recipe.training.optimizer)
    terms = [task_term()] if arm == "alone" else terms_of(config.same_prompts)
    outcome = arms.train(model, terms, replicas, schedule, config.data, validation)
    best = outcome.curve.max(axis=1).reshape(len(worlds), sweep.runs).argmax(axis=1)
    index = best + sweep.runs * np.arange(len(worlds))
    chosen = [
        {"learning_rate": float(rates[b]), "weight_decay": float(decays[b]), "steps": int(outcome.steps[i])}
        for b, i in zip(best, index, strict=True)
    ]
    return [pick(outcome.params, i) for i in index], chosen


def _compare(model: Model, params: Params, teacher: Model, config: AdditionConfig, world: World) -> dict[str, float]:
    written = measure.write_answers(teacher, world.teacher, config, world.test)
    heard = world.test.with_answers(config, written).batch(config)
    logits = measures.logits_on(model, params, heard)
    return measures.agreement(logits, measures.logits_on(teacher, world.teacher, heard), heard.mask)


def statistics(scores: list[float]) -> dict[str, Any]:
    """Mean, 95 % interval of the mean (Student's t), worst seed.

    Example:
      >>> statistics([1.0, 1.0])
      {'mean': 1.0, 'interval': [1.0, 1.0], 'worst': 1.0}
    """
    from scipy.stats import t

    mean = float(np.mean(scores))
    half = float(t.ppf(0.975, len(scores) - 1) * np.std(scores, ddof=1) / np.sqrt(len(scores)))
    return {"mean": mean, "interval": [mean - half, mean + half], "worst": float(min(scores))}


def close_gaps(results: dict[str, Any], config: ProtocolConfig) -> None:
    """Writes ``gap_closed`` = (arm − alone) / (teacher − alone), of means, into every row that has its ``alone``.

    An arm with n labels is held against ``alone`` with n; one without labels against the fewest, and
    ``gap_closed_by_labels`` has it against each.
    """
    teacher = float(np.mean(results["teacher"]["seeds"]))
    rows = results["rows"]
    for row in rows:
        alone = {r["labels"]: r["mean"] for r in rows if r["arm"] == "alone" and r["student"] == row["student"]}
        gaps = {str(n): (row["mean"] - a) / (teacher - a) for n, a in alone.items() if teacher > a}
        row["gap_closed"] = None if row["arm"] == "alone" else gaps.get(str(row["labels"] or min(config.labels)))
        if row["labels"] is None:
            row["gap_closed_by_labels"] = gaps
    tuned = [row for row in rows if row["labels"] is not None]
    results["sweep"] = {key: sum(row[key] for row in tuned) for key in ("runs", "cpu_seconds")}


def _flops(config: ProtocolConfig, recipe: Recipe, tuned: bool, labels: int | None) -> float:
    length = config.data.prompt_length + config.data.answer_length - 1
    sweep, training = config.sweep, recipe.training
    if tuned:
        steps, batch, runs = sweep.steps, sweep.batch_size, config.seeds * sweep.runs
    else:
        steps, batch, runs = training.steps, training.batch_size, config.seeds
    return 3.0 * runs * steps * batch * length * recipe.model.flops_per_token(length)
