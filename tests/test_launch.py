"""The files of scripts/launch: they parse, name scripts and options that exist, and hand arguments on as they are."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from distill import cli

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "scripts" / "launch").glob("*.sh"))
ARGUMENTS = ["--config", "addition", "--run", "runs/two words", "--student.training.steps", "50"]


@pytest.fixture
def machine(tmp_path):
    """A PATH on which srun, gcloud and python write down what they are called with, and the folder where they do."""
    said = tmp_path / "said"
    said.mkdir()
    for name in ("srun", "gcloud", "python"):
        script = f'#!/bin/bash\nprintf "%s\\0" {name} "$JAX_PROCESS_ID" "$@" > {said}/$$\nexit $FAKE_CODE\n'
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    return said


def launched(name: str, arguments: list[str], said: Path, **more: str) -> list[list[str]]:
    """The commands a file gave, the ones before them aside: each as its words."""
    environment = os.environ | {"PATH": f"{said.parent}:{os.environ['PATH']}", "FAKE_CODE": "0"} | more
    file = ROOT / "scripts" / "launch" / name
    done = subprocess.run(["bash", str(file), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == int(environment["FAKE_CODE"]), done.stderr
    return [file.read_text().removesuffix("\0").split("\0") for file in said.iterdir()]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_it_parses_and_names_what_there_is(file):
    subprocess.run(["bash", "-n", str(file)], check=True)
    text = file.read_text()
    assert os.access(file, os.X_OK)
    for script in re.findall(r"scripts/[\w/]+\.\w+", text):
        assert (ROOT / script).exists(), script
    examples = re.findall(r"^#.*?(--config .*?)(?:  +#.*)?$", text, re.MULTILINE)
    assert examples
    for example in examples:
        options, config = cli.parse_config("", example.split())
        assert str(options.run) in example and config is not None


def test_slurm(machine):
    where = {"SLURM_SUBMIT_DIR": str(ROOT), "JAX_PROCESS_ID": ""}
    ((name, _, *words),) = launched("slurm.sh", ARGUMENTS, machine, **where)
    assert (name, words[-8:]) == ("srun", [".venv/bin/python", "scripts/distill.py", *ARGUMENTS])


def test_tpu(machine):
    where = {"TPU": "slice", "ZONE": "z", "JAX_PROCESS_ID": ""}
    ((name, _, *words),) = launched("tpu.sh", ARGUMENTS, machine, **where)
    assert [name, *words[:5]] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"] and "--worker=all" in words
    assert "scripts/distill.py --config addition --run runs/two\\ words" in words[-1]


def test_local(machine):
    calls = launched("local.sh", ["2", *ARGUMENTS], machine, PYTHON="python")
    assert sorted(call[1] for call in calls) == ["0", "1"]
    assert all(call[2:] == ["scripts/distill.py", *ARGUMENTS] for call in calls)


def test_local_fails_where_a_process_fails(machine):
    assert launched("local.sh", ["1", *ARGUMENTS], machine, PYTHON="python", FAKE_CODE="3")
