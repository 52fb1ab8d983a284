"""Every divergence at logits of 1e4, temperatures of 0.05 to 20 and ruled-out tokens, against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_losses as twins
from builders import values_and_slopes
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import losses
from distill.objective import DIVERGENCES, ObjectiveConfig

ROWS, VOCAB = 4, 7
CASES = {
    "forward_kl": (losses.forward_kl, twins.forward_kl, {}),
    "reverse_kl": (losses.reverse_kl, lambda s, t, T, _: twins.forward_kl(t, s, T, None), {}),
    "generalized_jsd": (losses.generalized_jsd, None, {}),
    "skewed_forward_kl": (losses.skewed_forward_kl, twins.skewed_forward_kl(0.1), {}),
    "skewed_reverse_kl": (losses.skewed_reverse_kl, twins.skewed_reverse_kl(0.1), {}),
    "total_variation": (losses.total_variation, twins.total_variation, {}),
    "jeffreys": (losses.jeffreys, twins.jeffreys, {}),
    "alpha_beta": (losses.alpha_beta, twins.alpha_beta(0.5, 0.5), {}),
    "alpha_beta (1, 0)": (losses.alpha_beta, twins.alpha_beta(1.0, 0.0), {"alpha": 1.0, "beta": 0.0}),
    "alpha_beta (0, 0)": (losses.alpha_beta, twins.alpha_beta(0.0, 0.0), {"alpha": 0.0, "beta": 0.0}),
    "alpha_divergence": (losses.alpha_divergence, twins.alpha_divergence(0.5), {}),
    "renyi": (losses.renyi, twins.renyi(0.5), {}),
    "renyi 2": (losses.renyi, twins.renyi(2.0), {"alpha": 2.0}),
    "adaptive_kl": (losses.adaptive_kl, twins.adaptive_kl(0.5), {}),
    "entropy_aware_kl": (losses.entropy_aware_kl, twins.entropy_aware_kl, {}),
    "taid": (losses.taid, twins.taid(0.5), {}),
    "logit_mse": (losses.logit_mse, twins.logit_mse, {}),
    "pearson": (losses.pearson, twins.pearson, {}),
}
BOUNDED = ("generalized_jsd", "skewed_forward_kl", "skewed_reverse_kl", "total_variation", "pearson")
MEASURED = {name: partial(function, **options) for name, (function, _, options) in CASES.items()}

PAIRS = st.tuples(
    st.integers(0, 2**20),  # seed
    st.sampled_from([0.1, 3.0, 100.0, 1e4]),  # size of the logits
    st.sampled_from([0.05, 0.3, 1.0, 7.0, 20.0]),  # temperature
    st.integers(0, 3),  # tokens ruled out on both sides
    st.sampled_from([0.0, 1e4]),  # a constant on all logits
)


def drawn(seed, scale, ruled_out, offset):
    rng = np.random.default_rng(seed)
    pair = [(scale * rng.standard_normal((ROWS, VOCAB)) + offset).astype(np.float32) for _ in range(2)]
    for logits in pair:
        logits[:, VOCAB - ruled_out :] = -np.inf
    return pair


def test_every_divergence_of_the_objective_is_here():
    assert {function for function, *_ in CASES.values()} == set(DIVERGENCES.values())


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(PAIRS)
def test_values_are_finite_where_float64_is_and_gradients_sum_to_zero(name, case):
    seed, scale, temperature, ruled_out, offset = case
    student, teacher = drawn(seed, scale, ruled_out, offset)
    nats, slopes = values_and_slopes(MEASURED[name], student, teacher, traced={"temperature": jnp.float32(temperature)})
    twin = CASES[name][1]
    if twin is not None:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            want = twins.without_impossible_tokens(twin)[0](student, teacher, temperature)
        held = np.isfinite(want) & (np.abs(want) < 1e37)
        assert np.isfinite(nats[held]).all(), (nats, want)
        rounding = 2e-6 + 2.0**-20 * (scale + (offset if name in BOUNDED else 0.0)) / temperature
        squared = 2.0**-18 if name in ("alpha_beta (0, 0)", "logit_mse") else 2e-5
        np.testing.assert_allclose(nats[held], want[held], rtol=squared, atol=rounding)
    assert not np.isnan(nats).any() and np.isfinite(slopes).all()
    largest = np.max(np.abs(slopes), axis=-1)
    assert (np.abs(np.sum(np.float64(slopes), axis=-1)) <= 1e-3 * largest + 1e-6 / temperature).all()


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=8, deadline=None, database=None, derandomize=True)
@given(PAIRS)
def test_equal_distributions_cost_nothing(name, case):
    seed, scale, temperature, ruled_out, offset = case
    logits, _ = drawn(seed, scale, ruled_out, offset)
    nats, _ = values_and_slopes(MEASURED[name], logits, logits, traced={"temperature": jnp.float32(temperature)})
    np.testing.assert_allclose(nats, 0.0, atol=2e-6)


@pytest.mark.parametrize("powers", [(-2.0, 1.0), (-0.5, -0.5), (0.5, -0.5), (2.0, -1.0), (0.0, -1.0), (-1.0, 0.0)])
def test_alpha_beta_of_equal_distributions_is_0_at_negative_powers(powers):
    alpha, beta = powers
    logits = np.float32([[0.0, -100.0, -200.0, 3.0], [0.0, -1e4, 1e4, -np.inf]])
    function = partial(losses.alpha_beta, alpha=alpha, beta=beta)
    nats, slopes = values_and_slopes(function, logits, logits)
    np.testing.assert_array_equal(nats, 0.0)
    np.testing.assert_array_equal(slopes, 0.0)
    near = np.float32([[0.0, -100.0]])
    apart = near + np.float32([[0.0, 1e-4]])  # as float32 holds it
    want = twins.alpha_beta(alpha, beta)(np.float64(apart), np.float64(near), 1.0, None)
    if want[0] < 1e37:
        np.testing.assert_allclose(values_and_slopes(function, apart, near)[0], want, rtol=0.2, atol=1e-8)


@pytest.mark.parametrize("name", ["forward_kl", "jeffreys", "alpha_beta", "adaptive_kl", "entropy_aware_kl", "taid"])
def test_the_chunked_head_agrees_at_extremes(name):
    """Value and gradient against all logits at once; the last column of the kernel is padding."""
    function, student, teacher = MEASURED[name], *(jnp.asarray(x[:, :6]) for x in drawn(3, 1e4, 0, 0.0))
    head, mask = losses.Head(jnp.eye(6, 7), vocab_size=6), jnp.asarray([True, True, False, True])

    def loss(s, t, _):
        return function(s, t, temperature=0.05)

    def total(hidden):
        return losses.chunked(loss, (hidden, head), (teacher, head), jnp.zeros(ROWS), mask, chunk_size=3)[0]

    got, slopes = jax.jit(jax.value_and_grad(total))(student)
    nats, want = values_and_slopes(loss_without_inputs(loss), student, teacher)
    np.testing.assert_allclose(got, np.sum(np.asarray(nats)[np.asarray(mask)]), rtol=1e-5)
    np.testing.assert_allclose(slopes, np.where(mask[:, None], want, 0.0), rtol=1e-4, atol=1e-3)


def loss_without_inputs(loss):
    return lambda student, teacher: loss(student, teacher, None)


# R has no token where each side rules out what the other allows.
def test_the_interpolated_teacher_of_disjoint_supports_does_not_exist():
    student, teacher = jnp.array([0.0, -jnp.inf]), jnp.array([-jnp.inf, 0.0])
    assert jnp.isnan(losses.taid(student, teacher))
    assert losses.taid(student, teacher, interpolation=0.0) == 0.0
    assert losses.taid(student, teacher, interpolation=1.0) == jnp.inf


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_number_that_is_no_temperature_is_refused(temperature):
    x = jnp.zeros((2, 3))
    stored = losses.top_k_targets(x, 2), losses.sample_targets(jax.random.key(0), x, 2)
    calls = [partial(function, x, x) for function in DIVERGENCES.values()]
    calls += [partial(losses.top_k_forward_kl, x, x, k=2), partial(losses.top_k_targets, x, 2)]
    calls += [partial(losses.sample_targets, jax.random.key(0), x, 2), partial(losses.sparse, losses.forward_kl, x)]
    for call in calls:
        with pytest.raises(ValueError, match=r"temperature=.*; expected a finite number above 0"):
            call(temperature=temperature) if call.func is not losses.sparse else call(
                stored[0], temperature=temperature
            )
    for targets in stored:
        with pytest.raises(ValueError, match="temperature="):
            losses.from_targets(losses.forward_kl, x, targets, temperature=temperature)
    for name in ("temperature", "final_temperature"):
        with pytest.raises(ValueError, match=f"objective: {name}=.*; expected a finite number"):
            ObjectiveConfig(**({"final_temperature": 2.0, "schedule_steps": 5} | {name: temperature}))


def test_taid_without_a_teacher_in_it_is_refused():
    with pytest.raises(ValueError, match="taid with interpolation=0.0"):
        ObjectiveConfig("taid", interpolation=0.0)
    assert ObjectiveConfig("taid", interpolation=0.0, final_interpolation=1.0, schedule_steps=5).scheduled
