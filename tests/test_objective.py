"""The objective: which positions count, the divisor of a mean, and the factor T²."""

import contextlib
import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from builders import VOCAB, on_device, rows_of, uneven_batch
from hypothesis import strategies as st

from distill import losses
from distill.errors import UserError
from distill.models import Model, Output
from distill.objective import DIVERGENCES, ObjectiveConfig, task_term, terms_at, terms_of
from distill.state import init_state
from distill.step import make_train_step
from distill.term import BOTH_LOGITS, Term

SOFT = ("forward_kl", "reverse_kl", "generalized_jsd")


def case(rows=4, length=6, seed=0):
    rng = np.random.default_rng(seed)
    student, teacher = (jnp.asarray(rng.normal(size=(rows, length, VOCAB)), jnp.float32) for _ in range(2))
    return student, teacher, on_device(uneven_batch(rows, length, seed))


GIVEN = Model(
    init=lambda key: {"logits": jnp.zeros((1, 1, VOCAB))},
    apply=lambda params, tokens, **_: Output(params["logits"]),
    unembed=lambda params, hidden: hidden,
    vocab_size=VOCAB,
)
"""A student whose parameters are its logits."""
KEEP = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradients, state, params=None: (jax.tree.map(jnp.zeros_like, gradients), gradients),
)
"""An optimizer whose state is the gradient of the step."""


def stepped(terms, student, teacher, batch):
    """Metrics and gradient of the train step, by the student's logits; the teacher's are stored."""
    step = make_train_step(GIVEN, terms, KEEP)
    batch = batch if teacher is None else batch._replace(targets=losses.DenseTargets(teacher))
    new, metrics = step(init_state({"logits": student}, KEEP), None, batch)
    return metrics, new.opt_state["logits"]


def pairs_of(terms, student, teacher, batch):
    """Every term's (sum, weight)."""
    return stepped(terms, student, teacher, batch)[0]


loss = jax.jit(lambda config, *case: losses.divide(pairs_of(terms_of(config), *case)["loss"]), static_argnums=0)
gradient = jax.jit(lambda config, *case: stepped(terms_of(config), *case)[1], static_argnums=0)


def mixed(**options):
    return ObjectiveConfig(**({"kd_weight": 0.7, "task_weight": 0.3, "temperature": 2.0} | options))


# Fault: divided by sequences, by positions or by the vocabulary instead of by the counted tokens.
@pytest.mark.parametrize("divergence", SOFT)
def test_the_mean_is_over_the_counted_tokens(divergence):
    student, teacher, batch = case()
    pairs = pairs_of(terms_of(mixed(divergence=divergence)), student, teacher, batch)
    soft = {
        "forward_kl": lambda s, t: reference.forward_kl(s, t, 2.0),
        "reverse_kl": lambda s, t: reference.reverse_kl(s, t, 2.0),
        "generalized_jsd": lambda s, t: reference.generalized_jsd(s, t, 0.5, 2.0),
    }[divergence](np.asarray(student), np.asarray(teacher))
    hard = reference.cross_entropy(student, batch.labels)
    counted = [(b, i) for b in range(4) for i in range(6) if batch.mask[b, i]]
    assert 6 < len(counted) < 24 and len(set(np.sum(batch.mask, axis=1).tolist())) > 2
    for name, nats in ((divergence, soft), ("cross_entropy", hard)):
        total, weight = pairs[name]
        assert float(weight) == len(counted)
        np.testing.assert_allclose(total, sum(nats[position] for position in counted), rtol=1e-5)


def test_the_loss_is_the_weighted_sum_of_terms():
    student, teacher, batch = case()
    soft = pairs_of(terms_of(mixed(task_weight=0.0)), student, teacher, batch)["forward_kl"]
    hard = pairs_of([task_term()], student, None, batch)["cross_entropy"]
    want = 0.7 * 4.0 * losses.divide(soft) + 0.3 * losses.divide(hard)  # T² = 4
    np.testing.assert_allclose(loss(mixed(), student, teacher, batch), want, rtol=1e-6)


def test_beta_reaches_the_divergence():
    student, teacher, batch = case()
    for beta, divergence in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        jsd = loss(mixed(divergence="generalized_jsd", beta=beta), student, teacher, batch)
        np.testing.assert_allclose(jsd, loss(mixed(divergence=divergence), student, teacher, batch), rtol=1e-6)


# Fault: divided twice.
@pytest.mark.parametrize("times", [2, 5])
def test_repeating_the_batch_changes_nothing(times):
    student, teacher, batch = case()
    again = jax.tree.map(lambda field: jnp.concatenate([field] * times), (student, teacher, batch))
    np.testing.assert_allclose(loss(mixed(), *again), loss(mixed(), student, teacher, batch), rtol=1e-6)


# Fault: one term summed, the other averaged.
@pytest.mark.parametrize("axis", [0, 1], ids=["batch", "length"])
def test_both_terms_scale_equally(axis):
    student, teacher, batch = case()
    longer = jax.tree.map(lambda field: jnp.concatenate([field] * 3, axis), (student, teacher, batch))
    before, after = (pairs_of(terms_of(mixed()), *arguments) for arguments in ((student, teacher, batch), longer))
    assert before.keys() > {"forward_kl", "cross_entropy"}
    for name in ("forward_kl", "cross_entropy"):
        np.testing.assert_allclose(np.array(after[name]), 3.0 * np.array(before[name]), rtol=1e-6)


# Fault: everything masked gives NaN.
@pytest.mark.parametrize("divergence", SOFT)
def test_no_counted_position_gives_zero_with_zero_gradient(divergence):
    student, teacher, batch = case()
    batch = batch._replace(mask=jnp.zeros_like(batch.mask))
    config = mixed(divergence=divergence)
    assert float(loss(config, student.at[0, 0, 0].set(jnp.nan), teacher, batch)) == 0.0
    np.testing.assert_array_equal(gradient(config, student, teacher, batch), 0.0)


# Results are bit-identical whatever stands at positions that do not count.
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("divergence", SOFT)
def test_garbage_at_positions_that_do_not_count_changes_no_bit(divergence, garbage):
    student, teacher, batch = case()
    config, keep = mixed(divergence=divergence), batch.mask[..., None]
    bad_student, bad_teacher = jnp.where(keep, student, garbage), jnp.where(keep, teacher, garbage)
    bad_batch = batch._replace(labels=jnp.where(batch.mask, batch.labels, -100))
    for function in (loss, gradient):
        clean = function(config, student, teacher, batch)
        np.testing.assert_array_equal(function(config, bad_student, bad_teacher, bad_batch), clean)
        assert np.all(np.isfinite(clean))


def test_mask_is_slicing():
    student, teacher, batch = case()
    half = batch._replace(mask=batch.mask & (jnp.arange(4) < 2)[:, None])
    part = loss(mixed(), student[:2], teacher[:2], rows_of(batch, slice(2)))
    np.testing.assert_allclose(loss(mixed(), student, teacher, half), part, rtol=1e-6)


# T² is applied once, also where the soft term is the only one.
@pytest.mark.parametrize("divergence", SOFT)
@pytest.mark.parametrize("task_weight", [0.0, 0.5])
def test_temperature_squared_is_a_factor_of_the_soft_term_alone(divergence, task_weight):
    student, teacher, batch = case()
    with_factor, without, task = (
        gradient(config, student, teacher, batch)
        for config in (
            mixed(divergence=divergence, temperature=3.0, task_weight=task_weight),
            mixed(divergence=divergence, temperature=3.0, task_weight=task_weight, temperature_squared=False),
            ObjectiveConfig(kd_weight=0.0, task_weight=1.0),
        )
    )
    hard = task_weight * task
    np.testing.assert_allclose(with_factor - hard, 9.0 * (without - hard), rtol=1e-4, atol=1e-7)


# The factor T² keeps the size of the gradient at high T.
@pytest.mark.parametrize("divergence", SOFT)
def test_gradient_norm_is_flat_in_a_high_temperature(divergence):
    student, teacher, batch = case()

    def norm(temperature, squared):
        config = ObjectiveConfig(divergence=divergence, temperature=temperature, temperature_squared=squared)
        return float(jnp.linalg.norm(gradient(config, student, teacher, batch)))

    flat = [norm(temperature, True) for temperature in (16.0, 32.0, 64.0)]
    np.testing.assert_allclose(flat, flat[-1], rtol=0.05)
    assert norm(16.0, False) > 14.0 * norm(64.0, False)  # falls by (64/16)² = 16


def test_metric_named_after_a_divergence_is_in_nats():
    student, teacher, batch = case()
    for squared in (True, False):
        config = mixed(temperature=3.0, kd_weight=0.1, temperature_squared=squared)
        mean = losses.divide(pairs_of(terms_of(config), student, teacher, batch)["forward_kl"])
        nats = reference.forward_kl(np.asarray(student), np.asarray(teacher), 3.0)[np.asarray(batch.mask)]
        np.testing.assert_allclose(mean, nats.mean(), rtol=1e-5)


def test_a_custom_term_is_evaluated():
    student, teacher, batch = case()
    term = Term(
        "squared_error", 1.0, BOTH_LOGITS, lambda v: jnp.sum((v.student_logits - v.teacher_logits) ** 2, axis=-1)
    )
    total, weight = pairs_of([term], student, teacher, batch)["squared_error"]
    want = np.sum(((np.asarray(student) - np.asarray(teacher)) ** 2)[np.asarray(batch.mask)])
    np.testing.assert_allclose(total, want, rtol=1e-5)
    assert float(weight) == np.sum(batch.mask)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_can_be_named(divergence):
    student, teacher, batch = case()
    options = {"beta": 0.3} if divergence in ("generalized_jsd", "alpha_beta") else {}
    config = ObjectiveConfig(divergence=divergence, temperature=2.0, **options)
    want = getattr(losses, divergence)(student, teacher, temperature=2.0, **options)
    got = pairs_of(terms_of(config), student, teacher, batch)[divergence]
    np.testing.assert_allclose(got[0], losses.masked_sum(want, batch.mask)[0], rtol=1e-5)


def test_schedules_follow_the_optimizer_step():
    """Linear from the first value to the last in schedule_steps, constant after; T² follows T."""
    config = ObjectiveConfig(
        "taid", temperature=1.0, final_temperature=3.0, interpolation=0.2, final_interpolation=1.0, schedule_steps=10,
        kd_weight=1.0, final_kd_weight=0.5, task_weight=0.25,
    )  # fmt: skip
    student, teacher, batch = case()

    @jax.jit
    def at(step):
        terms = terms_at(terms_of(config), step)
        return [term.weight for term in terms], pairs_of(terms, student, teacher, batch)["taid"][0]

    for step, done in ((0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)):
        (kd, task), nats = at(jnp.int32(step))
        temperature = 1.0 + 2.0 * done
        np.testing.assert_allclose(kd, (1.0 - 0.5 * done) * temperature**2, rtol=1e-6)
        assert float(task) == 0.25
        want = losses.taid(student, teacher, interpolation=0.2 + 0.8 * done, temperature=temperature)
        np.testing.assert_allclose(nats, losses.masked_sum(want, batch.mask)[0], rtol=1e-5)


def test_terms_without_weight_are_not_computed():
    names = [
        [term.name for term in terms_of(ObjectiveConfig(kd_weight=k, task_weight=1.0 - k))] for k in (1.0, 0.5, 0.0)
    ]
    assert names == [["forward_kl"], ["forward_kl", "cross_entropy"], ["cross_entropy"]]


def test_missing_teacher_is_named():
    student, _, batch = case()
    with pytest.raises(ValueError, match="forward_kl.*teacher"):
        pairs_of(terms_of(ObjectiveConfig()), student, None, batch)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"beta": -0.1, "divergence": "generalized_jsd"},
        {"beta": 1.1},
        {"alpha": -1.0, "divergence": "renyi"},
        {"final_temperature": 0.0, "schedule_steps": 5},
        {"schedule_steps": 0, "final_temperature": 2.0},
        {"final_kd_weight": -1.0, "schedule_steps": 5},
        {"final_interpolation": 1.5, "schedule_steps": 5},
        {"kd_weight": -0.1, "task_weight": 1.0},
        {"kd_weight": 0.0, "task_weight": 0.0},
    ],
)
def test_invalid_objectives_are_refused(options):
    with pytest.raises(ValueError, match=f"objective: .*{next(iter(options))}"):
        ObjectiveConfig(**options)


def test_names_that_would_hide_a_metric_are_refused():
    twice = [task_term(), task_term(0.5)]
    with pytest.raises(ValueError, match="2 terms are named 'cross_entropy'"):
        make_train_step(GIVEN, twice, KEEP)
    for name in ("agreement", "loss", "gradient_norm"):
        with pytest.raises(ValueError, match=f"a term is named '{name}'"):
            make_train_step(GIVEN, [Term(name, 1.0, BOTH_LOGITS, lambda view: view.student_logits[..., 0])], KEEP)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Term("a", 1.0, frozenset({"student_logits"}), lambda view: 0), "needs=frozenset.*BOTH_LOGITS"),
        (lambda: Term("a", "1.0", BOTH_LOGITS, lambda view: 0), "weight='1.0'.*expected a number"),
        (lambda: Term("a", 1.0, BOTH_LOGITS, None), "value=None; expected a number and a function"),
        (lambda: make_train_step(GIVEN, task_term(), KEEP), "expected a list of Term"),
        (lambda: make_train_step(GIVEN, [lambda view: 0], KEEP), "expected a list of Term"),
    ],
)
def test_what_is_no_term_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda view: view.student_logits - view.teacher_logits, r"the term 'a'.*expected one number per position"),
        (
            lambda view: view.student_logits[..., 0].mean(-1)[..., None],
            r"the term 'a'.*expected one number per position",
        ),
        (lambda view: None, "the term 'a': value gives a NoneType"),
    ],
)
def test_a_value_of_another_shape_is_refused(value, message):
    student, teacher, batch = case()
    with pytest.raises(UserError, match=message):
        pairs_of([Term("a", 1.0, BOTH_LOGITS, value)], student, teacher, batch)


NAMES = st.lists(st.sampled_from(["a", "b", "c", "kl", "loss", "agreement", "tokens", "skipped"]), max_size=4)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(NAMES)
def test_names_of_terms_are_unique_and_not_those_of_metrics(names):
    """Otherwise two terms would be counted twice, or one would have another's gradient."""
    reserved = {"loss", "gradient_norm", "skipped", "tokens", "agreement", "teacher_cross_entropy"}
    terms = [dataclasses.replace(task_term(), name=name) for name in names]
    fine = names and len(set(names)) == len(names) and not reserved & set(names)
    with contextlib.nullcontext() if fine else pytest.raises(UserError):
        make_train_step(GIVEN, terms, KEEP)
