"""Stored and sampled targets: exact with a tail, unbiased with samples, and refused where they can be neither."""

from functools import partial
from itertools import pairwise, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_losses as twins

from distill import losses

BOUNDED_BELOW = {  # of these, merging words into a tail can only lower the value
    "forward_kl": (losses.forward_kl, {}),
    "reverse_kl": (losses.reverse_kl, {}),
    "jsd_0.3": (losses.generalized_jsd, {"beta": 0.3}),
    "skewed_forward_kl": (losses.skewed_forward_kl, {"alpha": 0.1}),
    "skewed_reverse_kl": (losses.skewed_reverse_kl, {"alpha": 0.1}),
    "total_variation": (losses.total_variation, {}),
    "jeffreys": (losses.jeffreys, {}),
    "alpha_divergence": (losses.alpha_divergence, {"alpha": 0.5}),
    "renyi_2": (losses.renyi, {"alpha": 2.0}),
}
ALL = {
    **BOUNDED_BELOW,
    "alpha_beta": (losses.alpha_beta, {"alpha": 0.2, "beta": 0.7}),
    "adaptive_kl": (losses.adaptive_kl, {}),
    "entropy_aware_kl": (losses.entropy_aware_kl, {}),
    "taid": (losses.taid, {}),
}


def pair(seed=0, scale=2.0, shape=(30, 12)):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for _ in range(2))


def gradient(function, student):
    return jax.grad(lambda s: jnp.sum(function(s)))(student)


def same(one, other, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def truncated(log_a, log_b, ids):
    """Σ a (log a − log b) over the kept words only: what is called KL elsewhere."""
    a, b = (jnp.take_along_axis(log, ids, axis=-1) for log in (log_a, log_b))
    return jnp.sum(jnp.exp(a) * (a - b), axis=-1)


# ---- the tail


# Fault: a truncated sum is negative where the student puts more on the kept words than the teacher.
@pytest.mark.parametrize("name", ALL)
def test_never_negative(name):
    divergence, options = ALL[name]
    student, teacher = pair(1)
    ids = losses.top_k_targets(teacher, 4).ids
    assert np.min(truncated(jax.nn.log_softmax(teacher), jax.nn.log_softmax(teacher + 0.5 * student), ids)) < 0
    for k in (1, 4, 11):
        targets = losses.top_k_targets(teacher, k)
        for logits in (student, teacher + 0.5 * student, teacher):
            assert np.min(losses.sparse(divergence, logits, targets, **options)) >= -1e-6
        same(losses.sparse(divergence, teacher, targets, **options), 0.0)


# Fault: with both sides renormalised, a student with 99.97 % of its mass elsewhere scores 0.
@pytest.mark.parametrize("name", ALL)
def test_mass_off_the_support_is_punished(name):
    divergence, options = ALL[name]
    p = np.array([0.6, 0.3, 0.09, 0.01, 0.0, 0.0]) + 1e-4
    q = np.array([2e-4, 1e-4, 1e-5, 1e-5, 0.7, 0.29968])
    student, teacher = (jnp.log(jnp.asarray(x / np.sum(x), jnp.float32)) for x in (q, p))
    targets = losses.top_k_targets(teacher, 2)
    renormalised = losses.forward_kl(student[targets.ids], targets.log_probs)
    assert float(renormalised) < 1e-6
    value = float(losses.sparse(divergence, student, targets, **options))
    assert value > 0.2
    slope = gradient(lambda s: losses.sparse(divergence, s, targets, **options), student)
    assert np.all(np.isfinite(slope))
    if name in ("forward_kl", "jsd_0.3", "skewed_forward_kl", "taid"):  # downhill is back to the support
        assert np.all(slope[:2] < 0) and np.sum(slope[:2]) < (-0.5 if name == "forward_kl" else -1e-4)


# Fault: with the teacher renormalised the student that equals the teacher is not where the loss is least.
def test_bias_of_a_renormalised_teacher():
    teacher = jnp.log(jnp.array([0.5, 0.2, 0.1, 0.1, 0.1]))
    targets = losses.top_k_targets(teacher, 2)
    kept = jnp.exp(targets.log_probs)

    def renormalised(student):
        log_q = jax.nn.log_softmax(student)[targets.ids]
        return -jnp.sum(kept / jnp.sum(kept) * log_q)

    # d/dlogits = Q − P/(mass kept) on the kept words, Q elsewhere: up by .3/.7 of P here, down by all of P there
    same(gradient(renormalised, teacher), [-0.5 * 3 / 7, -0.2 * 3 / 7, 0.1, 0.1, 0.1], atol=1e-5)
    same(gradient(lambda s: losses.sparse(losses.forward_kl, s, targets), teacher), 0.0)


# Fault: the truncated reverse KL falls below 0 when all mass leaks off the support; with the tail it rises.
def test_leaking_mass_raises_the_reverse_kl():
    teacher = jnp.log(jnp.array([0.55, 0.35, 0.05, 0.05]))
    targets = losses.top_k_targets(teacher, 2)
    shares = np.array([0.1, 0.3, 0.6, 0.9, 0.999])
    student = jnp.log(jnp.asarray([[0.6 * (1 - x), 0.4 * (1 - x), x / 2, x / 2] for x in shares], jnp.float32))
    leaking = truncated(student, jnp.broadcast_to(teacher, student.shape), jnp.broadcast_to(targets.ids, (5, 2)))
    whole = jax.vmap(lambda s: losses.sparse(losses.reverse_kl, s, targets))(student)
    assert leaking[3] < 0 and leaking[3] < leaking[0]
    assert np.all(np.diff(whole) > 0.1)


@pytest.mark.parametrize("name", ALL)
def test_with_all_words_or_all_but_one_it_is_the_full_divergence(name):
    divergence, options = ALL[name]
    student, teacher = pair(2)
    for temperature in (1.0, 4.0):
        log_s, log_t = (jax.nn.log_softmax(x / temperature) for x in (student, teacher))
        full = divergence(log_s, log_t, **options)  # TAID's mixture depends on the constant in the logits; not the rest
        for k in (11, 12):
            targets = losses.top_k_targets(teacher, k, temperature=temperature)
            same(losses.sparse(divergence, student, targets, temperature=temperature, **options), full)


@pytest.mark.parametrize("name", BOUNDED_BELOW)
def test_lower_bound_that_grows_with_the_words_kept(name):
    divergence, options = BOUNDED_BELOW[name]
    student, teacher = pair(3)
    values = [losses.sparse(divergence, student, losses.top_k_targets(teacher, k), **options) for k in (1, 3, 8)]
    values.append(divergence(student, teacher, **options))
    for low, high in pairwise(values):
        assert np.all(low <= high * (1 + 1e-5) + 1e-6)
    assert np.mean(values[-1]) > np.mean(values[0]) * 1.05


# Equality: the tail's words in the student's proportions. Merging them loses nothing.
def test_exact_where_the_ratio_is_constant_on_the_tail():
    teacher = jnp.log(jnp.array([0.5, 0.2, 0.15, 0.1, 0.05]))
    student = jnp.log(jnp.array([0.3, 0.1, 0.3, 0.2, 0.1]))
    targets = losses.top_k_targets(teacher, 2)
    for divergence in (losses.forward_kl, losses.reverse_kl, losses.jeffreys, losses.total_variation):
        same(losses.sparse(divergence, student, targets), divergence(student, teacher))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [0.5, 3.0, 1e4])
def test_value_and_gradient_are_those_of_float64(scale, dtype):
    student, teacher = (x.astype(dtype) for x in pair(4, scale=scale))
    exact = [np.asarray(x.astype(jnp.float32), np.float64) for x in (student, teacher)]
    for divergence, inner in ((losses.forward_kl, twins.kl), (losses.reverse_kl, lambda a, b: twins.kl(b, a))):
        value, slope = twins.without_impossible_tokens(_bucketed(inner, 3))
        for temperature in (0.5, 1.0, 4.0):
            targets = losses.top_k_targets(teacher, 3, temperature=temperature)
            loss = partial(losses.sparse, divergence, targets=targets, temperature=temperature)
            rounding = 1e-6 + 8 * 2.0**-24 * np.max(np.abs(exact)) / temperature**2
            same(loss(student), value(*exact, temperature), atol=rounding * max(temperature, 1.0))
            got = gradient(loss, student)
            assert got.dtype == dtype and np.all(np.isfinite(got))
            rtol = 1e-4 if dtype == jnp.float32 else 2.0**-8
            same(got.astype(jnp.float32), slope(*exact, temperature), rtol=rtol, atol=rounding)


def _bucketed(divergence, k):
    """A divergence of k+1 classes in float64: gathered by a sort, tails by a log-sum."""

    def function(student, teacher, temperature, frozen):
        order = np.argsort(-teacher, axis=-1, kind="stable")
        sides = []
        for log in twins.both(student, teacher, temperature):
            log = np.take_along_axis(log, order, axis=-1)
            high = np.max(np.real(log[..., k:]), axis=-1, keepdims=True)
            tail = high + np.log(np.sum(np.exp(log[..., k:] - high), axis=-1, keepdims=True))
            sides.append(np.concatenate([log[..., :k], tail], axis=-1))
        return divergence(*sides)

    return function


# The gradient of the full forward KL is kept best by the tail.
def test_gradient_with_a_tail_is_closest_to_the_full_one():
    rng = np.random.default_rng(5)
    ranks = np.log(np.arange(1, 1001))
    teacher = jnp.asarray(-1.2 * ranks + 0.5 * rng.normal(size=(40, 1000)), jnp.float32)
    student = teacher + jnp.asarray(1.0 * rng.normal(size=(40, 1000)), jnp.float32)
    targets = losses.top_k_targets(teacher, 8)
    kept = jnp.exp(targets.log_probs)

    def cross_entropy(weights, log_q):
        return -jnp.sum(weights * jnp.take_along_axis(log_q, targets.ids, axis=-1), axis=-1)

    def cosine(function):
        one, other = gradient(function, student), gradient(lambda s: losses.forward_kl(s, teacher), student)
        return float(
            jnp.mean(jnp.sum(one * other, -1) / jnp.linalg.norm(one, axis=-1) / jnp.linalg.norm(other, axis=-1))
        )

    with_tail = cosine(lambda s: losses.sparse(losses.forward_kl, s, targets))
    cut = cosine(lambda s: cross_entropy(kept, jax.nn.log_softmax(s)))  # renormalised weights: the same direction
    assert with_tail > 0.9 and with_tail > cut + 0.2


def test_tail_is_computed_when_it_is_not_stored():
    student, teacher = pair(6)
    full = losses.top_k_targets(teacher, 5)
    lean = losses.SparseTargets(full.ids, full.log_probs)
    for divergence in (losses.forward_kl, losses.reverse_kl):
        same(losses.sparse(divergence, student, lean), losses.sparse(divergence, student, full), rtol=1e-4)
    stored = losses.SparseTargets(full.ids, full.log_probs.astype(jnp.bfloat16))  # coarse, but a distribution still
    assert np.min(losses.sparse(losses.forward_kl, student, stored)) >= -1e-6
    nothing_left = losses.SparseTargets(jnp.array([3]), jnp.array([0.0]))
    student = jnp.log(jnp.array([0.25, 0.25, 0.25, 0.25]))
    same(losses.sparse(losses.forward_kl, student, nothing_left), np.log(4.0))
    assert losses.sparse(losses.reverse_kl, student, nothing_left) == jnp.inf
    for divergence in (losses.forward_kl, losses.reverse_kl):
        assert np.all(np.isfinite(gradient(lambda s, d=divergence: losses.sparse(d, s, nothing_left), student)))


def test_unused_slots_and_masked_words_change_nothing():
    student, teacher = pair(7)
    student, teacher = (x.at[:, -2:].set(-jnp.inf) for x in (student, teacher))
    targets = losses.top_k_targets(teacher, 4)
    short = losses.top_k_targets(teacher[:, :-2], 4)
    without = losses.sparse(losses.forward_kl, student[:, :-2], short)
    same(losses.sparse(losses.forward_kl, student, targets), without)
    padding = jnp.zeros((30, 2), jnp.int32)  # the id of a real word, which must not count twice
    padded = losses.SparseTargets(
        jnp.concatenate([targets.ids, padding], -1),
        jnp.concatenate([targets.log_probs, jnp.full((30, 2), -jnp.inf)], -1),
        targets.log_tail,
    )
    for divergence in (losses.forward_kl, losses.reverse_kl):
        one, other = (partial(losses.sparse, divergence, targets=t) for t in (targets, padded))
        same(one(student), other(student))
        same(gradient(one, student), gradient(other, student))
        assert np.all(np.isfinite(gradient(one, student)))
    same(
        losses.sparse(losses.forward_kl, student, losses.top_k_targets(teacher, 12)),
        losses.forward_kl(student, teacher),
    )


@pytest.mark.parametrize("bad", [-1, 12])
def test_an_id_that_is_no_word_is_seen(bad):
    student, teacher = pair(8)
    targets = losses.top_k_targets(teacher, 3)
    wrong = losses.SparseTargets(targets.ids.at[0, 1].set(bad), targets.log_probs, targets.log_tail)
    nats = losses.sparse(losses.forward_kl, student, wrong)
    assert np.isnan(nats[0]) and np.all(np.isfinite(nats[1:]))
    drawn = losses.SampledTargets(wrong.ids, jnp.ones_like(wrong.ids))
    assert np.isnan(losses.sampled_cross_entropy(student, drawn)[0])


# Fault: targets stored at one temperature are used at another.
def test_another_temperature_is_refused_or_exact():
    student, teacher = pair(9)
    targets = losses.top_k_targets(teacher, 5, temperature=2.0)
    for run in (losses.sparse, jax.jit(losses.sparse, static_argnums=0, static_argnames="temperature")):
        with pytest.raises(
            ValueError, match=r"temperature=1.0, but the targets were stored at temperature=2.0 with 5 of 12"
        ):
            run(losses.forward_kl, student, targets, temperature=1.0)
        whole = losses.top_k_targets(teacher, 12, temperature=2.0)
        got = run(losses.forward_kl, student, whole, temperature=0.5)
        same(got, losses.forward_kl(student, teacher, temperature=0.5), rtol=1e-4)
    drawn = losses.sample_targets(jax.random.key(0), teacher, 5, temperature=2.0)
    for function in (losses.sampled_cross_entropy, losses.sampled_forward_kl):
        with pytest.raises(ValueError, match=r"temperature=1.0, but they were drawn at temperature=2.0"):
            function(student, drawn)


def test_what_cannot_be_is_refused():
    student, teacher = pair(10)
    targets = losses.top_k_targets(teacher, 3)
    for function in (losses.logit_mse, losses.pearson):
        with pytest.raises(ValueError, match=f"{function.__name__} has no form with a tail"):
            losses.sparse(function, student, targets)
    with pytest.raises(ValueError, match="3 tokens are stored of a vocabulary of 2"):
        losses.sparse(losses.forward_kl, student[:, :2], targets)
    with pytest.raises(ValueError, match="k=13; expected 1 ≤ k ≤ 12"):
        losses.top_k_targets(teacher, 13)
    for options in ({"n": 0}, {"n": 4, "method": "stratified"}):
        with pytest.raises(ValueError, match="sample_targets: n="):
            losses.sample_targets(jax.random.key(0), teacher, **options)
    with pytest.raises(ValueError, match="no log_probs"):
        losses.sampled_forward_kl(student, losses.SampledTargets(targets.ids, jnp.ones_like(targets.ids)))


def test_targets_travel_through_jit_vmap_and_trees():
    student, teacher = pair(11)
    targets = losses.top_k_targets(teacher, 3, temperature=2.0)
    loss = partial(losses.sparse, losses.forward_kl, temperature=2.0)
    plain = loss(student, targets)
    same(jax.jit(loss)(student, targets), plain)
    same(jax.vmap(loss)(student, targets), plain)
    same(loss(student[:4], jax.tree.map(lambda x: x[:4], targets)), plain[:4])
    assert jax.eval_shape(lambda t: t, targets).temperature == 2.0
    assert loss(student[0], jax.tree.map(lambda x: x[0], targets)).shape == ()


# ---- samples


# The mean over every possible pair of draws, weighed by its probability, is the gradient of the full forward KL.
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_gradient_is_unbiased_by_enumeration(temperature):
    student, teacher = pair(12, shape=(3,))
    log_p = jax.nn.log_softmax(teacher / temperature)
    draws = jnp.array(list(product(range(3), repeat=2)), jnp.int32)
    chance = jnp.exp(jnp.sum(log_p[draws], axis=-1))
    targets = losses.SampledTargets(draws, jnp.ones_like(draws), log_p[draws], temperature)

    def mean(function, student):
        students = jnp.broadcast_to(student, (9, 3))
        return jnp.sum(chance * function(students, targets, temperature=temperature))

    full = partial(losses.forward_kl, teacher_logits=teacher, temperature=temperature)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p)
    same(mean(losses.sampled_forward_kl, student), full(student))
    same(mean(losses.sampled_cross_entropy, student), full(student) + entropy)
    for function in (losses.sampled_forward_kl, losses.sampled_cross_entropy):
        same(jax.grad(lambda s, f=function: mean(f, s))(student), jax.grad(full)(student))


@pytest.mark.parametrize("method", ["systematic", "iid"])
def test_draws_are_unbiased_and_so_is_their_gradient(method):
    rows, words, n = 20_000, 6, 4
    student, teacher = pair(13, scale=1.5, shape=(words,))
    students, teachers = (jnp.broadcast_to(x, (rows, words)) for x in (student, teacher))
    targets = losses.sample_targets(jax.random.key(1), teachers, n, method=method)
    slopes = np.asarray(gradient(lambda s: losses.sampled_cross_entropy(s, targets), students), np.float64)
    wanted = np.asarray(jax.grad(lambda s: losses.forward_kl(s, teacher))(student))
    z = (slopes.mean(0) - wanted) / (slopes.std(0) / np.sqrt(rows) + 1e-9)
    assert np.max(np.abs(z)) < 4.5
    values = np.asarray(losses.sampled_forward_kl(students, targets), np.float64)
    assert abs(values.mean() - float(losses.forward_kl(student, teacher))) < 4.5 * values.std() / np.sqrt(rows)


def _counts(targets, words):
    return np.sum(np.asarray(targets.counts)[..., None] * np.eye(words, dtype=int)[np.asarray(targets.ids)], axis=-2)


def test_systematic_draws_are_within_one_of_their_expectation():
    _, teacher = pair(14, scale=1.5, shape=(500, 9))
    expected = 7 * np.asarray(jax.nn.softmax(teacher))
    counts = {
        m: _counts(losses.sample_targets(jax.random.key(2), teacher, 7, method=m), 9) for m in ("systematic", "iid")
    }
    for drawn in counts.values():
        np.testing.assert_array_equal(np.sum(drawn, axis=-1), 7)
    assert np.max(np.abs(counts["systematic"] - expected)) < 1 + 1e-4
    assert np.max(np.abs(counts["iid"] - expected)) > 1.5
    variance = {m: np.mean((drawn - expected) ** 2) for m, drawn in counts.items()}
    assert variance["systematic"] < variance["iid"] / 2


@pytest.mark.parametrize("method", ["systematic", "iid"])
def test_impossible_words_are_never_drawn(method):
    teacher = jnp.broadcast_to(jnp.array([-jnp.inf, 0.0, -jnp.inf, 1.0, -200.0, -jnp.inf]), (2000, 6))
    targets = losses.sample_targets(jax.random.key(3), teacher, 50, method=method)
    assert set(np.unique(targets.ids)) <= {1, 3}
    student = jnp.broadcast_to(jnp.array([-jnp.inf, 0.0, 1.0, 1.0, 0.0, 0.0]), (2000, 6))
    assert np.all(np.isfinite(gradient(lambda s: losses.sampled_forward_kl(s, targets), student)))


def test_sampling_is_a_function_of_the_key_and_keeps_leading_axes():
    _, teacher = pair(15, shape=(2, 3, 8))
    one, again, other = (losses.sample_targets(jax.random.key(k), teacher, 5) for k in (0, 0, 1))
    assert one.ids.shape == one.counts.shape == one.log_probs.shape == (2, 3, 5)
    np.testing.assert_array_equal(_counts(one, 8), _counts(again, 8))
    assert np.any(_counts(one, 8) != _counts(other, 8))
    jitted = jax.jit(lambda k, t: losses.sample_targets(k, t, 5))(jax.random.key(0), teacher)
    np.testing.assert_array_equal(_counts(jitted, 8), _counts(one, 8))
    same(one.log_probs, jnp.take_along_axis(jax.nn.log_softmax(teacher), one.ids, axis=-1))


# In a fixed order neighbours would never be drawn together, and the variance would depend on how ids are numbered.
def test_systematic_draws_know_no_neighbours():
    targets = losses.sample_targets(jax.random.key(4), jnp.zeros((2000, 4)), 2)
    drawn = _counts(targets, 4)
    together = [np.mean(drawn[:, i] * drawn[:, j]) for i in range(4) for j in range(i)]
    np.testing.assert_allclose(together, 1 / 6, atol=0.04)
