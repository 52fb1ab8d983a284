"""Sentence encoders: terms, metrics, and a whole experiment with a tiny encoder on generated text."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from builders import random_params
from scipy import stats

import distill
from distill import losses
from distill.experiments import runner
from distill.experiments.folder import read_config
from distill.experiments.kinds import report_in
from distill.experiments.sentences import corpus, measure
from distill.experiments.sentences import run as experiment
from distill.experiments.sentences.config import SentenceConfig
from distill.features import FeatureConfig
from distill.models import Collect, EncoderConfig, encoder
from distill.optim import OptimizerConfig
from distill.parallel import ParallelConfig
from distill.term import View
from distill.training import LogConfig, TrainingConfig

TINY = EncoderConfig(vocab_size=40, layers=2, width=8, heads=2, feed_forward=12, token_types=2, max_length=12)
PRE_NORM = {"norm_place": "pre", "positions": "rotary", "gated": True, "norm_bias": False}
CONFIG = SentenceConfig(
    layers=(1,),
    sentences=24,
    held_out=8,
    length=10,
    features=FeatureConfig(relation_weight=0.1, relation_heads=2),
    training=TrainingConfig(
        steps=8,
        batch_size=8,
        steps_per_dispatch=4,
        evaluate_every=8,
        save_every=4,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    ),
    parallel=ParallelConfig(backend="one_device"),
    log=LogConfig(progress=False),
)


def test_similarities_are_compared_as_by_numpy():
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(5, 4)), rng.normal(size=(5, 6))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t)]
    square = (unit[0] @ unit[0].T - unit[1] @ unit[1].T) ** 2
    got = losses.similarity_mse(jnp.asarray(s, jnp.float32), jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(got, square.sum(axis=1) / 4, rtol=1e-5)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    turned = losses.similarity_mse(*(jnp.asarray(x, jnp.float32) for x in (s @ turn * 3, s)))
    np.testing.assert_allclose(turned, 0.0, atol=1e-10)
    assert losses.similarity_mse(jnp.ones((1, 4)), jnp.zeros((1, 4))).tolist() == [0.0]


def test_metrics_equal_scipy():
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(9, 4))
    student = teacher + 0.5 * rng.normal(size=(9, 4))
    student, teacher = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (student, teacher))
    pairs = [(x @ x.T)[np.triu_indices(9, 1)] for x in (student, teacher)]
    got = experiment.compare(student, teacher)
    assert got["pearson"] == pytest.approx(stats.pearsonr(*pairs)[0])
    assert got["spearman"] == pytest.approx(stats.spearmanr(*pairs)[0])
    cosines = [np.where(np.eye(9) > 0, -9.0, x @ x.T) for x in (student, teacher)]
    other = [[sorted(range(9), key=row.__getitem__)[-1] for row in matrix] for matrix in cosines]
    assert got["nearest"] == pytest.approx(np.mean(np.equal(*other)))
    assert got["cosine"] == pytest.approx(np.mean([a @ b for a, b in zip(student, teacher, strict=True)]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny teacher with a word-level tokenizer, and dialogues, in place of fetched files."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("teacher")
    model = encoder(TINY)
    distill.save(folder, model, random_params(model))
    vocab = {f"w{i}": i for i in range(40)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(0)
    turns = [" ".join(f"w{i}" for i in rng.integers(1, 40, rng.integers(3, 14))) for _ in range(2000)]
    dialogues = {str(i): {"messages": [[{"text": turns[2 * i]}], [{"text": turns[2 * i + 1]}]]} for i in range(1000)}
    file = folder / "dataset.json"
    file.write_text(json.dumps(dialogues))
    return file, dataclasses.replace(CONFIG, teacher=str(folder))


@pytest.fixture
def given(made, monkeypatch):
    file, config = made
    monkeypatch.setattr(corpus.fetch, "fetch", lambda what: file)
    return config


def test_an_experiment_runs_and_resumes(given, tmp_path):
    summary = runner.run_experiment(given, tmp_path)
    assert summary["student"]["layers"] == 1 and summary["teacher"]["layers"] == 2
    assert summary["student"]["cosine"] > summary["untrained"]["cosine"]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "sentence_cosine", "similarity_mse", "relation_kl"} <= lines[1].keys()
    spent = [(tmp_path / part / "cost.json").read_bytes() for part in ("", "random")]
    again = runner.run_experiment(given, tmp_path)
    assert spent == [(tmp_path / part / "cost.json").read_bytes() for part in ("", "random")]  # the run was finished
    assert again["cpu_seconds"] == summary["cpu_seconds"] > 0
    assert {c["verdict"] for c in json.loads((tmp_path / "preflight.json").read_text())["checks"]} == {"ok"}
    names = ("untrained", "student", "control", "teacher")
    assert {n: again[n] for n in names} == {n: summary[n] for n in names}
    assert runner.evaluate_folder(tmp_path)["student"] == summary["student"]
    model, params = distill.load(tmp_path)  # the content of RUN/student_hf
    tokens = corpus.sentences(given)["held_out"][0]
    teacher = experiment.embeddings(*distill.load(given.teacher), tokens)
    of_file = experiment.compare(experiment.embeddings(model, params, tokens), teacher)
    assert of_file["cosine"] == pytest.approx(summary["student"]["cosine"], abs=1e-6)
    examples = json.loads((tmp_path / "evaluation.json").read_text())["examples"]
    texts = corpus.sentences(given)["held_out"][1]
    for i, example in enumerate(examples):
        cosines = teacher @ teacher[i]
        cosines[i] = -2.0
        assert example["sentence"] == texts[i]
        nearest = max(cosines[j] for j, text in enumerate(texts) if text == example["teacher"])
        assert nearest == pytest.approx(cosines.max(), abs=1e-6)
    assert len(examples) == 6 and examples[0].keys() == {"sentence", *names}
    assert "Learning curves" in report_in(tmp_path).write_report([tmp_path]).read_text()
    rows = runner.answer(tmp_path, ["w1 w2 w3"])
    assert rows == runner.answer(tmp_path, ["w1 w2 w3"], "max:spearman")
    assert rows[0].keys() == {"prompt", "teacher", "student"}
    runner.print_summary(summary, tmp_path)
    with pytest.raises(ValueError, match="cosine_weight: 1.0 → 2.0"):
        runner.run_experiment(dataclasses.replace(given, cosine_weight=2.0), tmp_path)
    assert read_config(tmp_path, SentenceConfig) == given


def test_embeddings_are_compiled_once():
    model = encoder(TINY)
    params = random_params(model)
    before = measure._embed._cache_size()
    for rows in (3, 7, 100):
        experiment.embeddings(model, params, np.ones((rows, 5), np.int32))
    assert measure._embed._cache_size() == before + 1


def test_no_sentence_is_on_both_sides(given):
    sides = corpus.sentences(given)
    assert not set(sides["train"][1]) & set(sides["held_out"][1])
    assert all(((rows > 0).sum(axis=1) >= corpus.SHORTEST).all() for rows, _ in sides.values())
    with pytest.raises(ValueError, match="5000 of train asked for; there are"):
        corpus.sentences(dataclasses.replace(given, sentences=5000))


@pytest.mark.parametrize("options", [{}, PRE_NORM], ids=["post-norm", "pre-norm"])
def test_terms_equal_losses_of_the_embeddings(options):
    """Also with a final norm, as in ModernBERT."""
    models = [encoder(dataclasses.replace(TINY, layers=n, token_types=0, **options)) for n in (1, 2)]
    both = [(model, random_params(model, n)) for n, model in enumerate(models)]
    tokens = np.array([[5, 6, 7, 0], [8, 9, 0, 0], [1, 2, 3, 4]], np.int32)
    batch = corpus.batch_of(tokens)
    kept = [
        model.apply(params, tokens, segments=batch.segments, collect=Collect(hidden=(n,))).collected
        for n, (model, params) in enumerate(both, start=1)
    ]
    cosine, similarity = experiment.sentence_terms(CONFIG, *models, both[1][1])
    student, teacher = (experiment.embeddings(*one, tokens).astype(np.float64) for one in both)
    view = View(student_features=kept[0], teacher_features=kept[1], batch=batch, params=both[0][1])
    values = cosine.value(view)
    np.testing.assert_allclose(values[:, 0], 1.0 - (student * teacher).sum(-1), atol=1e-5)
    square = (student @ student.T - teacher @ teacher.T) ** 2
    np.testing.assert_allclose(similarity.value(view)[:, 0], square.sum(-1) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sentences": 1}, "at least 2 sentences"),
        ({"cosine_weight": -1.0}, "weights must be at least 0"),
        ({"cosine_weight": 0.0, "similarity_weight": 0.0, "features": FeatureConfig()}, "one of them above"),
    ],
)
def test_invalid_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SentenceConfig(**options)


def test_unsuitable_teachers_are_refused(given, tmp_path):
    with pytest.raises(ValueError, match="length=13; the teacher has 12 positions"):
        experiment.prepare(dataclasses.replace(given, length=13), tmp_path)
