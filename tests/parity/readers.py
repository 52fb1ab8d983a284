"""What ``save`` writes, read by other programs, each in its environment: ``make parity-oldest``, ``make parity-mlx``.

python tests/parity/readers.py transformers .venv-oldest/bin/python
python tests/parity/readers.py mlx .venv-mlx/bin/python
python tests/parity/readers.py transformers .venv/bin/python

Prints the largest difference of a logit (of a state, where an encoder has no head) by folder; exit 1 if one is above
1e-4 of the largest, or a folder is refused that should not be.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from builders import random_params

import distill
from distill.models import DecoderConfig, EncoderConfig, RopeScaling, decoder

SIZES = {"vocab_size": 23, "layers": 4, "width": 16, "heads": 4, "kv_heads": 2, "feed_forward": 24, "rope_theta": 60.0}
GEMMA = {"norm_plus_one": True, "norm_place": "around", "scaled_embedding": True, "activation": "gelu_tanh"}
GEMMA |= {"attention_scalar": 5, "tied": True}
NEOX = {"norm": "layer", "gated": False, "mlp_bias": True, "qkv_bias": True, "output_bias": True}
NEOX |= {"activation": "gelu_tanh", "kv_heads": 4, "feed_forward": 64, "rope_fraction": 0.5}
LLAMA3 = RopeScaling("llama3", 8.0, 40)
YARN = RopeScaling("yarn", 4.0, 40, beta_fast=4.0, attention_factor=1.7)
FACTORS = {"short_factors": (1.0, 1.5), "long_factors": (1.25, 3.0)}

MADE = {
    "llama": {"tied": True, "qkv_bias": True, "output_bias": True},
    "llama_llama3": {"rope_scaling": LLAMA3},
    "llama_yarn_magnitude": {"rope_scaling": YARN},
    "llama_linear": {"rope_scaling": RopeScaling("linear", 2.5)},
    "llama_dynamic": {"rope_scaling": RopeScaling("dynamic", 2.0, 8), "max_length": 8},
    "mistral": {"head_dim": 6},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 6},
    "smollm3": {"rope_layers": (True, False, True, True)},
    "mixtral": {"experts": 3},
    "qwen3_moe": {"experts": 4, "qk_norm": True, "normalize_experts": False},
    "olmo2": {"norm_place": "after", "qk_norm": True, "qk_norm_joint": True},
    "phi3": {"rope_fraction": 0.5},
    "neox": NEOX | {"parallel": True},
    "neox_in_turn": NEOX,
    "gemma2_no_window": GEMMA | {"attention_softcap": 2.0, "logit_softcap": 3.0},
    "gemma3_no_window": GEMMA | {"qk_norm": True},
    "gemma3_pattern": GEMMA
    | {"qk_norm": True, "rope_theta_local": 7.0, "sliding_window": 3, "window_layers": (True, False) * 2},
}
"""Name → options of a decoder beside ``SIZES``; with what mlx-lm knows of each family (no windows but Gemma 3's)."""

OLDER = {
    "mistral_window": {"sliding_window": 3},
    "qwen2_late_window": {"qkv_bias": True, "sliding_window": 3, "window_layers": (False, False, True, True)},
    "phi3_longrope": {"rope_scaling": RopeScaling("longrope", 4.0, 8, **FACTORS), "max_length": 32},
    "phi3_magnitude": {"rope_scaling": RopeScaling("longrope", 4.0, 8, attention_factor=1.1, **FACTORS)}
    | {"max_length": 32, "rope_fraction": 1.0},
}
"""The same, for transformers alone."""

FAMILY = {"phi3_longrope": "phi3", "phi3_magnitude": "phi3", "mistral": "mistral"}

REFUSED = {
    "transformers": {
        "modernbert_windows": "%: 'int' and 'NoneType'",  # its windows are no pattern, and it knows only patterns
        "phi3_magnitude": "`rope_scaling` must be a dictionary with three fields",
    },
    "mlx": {},
}
"""Reader → folder that means what an older version of it cannot compute → its error."""


def models(reader: str):
    """``(name, family, model, params)`` of every folder to save."""
    made = MADE if reader == "mlx" else MADE | OLDER
    for number, (name, options) in enumerate(made.items()):
        model = decoder(DecoderConfig(**(SIZES | options)))
        yield f"made_{name}", FAMILY.get(name), model, random_params(model, number)
    if reader == "transformers":
        for folder in sorted([*(TESTS / "data/families").iterdir(), *(TESTS / "data/encoders").iterdir()]):
            yield folder.name, json.loads((folder / "config.json").read_text())["model_type"], *distill.load(folder)


def ours(model, params, ids: np.ndarray) -> np.ndarray:
    """Logits, or the states of an encoder without a head."""
    hidden = model.apply(params, jnp.asarray(ids)).hidden
    headless = isinstance(model.config, EncoderConfig) and not model.config.mlm_head
    return np.asarray(hidden if headless else model.unembed(params, hidden))


def compare(reader: str, python: str, folder: Path) -> int:
    """Saves, has the other environment read, and prints a line for each folder. Returns how many differ."""
    ids = np.random.default_rng(1).integers(3, SIZES["vocab_size"], (2, 12))
    np.save(folder / "ids.npy", ids)
    expected = {}
    for name, family, model, params in models(reader):
        distill.save(folder / name, model, params, family=family)
        expected[name] = ours(model, params, ids)
    script = Path(__file__).with_name("reader.py")
    subprocess.run([python, script, reader, folder / "ids.npy", *(folder / name for name in expected)], check=True)
    bad = 0
    for name, want in expected.items():
        error, allowed = folder / name / f"{reader}.txt", REFUSED[reader].get(name.removeprefix("made_"))
        if error.is_file():
            right, text = allowed is not None and allowed in error.read_text(), f"refused: {error.read_text()[:90]!r}"
        else:
            worst = float(np.abs(np.load(folder / name / f"{reader}.npy") - want).max() / np.abs(want).max())
            right, text = worst < 1e-4, f"{worst:.1e} of the largest"
        bad += not right
        print(f"{'' if right else 'WRONG '}{name}: {text}")
    return bad


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as here:
        sys.exit(bool(compare(sys.argv[1], sys.argv[2], Path(here))))
