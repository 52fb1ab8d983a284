"""Llama 3.1 70B → 8B: one tokenizer, heads of 128 256 rows.

    python scripts/distill.py --config llama3_70b_to_8b --data.source FOLDER_OF_TEXT

Hardware: a pod of 64 devices of 80 GB or TPU v5p-128. Never trained on the machines
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
    """Forward KL with a little cross-entropy; parameters over 16 devices, heads and units over 4."""
    return TextConfig(
        name="llama3_70b_to_8b",
        teacher="meta-llama/Llama-3.1-70B-Instruct",
        data=TextDataConfig(source="data", length=4096),
        student=StudentConfig(source="meta-llama/Llama-3.1-8B-Instruct"),
        training=TrainingConfig(
            steps=5000,
            batch_size=256,
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
        parallel=ParallelConfig(backend="mesh", fsdp=16, tensor=4),
    )
