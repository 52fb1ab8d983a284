"""Several processes: how they find each other, and that two of them train the weights of one."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src.distributed import global_state
from one_process import learn_text, train
from text_builders import teacher_and_text

import distill
from distill import checkpoint
from distill.devices import processes
from distill.devices.processes import Start, settings
from distill.experiments import runner
from distill.metrics import read_metrics
from distill.parallel import ParallelConfig

HERE = Path(__file__).parent
PATIENCE = 400
"""Seconds after which processes hang, on a slow machine too. Who waits in vain for another waits much longer."""
PLAIN = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
SLURM |= {"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}


@pytest.mark.parametrize(
    ("environment", "on_tpu", "expected"),
    [
        ({}, False, None),
        ({}, True, Start()),
        ({"JAX_NUM_PROCESSES": "1"}, True, None),
        (PLAIN, False, Start("10.0.0.2:1234", 4, 3)),
        (PLAIN, True, Start("10.0.0.2:1234", 4, 3)),
        (PLAIN | SLURM | {"SLURM_NTASKS": "1"}, False, Start("10.0.0.2:1234", 4, 3)),
        (SLURM, False, Start(local_device_ids=tuple(range(8)))),  # one task drives all GPUs of its node
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0"}, False, Start()),
        (SLURM | {"SLURM_NTASKS": "16"}, False, Start()),  # JAX gives every task one device
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "n1:99", "SLURM_NTASKS": "16"}, False, Start("n1:99")),
        (SLURM | {"SLURM_NTASKS": "1"}, False, None),
        ({name: SLURM[name] for name in SLURM if name != "SLURM_STEP_NODELIST"}, False, None),  # sbatch without srun
    ],
)
def test_index_and_coordinator_are_read_from_the_environment(environment, on_tpu, expected):
    assert settings(environment, on_tpu) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is not; expected all three"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4, JAX_NUM_PROCESSES=4; expected ids 0 … 3"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1: expected a whole number"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two: expected a whole number"),
        ({"JAX_NUM_PROCESSES": "1"}, "JAX_PROCESS_ID=3, JAX_NUM_PROCESSES=1; expected ids 0 … 0"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.2"}, "JAX_COORDINATOR_ADDRESS=10.0.0.2: expected HOST:PORT"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(PLAIN | changes)


def test_a_single_process_needs_no_coordinator(tmp_path):
    assert (processes.count(), processes.index(), processes.asked_to_stop()) == (1, 0, False)
    assert processes.from_first(lambda: object) is object
    processes.meet("nobody")
    processes.agree("seed", "1")


class Silent:
    """A key-value store without entries, whose barriers never complete."""

    def blocking_key_value_get(self, key, milliseconds):
        raise RuntimeError(f"DEADLINE_EXCEEDED after {milliseconds} ms")

    def wait_at_barrier(self, name, milliseconds):
        raise RuntimeError(f"DEADLINE_EXCEEDED after {milliseconds} ms")


def test_waiting_for_other_processes_times_out(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "index", lambda: 1)
    monkeypatch.setattr(global_state, "client", Silent())
    with pytest.raises(TimeoutError, match=r"process 0 sent nothing for 3 s \(.* 3000 ms"):
        processes.from_first(lambda: 1, seconds=3.0)
    with pytest.raises(TimeoutError, match=r"not all 2 processes came to: data, in 3 s \(.* 3000 ms"):
        processes.meet("data", seconds=3.0)


def test_only_process_0_writes(tmp_path, monkeypatch):
    from distill.config import write_json
    from distill.metrics import Writer

    monkeypatch.setattr(processes, "index", lambda: 1)
    write_json(tmp_path / "value.json", {})
    Writer(tmp_path).close()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not see what process 0 wrote there; the run folder has to lie on"):
        checkpoint._look_for(tmp_path, "mark", seconds=0.0)


# ---- a pair of processes, four devices each


def start(folder: Path, port: int, index: int, **more: str) -> subprocess.Popen:
    plain = (f"localhost:{port}", "2", str(index))
    environment = os.environ | dict(zip(PLAIN, plain, strict=True)) | more
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"  # the last flag of a name takes effect
    command = [sys.executable, str(HERE / "one_process.py"), str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return place.getsockname()[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder in which two processes trained."""
    folder, port = teacher_and_text(tmp_path_factory.mktemp("pair")), free_port()
    both = [start(folder, port, index) for index in (0, 1)]
    try:
        printed = [one.communicate(timeout=PATIENCE) for one in both]
    finally:
        for one in both:
            one.kill()
    assert [one.returncode for one in both] == [0, 0], "\n".join(error for _, error in printed)
    (folder / "stdout.json").write_text(json.dumps([out for out, _ in printed]))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Leaves of the parameters that one device trains."""
    return jax.tree.leaves(train(tmp_path_factory.mktemp("alone"), ParallelConfig(backend="one_device")))


def leaves_of(folder: Path, index: int) -> list[np.ndarray]:
    with np.load(folder / f"process{index}.npz") as file:
        return [file[name] for name in file.files]


def distance(left, right) -> float:
    """Largest ‖a − b‖ / ‖b‖ of the leaves."""
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(left, right, strict=True))


def test_two_processes_train_the_weights_of_one_device(pair, alone):
    first, second = leaves_of(pair, 0), leaves_of(pair, 1)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert distance(first, alone) < 1e-6


def test_a_run_of_two_processes_resumes_on_one_device(pair, alone, tmp_path):
    shutil.copytree(pair / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    resumed = train(tmp_path / "run", ParallelConfig(backend="one_device"))
    assert distance(jax.tree.leaves(resumed), alone) < 1e-6


def test_two_processes_distil_on_text_like_one(pair, tmp_path):
    for name in ("teacher", "text.txt"):
        (tmp_path / name).symlink_to(pair / name)
    learn_text(tmp_path, ParallelConfig(backend="one_device"))
    together, one = (distill.load(folder / "text" / "student_hf")[1] for folder in (pair, tmp_path))
    assert distance(jax.tree.leaves(together), jax.tree.leaves(one)) < 1e-6
    told = [json.loads((pair / f"process{index}_again.json").read_text()) for index in (0, 1)]
    summary = json.loads((tmp_path / "text" / "summary.json").read_text())
    for again in told:  # as evaluated and written again from the run folder, by both
        for name, key in (("teacher", "nll"), ("student", "nll"), ("student", "kl"), ("start", "kl")):
            assert again["summary"][name][key] == pytest.approx(summary[name][key], rel=1e-4)
        assert again["answer"] == runner.answer(tmp_path / "text", ["the cat"])
    read = [json.loads((pair / f"process{index}_rows.json").read_text()) for index in (0, 1)]
    assert set(read[0]) == set(read[1]) == {4} and len(read[0]) >= 2  # each process reads its own of eight rows


def test_processes_share_results_and_errors(pair):
    first, second = (json.loads((pair / f"process{index}.json").read_text()) for index in (0, 1))
    for one in (first, second):
        assert one["devices"] == [4, 8] and one["found"]
        assert one["made"] == [0, "first"]
        assert "no number" in one["failed"]
        assert "backend=pmap with 2 processes; expected mesh, or auto" in one["pmap"]
    assert (first["disagreed"], second["disagreed"][:33]) == ("", "process 1 has another seed than p")
    printed = json.loads((pair / "stdout.json").read_text())
    assert ["printed by process" in out for out in printed] == [True, False]


def test_one_process_writes_the_metrics(pair):
    records = [json.loads(line) for line in (pair / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [5, 10, 15, 20]
    assert [record["step"] for record in records if record["kind"] == "eval"] == [0, 10, 20]


def test_a_coordinator_that_does_not_answer_is_an_error(tmp_path):
    lonely = start(tmp_path, free_port(), 1, JAX_START_SECONDS="1")
    _, error = lonely.communicate(timeout=PATIENCE)
    assert lonely.returncode == 1
    assert "process 1 waited 1 s at localhost:" in error and "Traceback" not in error


def ended_by(folder: Path, number: signal.Signals) -> tuple[list[int], list[str]]:
    """Exit codes and stderr of both processes of a training in which the second gets a signal."""
    port = free_port()
    before = len(read_metrics(folder / "run"))
    both = [start(folder, port, index, ENDLESS="1") for index in (0, 1)]
    try:
        end = time.monotonic() + PATIENCE
        while len(read_metrics(folder / "run")) < before + 3 and time.monotonic() < end:
            time.sleep(0.1)
        both[1].send_signal(number)
        printed = [one.communicate(timeout=PATIENCE)[1] for one in both]
    finally:
        for one in both:
            one.kill()
    return [one.returncode for one in both], printed


def test_a_signal_to_one_process_stops_all_and_a_lost_one_ends_the_others(tmp_path):
    assert PATIENCE < processes.MEETING_SECONDS  # otherwise the others could end because they timed out
    codes, errors = ended_by(tmp_path, signal.SIGTERM)
    stopped = [re.findall(r"stopped at step (\d+) of 1000000; saved", text) for text in errors]
    assert codes == [0, 0] and len(stopped[0]) == 1 and stopped[0] == stopped[1], errors
    codes, errors = ended_by(tmp_path, signal.SIGKILL)
    assert codes[0] != 0 and codes[1] == -signal.SIGKILL
    # whichever comes first: a failed collective (an error here) or a missed heartbeat (JAX ends the process)
    assert "If another process ended, its log says why." in errors[0] or "another task died" in errors[0], errors[0]
    steps = [record["step"] for record in read_metrics(tmp_path / "run")]
    assert int(stopped[0][0]) in steps and steps == sorted(set(steps) | {0}), steps
