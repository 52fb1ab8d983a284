"""The addition protocol: three students, six arms, n = 100, 300, 600 labels, five seeds.

    python scripts/reproduce.py addition

Hardware: 2 CPU cores. Minutes and scores: REPRODUCE.md, which that command writes.
"""

from distill.configs import addition
from distill.experiments.addition.config import ProtocolConfig, Recipe, SweepConfig
from distill.models.config import DecoderConfig
from distill.objective import ObjectiveConfig
from distill.optim import OptimizerConfig
from distill.training import TrainingConfig


def get_config() -> ProtocolConfig:
    """Teacher and first student of ``configs/addition.py``; two smaller students, trained longer."""
    base = addition.get_config()
    return ProtocolConfig(
        teacher=base.teacher,
        students={
            "15x": base.student,
            "30x": student(width=12, feed_forward=28, steps=10_000),
            "70x": student(width=8, feed_forward=16, steps=10_000),
        },
        sweep=SweepConfig(),
        # Of temperatures 1, 4, 8 (forward KL) and 4 (reverse KL) on 300 labels of the largest student, 8 was the best.
        same_prompts=ObjectiveConfig(temperature=8.0),
    )


def student(width: int, feed_forward: int, steps: int) -> Recipe:
    """A two-layer student and its training."""
    model = DecoderConfig(vocab_size=14, layers=2, width=width, heads=2, feed_forward=feed_forward)
    rate = OptimizerConfig(learning_rate=5e-3, warmup_steps=100, weight_decay=0.1)
    return Recipe(model, TrainingConfig(steps=steps, evaluate_every=500, save_every=steps, optimizer=rate))
