"""all-MiniLM-L6-v2, 6 layers to 3, on sentences of dialogues between people.

    python scripts/distill.py --config minilm

Hardware: 2 CPU cores, a few CPU minutes including the control. Score: see the table in REPRODUCE.md.
"""

from distill.experiments.sentences.config import SentenceConfig
from distill.optim import OptimizerConfig
from distill.training import TrainingConfig


def get_config() -> SentenceConfig:
    """The student starts from every second layer of the teacher; cosine, similarity and relation losses."""
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
