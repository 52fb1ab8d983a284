"""Divergences have the right direction, value and gradient at every temperature and size of logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import reference_losses as twins
from builders import values_and_slopes

from distill import losses

CLOSED_FORMS = {
    "forward_kl": (losses.forward_kl, reference.forward_kl, reference.forward_kl_gradient),
    "reverse_kl": (losses.reverse_kl, reference.reverse_kl, reference.reverse_kl_gradient),
    **{
        f"jsd_{beta}": (
            lambda s, t, *, temperature=1.0, beta=beta: losses.generalized_jsd(
                s, t, beta=beta, temperature=temperature
            ),
            lambda s, t, temperature=1.0, beta=beta: reference.generalized_jsd(s, t, beta, temperature),
            lambda s, t, temperature=1.0, beta=beta: reference.generalized_jsd_gradient(s, t, beta, temperature),
        )
        for beta in (0.1, 0.5, 0.9)
    },
}


def with_twin(function, twin, **options):
    return (partial(function, **options), *twins.without_impossible_tokens(twin))


DIVERGENCES = {
    **CLOSED_FORMS,
    "skewed_forward_kl": with_twin(losses.skewed_forward_kl, twins.skewed_forward_kl(0.1)),
    "skewed_reverse_kl": with_twin(losses.skewed_reverse_kl, twins.skewed_reverse_kl(0.3), alpha=0.3),
    "total_variation": with_twin(losses.total_variation, twins.total_variation),
    "jeffreys": with_twin(losses.jeffreys, twins.jeffreys),
    **{
        f"alpha_beta_{a}_{b}": with_twin(losses.alpha_beta, twins.alpha_beta(a, b), alpha=a, beta=b)
        for a, b in ((0.2, 0.7), (1.0, 0.0), (0.0, 0.5), (1.0, 1.0), (0.0, 0.0))
    },
    "alpha_divergence": with_twin(losses.alpha_divergence, twins.alpha_divergence(0.3), alpha=0.3),
    "renyi_0.5": with_twin(losses.renyi, twins.renyi(0.5)),
    "renyi_2": with_twin(losses.renyi, twins.renyi(2.0), alpha=2.0),
    "adaptive_kl": with_twin(losses.adaptive_kl, twins.adaptive_kl(0.5)),
    "entropy_aware_kl": with_twin(losses.entropy_aware_kl, twins.entropy_aware_kl),
    "taid": with_twin(losses.taid, twins.taid(0.3), interpolation=0.3),
    "logit_mse": with_twin(losses.logit_mse, twins.logit_mse),
    "pearson": with_twin(losses.pearson, twins.pearson),
    "top_k_forward_kl": with_twin(losses.top_k_forward_kl, twins.top_k_forward_kl(2), k=2),
}
TEMPERATURES = (0.1, 1.0, 4.0, 16.0)
GRID = (((2, 3, 7), jnp.float32), ((3, 130), jnp.float32), ((2, 3, 7), jnp.bfloat16))
KINDS = ("small", "large", "extreme", "masked")
STACKED = (len(KINDS), *GRID[0][0])  # one shape for several tests, so that they share compiled programs
EPSILON = 2.0**-24  # relative rounding error of float32


@pytest.fixture(params=DIVERGENCES)
def divergence(request):
    return DIVERGENCES[request.param]


def measured(function, student, teacher, temperature):
    """Values and gradients at a traced temperature; top_k_forward_kl stores it as a number with its targets."""
    if function is DIVERGENCES["top_k_forward_kl"][0]:
        return values_and_slopes(function, student, teacher, temperature=temperature)
    return values_and_slopes(function, student, teacher, traced={"temperature": temperature})


def gradient(function, student, teacher):
    return measured(function, student, teacher, 1.0)[1]


def logits_of(kind, shape, dtype, seed=0):
    """Student and teacher logits; with ``masked`` the last two tokens are impossible on both sides."""
    rng = np.random.default_rng(seed)
    scale = {"small": 0.3, "large": 10.0, "extreme": 1e4, "masked": 3.0}[kind]
    pair = [rng.uniform(-scale, scale, shape) for _ in range(2)]
    for logits in pair:
        if kind == "masked":
            logits[..., -2:] = -np.inf
    return tuple(jnp.asarray(logits, dtype) for logits in pair)


def every_kind(shape, dtype):
    """Student and teacher logits of all kinds, stacked: ``[kind, *shape]``."""
    pairs = [logits_of(kind, shape, dtype) for kind in KINDS]
    return tuple(jnp.stack(logits) for logits in zip(*pairs, strict=True))


def largest(logits):
    """Largest absolute finite logit."""
    return np.max(np.abs(np.where(np.isfinite(logits), logits, 0.0)))


def float64(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


# Fault: bf16 arithmetic, underflow of mixtures.
@pytest.mark.parametrize(("shape", "dtype"), GRID)
def test_values_equal_float64(divergence, shape, dtype):
    function, expected, _ = divergence
    students, teachers = every_kind(shape, dtype)
    for temperature in TEMPERATURES:
        nats, _ = measured(function, students, teachers, temperature)
        assert nats.shape == (len(KINDS), *shape[:-1]) and nats.dtype == jnp.float32
        for kind, got, student, teacher in zip(KINDS, nats, float64(students), float64(teachers), strict=True):
            rounding = 1e-6 + 8 * EPSILON * largest(student) / temperature  # the precision of float32 logits
            want, case = expected(student, teacher, temperature), f"{kind} logits, temperature {temperature}"
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=rounding, err_msg=case)


# Fault: right value, wrong gradient; NaN from −inf or from extreme logits.
@pytest.mark.parametrize(("shape", "dtype"), GRID)
def test_gradients_equal_float64(divergence, shape, dtype):
    function, _, expected = divergence
    students, teachers = every_kind(shape, dtype)
    for temperature in TEMPERATURES:
        _, slopes = measured(function, students, teachers, temperature)
        assert slopes.dtype == dtype
        rtol = 1e-4 if dtype == jnp.float32 else 2.0**-8  # the gradient itself is returned in bf16
        for kind, got, student, teacher in zip(
            KINDS, float64(slopes), float64(students), float64(teachers), strict=True
        ):
            rounding = 1e-6 + 8 * EPSILON * largest(student) / temperature**2
            want, case = expected(student, teacher, temperature), f"{kind} logits, temperature {temperature}"
            np.testing.assert_allclose(got, want, rtol=rtol, atol=rounding, err_msg=case)


# The closed-form gradients are those of the reference values.
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_reference_gradients_are_finite_differences(name):
    _, value, gradient = CLOSED_FORMS[name]
    rng = np.random.default_rng(0)
    student, teacher, step = rng.normal(size=(4, 6)), rng.normal(size=(4, 6)), 1e-6
    for temperature in TEMPERATURES:
        slopes = np.empty_like(student)
        for v in range(6):
            move = step * np.eye(6)[v]
            ahead, behind = value(student + move, teacher, temperature), value(student - move, teacher, temperature)
            slopes[:, v] = (ahead - behind) / (2 * step)
        np.testing.assert_allclose(gradient(student, teacher, temperature), slopes, rtol=1e-4, atol=1e-8)


# Fault: a mean over the vocabulary instead of a sum; the two KLs exchanged.
def test_three_tokens_by_hand():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.1, 0.6, 0.3])
    student, teacher = jnp.log(jnp.asarray(q, jnp.float32)), jnp.log(jnp.asarray(p, jnp.float32))
    forward = 0.5 * np.log(0.5 / 0.1) + 0.25 * np.log(0.25 / 0.6) + 0.25 * np.log(0.25 / 0.3)
    reverse = 0.1 * np.log(0.1 / 0.5) + 0.6 * np.log(0.6 / 0.25) + 0.3 * np.log(0.3 / 0.25)
    assert abs(forward - reverse) > 0.05
    np.testing.assert_allclose(losses.forward_kl(student, teacher), forward, rtol=1e-5)
    np.testing.assert_allclose(losses.reverse_kl(student, teacher), reverse, rtol=1e-5)


# Fault: beta reversed; at 0.1 a reversed beta gives a clearly different number.
def test_beta_is_the_weight_of_the_teacher():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.05, 0.15, 0.8])
    student, teacher = jnp.log(jnp.asarray(q, jnp.float32)), jnp.log(jnp.asarray(p, jnp.float32))

    def by_hand(beta):
        m = [beta * p[v] + (1 - beta) * q[v] for v in range(3)]
        return sum(beta * p[v] * np.log(p[v] / m[v]) + (1 - beta) * q[v] * np.log(q[v] / m[v]) for v in range(3))

    assert abs(by_hand(0.1) - by_hand(0.9)) > 0.01
    for beta in (0.1, 0.3, 0.5, 0.9):
        np.testing.assert_allclose(losses.generalized_jsd(student, teacher, beta=beta), by_hand(beta), rtol=1e-5)


# The ends of the JSD are the KLs, as limits and as values.
def test_limits_of_the_jsd_are_the_kls():
    student, teacher = logits_of("large", (6, 5), jnp.float32, seed=3)
    student, teacher = student / 5, teacher / 5
    for temperature in (1.0, 4.0):
        forward = losses.forward_kl(student, teacher, temperature=temperature)
        reverse = losses.reverse_kl(student, teacher, temperature=temperature)
        assert not np.allclose(forward, reverse, rtol=0.02)

        def jsd(beta, temperature=temperature):
            return losses.generalized_jsd(student, teacher, beta=beta, temperature=temperature)

        np.testing.assert_array_equal(jsd(0.0), forward)
        np.testing.assert_array_equal(jsd(1.0), reverse)
        np.testing.assert_allclose(jsd(1e-3) / 1e-3, forward, rtol=0.02)
        np.testing.assert_allclose(jsd(1.0 - 1e-3) / 1e-3, reverse, rtol=0.02)


def test_jsd_at_one_half_is_symmetric_and_bounded():
    """Fault: the two KLs exchanged, β reversed."""
    student, teacher = logits_of("large", (40, 9), jnp.float32, seed=4)
    there, back = losses.generalized_jsd(student, teacher), losses.generalized_jsd(teacher, student)
    np.testing.assert_allclose(there, back, rtol=1e-5, atol=1e-6)
    assert float(jnp.max(there)) <= np.log(2) + 1e-6


# Fault: a mixture averaged in log space. For disjoint tokens that mixture has no mass at all.
def test_the_mixture_is_of_probabilities():
    student, teacher = jnp.array([0.0, -jnp.inf, -jnp.inf]), jnp.array([-jnp.inf, 0.0, 0.0])
    for beta in (0.1, 0.5, 0.9):
        entropy = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
        np.testing.assert_allclose(losses.generalized_jsd(student, teacher, beta=beta), entropy, rtol=1e-6)


# Fault: the teacher's entropy dropped.
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_divergence_of_equal_distributions_is_zero(name):
    function, *_ = DIVERGENCES[name]
    logits, _ = every_kind((3, 130), jnp.float32)
    for temperature in TEMPERATURES:
        nats, slopes = measured(function, logits, logits, temperature)
        np.testing.assert_allclose(nats, 0.0, atol=2e-6, err_msg=f"temperature {temperature}")
        if name == "total_variation":  # |P − Q| has a kink there and no derivative
            continue
        squares = name in ("alpha_beta_0.0_0.0", "logit_mse")  # differences of logits, not weighted by probability
        for kind, slope, of in zip(KINDS, slopes, logits, strict=True):
            rounding = 130 * 8 * EPSILON * largest(of) / temperature if squares else 0.0
            case = f"{kind} logits, temperature {temperature}"
            np.testing.assert_allclose(temperature * slope, 0.0, atol=1e-5 + rounding, err_msg=case)


# Fault: the KL of close distributions is reported as 0, their JSD below 0.
def test_close_distributions_in_bf16_keep_their_distance(divergence):
    function, expected, _ = divergence
    rng = np.random.default_rng(5)
    teacher = rng.normal(size=(16, 200)) * 4
    student = jnp.asarray(teacher + 0.05 * rng.normal(size=teacher.shape), jnp.bfloat16)
    teacher = jnp.asarray(teacher, jnp.bfloat16)
    nats = jax.jit(function)(student, teacher)
    want = expected(float64(student), float64(teacher))
    assert np.all(want > 5e-6) and np.all(nats > 0)
    np.testing.assert_allclose(nats, want, rtol=0.01)


# A masked vocabulary gives the value and gradient of a smaller one.
def test_impossible_tokens_are_as_if_absent(divergence):
    function, *_ = divergence
    student, teacher = logits_of("masked", STACKED, jnp.float32)
    short_student, short_teacher = student[..., :-2], teacher[..., :-2]
    nats, long = measured(function, student, teacher, 1.0)
    short_nats, short = measured(function, short_student, short_teacher, 1.0)
    np.testing.assert_allclose(nats, short_nats, rtol=1e-6)
    np.testing.assert_allclose(long[..., :-2], short, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(long[..., -2:], 0.0)


# A token may be impossible on one side. The value is infinite where the definition is, and never NaN.
def test_one_sided_zeros_are_infinite_where_the_definition_is():
    whole, part = jnp.array([0.3, -0.2, 1.0]), jnp.array([0.5, 0.1, -jnp.inf])
    assert losses.forward_kl(part, whole) == jnp.inf
    assert losses.reverse_kl(whole, part) == jnp.inf
    assert losses.forward_kl(part, whole.at[2].set(-200.0)) == jnp.inf  # below the smallest float, but not 0
    assert np.all(np.isfinite(gradient(losses.forward_kl, part, whole)))
    pairs = (
        (losses.forward_kl, reference.forward_kl, whole, part),
        (losses.reverse_kl, reference.reverse_kl, part, whole),
    )
    for function, expected, student, teacher in pairs:
        np.testing.assert_allclose(function(student, teacher), expected(float64(student), float64(teacher)), rtol=1e-6)
        assert np.all(np.isfinite(gradient(function, student, teacher)))
    for student, teacher in ((whole, part), (part, whole)):
        want = reference.generalized_jsd(float64(student), float64(teacher), 0.5)
        np.testing.assert_allclose(losses.generalized_jsd(student, teacher), want, rtol=1e-6)
        assert np.all(np.isfinite(gradient(losses.generalized_jsd, student, teacher)))


# A certain and wrong student at logits of ±1e4: large or bounded, never infinite.
def test_extreme_disagreement_stays_finite(divergence):
    function, *_ = divergence
    student = jnp.array([1e4, -1e4, 0.0, 0.0, 0.0, 0.0, 0.0])
    teacher = jnp.array([-1e4, 1e4, 0.0, 0.0, 0.0, 0.0, 0.0])
    for temperature in TEMPERATURES:
        nats, slopes = measured(function, student, teacher, temperature)
        assert np.isfinite(nats) and np.all(np.isfinite(slopes)), temperature


# No factor T²: halving all logits and the temperature changes nothing.
def test_temperature_only_divides_the_logits(divergence):
    function, *_ = divergence
    student, teacher = logits_of("small", STACKED, jnp.float32)
    hot, _ = measured(function, student, teacher, 4.0)
    quarter, _ = measured(function, student / 4, teacher / 4, 1.0)
    np.testing.assert_allclose(hot, quarter, rtol=1e-5, atol=1e-8)


def test_gradients_reach_the_teacher(divergence):
    function, *_ = divergence
    student, teacher = logits_of("small", (4, 6), jnp.float32)
    got = jax.jit(jax.grad(lambda t: jnp.sum(function(student, t))))(teacher)
    assert np.max(np.abs(got)) > 1e-3


def test_a_single_position_has_no_leading_axes(divergence):
    function, *_ = divergence
    student, teacher = logits_of("small", STACKED, jnp.float32)
    nats, _ = measured(function, student[0, 0, 0], teacher[0, 0, 0], 1.0)
    assert nats.shape == ()
    many, _ = measured(function, student, teacher, 1.0)
    np.testing.assert_allclose(nats, many[0, 0, 0], rtol=1e-5, atol=1e-7)


def test_jit_vmap_and_a_temperature_of_1_change_nothing(divergence):
    function, *_ = divergence
    student, teacher = logits_of("small", STACKED, jnp.float32)
    plain = function(student, teacher)
    compiled, _ = measured(function, student, teacher, 1.0)
    np.testing.assert_allclose(compiled, plain, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jax.jit(jax.vmap(function))(student, teacher), plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_beta_outside_its_interval_is_refused(beta):
    with pytest.raises(ValueError, match="beta"):
        losses.generalized_jsd(jnp.zeros(3), jnp.zeros(3), beta=beta)


def test_shapes_are_checked(divergence):
    function, *_ = divergence
    with pytest.raises(Exception, match="(?i)type-check"):
        function(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
    with pytest.raises(Exception, match="(?i)type-check"):
        function(jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3), jnp.int32))


@pytest.mark.parametrize("divergence", [losses.forward_kl, losses.reverse_kl])
def test_handwritten_derivatives_equal_autodiff_through_both_softmaxes(divergence):
    """By both arguments and the temperature, first and second order, with tokens at −inf."""

    def chain(student, teacher, temperature):
        logs = [jax.nn.log_softmax(x / temperature, axis=-1) for x in (student, teacher)]
        (p, q) = logs if divergence is losses.reverse_kl else logs[::-1]
        return jnp.sum(jnp.where(p == -jnp.inf, 0.0, jnp.exp(p) * (jnp.where(p == -jnp.inf, 0.0, p - q))), axis=-1)

    def ours(student, teacher, temperature):
        return divergence(student, teacher, temperature=temperature)

    rng = np.random.default_rng(7)
    arguments = *(jnp.asarray(rng.normal(0, 2, (3, 11)), jnp.float32) for _ in range(2)), jnp.float32(1.7)
    along = *(jnp.asarray(rng.normal(0, 1, (3, 11)), jnp.float32) for _ in range(2)), jnp.float32(0.3)
    both = []
    for f in (ours, chain):
        gradient = jax.grad(lambda *x, f=f: jnp.sum(f(*x) ** 2), (0, 1, 2))
        both.append(jax.jit(partial(jax.jvp, gradient))(arguments, along))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), *both)
    impossible = [np.where(np.arange(11) == 4, -np.inf, x) for x in arguments[:2]]
    gradients = jax.jit(jax.grad(lambda s, t: jnp.sum(ours(s, t, 2.0)), (0, 1)))(*impossible)
    possible = [np.delete(x, 4, axis=1) for x in arguments[:2]]
    wanted = jax.jit(jax.grad(lambda s, t: jnp.sum(chain(s, t, 2.0)), (0, 1)))(*possible)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert not np.any(gradient[:, 4])
        np.testing.assert_allclose(np.delete(gradient, 4, axis=1), want, rtol=1e-4, atol=1e-6)
