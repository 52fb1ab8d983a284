"""Checkpoints: which are kept, and that damage is detected, reported and worked around."""

import contextlib
import dataclasses
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.checkpoint import HASHES, Checkpoints, KeepConfig, Refused, refuse_changes, resumed
from distill.config import to_dict
from distill.experiments.folder import configured, read_config
from distill.experiments.sentences.config import SentenceConfig
from distill.training import TrainingConfig

STATE = {"params": {"w": jnp.arange(300.0), "b": jnp.ones(7)}, "step": jnp.int32(3)}


def steps(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (KeepConfig(last=1), [60]),
        (KeepConfig(last=2, every=30), [30, 50, 60]),
        (KeepConfig(last=1, best="exact_match"), [20, 60]),
        (KeepConfig(last=1, best="kl"), [40, 60]),
        (KeepConfig(last=1, best="max:kl"), [30, 60]),
    ],
)
def test_the_newest_and_the_best_checkpoints_are_kept(keep, left, tmp_path):
    measured = {
        10: {"exact_match": 0.1, "kl": 0.5},
        20: {"exact_match": 0.9, "kl": 0.4},
        30: {"exact_match": 0.5, "kl": 0.9},
        40: {"exact_match": 0.2, "kl": 0.1},
        50: {"exact_match": math.nan, "kl": math.nan},
        60: None,
    }
    with Checkpoints(tmp_path, keep) as checkpoints:
        for step, metrics in measured.items():
            checkpoints.save(step, STATE | {"step": jnp.int32(step)}, {"identity": {}}, metrics)
        if keep.best:
            assert checkpoints.best(keep.best) == left[0]
            like = jax.eval_shape(lambda: STATE["params"])
            np.testing.assert_array_equal(checkpoints.params(like, left[0])["w"], STATE["params"]["w"])
        with pytest.raises(ValueError, match="no checkpoint measured by 'perplexity'"):
            checkpoints.best("perplexity")
    assert steps(tmp_path) == left


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"last": 0}, "last=0"), ({"every": -1}, "every=-1"), ({"best": "exactmatch"}, "exact_match, or max:NAME")],
)
def test_bad_keep_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        KeepConfig(**bad)


def test_best_needs_an_evaluation_at_every_checkpoint():
    with pytest.raises(ValueError, match="save_every=500 is no multiple of evaluate_every=1000"):
        TrainingConfig(steps=1000, evaluate_every=1000, save_every=500, keep=KeepConfig(best="kl"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    run = tmp_path_factory.mktemp("two")
    with Checkpoints(run) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, STATE | {"step": jnp.int32(step)}, {"identity": {"of": step}}, {"kl": 0.5})
    return run


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.unlink() if how == "gone" else file.write_bytes(data if how == "flipped" else file.read_bytes()[:-1])


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
@pytest.mark.parametrize(
    "what", ["state/ocdbt*/d/*", "state/_METADATA", "meta/manifest.ocdbt", "metrics/metrics", "_CHECKPOINT*", HASHES]
)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(what, how, two, tmp_path, capfd):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    file = sorted((tmp_path / "checkpoints" / "20").glob(what))[0]
    damage(file, how)
    intact = file.name == HASHES and how != "flipped"  # only the hashes reveal the damage
    with resumed(tmp_path) as checkpoints:
        assert checkpoints.latest == (20 if intact else 10)
        restored = checkpoints.restore(STATE)
        assert (
            int(restored["step"]) == checkpoints.latest and checkpoints.meta()["identity"]["of"] == checkpoints.latest
        )
    np.testing.assert_array_equal(restored["params"]["w"], STATE["params"]["w"])
    stderr = capfd.readouterr().err
    assert intact or ("20: damaged checkpoint" in stderr and "10: used" in stderr)
    assert (tmp_path / "checkpoints" / "20.damaged").exists() != intact  # a damaged checkpoint is never deleted


def test_if_all_checkpoints_are_damaged_it_is_an_error_and_none_is_renamed(two, tmp_path):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for step in ("10", "20"):
        damage(tmp_path / "checkpoints" / step / "state" / "_METADATA", "flipped")
    for _ in range(2):
        with pytest.raises(ValueError, match="every checkpoint is damaged"):
            resumed(tmp_path)
    assert steps(tmp_path) == [10, 20]


def test_reading_a_damaged_checkpoint_outside_of_training_is_refused(two, tmp_path):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    damage(next((tmp_path / "checkpoints" / "20" / "state").glob("ocdbt*/d/*")), "flipped")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="unreadable checkpoint"):
        checkpoints.params(jax.eval_shape(lambda: STATE["params"]))
    damage(tmp_path / "checkpoints" / "20" / "metrics" / "metrics", "cut")
    with pytest.raises(ValueError, match="unreadable checkpoint"):
        Checkpoints(tmp_path)


def test_a_checkpoint_killed_before_its_hashes_is_used_and_they_are_written(two, tmp_path):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    noted = tmp_path / "checkpoints" / "20" / HASHES
    noted.unlink()
    with resumed(tmp_path) as checkpoints:
        assert checkpoints.latest == 20
    assert noted.read_text() == (two / "checkpoints" / "20" / HASHES).read_text()


def test_fields_that_may_change_do_not_change_the_identity():
    old = {"student": {"training": to_dict(TrainingConfig())}}
    del old["student"]["training"]["keep"]  # written by earlier versions
    keep = dataclasses.replace(TrainingConfig(), keep=KeepConfig(every=1000))
    refuse_changes(Path("run"), old, {"student": {"training": to_dict(keep)}})
    with pytest.raises(ValueError, match="student.training.seed: 0 → 1"):
        refuse_changes(Path("run"), old, {"student": {"training": to_dict(TrainingConfig(seed=1))}})


def test_a_refused_configuration_does_not_overwrite_that_of_the_run(tmp_path):
    for seed, error in ((0, None), (1, None), (2, KeyboardInterrupt), (3, Refused), (4, FileNotFoundError)):
        with (
            contextlib.suppress(KeyboardInterrupt, Refused, OSError),
            configured(tmp_path, SentenceConfig(length=9 + seed)),
        ):
            assert read_config(tmp_path, SentenceConfig).length == 9 + seed
            if error:
                raise error
        assert read_config(tmp_path, SentenceConfig).length == 9 + min(seed, 1)
    with contextlib.suppress(ValueError), configured(tmp_path, SentenceConfig(length=20)):
        (tmp_path / "checkpoints" / "5").mkdir(parents=True)  # something was saved: it is the run's configuration now
        raise ValueError
    assert read_config(tmp_path, SentenceConfig).length == 20
    with contextlib.suppress(Refused), configured(tmp_path / "new", SentenceConfig()):
        raise Refused
    assert read_config(tmp_path / "new", SentenceConfig) == SentenceConfig()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_command_that_ends_before_it_saves_leaves_the_configuration_of_the_run(tmp_path, error):
    """Ctrl-C while models and text are read is such an end."""
    with configured(tmp_path, SentenceConfig(length=9)):
        (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    with contextlib.suppress(error), configured(tmp_path, SentenceConfig(length=20)):
        raise error
    assert read_config(tmp_path, SentenceConfig).length == 9
