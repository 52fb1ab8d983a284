"""Values of transformers, stored with their weights; rewritten where they are missing or differ."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

Results = dict[str, np.ndarray]


def agrees(folder: Path, results: Results) -> bool:
    """Whether stored values are equal up to rounding."""
    with np.load(folder / "theirs.npz") as file:
        return file.keys() == results.keys() and all(
            file[key].shape == value.shape and np.allclose(file[key], value, rtol=1e-4, atol=1e-5)
            for key, value in results.items()
        )


def write(
    data: Path, cases: Iterable[str], build: Callable[[str, Path], None], theirs: Callable[[Path], Results]
) -> None:
    """``data/CASE`` of every case; weights stay where their configuration is the one ``build`` writes.

    ``build(case, folder)`` writes a model's folder, ``theirs(folder)`` computes what transformers says of it.
    """
    for name in cases:
        old = data / name
        with tempfile.TemporaryDirectory() as new:
            new = Path(new)
            build(name, new)
            config = json.loads((new / "config.json").read_text())
            config.pop("transformers_version", None)
            if not (old / "config.json").is_file() or json.loads((old / "config.json").read_text()) != config:
                (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
                shutil.rmtree(old, ignore_errors=True)
                shutil.copytree(new, old)
        results = theirs(old)
        if not (old / "theirs.npz").is_file() or not agrees(old, results):
            np.savez_compressed(old / "theirs.npz", **results)
            print(f"wrote {name}: {sum(path.stat().st_size for path in old.iterdir())} bytes")
