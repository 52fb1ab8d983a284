"""all-MiniLM-L6-v2, 6 layers to 3, on sentences of dialogues between people.

    python scripts/distill.py --config minilm

Hardware: 2 CPU cores, a few CPU minutes, the control among them. Score: see the table in README.md.
"""

from distill.experiments.sentences.config import SentenceConfig
from distill.optim import OptimizerConfig
from distill.training import TrainingConfig


def get_config() -> SentenceConfig:
    """Every second layer of the teacher, then cosine, similarity and relation losses."""
    return SentenceConfig(
        training=TrainingConfig(
            steps=100,
            batch_size=64,
            steps_per_dispatch=10,
            evaluate_every=50,
            save_every=50,
            optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=20),
        )
    )
