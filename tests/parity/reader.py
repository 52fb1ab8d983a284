"""Reads folders in another environment and writes their logits: ``reader.py transformers|mlx IDS.npy FOLDER...``.

It runs with the Python of that environment, without this library, and writes ``FOLDER/READER.npy`` (float32, the head's
logits, or an encoder's states without a head), or ``FOLDER/READER.txt``, the error where the reader refuses the folder.
"""

import json
import sys
from pathlib import Path

import numpy as np


def by_transformers(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits of transformers on PyTorch, in float32."""
    import torch
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    options = {"attn_implementation": "eager", "torch_dtype": torch.float32}
    model = getattr(transformers, name).from_pretrained(folder, **options).eval()
    if model.config.model_type in ("mixtral", "qwen3_moe") and transformers.__version__ > "5":
        model.set_experts_implementation("eager")  # grouped products want rows of 16 bytes
    with torch.no_grad():
        output = model(torch.tensor(ids))
    return (output.logits if "logits" in output else output.last_hidden_state).numpy()


def by_mlx(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits of mlx-lm."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return np.array(model(mx.array(ids)).astype(mx.float32))


if __name__ == "__main__":
    reader, ids = sys.argv[1], np.load(sys.argv[2])
    read = {"transformers": by_transformers, "mlx": by_mlx}[reader]
    for folder in map(Path, sys.argv[3:]):
        try:
            np.save(folder / f"{reader}.npy", read(folder, ids))
        except Exception as error:  # whatever a reader raises is a refusal
            (folder / f"{reader}.txt").write_text(f"{type(error).__name__}: {error}")
