"""The student of an experiment on additions: where it starts, and what it is distilled on."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from distill import losses
from distill.batch import Batch
from distill.data.addition import Examples
from distill.devices.speed import flops_per_token
from distill.experiments.addition import measure
from distill.experiments.addition.config import Config
from distill.experiments.folder import Trained
from distill.models.model import Model
from distill.shapes import Params
from distill.students.start import Calibration, Start, start
from distill.training import TrainingConfig


def started(config: Config, teacher: Trained, train: Examples) -> Start:
    """The student before its first step; importance is measured by the cross-entropy of train-side answers."""

    def loss(model: Model, params: Params, batch: Batch) -> Any:
        logits = model.logits(params, batch.inputs, positions=batch.positions, segments=batch.segments)
        return losses.divide(losses.masked_sum(losses.cross_entropy(logits, batch.labels), batch.mask))

    def batches() -> Iterator[Batch]:
        for rows in np.array_split(np.arange(min(len(train.tokens), 1024)), 8):
            yield train.take(rows).batch(config.data)

    seed, calibration = config.student.training.seed, Calibration(loss, batches)
    return start(*teacher, config.student.model, config.student_start, calibration, seed=seed)


def transfer_set(config: Config, sides: dict[str, Examples], teacher: Trained) -> Examples:
    """The prompts of the train side with the answers the student is distilled on."""
    if config.answers == "labels":
        return sides["train"]
    written = measure.write_answers(*teacher, config.data, sides["train"])
    return sides["train"].with_answers(config.data, written)


def training_flops(model: Model, training: TrainingConfig, config: Config) -> float:
    """FLOPs of a training on true answers."""
    length = measure.row_length(config.data)
    return training.steps * training.batch_size * length * flops_per_token(model, None, length)
