"""A failed save leaves the folder as it was, and non-finite tensors are not loaded."""

import contextlib
import errno
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from builders import random_params, tiny_decoder
from safetensors.numpy import load_file, save_file

import distill
from distill.weights import folder as folders
from distill.weights import replace
from distill.weights import safetensors as files
from distill.weights.files import SINGLE
from distill.weights.safetensors import refuse_nonfinite

MODEL = tiny_decoder()
SHARDS = {"shard_bytes": 1500}


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


@pytest.fixture
def old(tmp_path, params):
    """A folder with a model and a file of the user."""
    distill.save(tmp_path / "model", MODEL, params, **SHARDS)
    (tmp_path / "model/README.md").write_text("mine")
    (tmp_path / "model/runs").mkdir()
    (tmp_path / "model/runs/a").write_text("mine too")
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def twice(params):
    return jax.tree.map(lambda leaf: 2 * leaf, params)


def alone(folder: Path) -> bool:
    return [path.name for path in folder.parent.iterdir()] == [folder.name]


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def on_call(function, number, instead):
    """Wraps ``function``; its n-th call runs ``instead``."""
    calls = iter(range(1, 1000))
    return lambda *args, **named: (instead if next(calls) == number else function)(*args, **named)


class Killed(BaseException):
    pass


def killed(*_, **__):
    raise Killed


def test_other_files_stay_and_no_temporary_file_is_left(old, params):
    inode = (old / "README.md").stat().st_ino
    distill.save(old, MODEL, twice(params))
    assert set(contents(old)) == {"README.md", "config.json", SINGLE, "runs/a"} and alone(old)
    assert (old / "README.md").read_text() == "mine" and (old / "README.md").stat().st_ino == inode
    jax.tree.map(np.testing.assert_array_equal, distill.load(old)[1], twice(params))


FAULTS = {
    "second shard": lambda patch: patch.setattr(files, "_write_one", on_call(files._write_one, 2, full)),
    "config": lambda patch: patch.setattr(folders.json, "dumps", on_call(json.dumps, 2, full)),
    "old files": lambda patch: patch.setattr(replace, "_link", full),
    "first rename": lambda patch: patch.setattr(replace.os, "replace", on_call(os.replace, 1, full)),
    "second rename": lambda patch: patch.setattr(replace.os, "replace", on_call(os.replace, 2, full)),
    "room": lambda patch: patch.setattr(
        replace.shutil, "disk_usage", lambda path: replace.shutil._ntuple_diskusage(9, 9, 0)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_full_disk_leaves_the_folder_as_it_was(old, params, monkeypatch, fault):
    before = contents(old)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="not written.*as it was.*Free some space"):
        if "rename" in fault:  # the same function names the shards
            patch.setattr(folders, "write", lambda folder, *_: (folder / SINGLE).write_text("new"))
        FAULTS[fault](patch)
        distill.save(old, MODEL, twice(params), **SHARDS)
    assert contents(old) == before and alone(old)


def test_a_full_disk_as_reported_by_safetensors(old, params, monkeypatch):
    from safetensors import SafetensorError, numpy

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(numpy, "save_file", full)
    with pytest.raises(ValueError, match="not written.*os error 28"):
        distill.save(old, MODEL, params)


def test_a_kill_while_writing_leaves_the_folder_as_it_was(old, params, monkeypatch):
    before = contents(old)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_write_one", on_call(files._write_one, 2, killed))
        patch.setattr(replace.shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans up nothing
        with pytest.raises(Killed):
            distill.save(old, MODEL, twice(params), **SHARDS)
    assert contents(old) == before and not alone(old)
    distill.save(old, MODEL, twice(params))
    assert alone(old)
    jax.tree.map(np.testing.assert_array_equal, distill.load(old)[1], twice(params))


def test_a_kill_between_the_renames_leaves_the_old_model(old, params, monkeypatch):
    before = contents(old)
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        # Renames of the file, of the old folder, and then of the new one.
        patch.setattr(os, "replace", on_call(os.replace, 3, killed))
        patch.setattr(replace.shutil, "rmtree", lambda *_, **__: None)
        distill.save(old, MODEL, twice(params))
    assert not old.exists() and contents(old.parent / ".model.before") == before
    jax.tree.map(np.testing.assert_array_equal, distill.load(old)[1], params)
    assert distill.weights.read_config(old).width == MODEL.config.width
    with pytest.raises(ValueError, match="no tokenizer|tokenizer of type"):  # a second failed save
        distill.save(old, MODEL, params, 3)
    assert contents(old) == before
    distill.save(old, MODEL, twice(params))
    assert alone(old) and (old / "README.md").read_text() == "mine"
    jax.tree.map(np.testing.assert_array_equal, distill.load(old)[1], twice(params))


@pytest.mark.parametrize("tied", [True, False])
def test_rows_without_a_token_are_not_saved(tied, tmp_path):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    whole = tiny_decoder(vocab_size=24, tied=tied)
    params, tokens = random_params(whole), np.array([[1, 2, 3]])
    model = whole.with_vocabulary(14)
    distill.save(tmp_path / "model", model, params)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] == 14
    read, theirs = distill.load(tmp_path / "model")
    np.testing.assert_array_equal(read.logits(theirs, tokens), model.logits(params, tokens))
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    logits = opened(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(logits, model.logits(params, tokens), atol=1e-4)


@pytest.mark.parametrize("arguments", [{"family": "gpt2"}, {"family": "gtp"}, {"tokenizer": "nowhere"}], ids=str)
def test_a_model_that_cannot_be_saved_leaves_the_folder_as_it_was(old, params, arguments):
    before = contents(old)
    with pytest.raises(ValueError, match="family|tokenizer"):
        distill.save(old, MODEL, params, **arguments)
    assert contents(old) == before and alone(old)


def test_targets_that_cannot_be_written_are_errors(old, params, monkeypatch):
    for target in (old / "config.json", old / "README.md/model"):
        with pytest.raises(ValueError, match="expected a folder|not written"):
            distill.save(target, MODEL, params)
    monkeypatch.chdir(old / "runs")
    with pytest.raises(ValueError, match="the current folder.*expected another"):
        distill.save("..", MODEL, params)

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(replace, "_empty", denied)
    with pytest.raises(ValueError, match="new: not written .*Permission denied.*choose a folder"):
        distill.save(old.parent / "new", MODEL, params)


# ---- loaded


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_detected_in_every_dtype(dtype, wrong):
    kind = jax.numpy.dtype(dtype)
    array = np.array([jax.numpy.finfo(kind).max, 0, -1, jax.numpy.finfo(kind).tiny] * 3, kind).reshape(3, 4)
    for layout in (array, array.T, array[:, ::2], array[:0]):
        refuse_nonfinite(layout, Path("f"), "t", piece=5)
    array[2, 1] = wrong
    for layout, at in ((array, "2, 1"), (array.T, "1, 2")):
        with pytest.raises(ValueError, match=rf"f: tensor t holds -?(nan|inf) at \[{at}\]"):
            refuse_nonfinite(layout, Path("f"), "t", piece=5)


def test_a_non_finite_tensor_is_named(tmp_path, params):
    distill.save(tmp_path, MODEL, params)
    tensors = load_file(tmp_path / SINGLE)
    tensors["model.norm.weight"][3] = np.inf
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds inf at \[3\]; expected finite numbers"):
        distill.load(tmp_path)


def test_code_stored_with_weights_is_not_executed(tmp_path, params):
    distill.save(tmp_path, MODEL, params)
    values = json.loads((tmp_path / "config.json").read_text())
    for kind in (values["model_type"], "bert", "theirs", None):
        changed = values | {"model_type": kind, "auto_map": {"AutoModelForCausalLM": "modeling_theirs.Theirs"}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"auto_map names code.*never run \(there is no trust_remote_code\)"):
            distill.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object"):
        distill.load(tmp_path)
