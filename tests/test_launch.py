"""The files of scripts/launch parse, name existing scripts and options, and pass arguments on unchanged."""

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
    """Folder in which the fake srun, gcloud and python of a PATH record their arguments."""
    calls = tmp_path / "calls"
    calls.mkdir()
    for name in ("srun", "gcloud", "python"):
        script = f'#!/bin/bash\nprintf "%s\\0" {name} "$JAX_PROCESS_ID" "$@" > {calls}/$$\nexit $FAKE_CODE\n'
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    return calls


def launched(name: str, arguments: list[str], calls: Path, **more: str) -> list[list[str]]:
    """Commands that a launch file ran, each as a list of arguments."""
    environment = os.environ | {"PATH": f"{calls.parent}:{os.environ['PATH']}", "FAKE_CODE": "0"} | more
    file = ROOT / "scripts" / "launch" / name
    done = subprocess.run(["bash", str(file), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == int(environment["FAKE_CODE"]), done.stderr
    return [file.read_text().removesuffix("\0").split("\0") for file in calls.iterdir()]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_scripts_parse_and_name_existing_files_and_options(file):
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


def test_slurm_passes_all_arguments_on(machine):
    where = {"SLURM_SUBMIT_DIR": str(ROOT), "JAX_PROCESS_ID": ""}
    ((name, _, *arguments),) = launched("slurm.sh", ARGUMENTS, machine, **where)
    assert (name, arguments[-8:]) == ("srun", [".venv/bin/python", "scripts/distill.py", *ARGUMENTS])


def test_tpu_quotes_arguments_for_all_workers(machine):
    where = {"TPU": "slice", "ZONE": "z", "JAX_PROCESS_ID": ""}
    ((name, _, *arguments),) = launched("tpu.sh", ARGUMENTS, machine, **where)
    assert [name, *arguments[:5]] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"]
    assert "--worker=all" in arguments
    assert "scripts/distill.py --config addition --run runs/two\\ words" in arguments[-1]


def test_local_starts_every_process_with_its_index(machine):
    calls = launched("local.sh", ["2", *ARGUMENTS], machine, PYTHON="python")
    assert sorted(call[1] for call in calls) == ["0", "1"]
    assert all(call[2:] == ["scripts/distill.py", *ARGUMENTS] for call in calls)


def test_local_fails_if_a_process_fails(machine):
    assert launched("local.sh", ["1", *ARGUMENTS], machine, PYTHON="python", FAKE_CODE="3")
