"""Factorised kernels: optimal factors, LoRA, and which parameters are trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from builders import on_device, random_params, tiny, tiny_decoder, uneven_batch

import distill
from distill import losses
from distill.objective import ObjectiveConfig, terms_of
from distill.parallel import ParallelConfig, make_mesh, on_mesh, one_device, pmapped
from distill.state import Frozen, init_state
from distill.step import make_train_step
from distill.students.factors import factored, fisher_rows, kernels_of, low_rank
from distill.students.lora import freeze, lora
from distill.trees import joined

CONFIG = tiny(qkv_bias=True)
MODEL = tiny_decoder(qkv_bias=True)
BATCH = on_device(uneven_batch())
ALL = ("query", "key", "value", "output", "gate", "up", "down")
SUMMED = {"output": 2}


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


def matrices(params, name):
    """The kernels of a projection, ``[N, inputs, outputs]``."""
    branch = "attention" if name in ("query", "key", "value", "output") else "mlp"
    kernel = np.asarray(params["layers"][branch][name]["kernel"], np.float64)
    return kernel.reshape(kernel.shape[0], np.prod(kernel.shape[1 : 1 + SUMMED.get(name, 1)]), -1)


def nats(model, params, batch):
    logits = model.logits(params, batch.inputs, positions=batch.positions, segments=batch.segments)
    return losses.divide(losses.masked_sum(losses.cross_entropy(logits, batch.labels), batch.mask))


# ---- low rank


def test_the_error_is_that_of_the_dropped_singular_values(params):
    """The theorem of Eckart and Young for every kernel, in float64."""
    small, factors = low_rank(MODEL, params, 3)
    whole = small.merge(factors)
    for name in ALL:
        for was, now in zip(matrices(params, name), matrices(whole, name), strict=True):
            left_out = np.linalg.svd(was, compute_uv=False)[3:]
            assert ((was - now) ** 2).sum() == pytest.approx((left_out**2).sum(), rel=1e-4), name
            assert np.linalg.matrix_rank(now, tol=1e-4) == 3
    np.testing.assert_array_equal(whole["embedding"], params["embedding"])
    sizes = {name: sum(matrices(params, name).shape[1:]) for name in ALL}
    without = MODEL.parameter_count() - sum(matrices(params, name).size for name in ALL)
    assert small.parameter_count() == without + 2 * 3 * sum(sizes.values())
    assert small.parameter_count() == sum(leaf.size for leaf in jax.tree.leaves(factors))


def test_factors_compute_the_same_as_their_product(params):
    small, factors = low_rank(MODEL, params, 2, kernels=("query", "output", "up"))
    assert "kernel" in factors["layers"]["mlp"]["down"] and "kernel" not in factors["layers"]["mlp"]["up"]
    want = reference.decoder_logits(CONFIG, small.merge(factors), np.asarray(BATCH.inputs))
    np.testing.assert_allclose(small.logits(factors, BATCH.inputs), want, rtol=1e-3, atol=1e-4)
    assert np.abs(want - np.asarray(MODEL.logits(params, BATCH.inputs))).max() > 0.1


def test_full_rank_changes_nothing(params):
    small, factors = low_rank(MODEL, params, 8, kernels=("query", "output"))
    np.testing.assert_allclose(
        small.logits(factors, BATCH.inputs), MODEL.logits(params, BATCH.inputs), rtol=1e-4, atol=1e-4
    )


def test_weighted_rows_have_smaller_errors(params):
    """The weighted error is minimal for the rank; rows of weight zero cause no division by zero."""
    rows = fisher_rows(MODEL, params, lambda p, b: nats(MODEL, p, b), [BATCH])
    weights = np.array(rows["layers"]["mlp"]["up"]["rows"])
    gradient = jax.grad(lambda p: nats(MODEL, p, BATCH))(params)["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(weights, np.sqrt((np.asarray(gradient, np.float64) ** 2).sum(-1)), rtol=1e-4)
    _, plain = low_rank(MODEL, params, 2, kernels=("up",))
    small, weighted = low_rank(MODEL, params, 2, kernels=("up",), rows=rows)
    errors = []
    for factors in (plain, weighted):
        error = weights[:, :, None] * (matrices(params, "up") - matrices(small.merge(factors), "up"))
        errors.append((error**2).sum(axis=(1, 2)))
    for layer, was in enumerate(matrices(params, "up")):
        least = (np.linalg.svd(weights[layer][:, None] * was, compute_uv=False)[2:] ** 2).sum()
        assert errors[1][layer] == pytest.approx(least, rel=1e-3)
        assert errors[0][layer] > 1.01 * least
    rows["layers"]["mlp"]["up"]["rows"] = np.zeros_like(weights)
    _, nothing = low_rank(MODEL, params, 2, kernels=("up",), rows=rows)
    jax.tree.map(np.testing.assert_array_equal, nothing, plain)
    with pytest.raises(ValueError, match="no batches"):
        fisher_rows(MODEL, params, lambda p, b: nats(MODEL, p, b), [])


def test_random_factors_have_the_spread_of_random_kernels():
    model = tiny_decoder(width=64, heads=4, feed_forward=96)
    drawn = factored(model, 32)
    whole, plain = drawn.merge(drawn.init(jax.random.key(0))), model.init(jax.random.key(0))
    for name in ALL:
        assert matrices(whole, name).std() == pytest.approx(matrices(plain, name).std(), rel=0.1), name


# ---- LoRA


ADAPTED = lora(MODEL, 2, alpha=6.0, kernels=("query", "output", "down"))


def learnt(seed=3):
    """A correction that is not zero."""
    return random_params(ADAPTED, seed)


def test_lora_starts_bit_identical_to_its_base(params):
    start = ADAPTED.init(jax.random.key(0))
    got = ADAPTED.logits(joined(params, start), BATCH.inputs)
    np.testing.assert_array_equal(got, MODEL.logits(params, BATCH.inputs))
    for name, deviation in (("query", 8**-0.5), ("output", 8**-0.5), ("down", 12**-0.5)):
        branch = start["layers"]["mlp" if name == "down" else "attention"][name]
        assert not branch["lora_right"].any()
        assert float(branch["lora_left"].std()) == pytest.approx(deviation, rel=0.5)


def test_lora_matches_its_equation(params):
    """W + 6/2 · A · B in float64, separate and merged."""
    whole = joined(params, learnt())
    by_hand = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for branch, name in (("attention", "query"), ("attention", "output"), ("mlp", "down")):
        left, right = (np.asarray(learnt()["layers"][branch][name][n], np.float64) for n in ("lora_left", "lora_right"))
        kernel = by_hand["layers"][branch][name]["kernel"]
        for layer in range(2):
            kernel[layer] += 3.0 * np.tensordot(left[layer], right[layer], axes=1)
    want = reference.decoder_logits(CONFIG, by_hand, np.asarray(BATCH.inputs))
    got = ADAPTED.logits(whole, BATCH.inputs)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
    merged = ADAPTED.merge(whole)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(MODEL.logits(merged, BATCH.inputs), got, rtol=1e-5, atol=1e-5)
    assert np.abs(got - np.asarray(MODEL.logits(params, BATCH.inputs))).max() > 0.5


TERMS = terms_of(ObjectiveConfig(temperature=2.0, kd_weight=0.7, task_weight=0.3))


SGD = optax.sgd(0.1)


def step_of(student, optimizer=SGD, **options):
    return make_train_step(student, TERMS, optimizer, teacher=MODEL, **options)


def test_only_the_correction_is_trained(params):
    """State and optimizer hold only A and B; the update follows from the gradient of the merged model."""
    update = optax.adam(0.1)
    state = init_state(learnt(), update)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 3 * ADAPTED.parameter_count() + 2
    teacher = random_params(MODEL, seed=9)
    before = jax.tree.map(np.array, params)
    new, metrics = jax.jit(step_of(ADAPTED, update))(state, Frozen(teacher, params), BATCH)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert jax.tree.structure(new.params) == jax.tree.structure(state.params)
    state, plain = (
        init_state(learnt(), optax.sgd(0.1)),
        init_state(ADAPTED.merge(joined(params, learnt())), optax.sgd(0.1)),
    )
    new, metrics = jax.jit(step_of(ADAPTED))(state, Frozen(teacher, params), BATCH)
    moved, same = jax.jit(step_of(MODEL))(plain, teacher, BATCH)
    assert float(metrics["loss"][0]) == pytest.approx(float(same["loss"][0]), rel=1e-4)
    slope = (plain.params["layers"]["mlp"]["down"]["kernel"] - moved.params["layers"]["mlp"]["down"]["kernel"]) / 0.1
    ours = learnt()["layers"]["mlp"]["down"]
    want = {
        "lora_left": 3.0 * jnp.einsum("nfd,nrd->nfr", slope, ours["lora_right"]),
        "lora_right": 3.0 * jnp.einsum("nfr,nfd->nrd", ours["lora_left"], slope),
    }
    for name, gradient in want.items():
        got = (ours[name] - new.params["layers"]["mlp"]["down"][name]) / 0.1
        np.testing.assert_allclose(got, gradient, rtol=1e-2, atol=1e-4)


def test_lora_steps_are_equal_on_every_wrapping(params):
    """On one device, a sharded mesh and pmap; the base is passed like the teacher, here the same arrays."""
    model = lora(MODEL, 2, kernels=("query", "down"))
    rows, first, update = np.arange(8)[None], init_state(random_params(model, 4), SGD), SGD
    mesh = make_mesh(ParallelConfig(fsdp=2))
    wrappings = [
        one_device(step_of(model)),
        on_mesh(step_of(model, mesh=mesh), model, update, mesh, MODEL),
        pmapped(lambda axis: step_of(model, axis_name=axis)),
    ]
    results = []
    for wrapping in wrappings:
        frozen = wrapping.place_params(Frozen(params, params))
        state, _ = wrapping.steps(
            wrapping.place_state(first), frozen, wrapping.place_examples(BATCH), wrapping.place_rows(rows)
        )
        results.append(jax.device_get(wrapping.fetch_state(state).params))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), results[0], other)
    assert any(
        np.abs(a - b).max() > 1e-4 for a, b in zip(*map(jax.tree.leaves, (results[0], first.params)), strict=True)
    )


def test_a_student_is_saved_merged(params, tmp_path):
    base = tiny_decoder()
    params = random_params(base)
    for name, (model, whole) in {
        "lora": ((m := lora(base, 2)), joined(params, random_params(m, 5))),
        "low_rank": low_rank(base, params, 2),
    }.items():
        distill.save(tmp_path / name, model, whole)
        opened, read = distill.load(tmp_path / name)
        np.testing.assert_allclose(
            opened.logits(read, BATCH.inputs), model.logits(whole, BATCH.inputs), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora(MODEL, 2, kernels=("head",)), "no head to factor; it has down, gate, key.*stay whole"),
        (lambda: lora(MODEL, 0), "rank=0: the kernel .* expected 1 …"),
        (lambda: factored(MODEL, 5, ("key",)), "rank=5: the kernel key is 8 × 4; expected 1 … 4"),
        (lambda: lora(MODEL, 2, alpha=-1.0), "alpha=-1.0; expected a number above 0"),
        (lambda: freeze(MODEL, ("heads",)), r"\('heads',\); expected some, not all, of embedding, head, layers"),
        (lambda: joined({"a": 1}, {"a": 2}), "a is both frozen and learnt"),
    ],
)
def test_invalid_factors_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert len(kernels_of(MODEL)) == 7
