"""Held-out metrics on a mesh equal those of one device; each device holds its own rows."""

import jax
import pytest
from builders import random_params, tiny_decoder, uneven_batch

from distill.data.text import TextDataConfig
from distill.evaluation import heldout
from distill.evaluation.heldout import Heldout
from distill.experiments.text.config import TextConfig
from distill.parallel import RULES, ParallelConfig, make_mesh, param_shardings
from distill.planning.plan import heldout_bytes
from distill.train import Task

TEACHER, STUDENT = tiny_decoder(layers=2, width=16, vocab_size=12), tiny_decoder(layers=1, vocab_size=12)
TEXT = uneven_batch(rows=19, length=8)


@pytest.fixture(scope="module")
def params():
    return random_params(TEACHER, 1), random_params(STUDENT, 2)


@pytest.fixture(scope="module")
def alone(params):
    return Heldout(TEACHER, params[0], TEXT)


@pytest.mark.parametrize(
    "config",
    [ParallelConfig(), ParallelConfig(fsdp=4), ParallelConfig(fsdp=2, tensor=2), ParallelConfig(dcn=2, sequence=2)],
    ids=lambda config: f"dcn{config.dcn}-fsdp{config.fsdp}-sequence{config.sequence}-tensor{config.tensor}",
)
def test_each_device_of_a_mesh_keeps_its_rows_and_measures_equal_one_device(params, alone, config):
    mesh = make_mesh(config)
    teacher, student = (
        jax.device_put(values, param_shardings(model, mesh, RULES["split"]))
        for model, values in zip((TEACHER, STUDENT), params, strict=True)
    )
    spread = Heldout(TEACHER, teacher, TEXT, mesh)
    assert spread.measure(STUDENT, student) == pytest.approx(alone.measure(STUDENT, params[1]), rel=1e-5)
    assert spread.of_teacher() == pytest.approx(alone.of_teacher(), rel=1e-5)
    parts = mesh.shape["dcn"] * mesh.shape["data"] * mesh.shape["fsdp"]
    assert len(spread.states()) == 3
    for states in spread.states():
        held = {shard.device: shard.data.nbytes for shard in states.addressable_shards}
        assert set(held.values()) == {states.nbytes // parts} and len(held) == 8


@pytest.mark.parametrize("config", [ParallelConfig(), ParallelConfig(fsdp=2, tensor=4)], ids=["data", "tensor"])
def test_the_plan_states_the_bytes_that_are_kept(params, config):
    mesh = make_mesh(config)
    spread = Heldout(TEACHER, params[0], TEXT, mesh)
    spread.measure(STUDENT, params[1])
    held = sum(states.addressable_shards[0].data.nbytes for states in spread.states())
    run = TextConfig(data=TextDataConfig(length=8), heldout_rows=19, prompt_tokens=4, parallel=config)
    assert heldout_bytes(run, Task(STUDENT, [], TEXT, teacher=TEACHER), mesh) == held


def test_parameters_are_moved_onto_the_mesh(params, alone):
    spread = Heldout(TEACHER, jax.device_get(params[0]), TEXT, make_mesh(ParallelConfig()))
    restored = jax.device_put(params[1], jax.devices()[3])
    assert spread.measure(STUDENT, restored) == pytest.approx(alone.measure(STUDENT, params[1]), rel=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 8, 11, 99])
def test_the_requested_number_of_first_rows_is_measured(params, alone, rows):
    few = jax.tree.map(lambda field: field[:rows], TEXT)
    want = Heldout(TEACHER, params[0], few).measure(STUDENT, params[1])
    assert alone.measure(STUDENT, params[1], rows) == pytest.approx(want, rel=1e-6)


def test_a_student_is_compiled_once_for_several_heldouts(params, alone):
    alone.measure(STUDENT, params[1])
    before = heldout._compare._cache_size()
    Heldout(TEACHER, params[0], TEXT).measure(STUDENT, jax.tree.map(lambda leaf: leaf + 1.0, params[1]))
    assert heldout._compare._cache_size() == before
