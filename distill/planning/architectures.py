"""Shapes of published models, so that a run can be planned without their weights and without internet access.

The table holds the numbers of their ``config.json`` and the vocabulary sizes of their tokenizers.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from distill.errors import MissingFile
from distill.models.config import DecoderConfig, EncoderConfig
from distill.weights import families, folder, gguf

_LLAMA3 = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip
_QWEN2 = {
    "model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "max_position_embeddings": 32768, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip
_QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "max_position_embeddings": 40960, "hidden_act": "silu", "attention_bias": False,
}  # fmt: skip
_GEMMA3 = {
    "model_type": "gemma3_text", "vocab_size": 262144, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6, "max_position_embeddings": 131072,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
_SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0, "max_position_embeddings": 8192, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip


def _sized(family: dict[str, Any], layers: int, width: int, heads: int, feed_forward: int, **more: Any):
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    return family | dict(zip(names, (layers, width, heads, feed_forward), strict=True)) | more


ARCHITECTURES: dict[str, tuple[dict[str, Any], int]] = {
    "smollm2": (_sized(_SMOLLM2, 30, 576, 9, 1536), 49152),
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": (_sized(_QWEN2, 24, 896, 14, 4864), 151665),
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": (_sized(_QWEN2, 28, 1536, 12, 8960), 151665),
    "Qwen/Qwen3-0.6B": (_sized(_QWEN3, 28, 1024, 16, 3072, tie_word_embeddings=True), 151669),
    "Qwen/Qwen3-8B": (_sized(_QWEN3, 36, 4096, 32, 12288, tie_word_embeddings=False), 151669),
    "meta-llama/Llama-3.1-8B-Instruct": (_sized(_LLAMA3, 32, 4096, 32, 14336), 128256),
    "meta-llama/Llama-3.1-70B-Instruct": (_sized(_LLAMA3, 80, 8192, 64, 28672), 128256),
    "google/gemma-3-1b-it": (
        _sized(
            _GEMMA3, 26, 1152, 4, 6912,
            num_key_value_heads=1, head_dim=256, sliding_window=512, query_pre_attn_scalar=256,
        ),
        262144,
    ),
    "google/gemma-3-27b-it": (
        _sized(
            _GEMMA3, 62, 5376, 32, 21504,
            num_key_value_heads=16, head_dim=128, vocab_size=262208, sliding_window=1024, query_pre_attn_scalar=168,
        ),
        262144,
    ),
}  # fmt: skip
"""Name on the hub, or built-in name → the entries of ``config.json`` that decide shapes, and tokens."""


def architecture(
    name: str, activations: Literal["float32", "bfloat16"] = "float32"
) -> tuple[DecoderConfig | EncoderConfig, int]:
    """The network of a model, by path or name, and the size of its vocabulary; no weight is read.

    For a folder or a file, every row of the embedding counts as a token.

    Raises:
      MissingFile: no such path, and the name is not in ``ARCHITECTURES``.
      UserError: an unsupported model.

    Example:
      >>> config, tokens = architecture("Qwen/Qwen3-8B")
      >>> config.layers, config.vocab_size, tokens
      (36, 151936, 151669)
    """
    if name in ARCHITECTURES:
        values, tokens = ARCHITECTURES[name]
        return dataclasses.replace(families.from_json(values), dtype=activations), tokens
    path = Path(name)
    if path.is_dir():
        config = folder.read_config(path, activations)
    elif path.is_file() and path.suffix == ".gguf":
        config = gguf.config_of(gguf.GGUFSource(path), activations)
    else:
        raise MissingFile(
            f"{name}: no such folder or GGUF file, and not among the known shapes ({', '.join(ARCHITECTURES)}); give a "
            "folder with its config.json."
        )
    return config, config.vocab_size
