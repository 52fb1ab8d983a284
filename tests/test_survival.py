"""Processes that are killed: they report their stacks, and the phase they were in is read from them."""

import signal
import subprocess
import sys
import time

import pytest

from distill import checkpoint, train
from distill.data import feed
from distill.evaluation import heldout
from distill.experiments import runner
from distill.experiments.addition import measure, replicas
from distill.reproduce import survival

# Files and functions as they are: one that is renamed is no longer recognised, and must be found here.
MAIN = f'File "{train.__file__}", line 9 in {train._Run.go.__name__}\nFile "/p/scripts/distill.py", line 3 in main'
SAVES = 'File "/p/orbax/checkpoint/writer.py", line 7 in run'
IMPORTS = 'File "/p/distill/data/a.py", line 1 in <module>\nFile "<frozen importlib._bootstrap>", line 2 in _call'
SCRIPT = """
import threading, time

def go():
    print("of the script, not an answer")
    while True:
        sum(range(1000))

threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(int, 1)], daemon=True).start()
go()
"""


@pytest.mark.parametrize(
    ("threads", "want"),
    [
        ([], "start"),
        ([MAIN], "train"),
        ([MAIN, SAVES], "save"),
        ([IMPORTS], "start"),  # of the data's module: nothing of the data is read yet
        ([IMPORTS, SAVES], "save"),
        (['File "/p/jax/_src/compiler.py", line 5 in compile_or_get_cached\n' + MAIN], "compile"),
        ([f'File "{measure.__file__}", line 5 in write_answers\n{MAIN}'], "evaluate"),
        ([f'File "{heldout.__file__}", line 5 in _states\n{MAIN}'], "evaluate"),
        ([f'File "{train.__file__}", line 5 in {train.Task.measure.__name__}\n{MAIN}'], "evaluate"),
        ([f'File "{feed.__file__}", line 5 in __call__\n{MAIN}'], "data"),
        ([f'File "{replicas.__file__}", line 5 in {replicas.train.__name__}'], "train"),
        ([f'File "{checkpoint.__file__}", line 5 in {checkpoint.Checkpoints._seal.__name__}'], "save"),
        ([f'File "{runner.__file__}", line 5 in {runner.train.__name__}'], "start"),
    ],
)
def test_the_phase_is_told_from_all_threads(threads, want):
    assert survival.phase("\n\n".join(threads)) == want


def test_a_process_that_is_asked_goes_on_until_it_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-c", survival._LAUNCH, str(script)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "bufsize": 0}
    with subprocess.Popen(command, **pipes) as process:
        end = time.monotonic() + 300  # a hang, on a slow machine too
        while survival.phase(survival._look(process)) != "train" and time.monotonic() < end:
            time.sleep(0.01)
        asked = {survival._look(process).count("in answer") for _ in range(50)}
        assert asked == {1} and process.poll() is None
        assert survival._kill(process) == "train"
        assert process.returncode == -signal.SIGKILL and survival._look(process) == ""


def test_a_process_that_ended_by_itself_was_not_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("")
    command = [sys.executable, "-c", survival._LAUNCH, str(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        process.wait()
        assert survival._kill(process) is None
