"""The student alone on a few labels: a sweep over learning rate, weight decay and steps, chosen by validation."""

import contextlib
from pathlib import Path

import jax
import numpy as np

from distill.checkpoint import lock, refuse_changes, resumed
from distill.config import to_dict
from distill.data.addition import Examples
from distill.errors import UserError
from distill.experiments.addition import replicas as arms
from distill.experiments.addition.config import Config
from distill.experiments.addition.measure import identity_of, network, row_flops
from distill.metrics import Writer
from distill.objective import router_terms, task_term
from distill.shapes import Params


def labelled(config: Config, train: Examples, seed: int) -> tuple[Examples, Examples]:
    """The few labelled examples of the baseline and those it is tuned by: disjoint, drawn from the train side.

    Raises:
      UserError: more than there are.
    """
    count, validation = config.baseline.labels, config.baseline.validation
    if count + validation > len(train.tokens):
        raise UserError(
            f"baseline: labels={count} and validation={validation} ask for more than the {len(train.tokens)} examples."
        )
    order = np.random.default_rng([seed, 1]).permutation(len(train.tokens))
    return train.take(order[:count]), train.take(order[count : count + validation])


def flops(config: Config) -> float:
    """FLOPs of the sweep."""
    sweep = config.baseline
    return 3 * sweep.runs * sweep.steps * sweep.batch_size * row_flops(config.student.model, config.data)


def learn(config: Config, folder: Path, train: Examples) -> Params:
    """The best of the sweep, trained or read from its folder; its checkpoint says what was chosen."""
    model, sweep, seed = network(config.student.model), config.baseline, config.student.training.seed
    of_student = {"model": to_dict(config)["student"]["model"], "seed": seed}
    asked = identity_of(config, "data", "baseline", **of_student)
    with lock(folder), resumed(folder) as checkpoints:
        if checkpoints.latest is not None:
            refuse_changes(folder, checkpoints.meta()["identity"], asked)
            return checkpoints.params(jax.eval_shape(model.init, jax.random.key(0)))
        few, validation = labelled(config, train, seed)
        rates, decays = arms.grid(sweep.learning_rates, sweep.weight_decays)
        examples = arms.stack([few.batch(config.data)] * sweep.runs)
        replicas = arms.Replicas(examples, np.full(sweep.runs, seed), rates, decays)
        schedule = arms.Schedule(sweep.steps, sweep.batch_size, sweep.evaluate_every, config.student.training.optimizer)
        terms = [task_term(), *router_terms(model)]
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
    return params


def _write_curve(folder: Path, every: int, outcome: arms.Outcome, best: int) -> None:
    with contextlib.closing(Writer(folder)) as writer:
        for i, (loss, score) in enumerate(zip(outcome.losses[best], outcome.curve[best], strict=True)):
            writer.write("train", (i + 1) * every, {"loss": float(loss)})
            writer.write("eval", (i + 1) * every, {"exact_match": float(score)})
