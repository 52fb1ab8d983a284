"""The training loop and its checkpoints: bit-identical resumption, refusals, NaN, no host sync."""

import dataclasses
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import distill
from distill import train
from distill.checkpoint import Checkpoints, KeepConfig, lock
from distill.data import addition
from distill.data.addition import TOKENIZER
from distill.experiments.folder import restore
from distill.experiments.runner import open_run
from distill.metrics import read_metrics
from distill.models import DecoderConfig, decoder
from distill.objective import ObjectiveConfig, Term, task_term, terms_of
from distill.optim import OptimizerConfig
from distill.parallel import ParallelConfig
from distill.reproduce import survival
from distill.term import LOGITS
from distill.train import Stopped, Task, fit
from distill.training import LogConfig, TrainingConfig

ROOT = Path(__file__).parents[1]
MODEL = DecoderConfig(vocab_size=14, layers=1, width=8, heads=2, feed_forward=16)
DATA = addition.AdditionConfig(digits=1)
TRAINING = TrainingConfig(
    steps=20, batch_size=8, steps_per_dispatch=5, evaluate_every=10, save_every=5, optimizer=OptimizerConfig()
)
ALONE = {"log": LogConfig(progress=False), "parallel_config": ParallelConfig(backend="one_device")}


@pytest.fixture(scope="module")
def task():
    examples = addition.encode(DATA, addition.pairs(DATA)["train"]).batch(DATA)
    return Task(decoder(MODEL), [task_term()], examples, identity={"learning_rate": 0.1, "teacher": "a"})


def equal_bits(left, right) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def test_a_batch_that_the_devices_cannot_share_is_refused_before_anything_is_compiled(task):
    with pytest.raises(ValueError, match="batch_size=12 cannot be divided over 8 devices"):
        train.lower(task, dataclasses.replace(TRAINING, batch_size=12), ParallelConfig())


def test_resumed_equals_uninterrupted_to_the_bit(task, tmp_path, monkeypatch):
    straight = fit(tmp_path / "straight", task, TRAINING, **ALONE)
    saves = Checkpoints.save

    def save_then_die(self, step, *rest):
        saves(self, step, *rest)
        if step == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", task, TRAINING, **ALONE)
    monkeypatch.setattr(Checkpoints, "save", saves)
    resumed = fit(tmp_path / "cut", task, TRAINING, **ALONE)
    assert equal_bits(straight, resumed)
    lines = [
        [(r["kind"], r["step"], r["loss"]) for r in read_metrics(tmp_path / d) if "loss" in r]
        for d in ("straight", "cut")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 4


def test_a_finished_run_is_not_trained_again(task, tmp_path):
    first = fit(tmp_path, task, TRAINING, **ALONE)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert equal_bits(first, fit(tmp_path, task, TRAINING, **ALONE))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_another_training_in_a_finished_run_is_refused_without_any_identity(task, tmp_path):
    """``fit`` knows the training, the terms and the shapes; the old parameters are not returned for a new loss."""
    plain = dataclasses.replace(task, identity={})
    fit(tmp_path, plain, TRAINING, **ALONE)
    wider = decoder(dataclasses.replace(MODEL, width=2 * MODEL.width))
    for changed, training, difference in (
        (dataclasses.replace(plain, terms=[task_term(0.5)]), TRAINING, r"fit.terms.cross_entropy: 1.0 → 0.5"),
        (dataclasses.replace(plain, student=wider), TRAINING, r"fit.student"),
        (plain, dataclasses.replace(TRAINING, seed=3), r"fit.training.seed: 0 → 3"),
    ):
        with pytest.raises(ValueError, match=difference):
            fit(tmp_path, changed, training, **ALONE)
    fit(tmp_path, plain, dataclasses.replace(TRAINING, on_nan="skip"), **ALONE)  # what is learnt does not depend on it


def test_changed_identity_is_refused_with_the_difference(task, tmp_path):
    """Fault: a cache of another teacher, tokenizer, order or data is used."""
    fit(tmp_path, task, TRAINING, **ALONE)
    changed = dataclasses.replace(task, identity={"learning_rate": 0.2, "teacher": "a"})
    with pytest.raises(ValueError, match=r"learning_rate: 0\.1 → 0\.2"):
        fit(tmp_path, changed, TRAINING, **ALONE)


def test_training_resumes_from_the_checkpoint_before_a_damaged_one(task, tmp_path, capsys):
    straight = fit(tmp_path, task, TRAINING, **ALONE)
    want = [(r["kind"], r["step"], r["loss"]) for r in read_metrics(tmp_path) if "loss" in r]
    file = next((tmp_path / "checkpoints" / "20" / "state").glob("ocdbt*/d/*"))
    file.write_bytes(file.read_bytes()[:-1])
    assert equal_bits(straight, fit(tmp_path, task, TRAINING, **ALONE))
    assert "20: damaged checkpoint" in capsys.readouterr().err
    assert want == [(r["kind"], r["step"], r["loss"]) for r in read_metrics(tmp_path) if "loss" in r]


def test_keeping_the_best_by_an_unknown_metric_is_refused_before_the_first_step(task, tmp_path):
    keep = dataclasses.replace(TRAINING, evaluate_every=5, keep=KeepConfig(best="exact_match"))
    with pytest.raises(ValueError, match="the evaluation measures kl"):
        fit(tmp_path, dataclasses.replace(task, evaluate=lambda params: {"kl": 0.5}), keep, **ALONE)
    assert len(read_metrics(tmp_path)) == 0


def test_the_best_is_restored_by_its_metric(task, tmp_path):
    scores = iter([0.9, 0.2, 0.1, 0.3, 0.4])  # at step 0 and then every five
    often = dataclasses.replace(TRAINING, evaluate_every=5, keep=KeepConfig(last=1, best="kl"))
    last = fit(tmp_path, dataclasses.replace(task, evaluate=lambda _: {"kl": next(scores)}), often, **ALONE)
    with Checkpoints(tmp_path) as checkpoints:
        ten = checkpoints.params(jax.eval_shape(lambda: last), 10)
    assert equal_bits(restore(task.student, tmp_path, "kl").params, ten) and not equal_bits(ten, last)
    assert equal_bits(restore(task.student, tmp_path).params, last)


def test_two_runs_in_one_folder_are_refused(task, tmp_path):
    with lock(tmp_path), pytest.raises(ValueError, match="another process"):
        fit(tmp_path, task, TRAINING, **ALONE)


def test_full_disk_is_refused_before_writing(task, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.checkpoint.shutil.disk_usage", lambda _: Free())
    with pytest.raises(ValueError, match="free some space"):
        fit(tmp_path, task, TRAINING, **ALONE)
    monkeypatch.undo()
    fit(tmp_path, task, TRAINING, **ALONE)


class Free:
    free = 0


def test_nan_stops_and_names_the_step(task, tmp_path):
    broken = Term("broken", 1.0, LOGITS, lambda view: view.student_logits.sum(-1) * np.float32("nan"))
    with pytest.raises(FloatingPointError, match=r"step 1 \(batch 0\)"):
        fit(tmp_path, dataclasses.replace(task, terms=[broken]), TRAINING, **ALONE)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None


def test_a_teacher_that_emits_nan_is_named(task, tmp_path):
    teacher = decoder(MODEL)
    params = jax.tree.map(lambda x: x * np.float32("nan"), teacher.init(jax.random.key(1)))
    kd = dataclasses.replace(task, terms=terms_of(ObjectiveConfig()), teacher=teacher, teacher_params=params)
    with pytest.raises(FloatingPointError, match="teacher"):
        fit(tmp_path, kd, TRAINING, **ALONE)


def test_no_transfer_to_or_between_devices_is_implicit(task, tmp_path, monkeypatch):
    seen = []
    original = train._Run.go

    def go(run):  # a CPU device shares memory with the host, so no guard sees a transfer to the host
        with jax.transfer_guard_host_to_device("disallow"), jax.transfer_guard_device_to_device("disallow"):
            seen.append(True)
            return original(run)

    monkeypatch.setattr(train._Run, "go", go)
    fit(tmp_path, task, TRAINING, **ALONE)
    assert seen


def test_a_dispatch_that_ends_within_its_call_is_timed_by_itself(task, tmp_path, monkeypatch):
    now, original = [0.0], train._Run.go

    def go(run):
        def steps(*arguments, compiled=run.wrapping.steps):
            now[0] += 2.0
            return jax.block_until_ready(compiled(*arguments))

        run.wrapping = dataclasses.replace(run.wrapping, steps=steps)
        return original(run)

    monkeypatch.setattr(train._Run, "go", go)
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # read when the client is created
    try:
        fit(tmp_path, task, dataclasses.replace(TRAINING, save_every=20), **ALONE)
    finally:
        jax.config.update("jax_cpu_enable_async_dispatch", True)
    lines = [line for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]  # evaluated after the second and the last
    tokens = 5 * 8 * task.examples.inputs.shape[1]
    assert [line["tokens_per_second"] for line in lines] == [tokens / 2.0] * 4


def test_teacher_is_not_in_the_checkpoint(task, tmp_path):
    teacher = decoder(dataclasses.replace(MODEL, width=32))
    kd = dataclasses.replace(
        task, terms=terms_of(ObjectiveConfig()), teacher=teacher, teacher_params=teacher.init(jax.random.key(1))
    )
    fit(tmp_path, kd, TRAINING, **ALONE)
    with Checkpoints(tmp_path) as checkpoints:
        meta = checkpoints.meta()
    assert meta["next_batch"] == 20
    stored = (tmp_path / "checkpoints" / "20" / "state" / "_METADATA").read_text()
    assert "params" in stored and "opt_state" in stored and "teacher" not in stored


def test_sigterm_saves_and_the_run_resumes(task, tmp_path):
    def ask(params):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(Stopped, match="stopped at step"):
        fit(tmp_path, dataclasses.replace(task, evaluate=ask), TRAINING, **ALONE)
    assert equal_bits(fit(tmp_path, task, TRAINING, **ALONE), fit(tmp_path / "b", task, TRAINING, **ALONE))


def test_ctrl_c_saves_and_a_second_one_does_not_wait(task, tmp_path):
    def ask(times):
        def evaluate(params):
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            return {}

        return dataclasses.replace(task, evaluate=evaluate)

    with pytest.raises(Stopped, match="stopped at step") as stopped:
        fit(tmp_path, ask(1), TRAINING, **ALONE)
    assert stopped.value.by == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "twice", ask(2), TRAINING, **ALONE)
    want = fit(tmp_path / "straight", task, TRAINING, **ALONE)
    assert equal_bits(fit(tmp_path, task, TRAINING, **ALONE), want)
    seconds = [line["seconds"] for line in read_metrics(tmp_path)]
    assert seconds == sorted(seconds)  # a resumed run counts on


SMALL = """
    --data.digits 1 --teacher.model.layers 1 --teacher.model.width 16 --teacher.training.steps 50
    --teacher.training.evaluate-every 50 --teacher.training.save-every 50 --student.training.steps 200
    --student.training.save-every 50 --student.training.evaluate-every 200 --student.model.layers 1
    --baseline.labels 20 --baseline.validation 20 --baseline.steps 20 --baseline.evaluate-every 20
    --baseline.batch-size 20 --student.model.vocab-size 16 --log.no-progress
    --teacher.training.batch-size 16 --student.training.batch-size 16
""".split()


ONE_DEVICE = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # the optimization level that compiles faster


def script(name: str, *arguments: str):
    """Runs a script in a separate process with one device."""
    environment = os.environ | ONE_DEVICE
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)


def here(name: str, arguments: list[str], monkeypatch, capsys) -> tuple[int, str, str]:
    """Runs a script in this process, without the cost of imports; returns exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    code = 0
    try:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    done = script("distill", "--run", str(run), *SMALL)
    assert done.returncode == 0, done.stderr
    return run, done.stdout


def test_the_student_is_loaded_from_its_run_folder(finished, tmp_path):
    run, _ = finished
    student = open_run(run)[1]["student"]
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    model, params = distill.load(run)
    size = TOKENIZER.vocab_size
    want = student.model.logits(student.params, tokens)[..., :size]
    np.testing.assert_array_equal(model.logits(params, tokens), want)
    assert model.config.vocab_size == size < student.model.config.vocab_size
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="a run folder without student_hf, which is written when its training ends"):
        distill.load(tmp_path)


def test_distill_writes_the_documented_files(finished):
    run, printed = finished
    summary = json.loads((run / "summary.json").read_text())
    assert {"teacher", "student", "baseline", "gap_closed", "agreement", "seconds"} <= summary.keys()
    assert all(name in printed for name in ("teacher", "student", "baseline"))
    assert (run / "config.json").exists() and (run / "evaluation.json").exists()


def test_the_scripts_evaluate_report_and_generate_read_a_run_folder(finished, monkeypatch, capsys):
    run, _ = finished
    before = json.loads((run / "evaluation.json").read_text())
    assert script("evaluate", "--run", str(run)).returncode == 0
    after = json.loads((run / "evaluation.json").read_text())
    assert before["student"]["exact_match"] == after["student"]["exact_match"]
    assert before["student"]["kl"] == after["student"]["kl"]
    done = script("report", "--run", str(run))
    assert done.returncode == 0 and (run / "report.html").exists(), done.stderr
    done = script("generate", "--run", str(run), "4+5=")
    assert done.returncode == 0 and "4+5=" in done.stdout and "teacher" in done.stdout, done.stderr
    best = ["--run", str(run), "4+5=", "--best"]
    code, printed, error = here("generate", [*best, "exact_match"], monkeypatch, capsys)
    assert (code, printed) == (0, done.stdout), error  # one evaluation, at the last step
    code, _, error = here("generate", [*best, "kl"], monkeypatch, capsys)
    assert code == 2 and "no checkpoint measured by 'kl'" in error


def test_a_killed_run_resumes_to_bit_identical_weights(finished, tmp_path):
    # A killed process may leave a truncated entry, so it gets a separate compile cache with links to existing entries.
    cache = shutil.copytree(os.environ["JAX_COMPILATION_CACHE_DIR"], tmp_path / "cache", copy_function=os.symlink)
    straight = survival.Run(finished[0], SMALL, ONE_DEVICE | {"JAX_COMPILATION_CACHE_DIR": str(cache)})
    hit, equal = survival.kills(1, tmp_path, straight, np.random.default_rng(0))
    assert sum(hit.values()) == equal == 1


BAD = {
    "unknown key": (["--student.modle.layers", "1"], "layers"),
    "wrong type": (["--student.training.steps", "many"], "int"),
    "digits 0": (["--data.digits", "0"], "digits=0"),
    "vocabulary": (["--student.model.vocab-size", "9"], "vocab_size=9"),
    "unknown config": (["--config", "additoin"], "addition"),
    "missing config file": (["--config", "nowhere.py"], "nowhere.py"),
    "temperature 0": (["--objective.temperature", "0"], "temperature"),
    "beta 2": (["--objective.beta", "2"], "beta"),
    "no weight": (["--objective.kd-weight", "0"], "kd_weight"),
    "steps": (["--student.training.steps", "77", "--student.training.steps-per-dispatch", "50"], "steps_per_dispatch"),
    "micro-batches": (["--student.training.micro-batches", "7"], "micro_batches"),
    "heads": (["--student.model.heads", "3"], "heads"),
    "learning rate": (["--student.training.optimizer.learning-rate", "0"], "learning_rate"),
    "labels": (["--baseline.labels", "0"], "labels"),
    "parallel": (["--parallel.backend", "pmap", "--parallel.fsdp", "2"], "pmap"),
    "schedule": (["--student.training.optimizer.schedule", "stairs"], "stairs"),
    "seed": (["--student.training.seed", "-1"], "seed"),
    "test fraction": (["--data.test-fraction", "1.5"], "test_fraction"),
    "more labels than pairs": (["--data.digits", "1", "--baseline.labels", "90"], "labels=90"),
    "teacher run": (["--teacher-run", "/nowhere"], "/nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    arguments, expected = BAD[case]
    code, _, error = here("distill", ["--run", str(tmp_path / "run"), *arguments], monkeypatch, capsys)
    assert code == 2 and expected in error and "Traceback" not in error


@pytest.mark.parametrize("name", ["evaluate", "report", "generate"])
def test_an_unreadable_run_folder_is_an_error(name, tmp_path, monkeypatch, capsys):
    arguments = ["--run", str(tmp_path / "none"), *(["1+1="] if name == "generate" else [])]
    code, _, error = here(name, arguments, monkeypatch, capsys)
    assert code == 2 and str(tmp_path) in error and "Traceback" not in error


def test_compiled_programs_are_cached_on_disk_and_reused(tmp_path):
    code = "from distill import cli; cli.set_up_jax(); import jax; jax.jit(lambda x: x * 2 + 1)(1.0)"
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    kept = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
        kept.append({file: file.stat().st_mtime_ns for file in (tmp_path / "distill" / "xla").glob("*-cache")})
    assert kept[0] and kept[0] == kept[1]  # recompiling would write the file again


def test_changed_config_is_refused_by_the_script(finished, monkeypatch, capsys):
    changed = ["--run", str(finished[0]), *SMALL, "--objective.temperature", "3"]
    code, _, error = here("distill", changed, monkeypatch, capsys)
    assert code == 2 and "temperature: 1.0 → 3.0" in error
    assert json.loads((finished[0] / "summary.json").read_text())
