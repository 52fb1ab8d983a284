"""Qwen2.5-Coder 1.5B → 0.5B: one tokenizer, on your own text.

    python scripts/distill.py --config qwen_coder --data.source FOLDER_OF_TEXT

Hardware: one device of 24 GB or more. GGUF files of both models work as well: ``--teacher A.gguf --student.source
B.gguf``. Never trained: a test lowers initialisation and step with the real shapes, without
weights. Minutes and score: unknown.
"""

from distill.data.text import TextDataConfig
from distill.experiments.text.config import StudentConfig, TextConfig
from distill.objective import ObjectiveConfig
from distill.optim import OptimizerConfig
from distill.training import TrainingConfig


def get_config() -> TextConfig:
    """Forward KL with a little cross-entropy, on the pages of the language reference by default."""
    return TextConfig(
        name="qwen_coder",
        teacher="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        data=TextDataConfig(source="pydoc", length=1024),
        student=StudentConfig(source="Qwen/Qwen2.5-Coder-0.5B-Instruct"),
        training=TrainingConfig(
            steps=500,
            batch_size=16,
            micro_batches=4,
            steps_per_dispatch=10,
            evaluate_every=100,
            save_every=100,
            optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=20),
        ),
        objective=ObjectiveConfig(divergence="forward_kl", kd_weight=0.9, task_weight=0.1),
        activations="bfloat16",
        teacher_dtype="bfloat16",
        heldout_rows=256,
    )
