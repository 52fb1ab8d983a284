"""One device, a mesh of eight and pmap train the same student, and none of them changes the teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import VOCAB, nnx_model, on_device, random_params, tiny_decoder, uneven_batch
from jax.sharding import PartitionSpec

from distill import parallel
from distill.checkpoint import Checkpoints
from distill.devices import backend
from distill.features import with_projectors
from distill.models import Model, Output
from distill.objective import ObjectiveConfig, task_term, terms_of
from distill.optim import OptimizerConfig, optimizer
from distill.parallel import MESH_AXES, RULES, ParallelConfig, make_mesh, param_shardings, state_shardings
from distill.state import Frozen, init_state
from distill.step import make_train_step
from distill.students.factors import factored
from distill.students.lora import lora
from distill.train import Task, fit
from distill.training import LogConfig, TrainingConfig

STEPS, BATCH = 20, 16
TERMS = terms_of(ObjectiveConfig(temperature=2.0, kd_weight=0.7, task_weight=0.3))
STUDENT = tiny_decoder(layers=1, vocab_size=12)  # every size is even, to be divisible by two
TEACHER = tiny_decoder(layers=1, vocab_size=12, width=12, head_dim=4, feed_forward=20)
UPDATE = optimizer(OptimizerConfig(learning_rate=0.02, warmup_steps=5, weight_decay=0.1), STEPS)
EIGHT = ParallelConfig(backend="mesh")
CUBE = ParallelConfig(backend="mesh", fsdp=2, tensor=2)
MESHES = {"eight": EIGHT, "cube": CUBE, "four_by_two": ParallelConfig(backend="mesh", fsdp=4, tensor=2)}


def make_step(axis_name, micro_batches=1, mesh=None, chunk_size=0):
    options = {"teacher": TEACHER, "axis_name": axis_name, "micro_batches": micro_batches}
    options |= {"mesh": mesh, "chunk_size": chunk_size}
    return make_train_step(STUDENT, TERMS, UPDATE, **options)


def chunked_on(config):
    mesh = make_mesh(config)
    return parallel.on_mesh(make_step(None, mesh=mesh, chunk_size=4), STUDENT, UPDATE, mesh, TEACHER)


def wrapped(micro_batches, chunk_size=0, **axes):
    def step(axis_name, mesh):
        return make_step(axis_name, micro_batches, mesh, chunk_size)

    return parallel.wrap(ParallelConfig(backend="mesh", **axes), step, STUDENT, UPDATE, TEACHER)


WRAPPINGS = {
    "one_device": lambda: parallel.one_device(make_step(None)),
    "mesh": lambda: parallel.on_mesh(make_step(None), STUDENT, UPDATE, make_mesh(EIGHT), TEACHER),
    "mesh_2x2x2": lambda: parallel.on_mesh(make_step(None), STUDENT, UPDATE, make_mesh(CUBE), TEACHER),
    "fsdp_4_tensor_2": lambda: wrapped(4, fsdp=4, tensor=2),
    "sequence_2": lambda: wrapped(2, chunk_size=4, sequence=2),
    "dcn_2_rules": lambda: wrapped(4, dcn=2, fsdp=2, tensor=2, student="replicated", teacher="gathered"),
    "pmap": lambda: parallel.pmapped(make_step),
    "chunked": lambda: parallel.one_device(make_step(None, chunk_size=4)),
    "chunked_mesh_2x2x2": lambda: chunked_on(CUBE),
    "chunked_pmap": lambda: parallel.pmapped(lambda axis_name: make_step(axis_name, chunk_size=4)),
}


@pytest.fixture(scope="module")
def arguments():
    """State, teacher, examples and the rows of 20 batches; counted tokens differ between devices."""
    examples = on_device(uneven_batch(rows=24))
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(24)[:BATCH] for _ in range(STEPS)])
    counts = np.asarray(examples.mask.sum(axis=1))[rows].reshape(STEPS, 8, 2).sum(axis=2)
    assert np.all(counts.max(axis=1) - counts.min(axis=1) >= 3)
    return init_state(STUDENT.init(jax.random.key(0)), UPDATE), random_params(TEACHER, seed=1), examples, rows


@pytest.fixture(scope="module")
def runs(arguments):
    """Name of a wrapping → final state, metrics and the arguments after the run; each is run once."""
    done = {}

    def run(name):
        if name not in done:
            wrapping, (state, teacher_params, examples, rows) = WRAPPINGS[name](), arguments
            placed_state, placed_teacher = wrapping.place_state(state), wrapping.place_params(teacher_params)
            placed = (placed_teacher, wrapping.place_examples(examples), wrapping.place_rows(rows))
            with jax.transfer_guard("disallow"):
                new, metrics = wrapping.steps(placed_state, *placed)
            state, metrics = wrapping.fetch_state(new), wrapping.fetch_metrics(metrics)
            done[name] = {"state": jax.device_get(state), "metrics": jax.device_get(metrics), "where": state}
            done[name] |= {"given": placed_state, "teacher": placed_teacher}
        return done[name]

    return run


# Faults: means of per-device means; gradients scaled by the number of devices. The steps run under a
# transfer guard: only placed arrays may be on the devices.
@pytest.mark.parametrize("name", list(WRAPPINGS)[1:])
def test_weights_are_those_of_one_device(runs, name):
    one, several = runs("one_device")["state"], runs(name)["state"]
    assert jax.tree.structure(one) == jax.tree.structure(several)
    assert int(several.step) == STEPS
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), several.params, one.params)
    apart = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), several.params, one.params)
    assert max(jax.tree.leaves(apart)) < 1e-6
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), one.params, STUDENT.init(jax.random.key(0)))
    assert min(jax.tree.leaves(moved)) > 0.01


def test_one_cpu_copies_no_layer_of_the_teacher_out_of_a_stack(arguments):
    state, _, examples, rows = arguments
    teacher = tiny_decoder(layers=3, vocab_size=12, width=12, head_dim=4, feed_forward=20)
    params = random_params(teacher, seed=1)
    wrapping = parallel.one_device(make_train_step(STUDENT, TERMS, UPDATE, teacher=teacher))
    placed = wrapping.place_params(params)
    after = []
    for frozen, stacked in ((params, True), (placed, False)):  # ``train.lower`` passes them unplaced
        text = wrapping.steps.lower(state, frozen, examples, rows[:3]).compile().as_text()
        assert ("f32[3,12,20]" in text) == stacked
        after.append(wrapping.steps(wrapping.place_state(state), frozen, examples, rows[:3])[0].params)
    jax.tree.map(np.testing.assert_array_equal, *after)
    both = wrapping.place_params(Frozen(params, params))
    assert jax.tree.structure(both) == jax.tree.structure(Frozen(placed, params))


@pytest.mark.parametrize("name", ["mesh_2x2x2", "pmap", "chunked_pmap"])
def test_a_device_may_hold_as_many_rows_as_there_are_devices(arguments, name):
    state, teacher_params, examples, _ = arguments
    rows = np.arange(64).reshape(1, 64) % 24
    params = []
    for wrapping in (WRAPPINGS["one_device"](), WRAPPINGS[name]()):
        placed = wrapping.place_state(state), wrapping.place_params(teacher_params)
        new, _ = wrapping.steps(*placed, wrapping.place_examples(examples), wrapping.place_rows(rows))
        params.append(jax.device_get(wrapping.fetch_state(new).params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *params)


def test_pmap_returns_the_state_as_it_was_placed(arguments):  # otherwise a run would compile its steps twice
    state, teacher_params, examples, rows = arguments
    wrapping = WRAPPINGS["pmap"]()
    placed = wrapping.place_state(state)
    before = [leaf.sharding for leaf in jax.tree.leaves(placed)]
    others = wrapping.place_params(teacher_params), wrapping.place_examples(examples), wrapping.place_rows(rows)
    new, _ = wrapping.steps(placed, *others)
    assert [leaf.sharding for leaf in jax.tree.leaves(new)] == before


@pytest.mark.parametrize("name", list(WRAPPINGS)[1:])
def test_metrics_are_those_of_one_device(runs, name):
    """Fault: a mean of the means of devices."""
    one, several = runs("one_device")["metrics"], runs(name)["metrics"]
    assert one.keys() == several.keys()
    for metric, (total, weight) in one.items():
        np.testing.assert_allclose(several[metric][0], total, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(several[metric][1], weight)
        assert weight.shape == (STEPS,)


# The teacher is neither donated nor changed. The state is donated; it is a copy.
@pytest.mark.parametrize("name", WRAPPINGS)
def test_the_state_is_donated_and_the_teacher_is_not(runs, arguments, name):
    run, (state, teacher_params, *_) = runs(name), arguments
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((run["teacher"], teacher_params, state)))
    for placed, given in zip(jax.tree.leaves(run["teacher"]), jax.tree.leaves(teacher_params), strict=True):
        placed = np.asarray(placed)
        np.testing.assert_array_equal(placed, np.broadcast_to(given, placed.shape))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(run["given"].params))


# Parameters and moments are sharded on a mesh with such axes.
def test_the_state_is_sharded(runs):
    where = runs("mesh_2x2x2")["where"]
    up = where.params["layers"]["mlp"]["up"]["kernel"]
    assert up.shape == (1, 8, 12) and up.addressable_shards[0].data.shape == (1, 4, 6)
    moments = [leaf for leaf in jax.tree.leaves(where.opt_state) if leaf.shape == up.shape]
    assert len(moments) == 4 and all(leaf.sharding == up.sharding for leaf in moments)  # gate and up, two each
    teacher = runs("mesh_2x2x2")["teacher"]["layers"]["mlp"]["up"]["kernel"]
    assert teacher.addressable_shards[0].data.shape == (1, 6, 10)
    assert runs("mesh")["where"].params["head"].sharding.is_fully_replicated


def test_a_sharded_teacher_with_a_replicated_student(runs):
    where, teacher = runs("dcn_2_rules")["where"], runs("dcn_2_rules")["teacher"]
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(where))
    up = teacher["layers"]["mlp"]["up"]["kernel"]
    assert up.shape == (1, 12, 20) and up.addressable_shards[0].data.shape == (1, 3, 20)


# ---- a state that is drawn or restored sharded


def with_inner_parts(model):
    """The model, its projectors and its low-rank factors: every kind of ``init`` that draws."""
    return with_projectors(factored(model, 2, ("up",)), {"hidden": (8, 6)})


@pytest.mark.parametrize("given", [False, True])
def test_the_state_is_drawn_sharded_and_does_not_depend_on_the_mesh(given):
    student = with_inner_parts(STUDENT)
    params = student.init(jax.random.key(5)) if given else None
    wrapping = parallel.on_mesh(lambda *_: None, student, UPDATE, make_mesh(CUBE))
    state = parallel.draw_state(student, UPDATE, jax.random.key(5), wrapping, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == wrapping.places[0]
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (8, 6)]
    assert len(moments) == 2 and not any(leaf.sharding.is_fully_replicated for leaf in moments)
    want = init_state(student.init(jax.random.key(5)), UPDATE)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(want))
    jax.tree.map(lambda leaf: leaf.delete(), state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))  # the initial state is copied, not donated


def test_the_state_is_restored_sharded_onto_another_mesh(tmp_path):
    on = {name: parallel.on_mesh(lambda *_: None, STUDENT, UPDATE, make_mesh(c)) for name, c in MESHES.items()}
    state = parallel.draw_state(STUDENT, UPDATE, jax.random.key(5), on["cube"])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"next_batch": 1})
    with Checkpoints(tmp_path) as checkpoints:
        for name in ("eight", "four_by_two"):
            restored = checkpoints.restore(parallel.abstract_state(STUDENT, UPDATE, on[name]))
            assert jax.tree.map(lambda leaf: leaf.sharding, restored) == on[name].places[0]
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))


def test_moments_are_sharded_like_their_parameters():
    mesh = make_mesh(CUBE)
    shardings = state_shardings(STUDENT, UPDATE, mesh)
    shapes = jax.eval_shape(lambda: init_state(STUDENT.init(jax.random.key(0)), UPDATE))
    assert jax.tree.structure(shardings) == jax.tree.structure(shapes)
    assert shardings.params == param_shardings(STUDENT, mesh)
    assert shardings.step.is_fully_replicated


# ---- the table of axes


def test_every_axis_of_the_decoder_is_in_the_table():
    biases = tiny_decoder(qkv_bias=True, output_bias=True, mlp_bias=True)
    axes = ranks_and_axes(biases)
    assert len(axes) == 19
    axes += ranks_and_axes(factored(biases, 1))
    axes += ranks_and_axes(tiny_decoder(experts=2, experts_per_token=1))
    axes += ranks_and_axes(tiny_decoder(positions="learned", max_length=16))
    assert all(len(names) == ndim and set(names) <= MESH_AXES.keys() for ndim, names in axes)
    assert {axis for _, names in axes for axis in names} == MESH_AXES.keys()  # and no axis is left over
    assert all(rules.keys() == MESH_AXES.keys() for rules in RULES.values())


def ranks_and_axes(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.leaves(jax.tree.map(lambda leaf, names: (leaf.ndim, names), shapes, model.axes), is_leaf=is_pair)


def is_pair(node):
    return isinstance(node, tuple) and isinstance(node[0], int)


def model_of(shape, names):
    return Model(lambda key: {"w": jnp.zeros(shape)}, Output, lambda p, h: h, VOCAB, axes={"w": names})


def test_two_dimensions_on_one_axis_are_refused():
    with pytest.raises(ValueError, match=r"\['w'\].*one mesh axis"):
        param_shardings(model_of((4, 4), ("heads", "mlp")), make_mesh(CUBE))
    one_way = ParallelConfig(backend="mesh", fsdp=2)  # without a tensor axis nothing collides
    assert param_shardings(model_of((4, 4), ("heads", "mlp")), make_mesh(one_way))["w"].is_fully_replicated


def test_an_indivisible_dimension_is_refused():
    with pytest.raises(ValueError, match=r"vocab=11 cannot be divided over tensor=2"):
        param_shardings(tiny_decoder(), make_mesh(CUBE))
    with pytest.raises(ValueError, match=r"embed=12 cannot be divided over fsdp=8"):
        param_shardings(model_of((3, 12), ("norm", "embed")), make_mesh(ParallelConfig(fsdp=8)))


def test_custom_rules_place_a_model():
    mesh = make_mesh(CUBE)
    gathered = param_shardings(tiny_decoder(), mesh, RULES["gathered"])  # a vocabulary of 11 need not be divided
    assert gathered["head"].spec == PartitionSpec(("fsdp", "tensor"), None)
    with pytest.raises(ValueError, match=r"embed=6 cannot be divided over fsdp × tensor=4"):
        param_shardings(model_of((6,), ("embed",)), mesh, RULES["gathered"])
    with pytest.raises(ValueError, match=r"\['w'\].*one mesh axis"):
        param_shardings(model_of((4, 4), ("embed", "mlp")), mesh, MESH_AXES | {"embed": ("fsdp", "tensor")})


def test_model_without_axes_is_replicated():
    shardings = param_shardings(nnx_model(), make_mesh(CUBE))
    assert len(jax.tree.leaves(shardings)) == 5
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings))


# ---- the configuration


def sizes(config, devices=None):
    """Axis sizes of a mesh, without axes of size 1."""
    return {axis: size for axis, size in make_mesh(config, devices).shape.items() if size > 1}


def test_the_mesh_has_the_configured_shape():
    assert sizes(ParallelConfig(fsdp=2)) == {"data": 4, "fsdp": 2}
    assert sizes(CUBE) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sizes(EIGHT, jax.devices()[:3]) == {"data": 3}
    assert sizes(ParallelConfig(dcn=2, sequence=2)) == {"dcn": 2, "data": 2, "sequence": 2}
    assert make_mesh(CUBE).axis_names == parallel.AXES


@dataclasses.dataclass(frozen=True)
class Chip:
    """A fake device with the attributes that a mesh reads."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "chip"


def test_the_dcn_axis_connects_slices():
    chips = [Chip(n, slice_index=n % 2) for n in range(8)]
    mesh = make_mesh(ParallelConfig(dcn=2, fsdp=2), chips)
    assert mesh.devices.shape == (2, 2, 2, 1, 1)
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match="dcn=1, and the devices are of 2 slices"):
        make_mesh(ParallelConfig(fsdp=2), [dataclasses.replace(chip, platform="tpu") for chip in chips])


def test_mesh_larger_than_the_devices_is_refused():
    with pytest.raises(ValueError, match="3 does not divide the 8 devices"):
        make_mesh(ParallelConfig(fsdp=3))
    with pytest.raises(ValueError, match="16 does not divide the 8 devices"):
        make_mesh(ParallelConfig(fsdp=4, tensor=4))


@pytest.mark.parametrize("backend", ["one_device", "pmap"])
def test_backend_that_cannot_shard_is_refused(backend):
    with pytest.raises(ValueError, match=f"{backend} cannot shard"):
        ParallelConfig(backend=backend, fsdp=2)
    with pytest.raises(ValueError, match="sequence=2"):
        ParallelConfig(backend=backend, sequence=2)
    with pytest.raises(ValueError, match="fsdp=0"):
        ParallelConfig(backend=backend, fsdp=0)


@pytest.mark.parametrize("name", ["mesh", "pmap"])
def test_an_indivisible_batch_is_refused(name):
    with pytest.raises(ValueError, match="batch_size=12 cannot be divided over 8 devices"):
        WRAPPINGS[name]().place_rows(np.zeros((2, 12), np.int32))


def test_an_indivisible_length_is_refused():
    with pytest.raises(ValueError, match="texts of 6 tokens cannot be divided over sequence=4"):
        wrapped(1, sequence=4).place_examples(uneven_batch())
    with pytest.raises(ValueError, match="teacher='whole'; expected one of split, gathered, replicated"):
        ParallelConfig(teacher="whole")


def test_sharding_that_the_devices_cannot_do_is_refused_on_one_device_too():
    """``auto`` does not drop what was asked for: fsdp=2 on one device is an error, not a run on one device."""
    one = jax.devices()[:1]
    assert not parallel.uses_mesh(ParallelConfig(), one) and parallel.uses_mesh(ParallelConfig(fsdp=2), one)
    with pytest.raises(ValueError, match="fsdp=2.*does not divide the 1 devices"):
        parallel.wrap(ParallelConfig(fsdp=2), lambda *_, **__: None, STUDENT, UPDATE, devices=one)


@pytest.mark.parametrize(("backend", "devices"), [("auto", 8), ("mesh", 8), ("one_device", 1), ("pmap", 8)])
def test_wrap_returns_the_configured_backend(backend, devices):
    wrapping = parallel.wrap(ParallelConfig(backend=backend), make_step, STUDENT, UPDATE, TEACHER)
    rows = wrapping.place_rows(np.arange(32, dtype=np.int32).reshape(2, 16))
    assert len(rows.sharding.device_set) == devices
    assert rows.shape == ((8, 2, 2) if backend == "pmap" else (2, 16))
    np.testing.assert_array_equal(np.sort(np.ravel(rows)), np.arange(32))


def test_the_optimization_level_of_the_user_overrides_ours(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    ours = backend.compiler_options()
    assert ours and jax.jit(lambda x: x + 1, compiler_options=ours)(1) == 2
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert backend.compiler_options() is None


@pytest.mark.parametrize("config", [EIGHT, CUBE, ParallelConfig(backend="pmap"), ParallelConfig(backend="one_device")])
def test_a_student_with_a_frozen_part_is_evaluated_where_it_learns(config, tmp_path):
    """The frozen part was given on one device; its evaluation is a program over all of them."""
    student, batch, base, seen = lora(TEACHER, 2), uneven_batch(BATCH, 6), random_params(TEACHER), []

    def evaluate(params):
        seen.append(jax.jit(student.logits)(params, batch.inputs))
        return {}

    task = Task(student, [task_term()], batch, base_params=base, evaluate=evaluate)
    training = TrainingConfig(steps=1, batch_size=BATCH, evaluate_every=1, save_every=1)
    fit(tmp_path, task, training, parallel_config=config, log=LogConfig(progress=False))
    np.testing.assert_allclose(seen[0], TEACHER.logits(base, batch.inputs), rtol=0, atol=2e-5)
    assert len(seen) == 2 and not (seen[0] == seen[1]).all()


def test_a_teacher_read_from_another_run_lies_beside_its_student():
    teacher_params = random_params(TEACHER)
    there = parallel.everywhere(teacher_params, CUBE)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(there))
    assert parallel.everywhere(teacher_params, ParallelConfig(backend="pmap")) is teacher_params
