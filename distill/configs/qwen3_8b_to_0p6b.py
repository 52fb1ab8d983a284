"""Qwen3-8B → Qwen3-0.6B: one tokenizer, heads of 151 936 rows.

    python scripts/distill.py --config qwen3_8b_to_0p6b --data.source FOLDER_OF_TEXT
    python scripts/plan.py --config qwen3_8b_to_0p6b --topology v5e:4x4

Hardware: 16 TPU v5e, or 8 devices of 80 GB. Never trained: the tests compile its step for the slice, without
weights. Minutes and score: unknown.
"""

from distill.experiments.text.config import TextConfig, on_slice
from distill.parallel import ParallelConfig


def get_config() -> TextConfig:
    """Parameters are divided over 8 devices."""
    return on_slice(
        "qwen3_8b_to_0p6b",
        "Qwen/Qwen3-8B",
        "Qwen/Qwen3-0.6B",
        batch_size=64,
        micro_batches=4,
        parallel=ParallelConfig(backend="mesh", fsdp=8),
    )
