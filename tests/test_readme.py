"""The README is true: its code runs as printed, its commands, options, files and losses exist, and it is short."""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from distill import cli, losses
from distill.data import addition
from distill.experiments import kinds
from distill.objective import DIVERGENCES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
ONE_DEVICE = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def spans() -> list[str]:
    """What stands between backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))


def commands() -> list[str]:
    lines = [line.partition("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return lines + [span for span in spans() if re.match(r"(python|make|pip|sbatch) ", span)]


def options_alone() -> list[str]:
    """Options that are shown without their command."""
    return [span for span in spans() if span.startswith("--")]


class Parsed(Exception):
    """A script has read its command line, and goes no further."""


@pytest.fixture
def parse(monkeypatch):
    """``parse(arguments)`` of a script: what its own parser makes of them; the script does not run."""

    def stop(function):
        def parsed(*arguments, **more):
            raise Parsed(function(*arguments, **more))

        return parsed

    def parser(doc):
        made = original(doc)
        made.parse_args = stop(made.parse_args)
        return made

    original = cli.parser
    monkeypatch.setattr(cli, "parser", parser)
    monkeypatch.setattr(cli, "parse_config", stop(cli.parse_config))

    def parse(script: str, *arguments: str):
        monkeypatch.setattr(sys, "path", ["", *sys.path])
        with pytest.raises(Parsed) as read:
            runpy.run_path(str(ROOT / script))["main"](arguments)
        return read.value.args[0]

    return parse


@pytest.fixture
def check(monkeypatch, tmp_path):
    """``check(config)``: an addition finds its own mistakes before it trains, such as models that do not fit."""
    monkeypatch.setattr(
        addition, "load", lambda data: {side: addition.encode(data, x) for side, x in addition.pairs(data).items()}
    )

    def check(config) -> None:
        if config.kind == "addition":  # others read their teacher first
            kinds.experiment_of(config).prepare(config, tmp_path)

    return check


def test_the_code_runs_as_printed_and_brings_the_student_nearer_to_its_teacher(tmp_path):
    (tmp_path / "quick.py").write_text("\n".join(blocks("python")))
    environment = os.environ | ONE_DEVICE
    done = subprocess.run(
        [sys.executable, "quick.py"], cwd=tmp_path, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.search(r"KL.*?([\d.]+) before, ([\d.]+) after", done.stdout).groups())
    assert after < 0.5 * before
    assert (tmp_path / "student_hf/config.json").is_file()


def test_every_command_is_one(parse, check):
    targets = set(re.findall(r"^([\w ]+):", (ROOT / "Makefile").read_text(), re.M))
    targets = {name for line in targets for name in line.split()}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = commands()
    assert len(found) > 12
    for command in found:
        program, *arguments = shlex.split(command)
        if program == "make":
            assert set(arguments) <= targets, command
        elif program == "pip":
            assert arguments[:2] == ["install", "-e"], command
            assert set(re.findall(r"\[(\w+)\]", arguments[2])) <= extras.keys(), command
        else:
            assert program == "python", command
            read = parse(*arguments)
            if not isinstance(read, argparse.Namespace):
                check(read[1])


def test_extras_and_options_beside_commands_exist(parse, check):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"cuda", *re.findall(r'"(\w+)" (?:for|to)', "".join(blocks("sh")))} <= extras.keys()
    for span in options_alone():
        if span not in ("--config-help", "--debug", "--objective.divergence"):
            cut = ["--student.model.head-dim", "16"] if "student-start" in span else []
            check(parse("scripts/distill.py", *shlex.split(span), *cut)[1])
    cut = ["--student.model.head-dim", "16", "--student-start.kind", "lora", "--student-start.rank", "8"]
    check(parse("scripts/distill.py", *cut)[1])
    assert "--config-help" in (ROOT / "distill/cli.py").read_text()


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_file_and_section_it_names_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://arxiv.org/abs/")]
    assert len(links) > 8
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        assert not anchor or anchor in anchors(ROOT / path), link
    for span in spans():
        if re.fullmatch(r"[a-z]+/", span):
            assert any((ROOT / folder / span).is_dir() for folder in ("distill", ".")), span
        elif re.match(r"(scripts|notebooks|distill)/", span):
            assert (ROOT / span).exists(), span


def test_every_loss_is_listed_and_exists():
    table = README[README.index("## Losses") : README.index("## Flow")]
    listed = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert listed <= set(losses.__all__)
    helpers = {"chunked", "divide", "masked_sum", "select", "sequence_weights", "layer_map", "from_targets"}
    helpers |= {"logits_of", "sample_targets", "top_k_targets"}
    assert {name for name in losses.__all__ if name.islower()} - helpers == listed
    rows = table[table.index("| name |") :]
    soft, rest = rows[: rows.index("| `cross_entropy`")], rows[rows.index("| `cross_entropy`") :]
    assert {name for name in listed if f"`{name}`" in soft} == DIVERGENCES.keys()
    assert "pearson" in soft.splitlines()[-1] and not any(f"`{name}`" in rest for name in DIVERGENCES)


def test_it_is_short():
    assert len(README.splitlines()) <= 150
