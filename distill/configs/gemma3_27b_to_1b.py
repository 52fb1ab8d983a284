"""Gemma 3 27B → 1B, text alone; the rows of the larger embedding that are no token get no probability.

    python scripts/distill.py --config gemma3_27b_to_1b --data.source FOLDER_OF_TEXT

Hardware: 32 devices of 80 GB or TPU v5p-64. Never trained on the machines
this library is tested on: a test lowers initialisation and step
with the real shapes, without weights. Minutes and score: unknown.
"""

from distill.config import TrainingConfig
from distill.data.text import TextDataConfig
from distill.objective import ObjectiveConfig
from distill.optim import OptimizerConfig
from distill.parallel import ParallelConfig
from distill.text_config import StudentConfig, TextConfig


def get_config() -> TextConfig:
    """Forward KL with a little cross-entropy; parameters over 16 devices."""
    return TextConfig(
        name="gemma3_27b_to_1b",
        teacher="google/gemma-3-27b-it",
        data=TextDataConfig(source="data", length=4096),
        student=StudentConfig(source="google/gemma-3-1b-it"),
        training=TrainingConfig(
            steps=5000,
            batch_size=128,
            micro_batches=4,
            steps_per_dispatch=10,
            evaluate_every=500,
            save_every=500,
            optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=200),
        ),
        objective=ObjectiveConfig(divergence="forward_kl", kd_weight=0.9, task_weight=0.1),
        arms=(),
        activations="bfloat16",
        teacher_dtype="bfloat16",
        heldout_rows=256,
        parallel=ParallelConfig(backend="mesh", fsdp=16, tensor=1),
    )
