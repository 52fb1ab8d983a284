"""Features, sequence means and padded vocabularies in the train step follow the same rules as logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import VOCAB, nnx_model, on_device, random_params, tiny_decoder, uneven_batch

from distill import losses, parallel
from distill.batch import shift
from distill.data import addition
from distill.experiments import runner
from distill.experiments.addition.config import Config, Recipe
from distill.experiments.addition.measure import network
from distill.experiments.addition.run import World, student_arm
from distill.experiments.addition.student import transfer_set
from distill.experiments.folder import Trained, restore
from distill.features import (
    FeatureConfig,
    feature_terms,
    projector_shapes,
    with_projectors,
    without_projectors,
)
from distill.models import Collect, DecoderConfig
from distill.objective import ObjectiveConfig, Term, task_term, terms_of
from distill.parallel import ParallelConfig, make_mesh
from distill.state import init_state
from distill.step import make_train_step
from distill.teacher.signal import SignalConfig
from distill.term import LOGITS, Needs
from distill.training import LogConfig, TrainingConfig

STUDENT = tiny_decoder(vocab_size=12)
TEACHER = tiny_decoder(vocab_size=12, layers=4, width=12, head_dim=4, feed_forward=20)
TWIN = tiny_decoder(vocab_size=12, layers=3)  # of the student's width
SGD = optax.sgd(1.0)  # so that parameters change by the gradient
EVERYTHING = FeatureConfig(
    hidden_weight=0.5, embeddings=True, attention_weight=0.25, relation_weight=0.125, relation_heads=2, relation_layer=3
)


@functools.cache
def everything():
    """A student with a projector, terms on logits and features, and the initial state."""
    student = with_projectors(STUDENT, projector_shapes(EVERYTHING, STUDENT, TEACHER))
    inside = feature_terms(EVERYTHING, student, TEACHER)
    terms = terms_of(ObjectiveConfig(temperature=2.0, kd_weight=0.7, task_weight=0.3), inside)
    return student, terms, random_params(student), random_params(TEACHER, seed=1)


def means(metrics):
    return {name: float(total) / float(weight) for name, (total, weight) in metrics.items()}


def stepped(student, terms, params, teacher_params, batch, teacher=TEACHER, **options):
    step = jax.jit(make_train_step(student, terms, SGD, teacher=teacher, **options))
    return step(init_state(params, SGD), teacher_params, batch)


def assert_close(left, right, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), left, right)


# ---- features in the step


def test_terms_are_those_of_the_losses_on_collected_features():
    student, terms, params, teacher_params = everything()
    batch = on_device(uneven_batch())
    _, metrics = stepped(student, terms, params, teacher_params, batch)
    wanted = Collect(hidden=(0, 1, 2), attention=(1, 2), relations=(2,))
    options = {"positions": batch.positions, "segments": batch.segments}
    s = STUDENT.apply(without_projectors(params), batch.inputs, collect=wanted, **options).collected
    wanted = Collect(hidden=(0, 2, 4), attention=(2, 4), relations=(3,))
    t = TEACHER.apply(teacher_params, batch.inputs, collect=wanted, **options).collected
    projector = params["projectors"]["hidden"]
    hidden = [
        losses.projected_mse(s["hidden"][m], t["hidden"][n], projector) for m, n in ((0, 0), (1, 2), (2, 4))
    ]  # the last layer of each half of the teacher, and the embeddings
    attention = [losses.attention_kl(s["attention"][m], t["attention"][n]) for m, n in ((1, 2), (2, 4))]
    relation = [
        losses.relation_kl(a, b, relation_heads=2) for a, b in zip(s["relations"][2], t["relations"][3], strict=True)
    ]
    want = {
        "hidden_projected_mse": sum(hidden) / 3,
        "attention_kl": sum(attention) / 2,
        "relation_kl": sum(relation),
    }
    got = means(metrics)
    for name, values in want.items():
        assert got[name] == pytest.approx(float(jnp.mean(values[batch.mask])), rel=1e-5), name
        assert got[name] > 0.01
    parts = 0.7 * 4.0 * got["forward_kl"] + 0.3 * got["cross_entropy"] + 0.5 * got["hidden_projected_mse"]
    parts += 0.25 * got["attention_kl"] + 0.125 * got["relation_kl"]
    assert got["loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_the_projector_learns_and_the_update_is_the_slope_of_the_loss(reduction):
    student, terms, params, teacher_params = everything()
    batch = on_device(uneven_batch())
    new, metrics = stepped(student, terms, params, teacher_params, batch, reduction=reduction)
    gradient = jax.tree.map(jnp.subtract, params, new.params)
    assert float(jnp.max(jnp.abs(gradient["projectors"]["hidden"]))) > 1e-3
    norm = optax.tree.norm(gradient)
    assert means(metrics)["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)

    def loss(distance):
        moved = jax.tree.map(lambda p, g: p + distance / norm * g, params, gradient)
        return means(stepped(student, terms, moved, teacher_params, batch, reduction=reduction)[1])["loss"]

    assert (loss(0.01) - loss(-0.01)) / 0.02 == pytest.approx(float(norm), rel=0.02)


@pytest.mark.parametrize("options", [{"micro_batches": 4}, {"chunk_size": 8}], ids=["micro_batches", "chunked"])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_micro_batches_equal_the_whole_batch(options, reduction):
    student, terms, params, teacher_params = everything()
    batch = on_device(uneven_batch())
    want = stepped(student, terms, params, teacher_params, batch, chunk_size=0, reduction=reduction)
    assert_close(stepped(student, terms, params, teacher_params, batch, reduction=reduction, **options), want)


def test_eight_devices_equal_one():
    student, terms, params, teacher_params = everything()
    examples = on_device(uneven_batch(rows=16))
    rows = np.arange(16)[None]

    def run(wrapping):
        state = wrapping.place_state(init_state(params, SGD))
        state, metrics = wrapping.steps(
            state,
            wrapping.place_params(teacher_params),
            wrapping.place_examples(examples),
            wrapping.place_rows(rows),
        )
        return jax.device_get((wrapping.fetch_state(state).params, wrapping.fetch_metrics(metrics)))

    def step(axis_name=None):
        return make_train_step(student, terms, SGD, teacher=TEACHER, axis_name=axis_name, reduction="sequence_mean")

    cube = make_mesh(ParallelConfig(backend="mesh", fsdp=2, tensor=2))
    want = run(parallel.one_device(step()))
    assert_close(run(parallel.on_mesh(step(), student, SGD, cube, TEACHER)), want)
    assert_close(run(parallel.pmapped(step)), want)


def test_garbage_in_padding_changes_no_feature():
    """Padding tokens (segment 0, not counted) do not change any bit."""
    student, terms, params, teacher_params = everything()
    rng = np.random.default_rng(0)
    tokens, segments = rng.integers(0, VOCAB, (4, 9)), np.ones((4, 9), int)
    segments[:, 6:] = 0
    results = []
    for filler in (0, 7):
        filled = np.where(segments > 0, tokens, filler)
        batch = on_device(shift(filled, segments > 0, segments))
        results.append(stepped(student, terms, params, teacher_params, batch))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_features_alone_need_no_term_on_logits():
    config = FeatureConfig(hidden_weight=1.0, hidden_loss="cosine")
    terms = terms_of(ObjectiveConfig(kd_weight=0.0, features=config), feature_terms(config, STUDENT, TWIN))
    params, batch = random_params(STUDENT), on_device(uneven_batch())
    for chunk_size in (0, 8):
        new, metrics = stepped(
            STUDENT, terms, params, random_params(TWIN, 1), batch, teacher=TWIN, chunk_size=chunk_size
        )
        assert means(metrics)["loss"] == pytest.approx(means(metrics)["hidden_cosine"], rel=1e-6)
        assert not np.array_equal(new.params["embedding"], params["embedding"])
        np.testing.assert_array_equal(new.params["norm"]["scale"], params["norm"]["scale"])  # after the last state


def test_equal_networks_have_equal_features():
    config = FeatureConfig(hidden_weight=1.0, hidden_loss="mse", attention_weight=1.0, relation_weight=1.0)
    terms, params = feature_terms(config, STUDENT, STUDENT), random_params(STUDENT)
    _, metrics = stepped(STUDENT, terms, params, params, on_device(uneven_batch()), teacher=STUDENT)
    for name in ("hidden_mse", "attention_kl", "relation_kl"):
        assert abs(means(metrics)[name]) < 1e-6


def test_a_custom_feature_term_is_trained_on():
    def last(view):
        return losses.hidden_mse(view.student_features["hidden"][2], view.teacher_features["hidden"][3])

    needs = Needs(student_layers=Collect(hidden=(2,)), teacher_layers=Collect(hidden=(3,)))
    term = Term("last", 2.0, needs, last)
    params = random_params(STUDENT)
    _, metrics = stepped(
        STUDENT, [term], params, random_params(TWIN, 1), on_device(uneven_batch()), teacher=TWIN, chunk_size=0
    )
    assert means(metrics)["loss"] == pytest.approx(2.0 * means(metrics)["last"], rel=1e-6)


@pytest.mark.parametrize(
    ("config", "teacher", "message"),
    [
        (FeatureConfig(hidden_weight=1.0, hidden_loss="mse"), TEACHER, "equal widths"),
        (FeatureConfig(attention_weight=1.0), tiny_decoder(vocab_size=12, heads=2), "average_heads=True"),
        (FeatureConfig(relation_weight=1.0, relation_heads=5), TEACHER, "relation_heads=5 is no divisor"),
        (FeatureConfig(relation_weight=1.0, relation_layer=9), TEACHER, "this model has 1 … 4"),
        (FeatureConfig(hidden_weight=1.0, layers="last"), tiny_decoder(vocab_size=12, layers=1), "use uniform"),
        (FeatureConfig(hidden_weight=1.0, hidden_loss="mse"), nnx_model(), "number of layers"),
    ],
)
def test_incompatible_features_are_refused_before_any_step(config, teacher, message):
    with pytest.raises(ValueError, match=message):
        feature_terms(config, STUDENT, teacher)


def test_features_without_a_teacher_are_refused():
    _, terms, *_ = everything()
    with pytest.raises(ValueError, match="hidden_projected_mse, attention_kl, relation_kl look inside the teacher"):
        make_train_step(STUDENT, terms, SGD)
    with pytest.raises(ValueError, match="signal.kind live"):
        Config(
            teacher=Recipe(DecoderConfig(vocab_size=14)),
            student=Recipe(DecoderConfig(vocab_size=14)),
            objective=ObjectiveConfig(features=EVERYTHING),
        )


@pytest.mark.parametrize(
    "options", [{"hidden_weight": -1.0}, {"relation_heads": 0}], ids=["negative weight", "no relation heads"]
)
def test_feature_configuration_is_checked(options):
    with pytest.raises(ValueError, match="features: "):
        FeatureConfig(**options)


# ---- sequence means


def test_every_sequence_has_the_same_weight():
    """Packed rows of documents with 1, 2 and 4 counted tokens: the mean of their means, not of 7 tokens."""
    tokens = np.arange(16).reshape(2, 8) % VOCAB
    segments = np.array([[1, 1, 2, 2, 2, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]])
    batch = on_device(shift(tokens, segments > 0, segments))
    assert np.asarray(batch.mask.sum(axis=1)).tolist() == [3, 4]
    term = Term("position", 1.0, LOGITS, lambda view: view.labels.astype(jnp.float32))
    params = random_params(STUDENT)
    labels = np.asarray(batch.labels, float)
    documents = [labels[0, :1].mean(), labels[0, 2:4].mean(), labels[1, :4].mean()]
    for reduction, want in (
        ("sequence_mean", np.mean(documents)),
        ("token_mean", labels[np.asarray(batch.mask)].mean()),
    ):
        for chunk_size in (0, 4):
            _, metrics = stepped(
                STUDENT, [term], params, None, batch, teacher=None, reduction=reduction, chunk_size=chunk_size
            )
            assert means(metrics)["position"] == pytest.approx(want, rel=1e-6)
            assert float(metrics["loss"][1]) == (3.0 if reduction == "sequence_mean" else 7.0)


def test_sequences_without_a_counted_token_do_not_count():
    batch = on_device(uneven_batch())
    nothing = batch._replace(mask=batch.mask.at[:4].set(False))
    weights = losses.sequence_weights(nothing.mask, nothing.segments)
    assert float(jnp.sum(weights)) == pytest.approx(float(jnp.sum(jnp.any(nothing.mask, axis=1))))
    none = batch._replace(mask=jnp.zeros_like(batch.mask))
    params = random_params(STUDENT)
    new, metrics = stepped(STUDENT, [task_term()], params, None, none, teacher=None, reduction="sequence_mean")
    jax.tree.map(np.testing.assert_array_equal, new.params, params)
    assert float(metrics["loss"][0]) == 0.0


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="'token_mean' or 'sequence_mean'"):
        stepped(STUDENT, [task_term()], random_params(STUDENT), None, on_device(uneven_batch()), None, reduction="sum")


# ---- padded vocabularies


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("chunk_size", [0, 8], ids=["whole", "chunked"])
def test_padded_rows_do_not_affect_the_step(chunk_size, tied):
    """Student with 16 rows, teacher with 20, vocabulary 12: equal to no padding, whatever the padded rows hold."""
    sides = [tiny_decoder(vocab_size=rows, tied=tied) for rows in (16, 20)]
    plain = tiny_decoder(vocab_size=12, tied=tied)
    terms = terms_of(ObjectiveConfig(temperature=2.0, kd_weight=0.7, task_weight=0.3))
    params = [random_params(model, seed) for seed, model in enumerate(sides)]

    def cut(tree):
        tables = {name: tree[name][:12] if name == "embedding" else tree[name][:, :12] for name in TABLES & tree.keys()}
        return tree | tables

    batch = on_device(uneven_batch())
    student, teacher = (model.with_vocabulary(12) for model in sides)
    new, metrics = stepped(student, terms, *params, batch, teacher=teacher, chunk_size=chunk_size)
    want, want_metrics = stepped(plain, terms, *map(cut, params), batch, teacher=plain, chunk_size=chunk_size)
    assert_close((cut(new.params), metrics), (want.params, want_metrics))
    np.testing.assert_array_equal(new.params["embedding"][12:], params[0]["embedding"][12:])  # padding is unchanged


TABLES = {"embedding", "head"}


def test_two_vocabularies_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"12 tokens, the teacher's 16; .*with_vocabulary"):
        make_train_step(STUDENT, [task_term()], SGD, teacher=tiny_decoder(vocab_size=16))
    with pytest.raises(ValueError, match="size=13; expected 1 … 12"):
        STUDENT.with_vocabulary(13)


def test_a_model_without_a_head_can_be_aligned():
    model = nnx_model()
    params, tokens = model.init(jax.random.key(0)), jnp.array([[1, 2]])
    cut = model.with_vocabulary(5)
    np.testing.assert_array_equal(cut.logits(params, tokens), model.logits(params, tokens)[..., :5])


# ---- experiments by configuration


def test_an_experiment_refuses_incompatible_features_before_training(tmp_path):
    sides = (DecoderConfig(vocab_size=14, layers=1, width=8, heads=heads, feed_forward=16) for heads in (2, 4))
    student, teacher = (Recipe(model) for model in sides)
    objective = ObjectiveConfig(features=FeatureConfig(attention_weight=1.0))
    config = Config(teacher=teacher, student=student, objective=objective, signal=SignalConfig("live"))
    with pytest.raises(ValueError, match="student has 2 heads, teacher 4"):
        runner.run_experiment(config, tmp_path)
    assert not (tmp_path / "teacher").exists()


def test_sequence_level_distillation_is_cross_entropy_on_the_teachers_answers():
    data = addition.AdditionConfig(digits=1)
    recipe = Recipe(DecoderConfig(vocab_size=14, layers=1, width=8, heads=2, feed_forward=16))
    objective = ObjectiveConfig(kd_weight=0.0, task_weight=1.0)
    config = Config(data=data, teacher=recipe, student=recipe, objective=objective)
    sides, model = addition.load(data), network(recipe.model)
    teacher = Trained(model, random_params(model, seed=3))
    examples = transfer_set(config, sides, teacher)
    prompts = examples.prompts(data)
    tokens = np.asarray(prompts)
    for _ in range(data.answer_length):  # greedy, without a cache
        logits = model.logits(teacher.params, jnp.asarray(tokens))
        tokens = np.concatenate([tokens, np.asarray(jnp.argmax(logits[:, -1], axis=-1))[:, None]], axis=1)
    before_end = np.cumsum(tokens[:, prompts.shape[1] :] == 1, axis=1) == 0
    written = np.asarray(examples.answers(data))
    assert np.all(written[before_end] == tokens[:, prompts.shape[1] :][before_end]) and before_end.any()
    batch = on_device(examples.batch(data))
    _, metrics = stepped(model, terms_of(config.objective), random_params(model), None, batch, teacher=None)
    nats = losses.cross_entropy(model.logits(random_params(model), batch.inputs), batch.labels)
    assert means(metrics)["loss"] == pytest.approx(float(jnp.mean(nats[batch.mask])), rel=1e-5)


def test_an_experiment_with_features_sequence_means_and_padded_vocabularies(tmp_path):
    """The run folder of such a student opens like any other: the checkpoint has no projector."""
    training = TrainingConfig(steps=4, batch_size=8, steps_per_dispatch=2, evaluate_every=4, save_every=2)
    config = Config(
        data=addition.AdditionConfig(digits=1),
        teacher=Recipe(DecoderConfig(vocab_size=20, layers=2, width=16, heads=2, feed_forward=16)),
        student=Recipe(DecoderConfig(vocab_size=16, layers=1, width=8, heads=2, feed_forward=16), training),
        objective=ObjectiveConfig(
            features=FeatureConfig(hidden_weight=1.0, attention_weight=1.0), reduction="sequence_mean"
        ),
        signal=SignalConfig("live"),
        parallel=ParallelConfig(backend="one_device"),
        log=LogConfig(progress=False),
    )
    teacher = network(config.teacher.model)
    trained = Trained(teacher, teacher.init(jax.random.key(1)))
    sides = addition.load(config.data)
    sides |= addition.split_heldout(config.data, sides["test"])
    student = runner.train(student_arm(World(config, tmp_path, sides), trained), config)
    again = restore(network(config.student.model), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, student.params, again.params)
    assert student.model.vocab_size == 14
    with pytest.raises(ValueError, match="hidden_weight: 1.0 → 0.0"):
        plain = dataclasses.replace(config, objective=ObjectiveConfig(reduction="sequence_mean"))
        runner.train(student_arm(World(plain, tmp_path, sides), trained), plain)
