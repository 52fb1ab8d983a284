"""The teacher's signal: what is stored trains as a live teacher does, and as the loss written by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import VOCAB, on_device, random_params, tiny_decoder, uneven_batch

from distill import losses
from distill.data import addition
from distill.data.loader import Loader
from distill.devices import backend
from distill.devices.speed import flops_per_token
from distill.errors import UserError
from distill.experiments.addition.config import Config, Recipe
from distill.experiments.addition.measure import network
from distill.experiments.addition.run import World, distillation
from distill.experiments.addition.student import started
from distill.experiments.folder import Trained
from distill.models import DecoderConfig
from distill.objective import ObjectiveConfig, terms_of
from distill.optim import OptimizerConfig, optimizer
from distill.parallel import ParallelConfig
from distill.state import init_state
from distill.step import make_train_step
from distill.teacher.signal import SignalConfig, head_alone, signal
from distill.train import Task, fit
from distill.training import LogConfig, TrainingConfig

STUDENT, TEACHER = tiny_decoder(), tiny_decoder(layers=3, width=16, tied=True)
SGD = optax.sgd(0.1)
ALL = SignalConfig("stored", "top_k", k=VOCAB)


@pytest.fixture(scope="module")
def case():
    return random_params(STUDENT), random_params(TEACHER, 1), uneven_batch()


def stepped(case, config, chunk_size, objective):
    params, teacher_params, batch = case
    given = signal(config, TEACHER, teacher_params, batch, temperature=objective.temperature)
    step = make_train_step(STUDENT, terms_of(objective), SGD, teacher=given.teacher, chunk_size=chunk_size)
    state, metrics = jax.jit(step)(init_state(params, SGD), given.params, on_device(given.examples))
    return state.params, {name: losses.divide(pair) for name, pair in metrics.items()}


# ---- equal information, equal numbers


@pytest.mark.parametrize("chunk_size", [0, 5], ids=["whole", "chunked"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "generalized_jsd"])
@pytest.mark.parametrize(
    "config", [SignalConfig("stored"), SignalConfig("stored", "hidden"), ALL], ids=["dense", "hidden", "all in top k"]
)
def test_a_stored_signal_that_holds_everything_is_the_live_teacher(case, config, divergence, chunk_size):
    objective = ObjectiveConfig(divergence, temperature=2.0, task_weight=0.3)
    params, metrics = stepped(case, config, chunk_size, objective)
    want, live = stepped(case, SignalConfig(), chunk_size, objective)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), params, want)
    shared = live if config is not ALL else {name: live[name] for name in ("loss", divergence, "cross_entropy")}
    for name, value in shared.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("targets", ["dense", "hidden", "top_k", "sampled"])
@pytest.mark.parametrize("chunk_size", [0, 5], ids=["whole", "chunked"])
def test_what_is_stored_of_padding_changes_nothing(case, targets, chunk_size):
    params, teacher_params, batch = case
    k = {"k": 3} if targets == "top_k" else {}
    given = signal(SignalConfig("stored", targets, **k), TEACHER, teacher_params, batch)

    def garbage(x):
        if not np.issubdtype(x.dtype, np.floating):
            return x
        return np.where(batch.mask.reshape(*batch.mask.shape, *[1] * (x.ndim - 2)), x, np.nan)

    step = make_train_step(STUDENT, terms_of(ObjectiveConfig()), SGD, teacher=given.teacher, chunk_size=chunk_size)
    new = [
        jax.jit(step)(init_state(params, SGD), given.params, on_device(batch._replace(targets=targets)))
        for targets in (given.examples.targets, jax.tree.map(garbage, given.examples.targets))
    ]
    jax.tree.map(np.testing.assert_array_equal, *new)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new[0]))


def test_targets_are_computed_in_parts_of_one_shape(case, monkeypatch):
    _, teacher_params, batch = case
    whole = signal(ALL, TEACHER, teacher_params, batch).examples.targets
    monkeypatch.setattr("distill.teacher.signal.LOGITS_AT_A_TIME", 3 * batch.inputs.shape[1] * VOCAB)
    parts = signal(ALL, TEACHER, teacher_params, batch).examples.targets
    np.testing.assert_array_equal(parts.ids, whole.ids)
    np.testing.assert_allclose(parts.log_probs, whole.log_probs, rtol=1e-5, atol=1e-6)
    assert len(parts.ids) == len(batch.inputs) and parts.temperature == 1.0


# ---- from a configuration, beside the loss written by hand

TRAINING = TrainingConfig(
    steps=6, batch_size=16, evaluate_every=6, save_every=6, optimizer=OptimizerConfig(learning_rate=3e-3)
)
TEMPERATURE = 1.5


def by_hand_top_k(log_q, targets):
    """Forward KL of the k stored tokens and one class for all others."""
    kept = jnp.take_along_axis(log_q, targets.ids, -1)
    stored = jax.nn.one_hot(targets.ids, log_q.shape[-1]).sum(-2)
    rest = jnp.sum((1.0 - stored) * jnp.exp(log_q), -1)
    p, tail = jnp.exp(targets.log_probs), jnp.exp(targets.log_tail)
    return jnp.sum(p * (targets.log_probs - kept), -1) + tail * (targets.log_tail - jnp.log(rest))


def by_hand_sampled(log_q, targets):
    """Mean over the draws of log P − log Q."""
    shares = targets.counts / targets.counts.sum(-1, keepdims=True)
    return jnp.sum(shares * (targets.log_probs - jnp.take_along_axis(log_q, targets.ids, -1)), -1)


@pytest.mark.parametrize("chunk_size", [0, 8], ids=["whole", "chunked"])
@pytest.mark.parametrize(
    ("config", "by_hand"),
    [
        (SignalConfig("stored", "top_k", k=3), by_hand_top_k),
        (SignalConfig("stored", "sampled", draws=6), by_hand_sampled),
    ],
    ids=["top k", "sampled"],
)
def test_a_configuration_trains_on_stored_tokens_as_the_loss_by_hand(tmp_path, config, by_hand, chunk_size):
    model = DecoderConfig(vocab_size=14, layers=1, width=16, heads=2, feed_forward=16)
    asked = Config(
        data=addition.AdditionConfig(digits=1),
        teacher=Recipe(dataclasses.replace(model, layers=2)),
        student=Recipe(model, dataclasses.replace(TRAINING, chunk_size=chunk_size)),
        objective=ObjectiveConfig(temperature=TEMPERATURE),
        answers="labels",
        signal=config,
        parallel=ParallelConfig(backend="one_device"),
        log=LogConfig(progress=False),
    )
    teacher = network(asked.teacher.model)
    teacher = Trained(teacher, random_params(teacher, 3))
    sides = addition.load(asked.data)
    sides |= addition.split_heldout(asked.data, sides["test"])
    work = distillation(World(asked, tmp_path, sides), teacher, lambda: started(asked, teacher, sides["train"]))
    assert type(work.task.examples.targets).__name__ in ("SparseTargets", "SampledTargets")
    got = fit(tmp_path, work.task, work.training, parallel_config=asked.parallel, log=asked.log)

    student, update = work.task.student, optimizer(TRAINING.optimizer, TRAINING.steps)
    loader = Loader(work.task.examples, TRAINING.batch_size, TRAINING.seed)

    @jax.jit
    def advance(params, state, batch):
        def loss(params):
            logits = student.logits(params, batch.inputs, positions=batch.positions, segments=batch.segments)
            nats = by_hand(jax.nn.log_softmax(logits / TEMPERATURE), batch.targets)
            return TEMPERATURE**2 * jnp.sum(jnp.where(batch.mask, nats, 0.0)) / jnp.sum(batch.mask)

        updates, state = update.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    want = student.init(jax.random.key(TRAINING.seed))
    state = update.init(want)
    for k in range(TRAINING.steps):
        want, state = advance(want, state, on_device(loader.batch(k)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), got, want)


def test_hidden_states_are_read_by_the_head_alone_on_a_mesh_too(case, tmp_path):
    _, teacher_params, batch = case
    given = signal(SignalConfig("stored", "hidden"), TEACHER, teacher_params, batch)
    assert given.params.keys() == {"embedding"}
    training = dataclasses.replace(TRAINING, steps=2, batch_size=8, evaluate_every=2, save_every=2)
    task = Task(STUDENT, terms_of(ObjectiveConfig()), given.examples, given.teacher, given.params)
    live = dataclasses.replace(task, examples=batch, teacher=TEACHER, teacher_params=teacher_params)
    one, mesh = ParallelConfig(backend="one_device"), ParallelConfig(fsdp=2)
    runs = [("a", task, one), ("b", live, one), ("c", task, mesh)]
    log = LogConfig(progress=False)
    weights = [fit(tmp_path / name, what, training, parallel_config=how, log=log) for name, what, how in runs]
    for other in weights[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), weights[0], other)
    with pytest.raises(ValueError, match="its head alone"):
        given.teacher.apply(given.params, batch.inputs)
    assert head_alone(STUDENT, random_params(STUDENT))[1].keys() == {"head"}


def test_the_head_alone_costs_its_product(case):
    """Metrics count the FLOPs that a step needs, not those of a teacher that is not in it."""
    given = signal(SignalConfig("stored", "hidden"), TEACHER, case[1], case[2])
    student = flops_per_token(STUDENT, None, 6)
    assert flops_per_token(STUDENT, given.teacher, 6) == student + 2 * TEACHER.config.width * VOCAB
    assert flops_per_token(STUDENT, TEACHER, 6) > flops_per_token(STUDENT, given.teacher, 6)


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 3}, "k=3 is read only with kind stored and targets top_k"),
        ({"kind": "stored", "draws": 3}, "draws=3 is read only with kind stored and targets sampled"),
        ({"targets": "top_k"}, "targets='top_k' is read only with kind stored"),
        ({"kind": "stored", "targets": "top_k", "k": 0}, "k=0.*at least 1"),
    ],
)
def test_a_signal_that_contradicts_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SignalConfig(**options)


@pytest.mark.parametrize(
    ("stored", "objective", "message"),
    [
        (SignalConfig("stored", "top_k"), {"final_temperature": 2.0, "schedule_steps": 5}, "one temperature"),
        (SignalConfig("stored", "sampled"), {"divergence": "reverse_kl"}, "no unbiased estimate"),
        (SignalConfig("stored", "top_k"), {"divergence": "pearson"}, "compares logits"),
        (SignalConfig("stored", "top_k", k=15), {}, "k=15, but the vocabulary has 14 tokens; set --signal.k"),
    ],
)
def test_an_objective_that_the_stored_targets_cannot_serve_is_refused(stored, objective, message):
    recipe = Recipe(DecoderConfig(vocab_size=14))
    with pytest.raises(ValueError, match=message):
        Config(teacher=recipe, student=recipe, signal=stored, objective=ObjectiveConfig(**objective))


def test_two_sources_of_logits_and_hidden_states_without_a_head_are_refused(case):
    params, teacher_params, batch = case
    dense = on_device(signal(SignalConfig("stored"), TEACHER, teacher_params, batch).examples)
    hidden = on_device(signal(SignalConfig("stored", "hidden"), TEACHER, teacher_params, batch).examples)
    for teacher, targets, message in ((TEACHER, dense, "leave one of them out"), (None, hidden, "whose head reads")):
        step = make_train_step(STUDENT, terms_of(ObjectiveConfig()), SGD, teacher=teacher)
        with pytest.raises(ValueError, match=message):
            step(init_state(params, SGD), teacher_params, targets)
    with pytest.raises(ValueError, match="read from the disk"):
        signal(SignalConfig("stored"), TEACHER, teacher_params, lambda k: batch)


def test_targets_that_no_device_can_hold_are_refused_before_the_teacher_reads(case, monkeypatch):
    """All logits of a large vocabulary are soon hundreds of gigabytes."""
    _, teacher_params, batch = case
    monkeypatch.setattr(backend, "device_bytes", lambda: batch.inputs.size * TEACHER.vocab_size * 4 - 1)
    with pytest.raises(UserError, match="targets='dense' of all examples take .* set --signal.targets hidden"):
        signal(SignalConfig("stored"), TEACHER, teacher_params, batch)
    signal(SignalConfig("stored", "top_k", k=1), TEACHER, teacher_params, batch)
