"""Configurations for large machines: initialisation, sharding and step are lowered with the real shapes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from distill.batch import Batch
from distill.config import load_config
from distill.models import decoder
from distill.objective import terms_of
from distill.optim import optimizer
from distill.parallel import param_shardings
from distill.planning.architectures import architecture
from distill.state import init_state
from distill.step import make_train_step

PARAMETERS = {  # published counts in units of 10⁹, tied heads once
    "qwen3_8b_to_0p6b": (8.19, 0.596),
    "qwen_coder": (1.54, 0.494),
    "llama3_70b_to_8b": (70.55, 8.03),
    "gemma3_27b_to_1b": (27.0, 1.0),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_initialisation_step_and_shardings_are_lowered(name):
    config = load_config(name)
    shapes = [architecture(one) for one in (config.teacher, config.student.source)]
    teacher, student = (decoder(shape) for shape, _ in shapes)
    counts = [model.parameter_count() / 1e9 for model in (teacher, student)]
    assert counts == pytest.approx(PARAMETERS[name], rel=0.02)
    vocab = min(tokens for _, tokens in shapes)
    teacher, student = teacher.with_vocabulary(vocab), student.with_vocabulary(vocab)
    parallel, training = config.parallel, config.training
    mesh = AbstractMesh((2, parallel.fsdp, parallel.tensor), ("data", "fsdp", "tensor"))
    assert all(param_shardings(model, mesh) for model in (teacher, student))  # raises if a size is indivisible
    update = optimizer(training.optimizer, training.steps)
    step = make_train_step(
        student, terms_of(config.objective), update, teacher=teacher, micro_batches=training.micro_batches
    )
    params = jax.eval_shape(teacher.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    state = jax.eval_shape(lambda key: init_state(student.init(key), update), jax.random.key(0))
    shape = training.batch_size, config.data.length
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = Batch(ids, ids, jax.ShapeDtypeStruct(shape, jnp.bool_), ids, ids)
    after, metrics = jax.eval_shape(step, state, params, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {"loss", "forward_kl", "agreement"} <= set(metrics)
