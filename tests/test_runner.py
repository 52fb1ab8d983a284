"""The runner: reruns of finished experiments, cost of stages, and fingerprints of teachers."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from builders import random_params, tiny_decoder
from text_builders import teacher_and_text, text_config

import distill
from distill.data.addition import AdditionConfig
from distill.experiments import cost, fingerprints, runner
from distill.experiments.addition import run as addition
from distill.experiments.addition.config import Config, Recipe, SweepConfig
from distill.experiments.folder import write_config
from distill.models.config import DecoderConfig
from distill.parallel import RULES, ParallelConfig, make_mesh, param_shardings
from distill.reports.table import cells
from distill.training import LogConfig, TrainingConfig

ROOT = Path(__file__).resolve().parents[1]
MODEL = DecoderConfig(vocab_size=14, layers=1, width=8, heads=2, feed_forward=16)
TRAINING = TrainingConfig(steps=4, batch_size=8, steps_per_dispatch=2, evaluate_every=4, save_every=2)
CONFIG = Config(
    data=AdditionConfig(digits=1),
    teacher=Recipe(MODEL, TRAINING),
    student=Recipe(MODEL, TRAINING),
    baseline=SweepConfig(20, 20, (1e-2,), (1.0,), steps=4, evaluate_every=4, batch_size=8),
    parallel=ParallelConfig(backend="one_device"),
    log=LogConfig(progress=False),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "addition"
    return run, runner.run_experiment(CONFIG, run)


@pytest.fixture
def text(tmp_path):
    return text_config(teacher_and_text(tmp_path), arms=("equal_tokens",))


def files(run):
    """Contents of all files that only training writes."""
    names = ("cost.json", "metrics.jsonl", "preflight.json", "config.json")
    return {path: path.read_bytes() for name in names for path in run.rglob(name) if "evaluation" not in path.parts}


def test_running_a_finished_run_again_changes_no_cost_or_metric(finished):
    run, summary = finished
    before = files(run)
    assert {path.name for path in before} == {"cost.json", "metrics.jsonl", "preflight.json", "config.json"}
    assert {path.parent.name for path in before if path.name == "cost.json"} == {"addition", "teacher", "baseline"}
    again = runner.run_experiment(CONFIG, run)
    assert files(run) == before
    assert again.keys() == summary.keys() >= {"teacher", "student", "baseline", "gap_closed", "agreement", "seconds"}
    assert again["student"]["exact_match"] == summary["student"]["exact_match"]


def test_a_run_folder_has_the_documented_files(finished):
    there = {path.name for path in finished[0].iterdir()}
    assert there >= {
        "config.json", "metrics.jsonl", "checkpoints", "evaluation.json", "student_hf", "summary.json",
        "preflight.json", "cost.json",
    }  # fmt: skip


def test_an_unstarted_control_is_left_out_and_a_missing_student_is_an_error(finished, tmp_path):
    config = dataclasses.replace(CONFIG, teacher_run=str(finished[0] / "teacher"))
    world, trained = addition.prepare(config, tmp_path), {}
    write_config(tmp_path, config)
    with pytest.raises(FileNotFoundError, match="no checkpoints"):
        runner.open_run(tmp_path)
    for arm in addition.arms(world, trained):
        trained[arm.name] = runner.train(arm, config)
        if arm.name == "student":
            break
    assert runner.open_run(tmp_path)[1].keys() == {"teacher", "student"}
    assert "baseline" not in runner.evaluate_folder(tmp_path)
    assert json.loads((finished[0] / "teacher" / "cost.json").read_text())["flops"] > 0  # read instead of trained again
    row = runner.answer(tmp_path, ["4+5="])[0]
    assert row.keys() == {"prompt", "truth", "teacher", "student"} and row["truth"] == "9"


def test_seconds_of_two_starts_add_up_and_only_a_cpu_has_joules(tmp_path, monkeypatch):
    for session in (1, 2):
        with cost.training_cost(tmp_path) as about:
            about["flops"] = 7.0
            (tmp_path / "metrics.jsonl").write_text("x" * session)
        spent = json.loads((tmp_path / "cost.json").read_text())
        if session == 1:
            first = spent
    assert spent["seconds"] > first["seconds"] > 0 and spent["flops"] == 7.0
    (row,) = cost.ledger({"training": tmp_path, "nothing": tmp_path / "none"})["rows"]
    assert row["joules"] == 10.0 * spent["cpu_seconds"] and row["what"] == "training"
    monkeypatch.setattr(cost.jax, "default_backend", lambda: "gpu")
    with cost.training_cost(tmp_path / "fast"):
        (tmp_path / "fast").mkdir()
        (tmp_path / "fast" / "metrics.jsonl").write_text("x")
    monkeypatch.undo()
    (row,) = cost.ledger({"training": tmp_path / "fast"})["rows"]
    assert "joules" not in row and row["platform"] == "gpu" and row["cpu_seconds"] >= 0


def test_a_failed_training_records_its_seconds_and_a_refused_one_none(tmp_path):
    with pytest.raises(FloatingPointError), cost.training_cost(tmp_path):
        (tmp_path / "metrics.jsonl").write_text("x")
        raise FloatingPointError
    assert json.loads((tmp_path / "cost.json").read_text())["seconds"] > 0
    with pytest.raises(ValueError), cost.training_cost(tmp_path / "refused"):
        raise ValueError
    assert not (tmp_path / "refused").exists()


# ---- fingerprints


@pytest.mark.parametrize("rules", RULES)
def test_a_fingerprint_does_not_depend_on_sharding(rules):
    model = tiny_decoder(layers=2, vocab_size=12)
    params = random_params(model)
    params |= {"rounded": np.arange(-8, 8, dtype=np.int8), "half": jax.numpy.arange(6, dtype="bfloat16")}
    want = fingerprints.of_tree(params)
    mesh = make_mesh(ParallelConfig(fsdp=2, tensor=2))
    places = param_shardings(model, mesh, RULES[rules])
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    places |= {"rounded": jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")), "half": everywhere}
    assert fingerprints.of_tree(jax.device_put(params, places)) == want
    assert fingerprints.of_tree(jax.device_get(params)) == want


def test_a_fingerprint_distinguishes_bits_positions_names_and_dtypes():
    values = np.arange(1.0, 7.0, dtype=np.float32)
    trees = [{"w": values}, {"v": values}, {"w": values.reshape(2, 3)}, {"w": values[::-1].copy()}]
    trees += [{"w": values.astype(np.int32)}, {"w": values.view(np.int32)}, {"w": np.nextafter(values, np.float32(9))}]
    trees += [{"w": values.reshape(3, 2).T.copy()}, {"w": np.where(np.arange(6) == 5, -values, values)}]
    assert len({fingerprints.of_tree(tree) for tree in trees}) == len(trees)


def test_a_file_is_hashed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hashed, sha256 = [], fingerprints._sha256
    monkeypatch.setattr(fingerprints, "_sha256", lambda file: hashed.append(file.name) or sha256(file))
    model = tiny_decoder(tied=True)
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        distill.save(tmp_path / name, model, random_params(model, seed))
    first, other, same = (fingerprints.of_files(tmp_path / name) for name in "abc")
    assert first == same != other and hashed == ["config.json", "model.safetensors"] * 3
    assert fingerprints.of_files(tmp_path / "a") == first and len(hashed) == 6
    distill.save(tmp_path / "a", model, random_params(model, 3))
    assert fingerprints.of_files(tmp_path / "a") not in (first, other) and len(hashed) > 6
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b" / "config.json"))  # a file: nothing is cached
    assert fingerprints.of_files(tmp_path / "b") == other
    with pytest.raises(FileNotFoundError, match="no weights"):
        fingerprints.of_files(tmp_path / "cache")


def test_a_teacher_is_fingerprinted_once_and_only_for_training(text, tmp_path, monkeypatch):
    asked, of_files = [], fingerprints.of_files
    monkeypatch.setattr(fingerprints, "of_files", lambda path: asked.append(path) or of_files(path))
    monkeypatch.setattr(fingerprints, "of_tree", None)
    runner.run_experiment(text, tmp_path / "run")
    assert len(asked) == 1  # of two arms
    runner.evaluate_folder(tmp_path / "run")
    runner.answer(tmp_path / "run", ["the cat"])
    assert len(asked) == 1


def test_another_teacher_at_the_same_path_is_refused(text, tmp_path):
    runner.run_experiment(text, tmp_path / "run")
    model, params = distill.load(text.teacher)
    distill.save(text.teacher, model, jax.tree.map(lambda leaf: leaf * 1.5, params))
    with pytest.raises(ValueError, match="teacher_weights: "):
        runner.run_experiment(text, tmp_path / "run")


# ---- the table


def test_a_table_formats_numbers_by_its_columns():
    columns = {"a": ("x", ".1f"), "b": ("y", lambda value: f"{value} ms"), "c": ("z", ",")}
    assert cells({"x": 1.25, "y": 3}, columns) == ["1.2", "3 ms", "–"]


def test_the_summary_is_printed_with_its_labels(finished, capsys):
    run, summary = finished
    runner.print_summary(summary, run)
    shown = capsys.readouterr().out
    assert "baseline (alone, 20 labels)" in shown and " ms" in shown and "student 1.0x smaller" in shown


# ---- on a mesh


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """A folder with a teacher and text, and the summary of the run on one device."""
    folder = teacher_and_text(tmp_path_factory.mktemp("one"))
    return folder, runner.run_experiment(_of(folder, ParallelConfig("one_device")), folder / "run")


def _of(folder: Path, parallel: ParallelConfig):
    return text_config(folder, arms=("equal_tokens",), heldout_rows=9, parallel=parallel)


def _measured(summary: dict, name: str) -> dict[str, float]:
    return {key: value for key, value in summary[name].items() if key in ("kl", "nll", "agreement")}


@pytest.mark.parametrize(
    ("count", "spread"),
    [(2, ParallelConfig("mesh")), (8, ParallelConfig(fsdp=2, tensor=2))],
    ids=["2 data", "8 data, fsdp, tensor"],
)
def test_text_ends_on_a_mesh_as_on_one_device(on_one_device, tmp_path, monkeypatch, capsys, count, spread):
    """All arms, tables, the report, and what is evaluated and written again from the run folder."""
    (folder, one), run, attached = on_one_device, tmp_path / "run", jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *_: attached[:count])
    several = runner.run_experiment(_of(folder, spread), run)
    for name in ("teacher", "student", "equal_tokens", "start"):
        assert _measured(several, name) == pytest.approx(_measured(one, name), rel=1e-4) != {}
    for script, arguments in {"evaluate": [], "generate": ["the cat"], "report": []}.items():
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"))["main"](["--run", str(run), *arguments])
    shown = capsys.readouterr().out
    assert "cross-entropy" in shown and "the cat" in shown and (run / "report.html").stat().st_size > 10_000
    again = json.loads((run / "summary.json").read_text())  # parameters as read from the checkpoint
    assert _measured(again, "student") == pytest.approx(_measured(several, "student"), rel=1e-5)
    assert runner.answer(run, ["the cat"]) == runner.answer(folder / "run", ["the cat"])
