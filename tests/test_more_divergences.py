"""Divergences beyond the KLs and the JSD: values by hand, limits, relations, refused hyperparameters."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_losses as twins

from distill import losses

P, Q = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.3, 0.5])
TEACHER, STUDENT = (jnp.log(jnp.asarray(probabilities, jnp.float32)) for probabilities in (P, Q))
WHOLE, PART = jnp.array([0.3, -0.2, 1.0]), jnp.array([0.5, 0.1, -jnp.inf])


def pair(seed=0, scale=2.0, shape=(20, 7)):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for _ in range(2))


def gradient(function, student, teacher, **options):
    return jax.grad(lambda s: jnp.sum(function(s, teacher, **options)))(student)


def same(one, other, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


# ---- by hand


@pytest.mark.parametrize(
    ("function", "options", "expected"),
    [
        (losses.skewed_forward_kl, {"alpha": 0.25}, np.sum(P * np.log(P / (0.25 * P + 0.75 * Q)))),
        (losses.skewed_reverse_kl, {"alpha": 0.25}, np.sum(Q * np.log(Q / (0.75 * P + 0.25 * Q)))),
        (losses.total_variation, {}, 0.4),
        (losses.jeffreys, {}, 0.4 * np.log(3.0) + 0.4 * np.log(5.0)),
        (losses.alpha_beta, {"alpha": 1.0, "beta": 1.0}, (0.16 + 0.0 + 0.16) / 2),
        (losses.alpha_beta, {"alpha": 0.5, "beta": 0.5}, 4 * (1 - np.sum(np.sqrt(P * Q)))),
        (losses.alpha_beta, {"alpha": 2.0, "beta": 0.0}, np.sum(P**2 * np.log(P**2 / Q**2) - P**2 + Q**2) / 4),
        (losses.alpha_beta, {"alpha": 0.0, "beta": 2.0}, np.sum(Q**2 * np.log(Q**2 / P**2) - Q**2 + P**2) / 4),
        (losses.alpha_beta, {"alpha": 0.5, "beta": -0.5}, 4 * np.sum(np.log(np.sqrt(Q / P)) + np.sqrt(P / Q) - 1)),
        (losses.alpha_beta, {"alpha": 0.0, "beta": 0.0}, np.sum(np.log(P / Q) ** 2) / 2),
        (losses.alpha_divergence, {"alpha": 2.0}, np.sum((P - Q) ** 2 / Q) / 2),
        (losses.alpha_divergence, {"alpha": -1.0}, np.sum((P - Q) ** 2 / P) / 2),
        (losses.renyi, {"alpha": 0.5}, -2 * np.log(np.sum(np.sqrt(P * Q)))),
        (losses.renyi, {"alpha": 3.0}, np.log(np.sum(P**3 / Q**2)) / 2),
        # the first token alone exceeds μ = .5 with .6 and is the head; gaps .4 and 0 + .4
        (losses.adaptive_kl, {"mu": 0.5}, (np.sum(P * np.log(P / Q)) + np.sum(Q * np.log(Q / P))) / 2),
        (losses.pearson, {}, 1 - np.corrcoef(P, Q)[0, 1]),
        (losses.logit_mse, {}, np.mean((np.log(P / Q) - np.mean(np.log(P / Q))) ** 2) / 2),
        (losses.top_k_forward_kl, {"k": 1}, 0.6 * np.log(0.6 / 0.2) + 0.4 * np.log(0.4 / 0.8)),
    ],
)
def test_three_tokens_match_numbers_by_hand(function, options, expected):
    same(function(STUDENT, TEACHER, **options), expected, atol=0.0)


# Alpha is the share of the first argument of the KL in the mixture.
def test_skew_is_the_share_of_the_first_argument_of_the_kl():
    student, teacher = jnp.array([-jnp.inf, 0.0]), jnp.array([0.0, -jnp.inf])
    for alpha in (0.1, 0.9):
        for function in (losses.skewed_forward_kl, losses.skewed_reverse_kl):
            same(function(student, teacher, alpha=alpha), np.log(1 / alpha))
    same(losses.skewed_forward_kl(*pair(), alpha=0.2), losses.skewed_reverse_kl(*pair()[::-1], alpha=0.2))


def test_adaptive_weights_follow_the_gaps():
    p, q = np.array([0.3, 0.28, 0.22, 0.2]), np.array([0.1, 0.2, 0.3, 0.4])  # head: tokens 0 (.30), but not 1 (.58)
    forward, reverse = np.sum(p * np.log(p / q)), np.sum(q * np.log(q / p))
    student, teacher = jnp.log(jnp.asarray(q, jnp.float32)), jnp.log(jnp.asarray(p, jnp.float32))
    shuffled = jnp.array([2, 0, 3, 1])
    for mu, head in ((0.5, 0.2), (0.6, 0.28), (0.9, 0.36)):
        share = head / 0.56
        same(losses.adaptive_kl(student, teacher, mu=mu), share * forward + (1 - share) * reverse)
        same(losses.adaptive_kl(student[shuffled], teacher[shuffled], mu=mu), share * forward + (1 - share) * reverse)


def test_weights_from_the_logits_carry_no_gradient():
    student, teacher = pair(3)
    forward, reverse = (gradient(f, student, teacher) for f in (losses.forward_kl, losses.reverse_kl))
    p, q = jax.nn.softmax(teacher), jax.nn.softmax(student)
    entropy = -jnp.sum(p * jnp.log(p), axis=-1, keepdims=True) / np.log(7)
    same(gradient(losses.entropy_aware_kl, student, teacher), entropy * forward + (1 - entropy) * reverse)
    order = jnp.argsort(-p, axis=-1)
    sorted_p, gaps = (jnp.take_along_axis(x, order, axis=-1) for x in (p, jnp.abs(p - q)))
    head = (jnp.cumsum(sorted_p, axis=-1) <= 0.5) | (jnp.arange(7) == 0)[None]
    share = jnp.sum(gaps * head, axis=-1, keepdims=True) / jnp.sum(gaps, axis=-1, keepdims=True)
    same(gradient(losses.adaptive_kl, student, teacher), share * forward + (1 - share) * reverse)


def test_entropy_aware_kl_is_reverse_for_certain_and_forward_for_uniform_teachers():
    student, _ = pair(4)
    uniform, certain = jnp.zeros_like(student), 30.0 * jax.nn.one_hot(jnp.arange(20) % 7, 7)
    same(losses.entropy_aware_kl(student, uniform), losses.forward_kl(student, uniform))
    same(losses.entropy_aware_kl(student, certain), losses.reverse_kl(student, certain), rtol=1e-4)
    only = jnp.where(certain > 0.0, 0.0, -jnp.inf)
    same(losses.entropy_aware_kl(only, only), 0.0)


def test_the_interpolated_teacher_is_the_student_at_0_and_the_teacher_at_1():
    student, teacher = pair(5)
    for temperature in (1.0, 4.0):
        options = {"temperature": temperature}
        same(losses.taid(student, teacher, interpolation=0.0, **options), 0.0)
        same(
            losses.taid(student, teacher, interpolation=1.0, **options), losses.forward_kl(student, teacher, **options)
        )
    middle = 0.75 * student + 0.25 * teacher  # mixes logits, and is constant to the gradient
    same(losses.taid(student, teacher, interpolation=0.25), losses.forward_kl(student, middle))
    same(gradient(losses.taid, student, teacher, interpolation=0.25), gradient(losses.forward_kl, student, middle))
    traced = jax.jit(lambda t: losses.taid(student, teacher, interpolation=t))(jnp.float32(0.25))
    same(traced, losses.taid(student, teacher, interpolation=0.25))
    for t in (0.0, 1.0):
        assert np.isfinite(losses.taid(WHOLE, PART, interpolation=t))


def test_pearson_ignores_shift_and_scale():
    p = jax.nn.softmax(pair(6)[0])
    flatter, opposite = jnp.log(0.5 * p + 0.5 / 7), jnp.log((1.0 - p) / 6)
    same(losses.pearson(flatter, jnp.log(p)), 0.0)
    same(losses.pearson(opposite, jnp.log(p)), 2.0)
    uniform = jnp.zeros(7)
    assert losses.pearson(uniform, uniform) == 0.0 and losses.pearson(uniform, jnp.log(p[0])) == 1.0
    np.testing.assert_array_equal(gradient(losses.pearson, uniform, jnp.log(p[0])), 0.0)


# A constant added to all logits of a row changes no probability.
def test_logit_mse_ignores_a_constant_and_one_sided_impossible_tokens():
    student, teacher = pair(7)
    same(losses.logit_mse(student + 100.0, teacher - 30.0), losses.logit_mse(student, teacher), rtol=1e-4)
    assert np.max(losses.logit_mse(teacher + 5.0, teacher)) < 1e-10
    same(losses.logit_mse(WHOLE, PART), losses.logit_mse(WHOLE[:2], PART[:2]))
    np.testing.assert_array_equal(losses.logit_mse(PART, jnp.array([-jnp.inf, -jnp.inf, 0.0])), 0.0)


def test_logit_mse_is_the_kl_of_a_high_temperature():
    student, teacher = pair(8, scale=1.0)
    for function in (losses.forward_kl, losses.reverse_kl):
        high = 50.0**2 * function(student, teacher, temperature=50.0)  # the remainder is of order 1/T
        same(high, losses.logit_mse(student, teacher), rtol=0.05)


# ---- limits and relations


def test_limits_of_the_families_are_the_kls():
    student, teacher = pair(1)
    forward, reverse = losses.forward_kl(student, teacher), losses.reverse_kl(student, teacher)
    assert not np.allclose(forward, reverse, rtol=0.05)
    for ours, theirs in (
        (losses.skewed_forward_kl(student, teacher, alpha=0.0), forward),
        (losses.skewed_reverse_kl(student, teacher, alpha=0.0), reverse),
        (losses.alpha_beta(student, teacher, alpha=1.0, beta=0.0), forward),
        (losses.alpha_beta(student, teacher, alpha=0.0, beta=1.0), reverse),
        (losses.alpha_divergence(student, teacher, alpha=1.0), forward),
        (losses.alpha_divergence(student, teacher, alpha=0.0), reverse),
        (losses.renyi(student, teacher, alpha=1.0), forward),
        (losses.top_k_forward_kl(student, teacher, k=6), forward),
        (losses.top_k_forward_kl(student, teacher, k=7), forward),
        (losses.jeffreys(student, teacher), forward + reverse),
    ):
        same(ours, theirs)


def test_families_are_continuous_where_the_formula_changes():
    student, teacher = pair(2, scale=1.0)

    def close(function, near, limit):
        same(function(student, teacher, **near), function(student, teacher, **limit), rtol=0.02, atol=1e-4)
        slopes = (gradient(function, student, teacher, **options) for options in (near, limit))
        same(*slopes, rtol=0.05, atol=0.02)

    close(losses.skewed_forward_kl, {"alpha": 1e-4}, {"alpha": 0.0})
    close(losses.skewed_reverse_kl, {"alpha": 1e-4}, {"alpha": 0.0})
    close(losses.renyi, {"alpha": 0.998}, {"alpha": 1.0})
    close(losses.renyi, {"alpha": 1.002}, {"alpha": 1.0})
    close(losses.alpha_divergence, {"alpha": 0.002}, {"alpha": 0.0})
    for near, limit in (
        ((1.0, 2e-3), (1.0, 0.0)),
        ((2e-3, 1.0), (0.0, 1.0)),
        ((0.5, -0.498), (0.5, -0.5)),
        ((2e-3, 2e-3), (0.0, 0.0)),
    ):
        close(losses.alpha_beta, *({"alpha": a, "beta": b} for a, b in (near, limit)))


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, -0.5), (2.0, -1.0), (-0.5, 1.5), (1.5, 0.5), (0.3, -0.7)])
def test_negative_powers(alpha, beta):
    value, slope = twins.without_impossible_tokens(twins.alpha_beta(alpha, beta))
    student, teacher = pair(9)
    got = losses.alpha_beta(student, teacher, alpha=alpha, beta=beta)
    assert np.min(got) >= 0.0
    same(got, value(student, teacher))
    same(gradient(losses.alpha_beta, student, teacher, alpha=alpha, beta=beta), slope(student, teacher), rtol=1e-4)


def test_exchanging_sides_exchanges_the_powers():
    student, teacher = pair(10)
    for a, b in ((0.2, 0.7), (1.0, 0.0), (0.4, -0.4), (0.0, 0.5)):
        there = losses.alpha_beta(student, teacher, alpha=a, beta=b)
        same(there, losses.alpha_beta(teacher, student, alpha=b, beta=a))
    for function in (losses.total_variation, losses.jeffreys, losses.alpha_divergence, losses.renyi, losses.pearson):
        same(function(student, teacher), function(teacher, student))


def test_inequalities_between_divergences():
    student, teacher = pair(11, scale=3.0, shape=(200, 9))
    forward, distance = losses.forward_kl(student, teacher), losses.total_variation(student, teacher)
    assert np.all(2 * distance**2 <= forward * (1 + 1e-5)) and np.max(distance) <= 1.0  # Pinsker
    orders = [losses.renyi(student, teacher, alpha=alpha) for alpha in (0.5, 1.0, 2.0, 10.0)]
    assert all(np.all(low <= high * (1 + 1e-5) + 1e-6) for low, high in pairwise(orders))
    for alpha in (0.05, 0.5):
        skewed = losses.skewed_forward_kl(student, teacher, alpha=alpha)
        assert np.max(skewed) <= np.log(1 / alpha) and np.all(skewed <= (1 - alpha) * forward * (1 + 1e-5))
    buckets = [losses.top_k_forward_kl(student, teacher, k=k) for k in (1, 3, 7, 9)]
    assert all(np.all(low <= high * (1 + 1e-5) + 1e-6) for low, high in pairwise(buckets))


# For close distributions the terms are small and their sum is smaller; it must survive rounding.
@pytest.mark.parametrize("distance", [0.1, 0.01])
def test_close_distributions_keep_four_digits(distance):
    student, teacher = pair(12, scale=1.0, shape=(30, 40))
    student = teacher + distance * student
    for function, twin, options in (
        (losses.alpha_beta, twins.alpha_beta(0.2, 0.7), {"alpha": 0.2, "beta": 0.7}),
        (losses.alpha_divergence, twins.alpha_divergence(0.5), {}),
        (losses.renyi, twins.renyi(2.0), {"alpha": 2.0}),
        (losses.pearson, twins.pearson, {}),
        (losses.logit_mse, twins.logit_mse, {}),
    ):
        value, _ = twins.without_impossible_tokens(twin)
        same(function(student, teacher, **options), value(student, teacher), rtol=1e-4, atol=0.0)


# ---- tokens impossible on one side


@pytest.mark.parametrize(
    ("function", "options", "finite"),
    [  # (student lacks a token of the teacher, teacher lacks a token of the student)
        (losses.skewed_forward_kl, {}, (True, True)),
        (losses.skewed_reverse_kl, {}, (True, True)),
        (losses.total_variation, {}, (True, True)),
        (losses.jeffreys, {}, (False, False)),
        (losses.alpha_beta, {}, (True, True)),
        (losses.alpha_beta, {"alpha": 1.0, "beta": 0.0}, (False, True)),
        (losses.alpha_beta, {"alpha": 0.0, "beta": 1.0}, (True, False)),
        (losses.alpha_beta, {"alpha": 0.0, "beta": 0.0}, (False, False)),
        (losses.alpha_divergence, {}, (True, True)),
        (losses.alpha_divergence, {"alpha": 2.0}, (False, True)),
        (losses.renyi, {}, (True, True)),
        (losses.renyi, {"alpha": 2.0}, (False, True)),
        (losses.adaptive_kl, {}, (False, False)),
        (losses.taid, {}, (True, True)),
        (losses.logit_mse, {}, (True, True)),
        (losses.pearson, {}, (True, True)),
        (losses.top_k_forward_kl, {"k": 1}, (False, True)),
        (losses.top_k_forward_kl, {"k": 3}, (False, True)),
    ],
)
def test_one_sided_zeros_are_infinite_where_the_definition_is(function, options, finite):
    for (student, teacher), expected in zip(((PART, WHOLE), (WHOLE, PART)), finite, strict=True):
        nats = function(student, teacher, **options)
        assert not np.isnan(nats) and bool(np.isfinite(nats)) == expected
        assert np.all(np.isfinite(gradient(function, student, teacher, **options)))
    nearly = jnp.array([0.5, 0.1, -60.0])  # finite values are limits of small probabilities
    for (student, teacher), (near_s, near_t), expected in zip(
        ((PART, WHOLE), (WHOLE, PART)), ((nearly, WHOLE), (WHOLE, nearly)), finite, strict=True
    ):
        if expected and function not in (losses.logit_mse, losses.taid):
            same(function(student, teacher, **options), function(near_s, near_t, **options), rtol=1e-4)


def test_disjoint_supports():
    student, teacher = jnp.array([-jnp.inf, 0.0]), jnp.array([0.0, -jnp.inf])
    assert losses.renyi(student, teacher) == jnp.inf and losses.renyi(student, teacher, alpha=2.0) == jnp.inf
    same(losses.alpha_divergence(student, teacher), 4.0)
    same(losses.total_variation(student, teacher), 1.0)
    for function in (losses.renyi, losses.alpha_divergence, losses.total_variation):
        assert np.all(np.isfinite(gradient(function, student, teacher)))


# A ratio that float32 cannot hold is infinite; its gradient is not NaN.
def test_ratios_beyond_float32_are_infinite_without_nan_gradients():
    student, teacher = jnp.array([0.0, -500.0, 3.0]), jnp.array([-500.0, 0.0, 3.0])
    for options in ({"alpha": 2.0}, {"alpha": -1.0}):
        assert losses.alpha_divergence(student, teacher, **options) == jnp.inf
        assert np.all(np.isfinite(gradient(losses.alpha_divergence, student, teacher, **options)))
    same(
        losses.renyi(student, teacher, alpha=2.0),
        twins.renyi(2.0)(*(np.float64(x) for x in (student, teacher)), 1.0, 0),
    )
    for a, b in ((-0.5, -0.5), (0.5, -0.5), (-1.0, 0.5)):
        assert not np.isnan(losses.alpha_beta(student, teacher, alpha=a, beta=b))
        assert np.all(np.isfinite(gradient(losses.alpha_beta, student, teacher, alpha=a, beta=b)))


# ---- refused


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (losses.skewed_forward_kl, {"alpha": 1.0}, r"skewed_forward_kl: alpha=1.0; expected"),
        (losses.skewed_reverse_kl, {"alpha": -0.1}, r"skewed_reverse_kl: alpha=-0.1; expected"),
        (losses.alpha_beta, {"alpha": 1e-5, "beta": 1.0}, r"alpha_beta: alpha=1e-05 .*expected 0, whose limit"),
        (losses.alpha_beta, {"alpha": 1.0, "beta": float("nan")}, r"beta=nan"),
        (losses.alpha_beta, {"alpha": 0.5, "beta": -0.5001}, r"alpha \+ beta="),
        (losses.alpha_divergence, {"alpha": 0.99999}, r"alpha_divergence: alpha=0.99999; expected"),
        (losses.alpha_divergence, {"alpha": float("inf")}, r"alpha=inf"),
        (losses.renyi, {"alpha": 0.0}, r"renyi: alpha=0.0; expected a number above 0"),
        (losses.renyi, {"alpha": -2.0}, r"alpha=-2.0"),
        (losses.adaptive_kl, {"mu": 0.0}, r"adaptive_kl: mu=0.0; expected"),
        (losses.adaptive_kl, {"mu": 1.0}, r"mu=1.0"),
        (losses.taid, {"interpolation": 1.5}, r"taid: interpolation=1.5; expected"),
        (losses.top_k_forward_kl, {"k": 0}, r"k=0; expected 1 ≤ k ≤ 3"),
        (losses.top_k_forward_kl, {"k": 4}, r"k=4; expected 1 ≤ k ≤ 3"),
    ],
)
def test_bad_hyperparameters_are_refused(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(STUDENT, TEACHER, **options)
