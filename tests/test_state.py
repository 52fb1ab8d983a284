"""What learns is float32, whatever type the student was given in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import on_device, random_params, tiny_decoder, uneven_batch

from distill.models.int8 import quantizer
from distill.objective import task_term
from distill.optim import OptimizerConfig, optimizer
from distill.parallel import ParallelConfig
from distill.state import Frozen, TrainState, init_state
from distill.step import make_train_step
from distill.students.lora import lora
from distill.train import Task, fit
from distill.training import LogConfig, TrainingConfig

STUDENT = tiny_decoder(layers=1)
SLOW = OptimizerConfig(learning_rate=2e-5, schedule="constant", warmup_steps=0)
TRAINING = TrainingConfig(steps=6, batch_size=8, evaluate_every=6, save_every=6, steps_per_dispatch=6, optimizer=SLOW)


def narrow(dtype):
    return jax.tree.map(lambda x: x.astype(dtype), random_params(STUDENT))


def equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_student_of_16_bits_moves_as_its_float32_copy(dtype):
    update, batch = optimizer(SLOW, 6), on_device(uneven_batch())
    step = jax.jit(make_train_step(STUDENT, [task_term()], update))

    def trained(params):
        state = init_state(params, update)
        for _ in range(3):
            state, _ = step(state, None, batch)
        return state

    start = narrow(dtype)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), start)
    got = trained(start)
    assert {leaf.dtype for leaf in jax.tree.leaves(got.params)} == {jnp.dtype("float32")}
    equal(got, trained(wide))
    moved = jax.tree.map(lambda new, old: float(jnp.mean(jnp.abs(new - old))), got.params, wide)
    assert moved["layers"]["mlp"]["up"]["kernel"] > 2e-5  # three steps of Adam at that rate


def test_a_fit_of_a_student_of_16_bits_is_that_of_its_float32_copy(tmp_path):
    batch, start = uneven_batch(), narrow("bfloat16")
    where = {"log": LogConfig(progress=False), "parallel_config": ParallelConfig(backend="mesh")}
    runs = {
        name: fit(tmp_path / name, Task(STUDENT, [task_term()], batch, params=params), TRAINING, **where)
        for name, params in (("narrow", start), ("wide", jax.tree.map(lambda x: x.astype(jnp.float32), start)))
    }
    equal(runs["narrow"], runs["wide"])
    assert runs["narrow"]["head"].dtype == np.float32


def test_a_state_made_by_hand_in_16_bits_is_refused():
    update = optax.sgd(0.1)
    params = random_params(STUDENT) | {"head": narrow("bfloat16")["head"]}
    state = TrainState(jnp.int32(0), params, update.init(params))
    with pytest.raises(ValueError, match="the parameter head is bfloat16, in which small updates are lost"):
        jax.jit(make_train_step(STUDENT, [task_term()], update))(state, None, on_device(uneven_batch()))


def test_integers_and_keys_are_no_parameters_to_learn():
    for leaf, kind in ((jnp.arange(3), "int32"), (jax.random.key(0), "key<fry>")):
        with pytest.raises(ValueError, match=f"the parameter a/b is {kind}, which cannot be learnt"):
            init_state({"a": {"b": leaf}}, optax.sgd(0.1))


# The frozen base may be of any type; the factors and their sums over micro-batches are float32.
@pytest.mark.parametrize("base_type", ["int8", "bfloat16"])
def test_factors_on_a_narrow_base_learn_in_float32(base_type):
    base_params = narrow("bfloat16")
    if base_type == "int8":
        base_params = jax.tree_util.tree_map_with_path(quantizer(STUDENT), base_params)
    student, update, batch = lora(STUDENT, 2), optax.sgd(0.1), on_device(uneven_batch())
    state = init_state(jax.tree.map(lambda x: x.astype(jnp.bfloat16), student.init(jax.random.key(0))), update)
    step = jax.jit(make_train_step(student, [task_term()], update, micro_batches=4))
    new = step(state, Frozen(None, base_params), batch)[0].params
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}
    moved = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (new, state.params)), strict=True)]
    assert sum(moved) == len(moved) // 2  # the right factors; the left ones have no gradient while those are 0
