"""Whole distillations on text with a random teacher and a tokenizer trained here."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from builders import random_params
from text_builders import teacher_and_text, text_config

import distill
from distill.checkpoint import Checkpoints
from distill.data import prepared
from distill.data.loader import Loader
from distill.experiments import runner
from distill.experiments.folder import read_config, restore
from distill.experiments.kinds import experiment_in
from distill.experiments.text import run as text_experiment
from distill.experiments.text.config import StudentConfig, TextConfig
from distill.features import FeatureConfig
from distill.metrics import read_metrics
from distill.models import DecoderConfig, decoder
from distill.reports.text import write_report
from distill.reproduce import text as reproduce
from distill.reproduce.page import write_section
from distill.students.config import StartConfig
from distill.students.start import Start
from distill.tokenizer import TextTokenizer
from distill.weights.published import read

SEED = jax.random.key(0)
EXPERTS = {"experts": 2, "experts_per_token": 1, "router_loss_weight": 0.02}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with a teacher and the text."""
    return teacher_and_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def config(folder):
    return text_config(folder)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "text"
    return run, runner.run_experiment(config, run)


def test_every_arm_is_evaluated_on_the_same_text(finished, config):
    run, summary = finished
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert all(name in summary for name in ("teacher", "student", "equal_tokens", "equal_time", "start"))
    assert summary["student"]["kl"] < summary["start"]["kl"]  # training has an effect
    loader = Loader(runner.open_run(run)[0].train, 8, config.training.seed)
    read = sum(int(np.sum(loader.batch(k).segments > 0)) for k in range(8))  # padding is no token
    assert read < 8 * 8 * 24
    assert evaluation["student"]["training_tokens"] == evaluation["equal_tokens"]["training_tokens"] == read
    assert len(evaluation["student"]["written"]) == len(evaluation["prompts"]) == 2
    train, heldout = (evaluation["text"][side] for side in ("train", "heldout"))
    assert train["documents"] + heldout["documents"] == 60 and heldout["counted"] == evaluation["heldout"]["tokens"]
    assert evaluation["heldout"]["rows"] == heldout["rows"] > len(evaluation["prompts"])
    runner.print_summary(summary, run)


def test_preflight_results_are_in_the_run_folder(finished, config):
    found = json.loads((finished[0] / "preflight.json").read_text())
    verdicts = {check["name"]: check["verdict"] for check in found["checks"]}
    assert verdicts["forward_kl at student = teacher"] == verdicts["memory"] == verdicts["tokenizer"] == "ok"
    _, params = distill.load(config.teacher)
    assert found["memory"]["teacher"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert found["memory"]["optimizer"] >= 2 * found["memory"]["student"] > 0
    assert found["nats_per_token"]["teacher"] > 0


def test_a_finished_run_can_be_evaluated_and_prompted(finished, config, monkeypatch, capsys):
    run, summary = finished
    monkeypatch.setattr(runner, "fit", None)
    assert experiment_in(run) is text_experiment
    again = runner.evaluate_folder(run)
    for name in ("student", "equal_tokens", "start"):
        assert again[name]["kl"] == summary[name]["kl"]
    row = runner.answer(run, ["the cat"])[0]
    assert row.keys() == runner.answer(run, ["the cat"], "kl")[0].keys()
    assert row["prompt"] == "the cat" and set(row) == {"prompt", "teacher", "student"}
    runner.print_summary(again, run)
    assert "distilled, at equal tokens: KL" in capsys.readouterr().out


def test_the_exported_student_equals_the_student(finished):
    run, _ = finished
    model, params = distill.load(run / "student_hf")
    whole = decoder(dataclasses.replace(model.config, vocab_size=320))  # rows of the teacher, more than its tokens
    with Checkpoints(run) as checkpoints:
        saved = checkpoints.params(jax.eval_shape(whole.init, jax.random.key(0)))
    saved["embedding"] = saved["embedding"][: model.vocab_size]
    assert model.vocab_size == read(str(run)).tokenizer.vocab_size < 320
    assert jax.tree.all(jax.tree.map(np.array_equal, params, saved))
    next_teacher = read(str(run))
    assert jax.tree.all(jax.tree.map(np.array_equal, next_teacher.params, saved))
    tokenizer = next_teacher.tokenizer
    assert tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"


def test_heldout_metrics_equal_those_of_all_logits(finished, config):
    summary = finished[1]
    world = text_experiment.prepare(config, finished[0])
    rows = prepared.prepare(config.data, world.tokenizer, config.data_dir)["heldout"].batch()
    params = world.first
    sides = ((world.teacher.model, world.teacher.params), (world.student, params))
    teacher, student = (
        np.asarray(m.logits(p, rows.inputs, positions=rows.positions, segments=rows.segments), np.float64)[rows.mask]
        for m, p in sides
    )
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (teacher, student))
    labels = rows.labels[rows.mask][:, None]
    want = {
        "kl": (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(),
        "nll": -np.take_along_axis(log_q, labels, -1).mean(),
        "agreement": (log_p.argmax(-1) == log_q.argmax(-1)).mean(),
    }
    assert {key: summary["start"][key] for key in want} == pytest.approx(want, rel=1e-4)
    assert summary["teacher"]["nll"] == pytest.approx(-np.take_along_axis(log_p, labels, -1).mean(), rel=1e-4)


def test_resumed_equals_uninterrupted_to_the_bit_from_memory_or_disk(finished, config, tmp_path, monkeypatch):
    saves = Checkpoints.save

    def save_then_die(self, step, *rest):
        saves(self, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        runner.run_experiment(config, tmp_path)
    monkeypatch.setattr(Checkpoints, "save", saves)
    runner.run_experiment(dataclasses.replace(config, arms=(), streaming=True), tmp_path)
    like = text_experiment.prepare(config, tmp_path).student
    left, right = (restore(like, run).params for run in (finished[0], tmp_path))
    assert jax.tree.all(jax.tree.map(np.array_equal, left, right))
    losses = [[r["loss"] for r in read_metrics(run) if "loss" in r] for run in (finished[0], tmp_path)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_changed_run_is_refused(finished, config):
    hotter = dataclasses.replace(config, objective=dataclasses.replace(config.objective, temperature=2.0))
    with pytest.raises(ValueError, match=r"objective\.temperature: 1\.0 → 2\.0"):
        runner.run_experiment(hotter, finished[0])
    assert read_config(finished[0], TextConfig) == config  # the stored configuration is that of the run


def test_chosen_layers_a_pruned_vocabulary_and_hidden_states_are_one_option_each(config, tmp_path):
    given = dataclasses.replace(
        config,
        student=StudentConfig(start=StartConfig("lora", layers=(2, 0), rank=2)),
        vocabulary=60,
        objective=dataclasses.replace(config.objective, features=FeatureConfig(hidden_weight=0.5)),
        training=dataclasses.replace(config.training, steps=4),
    )
    world = text_experiment.prepare(given, tmp_path)
    student = runner.train(next(text_experiment.arms(world, {})), given)
    kl = [world.heldout.measure(world.student, params)["kl"] for params in (world.first, student.params)]
    assert kl[1] != kl[0]
    assert all(r["hidden_projected_mse"] > 0 for r in read_metrics(tmp_path) if r["kind"] == "train")
    model, params = distill.load(tmp_path / "student_hf")
    tokenizer = TextTokenizer.from_folder(tmp_path / "student_hf")
    assert model.vocab_size == tokenizer.vocab_size <= 60 and model.config.layers == 2
    assert tokenizer.decode(tokenizer.encode("the dog sat")) == "the dog sat"
    jax.tree.map(np.testing.assert_array_equal, params, student.params)
    with Checkpoints(tmp_path) as checkpoints:
        learnt = checkpoints.params(jax.eval_shape(world.begin.model.init, SEED))
    curve, merged = read_metrics(tmp_path)[-1], world.heldout.measure(world.student, student.params, given.curve_rows)
    assert curve["kl"] == pytest.approx(merged["kl"], rel=1e-4)  # with LoRA separate and merged
    assert sum(leaf.size for leaf in jax.tree.leaves(learnt)) < model.parameter_count() / 2


@pytest.mark.parametrize(
    "student",
    [
        StudentConfig(feed_forward=8, start=StartConfig("low_rank", rank=2)),
        StudentConfig(layers=1, start=StartConfig("teacher", choice="first", share_embeddings=True)),
        StudentConfig(layers=2, width=8, start=StartConfig("random")),
    ],
    ids=lambda student: student.start.kind,
)
def test_every_start_becomes_a_plain_student(config, student, tmp_path):
    given = dataclasses.replace(config, student=student)
    world = text_experiment.prepare(given, tmp_path)
    params = world.begin.plain(world.begin.learnt(jax.random.key(3)))
    size = world.student.config
    plain = jax.eval_shape(decoder(size).init, jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), plain
    )
    assert (size.layers, size.feed_forward, size.width) == (
        student.layers or 3,
        student.feed_forward or 24,
        student.width or 16,
    )
    if student.start.kind == "teacher":
        first = world.teacher.params["layers"]["mlp"]["up"]["kernel"][0]
        np.testing.assert_array_equal(params["layers"]["mlp"]["up"]["kernel"][0], first)


def test_an_image_token_without_a_row_in_the_student_is_no_difference(folder, config, tmp_path):
    """As in Gemma 3 27B and 1B: one tokenizer, one more row in the larger model."""
    from tokenizers import Tokenizer

    known = TextTokenizer.from_folder(folder / "teacher")
    backend = Tokenizer.from_str(known.serialized)
    backend.add_special_tokens(["<image>"])
    for name, rows in (("large", 320), ("small", known.vocab_size)):
        model = decoder(DecoderConfig(vocab_size=rows, layers=1, width=8, heads=2, feed_forward=8, tied=True))
        distill.save(tmp_path / name, model, random_params(model), TextTokenizer(backend.to_str(), "<eos>"))
    student = StudentConfig(str(tmp_path / "small"))
    given = dataclasses.replace(config, teacher=str(tmp_path / "large"), student=student)
    world = text_experiment.prepare(given, tmp_path)
    assert world.tokenizer.ids() == known.ids()
    assert world.teacher.model.vocab_size == world.student.vocab_size == known.vocab_size


def test_every_arm_has_the_load_balancing_loss(config, tmp_path):
    experts = decoder(DecoderConfig(vocab_size=320, layers=3, width=16, heads=2, feed_forward=8, **EXPERTS))
    world = text_experiment.prepare(dataclasses.replace(config, arms=("equal_tokens",)), tmp_path)
    world = dataclasses.replace(world, begin=Start(experts, None, None), student=experts)
    tasks = [arm.work().task for arm in text_experiment.arms(world, {})]
    assert [[t.weight for t in task.terms if t.name == "load_balancing"] for task in tasks] == [[0.02]] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": 9}, "prune: size=9; bytes and special tokens alone are"),
        ({"student": StudentConfig(start=StartConfig("teacher", layers=(0, 3)))}, "some of 0 … 2"),
        ({"teacher": "nowhere/model.gguf"}, "no such folder or file"),
        ({"student": StudentConfig(layers=4)}, "4 layers of 3"),
        ({"student": StudentConfig(width=32)}, r"width=32; expected 1 … 16"),
        ({"prompt_tokens": 24, "data": {"source": "nowhere"}}, "nowhere"),
    ],
)
def test_impossible_experiments_are_refused_before_training(config, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(runner, "fit", None)
    if "data" in change:
        change = change | {"data": dataclasses.replace(config.data, **change["data"])}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        runner.run_experiment(dataclasses.replace(config, **change), tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StudentConfig(), "as large as the teacher"),
        (lambda: StudentConfig("a/b", layers=2), "layers=2 is read only with no source, which has its own sizes"),
        (lambda: StudentConfig("a/b", start=StartConfig()), "start=.* is read only with no source, which has"),
        (lambda: StudentConfig(layers=2, start=StartConfig("teacher", layers=(1,))), "give one of them"),
        (lambda: StudentConfig(layers=0), "layers=0; expected at least 1"),
        (lambda: TextConfig(arms=("equal_time", "equal_tokens")), "must come first"),
        (lambda: TextConfig(arms=("equal_tokens", "equal_tokens")), "each at most once"),
        (lambda: TextConfig(heldout_rows=0), "heldout_rows=0"),
        (lambda: TextConfig(prompts=0), "prompts=0"),
        (lambda: TextConfig(prompt_tokens=999), "a row has 256 tokens"),
    ],
)
def test_invalid_configurations_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_student_is_cut_out_before_its_teacher_is_quantised(config, tmp_path):
    """The teacher is held in int8, the student is cut out of the teacher in bfloat16; both take a step."""
    small, wide = (
        text_experiment.prepare(dataclasses.replace(config, teacher_dtype=dtype), tmp_path)
        for dtype in ("int8", "bfloat16")
    )
    loaded = read(config.teacher, dtype="int8").params
    assert jax.tree.all(jax.tree.map(np.array_equal, small.teacher.params, loaded))
    starts = [world.begin.learnt(SEED) for world in (small, wide)]
    assert jax.tree.all(jax.tree.map(np.array_equal, *starts))
    kl, exact = (world.heldout.measure(world.student, starts[0], 2)["kl"] for world in (small, wide))
    assert kl == pytest.approx(exact, rel=0.1) and kl != exact


def test_an_int8_teacher_may_have_a_pruned_vocabulary(config, tmp_path):
    config = dataclasses.replace(config, teacher_dtype="int8", vocabulary=300, arms=())
    summary = runner.run_experiment(config, tmp_path / "run")
    assert summary["student"]["kl"] < summary["start"]["kl"]
    assert runner.evaluate_folder(tmp_path / "run")["student"]["kl"] == summary["student"]["kl"]


def test_the_report_shows_arms_texts_and_verdict(finished):
    run, _ = finished
    page = write_report([run]).read_text()
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert all(line in page for line in evaluation["verdict"])
    assert "cross-entropy, equal time" in page and "data:image/png;base64," in page
    (run / "broken").mkdir()
    (run / "broken" / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match="no 'teacher'; run scripts/evaluate.py"):
        write_report([run / "broken"])


def test_a_reproduced_section_replaces_its_predecessor(tmp_path):
    page, summary = tmp_path / "REPRODUCE.md", {"student": {"kl": 1.5}, "verdict": ["even"], "seconds": 60.0}
    page.write_text("# Reproduced numbers\n\n## One\n\nfirst\n\n## Two\n\nsecond\n")
    worse = summary | {"student": summary["student"] | {"kl": summary["student"]["kl"] + 1.0}}
    section = reproduce.text_page(TextConfig(), [summary, worse])
    low = summary["student"]["kl"]
    assert f"| distilled | {low + 0.5:.4f} [{low:.4f}, {low + 1:.4f}] |" in section
    for text in (section, section + "\nagain\n", "## One\n\nnew\n"):
        write_section(page, text)
    written = page.read_text()
    assert written.startswith("# Reproduced numbers\n\n## One\n\nnew\n\n## Two\n\nsecond\n\n## ")
    assert written.count(section.partition("\n")[0]) == 1 and written.endswith("\nagain\n")
