"""The train step: what it averages over, what it ignores, and that the teacher does not change."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from builders import VOCAB, handmade, nnx_model, on_device, random_params, rows_of, tiny, tiny_decoder, uneven_batch
from jax.extend.core import jaxprs_in_params

from distill import losses
from distill.batch import shift
from distill.devices import backend
from distill.models import decoder
from distill.models.adapters import from_linen
from distill.models.parameters import parameter
from distill.objective import ObjectiveConfig, Term, task_term, terms_of
from distill.optim import OptimizerConfig, optimizer
from distill.parallel import scan_steps
from distill.state import init_state
from distill.step import CHUNKED_FROM, make_train_step
from distill.term import BOTH_LOGITS

TERMS = terms_of(ObjectiveConfig(temperature=2.0, kd_weight=0.7, task_weight=0.3))
STUDENT = tiny_decoder(layers=1, feed_forward=14)
TEACHER_CONFIG = tiny(layers=1, width=12, head_dim=4, feed_forward=20)
TEACHER = decoder(TEACHER_CONFIG)
SGD = optax.sgd(1.0)  # so that parameters change by the gradient


@pytest.fixture(scope="module")
def teacher_params():
    return random_params(TEACHER, seed=1)


@pytest.fixture(scope="module")
def state():
    return init_state(random_params(STUDENT), SGD)


@pytest.fixture(scope="module")
def step():
    return jax.jit(make_train_step(STUDENT, TERMS, SGD, teacher=TEACHER))


@pytest.fixture(scope="module")
def batch():
    return on_device(uneven_batch())


def assert_close(left, right, rtol=1e-4, atol=1e-6):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), left, right)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def means(metrics):
    return {name: float(total) / max(float(weight), 1.0) for name, (total, weight) in metrics.items()}


# ---- averages


def test_metrics_are_those_of_float64(step, state, teacher_params, batch):
    _, metrics = step(state, teacher_params, batch)
    student = reference.decoder_logits(tiny(layers=1, feed_forward=14), state.params, np.asarray(batch.inputs))
    teacher = reference.decoder_logits(TEACHER_CONFIG, teacher_params, np.asarray(batch.inputs))
    mask, labels = np.asarray(batch.mask), np.asarray(batch.labels)
    soft = reference.forward_kl(student, teacher, 2.0)[mask].mean()
    hard = reference.cross_entropy(student, labels)[mask].mean()
    want = {
        "loss": 0.7 * 4.0 * soft + 0.3 * hard,
        "forward_kl": soft,
        "cross_entropy": hard,
        "agreement": (student.argmax(-1) == teacher.argmax(-1))[mask].mean(),
        "teacher_cross_entropy": reference.cross_entropy(teacher, labels)[mask].mean(),
    }
    got = means(metrics)
    assert got.pop("tokens") == batch.inputs.size
    assert got.keys() == want.keys() | {"gradient_norm"}
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=1e-4), name
        assert float(metrics[name][1]) == mask.sum()


# The update is the slope of the reported loss.
def test_gradient_is_a_finite_difference(step, state, teacher_params, batch):
    new, metrics = step(state, teacher_params, batch)
    gradient = jax.tree.map(jnp.subtract, state.params, new.params)
    norm = optax.tree.norm(gradient)
    assert means(metrics)["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)

    def loss(distance):
        moved = jax.tree.map(lambda p, g: p + distance / norm * g, state.params, gradient)
        return means(step(state._replace(params=moved), teacher_params, batch)[1])["loss"]

    assert (loss(0.01) - loss(-0.01)) / 0.02 == pytest.approx(float(norm), rel=0.01)


# Fault: a mean of the means of micro-batches.
@pytest.mark.parametrize("micro_batches", [2, 8])
def test_micro_batches_equal_the_whole_batch(step, state, teacher_params, batch, micro_batches):
    parts = jax.jit(make_train_step(STUDENT, TERMS, SGD, teacher=TEACHER, micro_batches=micro_batches))
    batch = batch._replace(mask=batch.mask.at[3].set(False))  # a micro-batch may have no counted token
    assert_close(parts(state, teacher_params, batch), step(state, teacher_params, batch))


def test_the_mean_of_means_differs_from_the_mean_over_tokens(step, state, teacher_params, batch):
    """Fault: a mean of the means of micro-batches."""
    few, many = jnp.array([0, 6, 0, 6]), jnp.array([1, 7, 1, 7])  # rows that count 1 token, rows that count 6
    few, many, all_of_it = (
        step(state, teacher_params, rows_of(batch, rows))[1] for rows in (few, many, jnp.r_[few, many])
    )
    assert float(few["loss"][1]) == 4.0 and float(many["loss"][1]) == 24.0
    mean_of_means = (means(few)["loss"] + means(many)["loss"]) / 2
    assert abs(mean_of_means - means(all_of_it)["loss"]) > 0.05


# Fault: divided twice.
def test_repeating_the_batch_changes_nothing(step, state, teacher_params, batch):
    once, twice = (rows_of(batch, jnp.arange(rows) % 4) for rows in (4, 8))
    new, metrics = step(state, teacher_params, twice)
    want, want_metrics = step(state, teacher_params, once)
    assert_close(new, want)
    assert float(metrics.pop("tokens")[0]) == 2.0 * float(want_metrics.pop("tokens")[0])
    assert means(metrics) == pytest.approx(means(want_metrics), rel=1e-4)


# Fault: everything masked gives NaN.
def test_a_batch_without_counted_tokens_changes_nothing(step, state, teacher_params, batch):
    new, metrics = step(state, teacher_params, batch._replace(mask=jnp.zeros_like(batch.mask)))
    assert_same_bits(new.params, state.params)
    assert float(metrics.pop("tokens")[0]) == batch.inputs.size  # read, though none is predicted
    for name, (total, weight) in metrics.items():
        assert float(total) == 0.0 and float(weight) == (1.0 if name == "gradient_norm" else 0.0)


def test_a_batch_without_counted_tokens_leaves_adam_finite(batch):
    """Fault: everything masked gives NaN."""
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.5)
    update = optimizer(config, 10)
    state = init_state(random_params(STUDENT), update)
    empty = batch._replace(mask=jnp.zeros_like(batch.mask))
    new, _ = jax.jit(make_train_step(STUDENT, [task_term()], update))(state, None, empty)
    for path, leaf in jax.tree_util.tree_leaves_with_path(new.params):  # only the decay of matrices
        before = state.params
        for key in path:
            before = before[key.key]
        factor = 1.0 if path[-1].key == "scale" else 1.0 - 0.1 * 0.5
        np.testing.assert_allclose(leaf, before * factor, rtol=1e-5, atol=1e-7)


# ---- the shift


# Fault: no causal shift, or a double one.
def test_labels_are_shifted_by_one_token():
    tokens = (np.arange(7)[None] + np.arange(4)[:, None]) % VOCAB  # the next token is the one after
    batch = on_device(shift(tokens, np.ones_like(tokens)))

    def loss(ahead):
        model = handmade(lambda inputs: 50.0 * jax.nn.one_hot((inputs + ahead) % VOCAB, VOCAB))
        state = init_state(model.init(jax.random.key(0)), SGD)
        return means(make_train_step(model, [task_term()], SGD)(state, None, batch)[1])["cross_entropy"]

    assert loss(0) == pytest.approx(50.0, rel=1e-4)  # copies the current token
    assert loss(1) == pytest.approx(0.0, abs=1e-6)  # predicts the next one
    assert loss(2) == pytest.approx(50.0, rel=1e-4)


# ---- padding and packing


def padded_rows(filler=0):
    """Two rows of 4 and 5 tokens, padded to 9 with ``filler``, which does not count."""
    segments = (np.arange(9) < np.array([[4], [5]])).astype(np.int32)
    tokens = np.full((2, 9), filler)
    tokens[segments > 0] = np.random.default_rng(2).integers(0, VOCAB, 9)
    return on_device(shift(tokens, np.ones_like(tokens), segments))


# Fault: padding carries loss.
@pytest.mark.parametrize("filler", [3, VOCAB - 1])
def test_garbage_in_padding_changes_no_bit(step, state, teacher_params, filler):
    clean, dirty = padded_rows(), padded_rows(filler=filler)
    assert np.any(clean.inputs != dirty.inputs) and np.any(clean.labels != dirty.labels)
    assert_same_bits(step(state, teacher_params, dirty), step(state, teacher_params, clean))


# The states are masked before the head, because 0 · NaN would be NaN in its gradient.
@pytest.mark.parametrize("known_head", [True, False])
def test_nan_at_positions_that_do_not_count_changes_nothing(step, state, teacher_params, batch, known_head):
    def spoilt(model):
        def apply(*args, **options):
            output = model.apply(*args, **options)
            return output._replace(hidden=jnp.where(batch.mask[..., None], output.hidden, jnp.nan))

        return dataclasses.replace(model, apply=apply, head=model.head if known_head else None)

    assert not batch.mask.all()
    dirty = jax.jit(make_train_step(spoilt(STUDENT), TERMS, SGD, teacher=spoilt(TEACHER)))
    assert_close(dirty(state, teacher_params, batch), step(state, teacher_params, batch), rtol=1e-6, atol=1e-7)


def test_masked_labels_may_be_anything(step, state, teacher_params, batch):
    marked = batch._replace(labels=jnp.where(batch.mask, batch.labels, -100))
    assert_same_bits(step(state, teacher_params, marked), step(state, teacher_params, batch))


# Packed documents give the same result as one document per row.
def test_packing_changes_nothing(step, state, teacher_params):
    tokens, segments = np.zeros((2, 9), np.int64), np.zeros((2, 9), np.int32)
    tokens[0], segments[0] = np.random.default_rng(2).integers(0, VOCAB, 9), [1, 1, 1, 1, 2, 2, 2, 2, 2]
    packed, own_rows = on_device(shift(tokens, np.ones_like(tokens), segments)), padded_rows()
    assert int(packed.mask.sum()) == int(own_rows.mask.sum()) == 7
    want, got = (step(state, teacher_params, rows) for rows in (own_rows, packed))
    for (_, metrics), rows in ((want, own_rows), (got, packed)):
        assert float(metrics.pop("tokens")[0]) == np.sum(np.asarray(rows.segments) > 0)  # padding is not counted
    assert_close(got, want)
    crossed = step(state, teacher_params, packed._replace(segments=jnp.ones_like(packed.segments)))
    assert abs(means(crossed[1])["loss"] - means(want[1])["loss"]) > 1e-3


# ---- the teacher


# The teacher has no gradient.
def test_gradient_of_the_teacher_is_zero(step, state, teacher_params, batch):
    def loss(params):
        return step(state, params, batch)[1]["loss"][0]

    gradient = jax.grad(loss)(teacher_params)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0.0), gradient)
    other = jax.tree.map(lambda leaf: leaf + 0.1, teacher_params)
    assert abs(float(loss(other) - loss(teacher_params))) > 1e-3  # and yet the teacher has an effect


def products(jaxpr):
    """Shapes of the results of all matrix products in a jaxpr, including inner ones."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(sorted(equation.outvars[0].aval.shape))
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


# No gradient of the teacher is computed and thrown away.
def test_the_program_does_not_compute_the_teachers_gradient(state, teacher_params, batch):
    train_step = make_train_step(STUDENT, TERMS, SGD, teacher=TEACHER)
    shapes = set(products(jax.make_jaxpr(train_step)(state, teacher_params, batch).jaxpr))
    assert {(8, 14), (8, VOCAB)} <= shapes  # gradients of the student's feed-forward and head
    assert (20, 8 * 6) in shapes  # the teacher's feed-forward is computed
    assert not {(12, 20), (11, 12)} & shapes  # and its gradients are not


# Fault: the teacher in the state, the optimizer or the checkpoint.
def test_state_holds_nothing_of_the_teacher(teacher_params, batch):
    update = optimizer(OptimizerConfig(), 10)
    state = init_state(random_params(STUDENT), update)
    train_step = make_train_step(STUDENT, TERMS, update, teacher=TEACHER)
    new, _ = jax.eval_shape(train_step, state, teacher_params, batch)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(new))
    assert sizes == 3 * STUDENT.parameter_count() + 3  # parameters, two moments, three counters


def test_the_teachers_parameters_stay_bit_identical(step, state, teacher_params, batch):
    before = jax.tree.map(np.array, teacher_params)
    for _ in range(3):
        state, _ = step(state, teacher_params, batch)
    assert_same_bits(teacher_params, before)


def test_a_student_equal_to_its_teacher_has_zero_loss_and_gradient(batch):
    """Fault: the teacher's entropy left in."""
    params = random_params(STUDENT)
    step = make_train_step(STUDENT, terms_of(ObjectiveConfig(temperature=3.0)), SGD, teacher=STUDENT)
    new, metrics = jax.jit(step)(init_state(params, SGD), jax.tree.map(jnp.copy, params), batch)
    assert means(metrics)["forward_kl"] == pytest.approx(0.0, abs=1e-6)
    assert means(metrics)["agreement"] == 1.0
    assert_close(new.params, params, rtol=0, atol=1e-6)


def test_stored_logits_equal_the_live_teacher(step, state, teacher_params, batch):
    logits = TEACHER.logits(teacher_params, batch.inputs, positions=batch.positions, segments=batch.segments)
    cached = jax.jit(make_train_step(STUDENT, TERMS, SGD))
    got = cached(state, None, batch._replace(targets=losses.DenseTargets(logits)))
    assert_close(got, step(state, teacher_params, batch))


# ---- the head in chunks


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_chunks_change_nothing(state, teacher_params, batch, micro_batches):
    """A step that never holds all logits has the weights and metrics of one that does."""
    options = {"teacher": TEACHER, "micro_batches": micro_batches}
    whole = jax.jit(make_train_step(STUDENT, TERMS, SGD, chunk_size=0, **options))(state, teacher_params, batch)
    for chunk_size in (3, 64):
        step = jax.jit(make_train_step(STUDENT, TERMS, SGD, chunk_size=chunk_size, **options))
        assert_close(step(state, teacher_params, batch), whole)


# ---- rematerialisation


def kept(model, params, batch, remat):
    """Bytes of the residuals for the backward pass."""

    def residuals(params):
        return jax.vjp(lambda p: model.apply(p, batch.inputs, remat=remat).hidden, params)[1]

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(residuals, params)))


def test_remat_keeps_less(state, batch):
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    none, dots, full = (kept(STUDENT, state.params, batch, name) - weights for name in ("none", "dots", "full"))
    assert none > 1.5 * dots and dots > 1.5 * full


def test_few_layers_are_unrolled_on_a_cpu_with_the_same_result(batch, monkeypatch):
    """Unless they are rematerialised, which the compiler would undo without the loop."""

    student = tiny_decoder(layers=2, feed_forward=14)
    params = random_params(student)

    def gradient(remat="none"):
        def loss(params):
            return jnp.sum(jnp.square(student.apply(params, batch.inputs, remat=remat).hidden))

        return jax.jit(jax.grad(loss)).lower(params)

    apart, again = gradient(), gradient("full")
    assert "stablehlo.while" not in apart.as_text() and "stablehlo.while" in again.as_text()
    monkeypatch.setattr(backend, "UNROLLED", 1)
    loop = gradient()
    assert "stablehlo.while" in loop.as_text()
    assert_close(apart.compile()(params), loop.compile()(params))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(step, state, teacher_params, batch, remat):
    again = jax.jit(make_train_step(STUDENT, TERMS, SGD, teacher=TEACHER, remat=remat))
    assert_close(again(state, teacher_params, batch), step(state, teacher_params, batch))


class Embedded(nn.Module):
    """A network without layers."""

    @nn.compact
    def __call__(self, tokens):
        return self.param("table", parameter(("vocab", "embed"), std=1.0), (VOCAB, 4))[tokens]


def test_an_unknown_remat_is_refused(batch):
    with pytest.raises(ValueError, match="remat='most'; expected one of none, dots, full"):
        STUDENT.apply(random_params(STUDENT), batch.inputs, remat="most")
    with pytest.raises(ValueError, match="remat='full'; expected one of none for Embedded"):
        from_linen(Embedded(), VOCAB).apply(None, batch.inputs, remat="full")


def test_chunks_are_the_default_of_large_vocabularies():
    def largest(vocab):
        models = [tiny_decoder(layers=1, vocab_size=vocab, width=width) for width in (8, 16)]
        update = optax.sgd(0.1)
        student, teacher = (jax.eval_shape(model.init, jax.random.key(0)) for model in models)
        state = jax.eval_shape(lambda params: init_state(params, update), student)
        step = jax.jit(make_train_step(models[0], TERMS, update, teacher=models[1]))
        whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct((64, 32), x.dtype), uneven_batch())
        return step.lower(state, teacher, whole).compile().memory_analysis().temp_size_in_bytes / (64 * 32 * vocab * 4)

    assert largest(CHUNKED_FROM // 2) > 1.9  # both logits, whole
    assert largest(CHUNKED_FROM * 8) < 1.0


def test_chunks_of_a_model_without_a_head_are_refused():
    with pytest.raises(ValueError, match="head"):
        make_train_step(nnx_model(), TERMS, SGD, teacher=TEACHER, chunk_size=8)


# ---- many students at once


ROWS = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [0, 2, 4, 6]])


def run_of(update):
    """``(state, batch) -> (state, metrics)`` of three steps."""
    steps = scan_steps(make_train_step(STUDENT, [task_term()], update))
    return lambda state, batch: steps(state, None, batch, jnp.asarray(ROWS))


def test_scanned_steps_equal_single_steps(batch):
    update = optimizer(OptimizerConfig(warmup_steps=2), 3)
    state = init_state(STUDENT.init(jax.random.key(0)), update)
    scanned, metrics = jax.jit(run_of(update))(state, batch)
    step = jax.jit(make_train_step(STUDENT, [task_term()], update))
    for k, rows in enumerate(ROWS):
        state, single = step(state, None, rows_of(batch, rows))
        assert means(jax.tree.map(lambda leaf, k=k: leaf[k], metrics)) == pytest.approx(means(single), rel=1e-4)
    assert int(scanned.step) == 3
    assert_close(scanned, state)


def test_vmapped_seeds_equal_seeds_in_a_loop(batch):
    update = optimizer(OptimizerConfig(warmup_steps=2), 3)

    def train(seed):
        return run_of(update)(init_state(STUDENT.init(jax.random.key(seed)), update), batch)

    together = jax.jit(jax.vmap(train))(jnp.arange(3))
    alone = jax.jit(train)
    for i in range(3):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone(jnp.int32(i)), rtol=1e-3, atol=1e-5)
    heads = together[0].params["head"]
    assert np.max(np.abs(heads[0] - heads[1])) > 0.1


def test_vmapped_learning_rates_equal_rates_in_a_loop(batch):
    params, cases = STUDENT.init(jax.random.key(0)), [(0.01, 0.0), (0.05, 0.5)]

    def train(learning_rate, weight_decay):
        traced = {"learning_rate": learning_rate, "weight_decay": weight_decay}
        update = optimizer(OptimizerConfig(warmup_steps=2), 3, **traced)
        return run_of(update)(init_state(params, update), batch)

    together = jax.jit(jax.vmap(train))(*jnp.array(cases).T)
    for i, (learning_rate, weight_decay) in enumerate(cases):
        config = OptimizerConfig(learning_rate=learning_rate, weight_decay=weight_decay, warmup_steps=2)
        update = optimizer(config, 3)
        alone = jax.jit(run_of(update))(init_state(params, update), batch)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone, rtol=1e-3, atol=1e-5)
    heads = together[0].params["head"]
    assert np.max(np.abs(heads[0] - heads[1])) > 0.01


# ---- it learns


@pytest.mark.parametrize("student", [STUDENT, nnx_model()], ids=["linen", "nnx"])
def test_student_comes_closer_to_its_teacher(student, teacher_params, batch):
    update = optimizer(OptimizerConfig(learning_rate=0.03, warmup_steps=5), 60)
    terms = terms_of(ObjectiveConfig(temperature=2.0))
    steps = jax.jit(scan_steps(make_train_step(student, terms, update, teacher=TEACHER)))
    state = init_state(student.init(jax.random.key(0)), update)
    new, metrics = steps(state, teacher_params, batch, jnp.tile(jnp.arange(8), (60, 1)))
    kl = np.asarray(metrics["forward_kl"][0] / metrics["forward_kl"][1])
    assert kl[-1] < 0.2 * kl[0]
    assert jax.tree.structure(new.params) == jax.tree.structure(state.params)


def test_a_custom_term_is_trained_on(teacher_params, batch):
    term = Term(
        "squared_error", 2.0, BOTH_LOGITS, lambda v: jnp.mean((v.student_logits - v.teacher_logits) ** 2, axis=-1)
    )
    step = jax.jit(make_train_step(STUDENT, [term], optax.sgd(0.01), teacher=TEACHER))
    state = init_state(random_params(STUDENT), optax.sgd(0.01))
    state, first = step(state, teacher_params, batch)
    _, second = step(state, teacher_params, batch)
    assert means(first)["loss"] == pytest.approx(2.0 * means(first)["squared_error"], rel=1e-5)
    assert means(second)["loss"] < means(first)["loss"]


def test_invalid_steps_are_refused(state, batch):
    with pytest.raises(ValueError, match="no terms"):
        make_train_step(STUDENT, [], SGD)
    with pytest.raises(ValueError, match="needs a teacher"):
        make_train_step(STUDENT, TERMS, SGD)(state, None, batch)
    with pytest.raises(ValueError, match="batch of 8 cannot be split into 3"):
        make_train_step(STUDENT, [task_term()], SGD, micro_batches=3)(state, None, batch)
