"""Kinds of experiments and their modules."""

import importlib
import json
import shutil

import jax
import numpy as np
import pytest
from builders import random_params, tiny_decoder

import distill
from distill.config import load_config
from distill.experiments import kinds, runner
from distill.experiments.addition.config import Config
from distill.experiments.folder import Trained, read_config, write_config
from distill.experiments.sentences.config import SentenceConfig


def test_the_kind_is_read_from_the_run_folder(tmp_path):
    write_config(tmp_path, Config())
    assert read_config(tmp_path, Config) == Config()
    assert (
        kinds.experiment_in(tmp_path).__name__
        == kinds.experiment_of(Config()).__name__
        == "distill.experiments.addition.run"
    )
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="kind None; expected one of addition"):
        kinds.experiment_in(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "chess"}))
    with pytest.raises(ValueError, match="kind 'chess'; expected one of addition"):
        kinds.report_in(tmp_path)
    with pytest.raises(ValueError, match="an experiment of kind 'chess'; expected 'addition'"):
        read_config(tmp_path, Config)
    with pytest.raises(FileNotFoundError, match="nowhere: no config.json; expected a run folder"):
        kinds.experiment_in(tmp_path / "nowhere")


def test_a_report_refuses_runs_of_different_kinds(tmp_path):
    for name, config in (("a", Config()), ("b", Config()), ("c", SentenceConfig())):
        (tmp_path / name).mkdir()
        write_config(tmp_path / name, config)
    a, b, c = (tmp_path / name for name in "abc")
    assert (
        kinds.report_in(a, b).__name__ == "distill.reports.addition"
        and kinds.report_in(c).__name__ != "distill.reports.addition"
    )
    with pytest.raises(ValueError, match="a and .*c are runs of two kinds .*Write a report of each"):
        kinds.report_in(a, b, c)


def test_a_run_folder_of_another_kind_is_not_overwritten(tmp_path):
    write_config(tmp_path, SentenceConfig())
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match="holds an experiment of kind 'sentences'; this one is 'addition'.*--run"):
        write_config(tmp_path, Config())
    assert (tmp_path / "config.json").read_bytes() == before
    write_config(tmp_path, SentenceConfig(length=9))
    assert read_config(tmp_path, SentenceConfig).length == 9


def test_a_student_without_a_family_is_reported_and_skipped(tmp_path, capsys):
    model = tiny_decoder(norm="layer", vocab_size=16).with_vocabulary(11)
    runner.export(tmp_path, model, random_params(model))
    stderr = capsys.readouterr().err
    assert f"{tmp_path / 'student_hf'}: not written: no family among llama" in stderr and "norm='layer'" in stderr
    assert not (tmp_path / "student_hf").exists()


def test_a_student_is_exported_without_padded_rows(tmp_path, capsys, monkeypatch):
    model = tiny_decoder(vocab_size=16, tied=True).with_vocabulary(11)
    params = random_params(model)
    runner.export(tmp_path, *Trained(model, params))
    small, loaded = distill.load(tmp_path)
    want = params | {"embedding": params["embedding"][:11]}
    assert small.vocab_size == 11 and capsys.readouterr().err == ""
    jax.tree.map(np.testing.assert_array_equal, loaded, want)
    # A full disk must not pass as a decoder without a family: the run ends with the error.
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(ValueError, match="not written .*the disk is full.*as it was"):
        runner.export(tmp_path, *Trained(model, jax.tree.map(lambda leaf: 2 * leaf, params)))
    jax.tree.map(np.testing.assert_array_equal, distill.load(tmp_path)[1], want)


def test_other_configurations_are_refused():
    with pytest.raises(ValueError, match="ProtocolConfig is no experiment"):
        kinds.experiment_of(load_config("addition_arms"))


@pytest.mark.parametrize("kind", kinds.KINDS.values())
def test_every_kind_has_the_functions_that_scripts_call(kind):
    experiment, report = map(importlib.import_module, kind[:2])
    for name in ("CONFIG", "prepare", "arms", "evaluate", "summarize", "write", "notes"):
        assert callable(getattr(experiment, name))
    assert experiment.CONFIG.kind in kinds.KINDS and experiment.NAMES.keys() >= {"teacher", "student"}
    assert all(isinstance(key, str) for key, _ in experiment.COLUMNS.values())
    assert callable(report.write_report)
