"""Llama 3.1 70B → 8B: one tokenizer, a vocabulary of 128 256 tokens.

    python scripts/distill.py --config llama3_70b_to_8b --data.source FOLDER_OF_TEXT
    python scripts/plan.py --config llama3_70b_to_8b --topology v5p:4x4x4

Hardware: 64 TPU v5p, or 64 devices of 80 GB. Never trained: the tests compile its step for the slice, without
weights. Minutes and score: unknown.
"""

from distill.experiments.text.config import TextConfig, on_slice
from distill.parallel import ParallelConfig


def get_config() -> TextConfig:
    """Parameters are divided over 16 devices, heads and units over 4."""
    return on_slice(
        "llama3_70b_to_8b",
        "meta-llama/Llama-3.1-70B-Instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
        batch_size=256,
        micro_batches=4,
        parallel=ParallelConfig(backend="mesh", fsdp=16, tensor=4),
    )
