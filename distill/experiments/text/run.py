"""Text: a student distilled from a published teacher, and the same student by cross-entropy alone (``runner.py``).

    RUN/                the student, distilled from the live teacher
    RUN/equal_tokens/   the same student by cross-entropy: same start, same batches, same schedule
    RUN/equal_time/     likewise, for as many seconds of training as distilling took

Seconds of training are steps · the median time of a step: compiling, evaluating and saving are left out, and a single
slow step does not count.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill.data import prepared
from distill.devices.speed import flops_per_token
from distill.errors import UserError
from distill.evaluation import measures
from distill.experiments.folder import Trained, identity
from distill.experiments.learner import first_params, learner
from distill.experiments.preflight import Side
from distill.experiments.runner import Arm, Look, Work
from distill.experiments.text.config import TextConfig
from distill.experiments.text.equal_time import equal_steps, training_of
from distill.experiments.text.world import World
from distill.experiments.text.world import prepare as prepare  # part of what every kind has (runner.py)
from distill.features import without_projectors
from distill.models.model import Model
from distill.objective import router_terms, task_term
from distill.reports import text as page
from distill.shapes import Params
from distill.teacher.signal import signal
from distill.train import Evaluate, Task
from distill.training import TrainingConfig

CONFIG = TextConfig
PREFLIGHT_TOKENS = 256
"""Of a held-out row, in preflight, where logits of the whole vocabulary are alive at once."""
NAMES = {name: title for name, (title, *_) in page.NAMES.items()}
COLUMNS = page.COLUMNS


def arms(world: World, trained: dict[str, Trained]) -> Iterator[Arm]:
    """The distilled student, then those by cross-entropy."""
    del trained  # no arm starts from another
    student = _arm(world, "student", "distillation", functools.partial(distillation, world))
    yield dataclasses.replace(student, export=lambda student: (*student, world.tokenizer))
    for name in world.config.arms:
        yield _arm(world, name, NAMES[name], functools.partial(cross_entropy, world, name))


def _arm(world: World, name: str, title: str, work: Callable[[], Work]) -> Arm:
    def plain(learnt: Params) -> Params:
        return world.begin.plain(without_projectors(learnt))

    folder = _folder(world, name)
    return Arm(name, title, folder, learns=world.begin.model, work=work, model=world.student, plain=plain)


def _folder(world: World, name: str) -> Path:
    return world.run if name == "student" else world.run / name


def distillation(world: World) -> Work:
    """Task of the distilled student: the soft targets of the teacher."""
    config, begin, teacher = world.config, world.begin, world.teacher
    model, terms = learner(config.objective, begin.model, teacher.model)
    given = signal(
        config.signal, *teacher, world.train, temperature=config.objective.temperature, seed=config.training.seed
    )
    task = Task(
        student=model,
        terms=terms,
        reduction=config.objective.reduction,
        examples=given.examples,
        teacher=given.teacher,
        teacher_params=given.params,
        params=first_params(model, begin.params, world.key),
        base_params=begin.base,
        evaluate=_curve(world),
        identity=_identity(world, config.training, "objective", "signal", "teacher_dtype"),
    )

    def look() -> Look:
        row = jax.tree.map(lambda field: jnp.asarray(field[:1, :PREFLIGHT_TOKENS]), world.heldout.batch)
        return Look(Side(world.student, world.first, world.tokenizer), Side(*teacher, world.tokenizer), row)

    flops = _tokens(config.training, config) * flops_per_token(begin.model, given.teacher, config.data.length)
    if config.signal.kind == "stored":  # the teacher has read every row once
        flops += given.examples.inputs.size * teacher.model.config.flops_per_token(config.data.length)
    return Work(flops, task, config.training, look, plan=True)


def cross_entropy(world: World, name: str) -> Work:
    """Task of the student without a teacher: the same text, from the same start."""
    config, begin, training = world.config, world.begin, world.config.training
    if name == "equal_time":
        training = dataclasses.replace(training, steps=equal_steps(config, world.run))
    task = Task(
        student=begin.model,
        terms=[task_term(), *router_terms(begin.model, config.objective.router_weight)],
        reduction=config.objective.reduction,
        examples=world.train,
        params=begin.params,
        base_params=begin.base,
        evaluate=_curve(world),
        identity=_identity(world, training),
    )
    flops = _tokens(training, config) * flops_per_token(begin.model, None, config.data.length)
    return Work(flops, task, training)


def _identity(world: World, training: TrainingConfig, *parts: str) -> dict[str, Any]:
    named = identity(world.config, "teacher", "data", "student", "activations", *parts, **world.fingerprints)
    return named | identity(dataclasses.replace(world.config, training=training), "training")


def _curve(world: World) -> Evaluate:
    """Held-out measures for the learning curve, from all of the student's parameters."""
    rows = world.config.curve_rows
    return lambda whole: world.heldout.measure(world.begin.model, without_projectors(whole), rows)


def _tokens(training: TrainingConfig, config: TextConfig) -> int:
    return training.steps * training.batch_size * config.data.length


# ---- evaluation


def evaluate(world: World, trained: dict[str, Trained]) -> dict[str, Any]:
    """Every arm, the untrained start and the teacher on the same held-out text."""
    teacher, length = world.teacher, world.config.data.length
    evaluation: dict[str, Any] = {"teacher": world.heldout.of_teacher()}
    evaluation["teacher"] |= _sizes(teacher.model, length) | _written(world, *teacher)
    for name, (model, params) in (trained | {"start": Trained(world.student, world.first)}).items():
        evaluation[name] = world.heldout.measure(model, params) | _sizes(model, length)
        evaluation[name] |= _written(world, model, params)
        if name in trained:
            evaluation[name] |= training_of(_folder(world, name))
    evaluation["heldout"] = {"rows": len(world.heldout.batch.inputs), "tokens": world.heldout.tokens}
    evaluation["prompts"] = [world.tokenizer.decode(row) for row in world.prompts]
    packed = prepared.summaries(world.config.data, world.tokenizer, world.config.data_dir)
    evaluation["text"] = {side: dataclasses.asdict(summary) for side, summary in packed.items()}
    evaluation["verdict"] = verdict(evaluation)
    return evaluation


def _sizes(model: Model, length: int) -> dict[str, float]:
    return {"parameters": model.parameter_count(), "flops_per_token": model.config.flops_per_token(length)}


def _written(world: World, model: Model, params: Params) -> dict[str, Any]:
    """Continuations of the prompts by a model, and how many tokens a second it writes."""
    written = _continued(world, model, params, world.prompts)
    start = time.perf_counter()
    _continued(world, model, params, world.prompts)
    seconds = time.perf_counter() - start
    texts = [world.tokenizer.decode(row) for row in written]
    count = measures.count_written(written, world.tokenizer.stop_ids)
    return {"written": texts, "tokens_per_second": count / seconds}


def _continued(world: World, model: Model, params: Params, prompts: np.ndarray) -> np.ndarray:
    """``[B, new_tokens]`` ids a model writes greedily after prompts ``[B, L]``."""
    stops, pad = world.tokenizer.stop_ids, world.tokenizer.eos_id
    return measures.continued(model, params, prompts, world.config.new_tokens, eos_ids=stops, pad_id=pad)


def verdict(evaluation: dict[str, Any]) -> list[str]:
    """Distilled beside cross-entropy, a line for each arm: by how many nats it is better, or worse.

    Example:
      >>> verdict({"student": {"kl": 1.0, "nll": 3.0}, "equal_time": {"kl": 1.5, "nll": 2.9}})
      ['distilled, at equal time: KL to the teacher 0.5000 better, nats per token 0.1000 worse: not better on both']
    """
    lines = []
    for arm in ("equal_tokens", "equal_time"):
        if arm in evaluation:
            gains = [evaluation[arm][key] - evaluation["student"][key] for key in ("kl", "nll")]
            kl, nll = (f"{abs(gain):.4f} {'better' if gain > 0 else 'worse'}" for gain in gains)
            both = "better on both" if min(gains) > 0 else "not better on both"
            lines.append(f"distilled, at {arm.replace('_', ' ')}: KL to the teacher {kl}, nats per token {nll}: {both}")
    steps = [evaluation.get(arm, {}).get("steps") for arm in ("equal_tokens", "equal_time")]
    if steps[0] is not None and steps[0] == steps[1]:
        lines.append(f"equal time is equal tokens here: {steps[0]} steps of cross-entropy take as long as distilling")
    return lines


def summarize(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The few numbers of summary.json."""
    keep = [key for key, _ in COLUMNS.values()]
    names = [name for name in NAMES if name in evaluation]
    rows = {name: {key: evaluation[name][key] for key in keep if key in evaluation[name]} for name in names}
    seconds = sum(row["seconds"] for row in evaluation["ledger"]["rows"])
    agreement = evaluation["student"]["agreement"]
    return rows | {"agreement": agreement, "verdict": evaluation["verdict"], "seconds": seconds}


def write(world: World, trained: dict[str, Trained], prompts: list[str]) -> list[dict[str, str]]:
    """Continuations of each prompt by teacher and student."""
    rows = []
    for prompt in prompts:
        ids = np.asarray([[*world.tokenizer.start, *world.tokenizer.encode(prompt)]], np.int32)
        if not ids.size:
            raise UserError("an empty prompt; expected some text to go on with.")
        row = {"prompt": prompt}
        for name, one in (("teacher", world.teacher), ("student", trained["student"])):
            row[name] = world.tokenizer.decode(_continued(world, *one, ids)[0])
        rows.append(row)
    return rows


def notes(summary: dict[str, Any]) -> list[str]:
    """Distilled beside cross-entropy."""
    return summary["verdict"]
