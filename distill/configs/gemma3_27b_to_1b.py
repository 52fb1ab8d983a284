"""Gemma 3 27B → 1B on text; the padded rows of the larger embedding are masked.

    python scripts/distill.py --config gemma3_27b_to_1b --data.source FOLDER_OF_TEXT
    python scripts/plan.py --config gemma3_27b_to_1b --topology v5p:2x4x4

Hardware: 32 TPU v5p, or 32 devices of 80 GB. Never trained: the tests compile its step for the slice, without
weights. Minutes and score: unknown.
"""

from distill.experiments.text.config import TextConfig, on_slice
from distill.parallel import ParallelConfig


def get_config() -> TextConfig:
    """Parameters are divided over 16 devices."""
    return on_slice(
        "gemma3_27b_to_1b",
        "google/gemma-3-27b-it",
        "google/gemma-3-1b-it",
        batch_size=128,
        micro_batches=4,
        parallel=ParallelConfig(backend="mesh", fsdp=16),
    )
