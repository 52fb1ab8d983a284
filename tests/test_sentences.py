"""Sentence encoders: terms, metrics, and a whole experiment with a tiny encoder on generated text."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from builders import random_params
from scipy import stats

import distill
from distill import losses
from distill.errors import MissingFile, UserError
from distill.experiments import runner
from distill.experiments.folder import read_config
from distill.experiments.kinds import report_in
from distill.experiments.sentences import corpus, measure
from distill.experiments.sentences import run as experiment
from distill.experiments.sentences.config import SentenceConfig
from distill.experiments.sentences.pooling import read_pooling
from distill.features import FeatureConfig
from distill.models import Collect, EncoderConfig, encoder
from distill.models.encoder import embed
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
    tokens, segments, _ = corpus.sentences(given)["held_out"]
    teacher = experiment.embeddings(*distill.load(given.teacher), tokens, segments)
    of_file = experiment.compare(experiment.embeddings(model, params, tokens, segments), teacher)
    assert of_file["cosine"] == pytest.approx(summary["student"]["cosine"], abs=1e-6)
    examples = json.loads((tmp_path / "evaluation.json").read_text())["examples"]
    texts = corpus.sentences(given)["held_out"].texts
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


def test_embeddings_are_compiled_once(monkeypatch):
    model, traced, embed = encoder(TINY), [], measure.embed
    params = random_params(model)
    monkeypatch.setattr(measure, "embed", lambda *inputs: traced.append(inputs) or embed(*inputs))
    for rows in (3, 7, 100):
        experiment.embeddings(model, params, *np.ones((2, rows, 5), np.int32))
    assert len(traced) == 1


def test_no_sentence_is_on_both_sides(given):
    sides = corpus.sentences(given)
    assert not set(sides["train"].texts) & set(sides["held_out"].texts)
    assert all((side.segments.sum(axis=1) >= corpus.SHORTEST).all() for side in sides.values())
    with pytest.raises(ValueError, match="5000 of train asked for; there are"):
        corpus.sentences(dataclasses.replace(given, sentences=5000))


@pytest.mark.parametrize(
    ("options", "kind"), [({}, "mean"), (PRE_NORM, "mean"), ({}, "cls")], ids=["post-norm", "pre-norm", "cls"]
)
def test_terms_equal_losses_of_the_embeddings(options, kind):
    """Also with a final norm, as in ModernBERT."""
    models = [encoder(dataclasses.replace(TINY, layers=n, token_types=0, **options)) for n in (1, 2)]
    both = [(model, random_params(model, n)) for n, model in enumerate(models)]
    tokens, segments = corpus.padded([[5, 6, 7], [8, 0], [0, 2, 3, 4]], 4)  # 0 is a token here
    batch = corpus.batch_of(corpus.Sentences(tokens, segments, []))
    np.testing.assert_array_equal(batch.mask.sum(axis=1), [3, 2, 4])
    kept = [
        model.apply(params, tokens, segments=batch.segments, collect=Collect(hidden=(n,))).collected
        for n, (model, params) in enumerate(both, start=1)
    ]
    cosine, similarity = experiment.sentence_terms(CONFIG, *models, both[1][1], kind)
    student, teacher = (experiment.embeddings(*one, tokens, segments, kind).astype(np.float64) for one in both)
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


def test_a_teacher_without_a_tokenizer_that_can_be_read_is_named(tmp_path):
    config = SentenceConfig(teacher=str(tmp_path))
    with pytest.raises(MissingFile, match=r"tokenizer.json: missing; .* AutoTokenizer"):
        corpus.sentences(config)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json: no tokenizer that the library tokenizers reads"):
        corpus.sentences(config)


def test_the_folder_of_a_run_is_that_of_its_student(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "student_hf").mkdir()
    assert corpus.teacher_folder(SentenceConfig(teacher=str(tmp_path))) == tmp_path / "student_hf"


def test_every_token_of_a_sentence_counts_whatever_its_id(given):
    """Id 0 is a word of this tokenizer, as <s> is 0 in XLM-R's vocabulary."""
    held_out = corpus.sentences(given)["held_out"]
    model, params = distill.load(given.teacher)
    zero = held_out.tokens.copy()
    zero[:, 0] = 0
    lengths = held_out.segments.sum(axis=1)
    got = measure.embeddings(model, params, zero, held_out.segments)
    for ids, length, vector in zip(zero[:3], lengths, got, strict=False):
        alone = measure.embeddings(model, params, ids[None, :length], np.ones((1, length), np.int32))[0]
        np.testing.assert_allclose(vector, alone, atol=1e-5)


# ---- folders of sentence-transformers


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
CLS = {"word_embedding_dimension": 8, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def folder_of(where, modules=MODULES, pooling=CLS, **files):
    (where / "1_Pooling").mkdir(parents=True)
    (where / "1_Pooling/config.json").write_text(json.dumps(pooling))
    (where / "modules.json").write_text(json.dumps(modules))
    for name, values in files.items():
        (where / f"{name}.json").write_text(json.dumps(values))
    return where


@pytest.mark.parametrize(
    ("pooling", "kind"),
    [
        (CLS, "cls"),
        ({}, "mean"),
        (CLS | {"include_prompt": True, "pooling_mode_lasttoken": False}, "cls"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "last"),
        ({"embedding_dimension": 8, "pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_the_pooling_is_that_of_the_folder(pooling, kind, tmp_path):
    found = read_pooling(folder_of(tmp_path / "a", pooling=pooling, sentence_bert_config={"max_seq_length": 9}), 8)
    assert (found.kind, found.longest) == (kind, 9)
    assert json.loads(dict(found.files)["1_Pooling/config.json"]) == pooling
    assert json.loads(dict(found.files)["modules.json"]) == MODULES


def test_without_modules_the_mean_is_taken_and_written_down(tmp_path):
    found = read_pooling(tmp_path, 8)
    for name, text in found.files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert found.kind == "mean" == read_pooling(tmp_path, 8).kind
    assert [module["path"] for module in json.loads((tmp_path / "modules.json").read_text())] == ["", "1_Pooling"]


DENSE = {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules": [*MODULES[:2], DENSE]}, "Transformer, Pooling, Dense; expected Transformer, Pooling and perhaps"),
        ({"modules": MODULES[:1]}, "modules.json: Transformer; expected"),
        ({"modules": {"a": 1}}, "expected a list of modules"),
        ({"modules": [MODULES[0] | {"path": "0_BERT"}, MODULES[1]]}, "the Transformer is in '0_BERT'"),
        ({"modules": [MODULES[0], MODULES[1] | {"path": "../1_Pooling"}]}, "the Pooling in '../1_Pooling'"),
        (
            {"pooling": CLS | {"pooling_mode_mean_tokens": True}},
            "pooling is pooling_mode_mean_tokens, pooling_mode_cls",
        ),
        ({"pooling": {"pooling_mode": "weightedmean"}}, "the pooling is weightedmean; expected one of mean, cls"),
        ({"pooling": CLS | {"pooling_mode_head": True}}, "unknown keys pooling_mode_head"),
        ({"pooling": [1]}, "1_Pooling/config.json: expected an object"),
        ({"sentence_bert_config": {"do_lower_case": True}}, "do_lower_case='True' changes every text"),
        ({"config_sentence_transformers": {"default_prompt_name": "query"}}, "default_prompt_name='query'"),
    ],
)
def test_what_a_folder_of_sentence_transformers_may_not_hold_is_named(files, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_pooling(folder_of(tmp_path / "a", **files), 8)


def test_a_missing_or_damaged_pooling_is_an_error(tmp_path):
    where = folder_of(tmp_path / "a")
    (where / "1_Pooling/config.json").write_text("{")
    with pytest.raises(ValueError, match="1_Pooling/config.json: cannot be read"):
        read_pooling(where, 8)
    (where / "1_Pooling/config.json").unlink()
    with pytest.raises(FileNotFoundError, match="1_Pooling/config.json: missing; modules.json of this folder names it"):
        read_pooling(where, 8)


def test_teacher_and_student_pool_as_the_folder_says_and_the_student_keeps_it(given, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(given.teacher, teacher)
    folder_of(tmp_path / "cls")
    shutil.copytree(tmp_path / "cls", teacher, dirs_exist_ok=True)
    config = dataclasses.replace(given, teacher=str(teacher))
    world = experiment.prepare(config, tmp_path / "run")
    held_out = world.sides["held_out"]
    want = embed(*world.teacher, held_out.tokens, held_out.segments, "cls")
    np.testing.assert_allclose(world.embed(*world.teacher, held_out), want, atol=1e-5)
    assert np.abs(want - embed(*world.teacher, held_out.tokens, held_out.segments)).max() > 1e-3
    arm = next(iter(experiment.arms(world, {})))
    runner.export(tmp_path / "run", *arm.export(world.student))
    assert read_pooling(tmp_path / "run/student_hf", 8) == world.pooling
    assert world.fingerprints["pooling"] == "cls"
    with pytest.raises(ValueError, match="length=10; the teacher reads 7 tokens"):
        (teacher / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 7}))
        experiment.prepare(config, tmp_path / "run")
