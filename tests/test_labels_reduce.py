"""Hard-label cross-entropy and the (sum, weight) pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from distill import losses

OPTIONS = ({}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.3, "z_loss": 1e-4})
SCALES = {"small": 0.3, "large": 10.0, "shifted": 3.0, "extreme": 1e4}


def case(kind, dtype, shape=(2, 3, 7)):
    rng = np.random.default_rng(0)
    scale = SCALES[kind]
    logits = rng.uniform(-scale, scale, shape) + (1e4 if kind == "shifted" else 0.0)
    return jnp.asarray(logits, dtype), jnp.asarray(rng.integers(0, shape[-1], shape[:-1]), jnp.int32)


def float64(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


def gradient(logits, labels, **options):
    return jax.grad(lambda x: jnp.sum(losses.cross_entropy(x, labels, **options)))(logits)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("options", OPTIONS)
def test_values_equal_float64(kind, dtype, options):
    logits, labels = case(kind, dtype)
    nats = losses.cross_entropy(logits, labels, **options)
    assert nats.shape == labels.shape and nats.dtype == jnp.float32
    want = reference.cross_entropy(float64(logits), labels, **options)
    np.testing.assert_allclose(nats, want, rtol=1e-5, atol=1e-6)


# Fault: right value, wrong gradient.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_equal_float64(kind, dtype, options):
    logits, labels = case(kind, dtype)
    got = gradient(logits, labels, **options)
    want = reference.cross_entropy_gradient(float64(logits), labels, **options)
    rtol = 1e-4 if dtype == jnp.float32 else 2.0**-8  # the gradient itself is returned in bf16
    np.testing.assert_allclose(float64(got), want, rtol=rtol, atol=1e-6)


def test_reference_gradient_is_a_finite_difference():
    rng = np.random.default_rng(1)
    logits, labels, step = rng.normal(size=(4, 5)), np.array([0, 2, 4, 1]), 1e-6
    for options in OPTIONS:
        slopes = np.empty_like(logits)
        for v in range(5):
            move = step * np.eye(5)[v]
            ahead = reference.cross_entropy(logits + move, labels, **options)
            slopes[:, v] = (ahead - reference.cross_entropy(logits - move, labels, **options)) / (2 * step)
        np.testing.assert_allclose(
            reference.cross_entropy_gradient(logits, labels, **options), slopes, rtol=1e-4, atol=1e-8
        )


def test_label_smoothing_matches_numbers_by_hand():
    logits = jnp.log(jnp.array([0.7, 0.2, 0.1]))
    want = -(0.9 + 0.1 / 3) * np.log(0.7) - 0.1 / 3 * (np.log(0.2) + np.log(0.1))
    np.testing.assert_allclose(losses.cross_entropy(logits, jnp.array(0), label_smoothing=0.1), want, rtol=1e-6)


def test_z_loss_matches_numbers_by_hand():
    logits = jnp.log(jnp.array([2.0, 3.0, 5.0]))  # Z = 10
    want = -np.log(0.5) + 0.25 * np.log(10) ** 2
    np.testing.assert_allclose(losses.cross_entropy(logits, jnp.array(2), z_loss=0.25), want, rtol=1e-6)


# Fault: tokens that cannot occur give NaN.
def test_impossible_tokens_are_as_if_absent():
    logits, labels = case("large", jnp.float32)
    labels = labels % 5
    masked = logits.at[..., 5:].set(-jnp.inf)
    np.testing.assert_allclose(
        losses.cross_entropy(masked, labels), losses.cross_entropy(logits[..., :5], labels), rtol=1e-6
    )
    got = gradient(masked, labels)
    np.testing.assert_allclose(got[..., :5], gradient(logits[..., :5], labels), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got[..., 5:], 0.0)


@pytest.mark.parametrize("label", [-1, -100, 7, 1000])
def test_a_label_outside_the_vocabulary_gives_nan(label):
    logits, _ = case("small", jnp.float32)
    assert np.all(np.isnan(losses.cross_entropy(logits, jnp.full((2, 3), label))))


@pytest.mark.parametrize(("dtype", "vocab"), [(jnp.int8, 300), (jnp.int16, 40_000)])
def test_labels_of_narrow_dtypes_equal_wide_ones(dtype, vocab):
    logits, _ = case("large", jnp.float32, (4, vocab))
    labels = jnp.array([0, 7, 99, 127])
    few = labels.astype(dtype)
    np.testing.assert_array_equal(losses.cross_entropy(logits, few), losses.cross_entropy(logits, labels))
    np.testing.assert_array_equal(gradient(logits, few), gradient(logits, labels))
    assert np.all(np.isnan(losses.cross_entropy(logits, jnp.full(4, -1, dtype))))


def test_derivatives_allocate_no_further_array():
    logits, labels = case("large", jnp.float32, (4, 32))
    program = jax.jit(gradient).lower(logits, labels).compile().as_text()
    assert "exponential" in program and "scatter" not in program
    # forward mode and second order: diag(q) − q qᵀ, independent of the label
    tangent = jnp.cos(logits)
    slope = jax.jvp(lambda x: losses.cross_entropy(x, labels), (logits,), (tangent,))[1]
    np.testing.assert_allclose(slope, jnp.sum(gradient(logits, labels) * tangent, axis=-1), rtol=1e-5, atol=1e-6)
    q = np.asarray(jax.nn.softmax(logits[0]), np.float64)
    hessian = jax.hessian(lambda x: losses.cross_entropy(x, labels[0]))(logits[0])
    np.testing.assert_allclose(hessian, np.diag(q) - np.outer(q, q), atol=1e-6)


@pytest.mark.parametrize("options", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_loss": -1e-4}])
def test_options_outside_their_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        losses.cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32), **options)


def test_shapes_are_checked():
    with pytest.raises(Exception, match="(?i)type-check"):
        losses.cross_entropy(jnp.zeros((2, 3)), jnp.zeros((3,), jnp.int32))
    with pytest.raises(Exception, match="(?i)type-check"):
        losses.cross_entropy(jnp.zeros((2, 3)), jnp.zeros((2,), jnp.float32))
    with pytest.raises(Exception, match="(?i)type-check"):
        losses.masked_sum(jnp.zeros((2, 3)), jnp.ones((2, 3), jnp.int32))
    with pytest.raises(Exception, match="(?i)type-check"):
        losses.masked_sum(jnp.zeros((2, 3)), jnp.ones((2, 1), bool))


# ---- (sum, weight)


# Fault: loss * mask propagates NaN and −inf.
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_positions_that_do_not_count_have_no_effect(garbage):
    values, mask = jnp.array([1.5, garbage, 2.0, garbage]), jnp.array([True, False, True, False])
    assert [float(x) for x in losses.masked_sum(values, mask)] == [3.5, 2.0]
    slope = jax.grad(lambda v: losses.masked_sum(v, mask)[0])(values)
    np.testing.assert_array_equal(slope, [1.0, 0.0, 1.0, 0.0])


def test_mask_is_slicing():
    rng = np.random.default_rng(2)
    values, mask = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), jnp.asarray(rng.random((6, 5)) < 0.4)
    total, weight = losses.masked_sum(values, mask)
    np.testing.assert_allclose(total, np.sum(np.asarray(values, np.float64)[np.asarray(mask)]), rtol=1e-5)
    assert float(weight) == np.sum(mask)


# Pairs are added and divided once; a mean of means differs.
def test_pairs_of_parts_add_up_to_the_whole():
    rng = np.random.default_rng(3)
    values = jnp.asarray(rng.normal(size=(4, 6)) + np.arange(4)[:, None], jnp.float32)
    mask = jnp.asarray(np.arange(6) < np.array([[1], [2], [3], [6]]))
    parts = [losses.masked_sum(v, m) for v, m in zip(values, mask, strict=True)]
    together = losses.divide(jax.tree.map(lambda *leaves: sum(leaves), *parts))
    np.testing.assert_allclose(together, losses.divide(losses.masked_sum(values, mask)), rtol=1e-6)
    assert abs(float(together) - np.mean([losses.divide(part) for part in parts])) > 0.1


# Sums of bf16 values are float32 sums.
def test_sums_are_float32_for_every_dtype():
    total, weight = losses.masked_sum(jnp.ones(1000, jnp.bfloat16), jnp.ones(1000, bool))
    assert total.dtype == weight.dtype == jnp.float32 and float(total) == float(weight) == 1000.0


# Fault: everything masked gives NaN.
def test_no_counted_position_gives_zero_with_zero_gradient():
    mask = jnp.zeros(3, bool)
    value, slope = jax.value_and_grad(lambda v: losses.divide(losses.masked_sum(v, mask)))(
        jnp.array([1.0, jnp.nan, 2.0])
    )
    assert float(value) == 0.0
    np.testing.assert_array_equal(slope, 0.0)
