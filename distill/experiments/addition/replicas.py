"""Many small trainings in one program: the pure step of every (seed, learning rate, weight decay), a replica each.

Used to tune a student alone, and to run the arms of the addition protocol over seeds (``configs/addition_arms.py``).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill.batch import Batch
from distill.data.addition import TOKENIZER, AdditionConfig, Examples
from distill.data.loader import rows_of
from distill.devices import backend
from distill.generation import sampler
from distill.models.model import Model
from distill.objective import Term
from distill.optim import OptimizerConfig, optimizer
from distill.parallel import scan_steps
from distill.shapes import Array, Params
from distill.state import init_state
from distill.step import make_train_step


class Replicas(NamedTuple):
    """R trainings that differ in weights, data and hyperparameters, not in shape."""

    examples: Batch
    """``[R, n, L]``: each its own data."""
    seeds: np.ndarray
    """``[R]``: of the initial weights."""
    learning_rates: np.ndarray
    weight_decays: np.ndarray


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Settings that all replicas share."""

    steps: int
    batch_size: int
    evaluate_every: int
    optimizer: OptimizerConfig = OptimizerConfig()
    data_seed: int = 0


class Outcome(NamedTuple):
    """Results of R trainings."""

    params: Params
    """``[R, …]``: of the best point if there was a validation set, else of the end."""
    curve: np.ndarray
    """``[R, evaluations]`` exact match (validation); NaN without one."""
    steps: np.ndarray
    """``[R]``: the step these parameters are from."""
    losses: np.ndarray
    """``[R, evaluations]``: mean loss since the evaluation before."""


def stack(batches: Sequence[Batch]) -> Batch:
    """Batches of equal shape along a new leading axis."""
    return jax.tree.map(lambda *fields: np.stack(fields), *batches)


def each(function: Callable, shared: int = 0) -> Callable:
    """``function`` of every replica: all arguments but the last ``shared`` have a leading axis of replicas.

    Under ``vmap`` on accelerators, which one small replica leaves idle; one after the other on CPUs, which need less
    time for it: a cache holds one replica, and products are not batched.
    """

    def mapped(*arguments):
        split = len(arguments) - shared
        if backend.loop_replicas():
            return jax.lax.map(lambda own: function(*own, *arguments[split:]), arguments[:split])
        return jax.vmap(function, in_axes=(0,) * split + (None,) * shared)(*arguments)

    return mapped


def exact_match(model: Model, config: AdditionConfig):
    """A compiled ``(params [R, …], prompts [R, n, …], answers [R, n, …]) -> [R]`` exact match, greedy."""

    def one(params: Params, prompts: Array, answers: Array) -> Array:
        ids = {"eos_ids": TOKENIZER.stop_ids, "pad_id": TOKENIZER.pad_id}
        written = sampler.greedy(model, params, prompts, max_new_tokens=config.answer_length, **ids)
        return jnp.mean(jnp.all(written == answers, axis=1), dtype=jnp.float32)

    return jax.jit(each(one))


def train(
    student: Model,
    terms: Sequence[Term],
    replicas: Replicas,
    schedule: Schedule,
    config: AdditionConfig,
    validation: Sequence[Examples] | None = None,
) -> Outcome:
    """Trains R replicas side by side.

    With ``validation`` (R sets) each replica keeps the parameters of its best evaluation, the later on a tie: the
    number of steps is then one more thing chosen on the validation set.
    """

    def update_of(learning_rate: Array, weight_decay: Array):
        rates = {"learning_rate": learning_rate, "weight_decay": weight_decay}
        return optimizer(schedule.optimizer, schedule.steps, **rates)

    def start(seed: Array, learning_rate: Array, weight_decay: Array):
        return init_state(student.init(jax.random.key(seed)), update_of(learning_rate, weight_decay))

    def advance(state, learning_rate: Array, weight_decay: Array, examples: Batch, rows: Array):
        step = make_train_step(student, terms, update_of(learning_rate, weight_decay))
        state, metrics = scan_steps(step)(state, None, examples, rows)
        return state, jnp.mean(metrics["loss"][0] / metrics["loss"][1])

    rates = jnp.asarray(replicas.learning_rates, jnp.float32), jnp.asarray(replicas.weight_decays, jnp.float32)
    state = jax.jit(each(start))(jnp.asarray(replicas.seeds), *rates)
    advance_all = jax.jit(each(advance, shared=1), donate_argnums=0, compiler_options=backend.compiler_options())
    examples = jax.device_put(replicas.examples)
    indices = functools.partial(
        rows_of, examples.inputs.shape[1], schedule.batch_size, schedule.data_seed, count=schedule.evaluate_every
    )
    judge = None if validation is None else _judge(student, config, validation)
    best, curve, losses = None, [], []
    for first in range(0, schedule.steps, schedule.evaluate_every):
        state, loss = advance_all(state, *rates, examples, jnp.asarray(indices(first=first)))
        losses.append(np.asarray(loss))
        score = np.full(len(replicas.seeds), np.nan) if judge is None else np.asarray(judge(state.params))
        curve.append(score)
        best = _keep_best(best, state.params, score, first + schedule.evaluate_every)
    if not np.isfinite(losses[-1]).all():
        raise FloatingPointError(
            f"replicas {np.flatnonzero(~np.isfinite(losses[-1])).tolist()}: the loss is not finite."
        )
    return Outcome(best[0], np.stack(curve, axis=1), best[2], np.stack(losses, axis=1))


def _judge(student: Model, config: AdditionConfig, validation: Sequence[Examples]):
    prompts = jnp.stack([jnp.asarray(examples.prompts(config)) for examples in validation])
    answers = jnp.stack([jnp.asarray(examples.answers(config)) for examples in validation])
    score = exact_match(student, config)
    return lambda params: score(params, prompts, answers)


def _keep_best(best, params: Params, score: np.ndarray, step: int):
    steps = np.full(len(score), step)
    if best is None:
        return jax.tree.map(jnp.copy, params), score, steps
    better = np.isnan(score) | (score >= best[1])
    kept = jax.tree.map(
        lambda new, old: jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old), params, best[0]
    )
    return kept, np.where(better, score, best[1]), np.where(better, steps, best[2])


def grid(learning_rates: Sequence[float], weight_decays: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of the two, as two arrays."""
    rates, decays = np.meshgrid(learning_rates, weight_decays, indexing="ij")
    return rates.ravel(), decays.ravel()


def pick(tree: Any, index: int) -> Any:
    """Replica ``index`` of a tree with a leading replica axis."""
    return jax.tree.map(lambda leaf: leaf[index], tree)
