"""Qwen3-8B → Qwen3-0.6B, which have one tokenizer and heads of 151 936 rows.

    python scripts/distill.py --config qwen3_8b_to_0p6b --data.source FOLDER_OF_TEXT

Hardware: 8 devices of 80 GB or a TPU v5e-16 slice. Never trained on the machines
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
    """Forward KL with a little cross-entropy; parameters over 8 devices."""
    return TextConfig(
        name="qwen3_8b_to_0p6b",
        teacher="Qwen/Qwen3-8B",
        data=TextDataConfig(source="data", length=4096),
        student=StudentConfig(source="Qwen/Qwen3-0.6B"),
        training=TrainingConfig(
            steps=5000,
            batch_size=64,
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
        parallel=ParallelConfig(backend="mesh", fsdp=8, tensor=1),
    )
