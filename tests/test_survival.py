"""Processes that are killed: they report their stacks, and the phase they were in is read from them."""

import signal
import subprocess
import sys
import time

import pytest

from distill.reproduce import survival

MAIN = 'File "/p/distill/train.py", line 9 in go\nFile "/p/scripts/distill.py", line 3 in main'
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
        (['File "/p/distill/experiments/addition/measure.py", line 5 in write_answers\n' + MAIN], "evaluate"),
        (['File "/p/distill/data/feed.py", line 5 in __call__\n' + MAIN], "data"),
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
