"""From the loop to the loss: the calls between them, counted while a step is traced, and printed."""

import functools
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from builders import random_params, tiny_decoder, uneven_batch

from distill import losses, objective
from distill.devices import backend
from distill.parallel import ParallelConfig
from distill.train import Task, fit
from distill.training import LogConfig, TrainingConfig

STUDENT, TEACHER = tiny_decoder(), tiny_decoder(layers=1)
PACKAGE = Path(losses.__file__).parents[1]


@pytest.mark.parametrize(("chunk_size", "most"), [(0, 6), (8, 10)], ids=["whole", "chunked"])
def test_few_calls_lie_between_the_loop_and_the_loss(tmp_path, monkeypatch, chunk_size, most):
    """One device, as ``fit`` runs it; frames of JAX are not counted."""
    stacks = []

    @functools.wraps(losses.forward_kl)
    def forward_kl(*logits, **options):
        stacks.append([frame for frame in traceback.extract_stack() if PACKAGE in Path(frame.filename).parents])
        return losses.forward_kl(*logits, **options)

    monkeypatch.setitem(objective.DIVERGENCES, "forward_kl", forward_kl)
    task = Task(
        STUDENT,
        objective.terms_of(objective.ObjectiveConfig(temperature=2.0)),
        uneven_batch(),
        TEACHER,
        random_params(TEACHER),
    )
    training = TrainingConfig(steps=2, batch_size=8, evaluate_every=2, save_every=2, chunk_size=chunk_size)
    fit(tmp_path, task, training, parallel_config=ParallelConfig(backend="one_device"), log=LogConfig(progress=False))
    calls = [[frame.name for frame in stack if Path(frame.filename).name != "train.py"] for stack in stacks]
    calls = [names for names, stack in zip(calls, stacks, strict=True) if stack[0].name == "fit"]
    deepest = max(calls, key=len)
    print(f"\n{'chunked' if chunk_size else 'whole'}, {len(deepest)} calls: {' > '.join(deepest)} > forward_kl")
    assert len(deepest) <= most


def test_rows_of_a_chunk_cost_one_call_more(monkeypatch):
    """On a CPU with a large vocabulary the loss reads a chunk some rows at a time."""
    monkeypatch.setattr(backend, "CPU_LOGITS", 1)
    hidden, kernel, seen = jnp.ones((32, 4)), jnp.ones((4, 9)), []

    def loss(student_logits, teacher_logits, labels):
        seen.append([f.name for f in traceback.extract_stack() if PACKAGE in Path(f.filename).parents])
        return losses.cross_entropy(student_logits, labels)

    def total(hidden):
        head = losses.Head(kernel)
        return losses.chunked(loss, (hidden, head), None, jnp.zeros(32, jnp.int32), jnp.ones(32, bool), 16)[0]

    jax.make_jaxpr(jax.grad(total))(hidden)
    deepest = max(seen, key=len)
    print(f"\nrows of a chunk, {len(deepest)} calls: {' > '.join(deepest)} > loss")
    assert len(deepest) <= 5
