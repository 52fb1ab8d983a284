"""Rounding of the forward pass: distill and transformers in float32, both beside transformers in float64.

python tests/parity/precision.py

Prints the mean and the largest error of log-probabilities of a random Llama with the sizes of SmolLM2-135M; exit 1 if
those of distill are above ``MOST`` times those of transformers.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import distill

MOST = 3.0
LAYERS, TOKENS = 12, 128


def reference() -> transformers.PreTrainedModel:
    """A Llama of the width of SmolLM2-135M, with weights that make its predictions sharp."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    config = transformers.LlamaConfig(**sizes, **heads, vocab_size=4096, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.5)
    return model


def errors(logits: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Mean and largest error of log-probabilities."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    difference = np.abs(log_softmax(logits) - log_softmax(exact))
    return float(difference.mean()), float(difference.max())


def main() -> None:
    model, ids = reference(), np.random.default_rng(0).integers(0, 4096, (2, TOKENS))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        theirs = model(torch.tensor(ids)).logits.numpy()
        exact = model.double()(torch.tensor(ids)).logits.numpy()
        ours, params = distill.load(folder)
        mine = np.asarray(ours.logits(params, ids))
    found = {"distill": errors(mine, exact), "transformers": errors(theirs, exact)}
    for name, (mean, largest) in found.items():
        print(f"{name:12s} float32: log-probabilities off by {mean:.1e} on average, {largest:.1e} at most")
    ratio = found["distill"][0] / found["transformers"][0]
    print(f"ratio of the averages {ratio:.2f}")
    sys.exit(ratio > MOST)


if __name__ == "__main__":
    main()
