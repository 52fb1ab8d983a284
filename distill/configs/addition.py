"""Two-digit addition: a teacher of 108 608 parameters, a student 15 times smaller, distilled without labels.

    python scripts/distill.py --config addition

Hardware: 2 CPU cores, under a minute. Score: see the table in README.md, printed by ``make demo``.
"""

from distill.experiments.addition.config import Config, Recipe, SweepConfig
from distill.models.config import DecoderConfig
from distill.objective import ObjectiveConfig
from distill.optim import OptimizerConfig
from distill.training import TrainingConfig


def get_config() -> Config:
    """The teacher learns 5 000 labelled pairs, the student its answers and soft targets for the same prompts."""
    return Config(
        name="addition",
        teacher=Recipe(
            DecoderConfig(vocab_size=14, layers=2, width=64, heads=4, feed_forward=192),
            TrainingConfig(
                steps=1000,
                evaluate_every=100,
                save_every=1000,
                optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, weight_decay=0.1),
            ),
        ),
        student=Recipe(
            DecoderConfig(vocab_size=14, layers=2, width=16, heads=2, feed_forward=48),
            TrainingConfig(
                steps=3000,
                evaluate_every=200,
                save_every=500,
                optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=50, weight_decay=0.1),
            ),
        ),
        objective=ObjectiveConfig(divergence="forward_kl", temperature=1.0, kd_weight=1.0),
        baseline=SweepConfig(labels=100),
    )
