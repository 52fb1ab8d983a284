"""Configuration of the distillation of a sentence encoder."""

import dataclasses
from typing import ClassVar

from distill.errors import UserError, check_fields
from distill.features import FeatureConfig
from distill.parallel import ParallelConfig
from distill.training import LogConfig, TrainingConfig


@dataclasses.dataclass(frozen=True)
class SentenceConfig:
    """A sentence encoder distilled into one with fewer of its layers (``distill/experiments/sentences/run.py``)."""

    kind: ClassVar[str] = "sentences"
    name: str = "minilm"
    teacher: str | None = None
    """Folder of an encoder with tokenizer.json, pooled as its modules.json says; None: all-MiniLM-L6-v2, fetched."""
    layers: tuple[int, ...] = (1, 3, 5)
    """Layers of the teacher the student starts as, counted from 0; of ModernBERT layer 0 must be among them."""
    sentences: int = 20_000
    """To train on; of 6 to ``length`` tokens."""
    held_out: int = 1_000
    """Of dialogues nobody trained on, to judge by."""
    length: int = 24
    """Tokens of a row, [CLS] and [SEP] among them."""
    cosine_weight: float = 1.0
    """1 − cosine of the embeddings of student and teacher."""
    similarity_weight: float = 10.0
    """Squared error of the similarities between the sentences of a batch (``losses.similarity_mse``)."""
    features: FeatureConfig = FeatureConfig(relation_weight=0.1, relation_heads=12)
    training: TrainingConfig = TrainingConfig()
    """Of the student, and of the control that starts at random."""
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self):
        check_fields(self, "sentences")
        if min(self.sentences, self.held_out) < 2 or self.length < 6 or not self.layers:
            raise UserError("sentences: expected at least 2 sentences on both sides, length ≥ 6, and one layer.")
        if min(self.cosine_weight, self.similarity_weight) < 0.0 or not (
            self.cosine_weight + self.similarity_weight > 0.0 or self.features.used
        ):
            raise UserError("sentences: weights must be at least 0, one of them above.")
