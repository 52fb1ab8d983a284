"""Which module an experiment belongs to."""

import importlib
import json

import pytest

from distill import kinds
from distill.config import Config, load_config, read_config, write_config


def test_a_run_folder_tells_its_kind(tmp_path):
    write_config(tmp_path, Config())
    assert read_config(tmp_path) == Config()
    assert kinds.experiment_in(tmp_path).__name__ == kinds.experiment_of(Config()).__name__ == "distill.experiment"
    (tmp_path / "config.json").write_text(json.dumps({"kind": "chess"}))
    with pytest.raises(ValueError, match="kind 'chess'; expected one of addition"):
        kinds.report_in(tmp_path)
    with pytest.raises(ValueError, match="an experiment of kind 'chess'; expected 'addition'"):
        read_config(tmp_path)
    assert kinds.experiment_in(tmp_path / "nowhere").__name__ == "distill.experiment"  # which says what is missing


def test_what_is_no_experiment_is_refused():
    with pytest.raises(ValueError, match="ProtocolConfig is no experiment"):
        kinds.experiment_of(load_config("addition_arms"))


@pytest.mark.parametrize("kind", kinds.KINDS.values())
def test_every_kind_has_what_the_scripts_call(kind):
    experiment, report = map(importlib.import_module, kind)
    for name in ("run_experiment", "evaluate_folder", "print_summary", "answer"):
        assert callable(getattr(experiment, name))
    assert callable(report.write_report)
