"""``TrainingConfig`` and ``LogConfig``: the numbers of one training."""

import dataclasses
import math
from typing import Literal

from distill.checkpoint import KeepConfig
from distill.errors import UserError, check_fields
from distill.optim import OptimizerConfig

DISPATCHED = 50
"""Most steps of a dispatch whose size is chosen."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How one model is trained.

    Example:
      >>> TrainingConfig(steps=30).dispatch, TrainingConfig(steps=1500).dispatch, TrainingConfig(steps=7).dispatch
      (10, 50, 1)
    """

    steps: int = 1500
    """Optimizer steps in all."""
    batch_size: int = 256
    """Global batch, in examples; must be divisible by micro_batches and by the number of devices."""
    micro_batches: int = 1
    """Parts in which a batch is computed; the update is that of the whole batch."""
    chunk_size: int | None = None
    """Positions whose logits are alive at a time; 0: all; None: chosen by the vocabulary (``step.CHUNKED_FROM``)."""
    remat: Literal["none", "dots", "full"] = "none"
    """What a layer of the student keeps for the backward pass: ``none``: all it computed; ``dots``: products with
    weights; ``full``: only its input, and the layer is computed twice. Values do not depend on it."""
    steps_per_dispatch: int | None = None
    """Small steps in one program; evaluation and saving fall on its multiples. None: the largest number up to
    ``DISPATCHED`` that divides steps, evaluate_every and save_every."""
    evaluate_every: int = 250
    """Steps between points of the learning curve."""
    save_every: int = 500
    """Steps between checkpoints."""
    seed: int = 0
    """Of the initial weights and the order of the data."""
    keep: KeepConfig = KeepConfig()
    """Checkpoints that are not deleted."""
    on_nan: Literal["stop", "skip"] = "stop"
    """Where loss or gradients are not finite: stop; or skip: the batch is spent, parameters and optimizer stay
    bit-identical, and the metrics count it."""
    skips_in_a_row: int = 10
    """Number of batches skipped one after another that stops the run."""
    data_timeout: float = 600.0
    """Seconds after which data that is read while the model trains, and does not come, ends the run, state saved."""
    optimizer: OptimizerConfig = OptimizerConfig()

    @property
    def dispatch(self) -> int:
        """Steps of a dispatch: ``steps_per_dispatch``, or the number that was chosen."""
        if self.steps_per_dispatch is not None:
            return self.steps_per_dispatch
        common = math.gcd(self.steps, self.evaluate_every, self.save_every)
        return max(n for n in range(1, DISPATCHED + 1) if common % n == 0)

    def __post_init__(self):
        check_fields(self, "training", lambda: {"skips_in_a_row": (self.on_nan == "skip", "on_nan='skip'")})
        counts = ("steps", "batch_size", "micro_batches", "evaluate_every", "save_every", "skips_in_a_row")
        values = {name: vars(self)[name] for name in (*counts, "steps_per_dispatch")}
        for name, value in values.items():
            if value is not None and value < 1:
                raise UserError(f"training: {name}={value}; expected at least 1.")
        for name in ("steps", "evaluate_every", "save_every"):
            if values[name] % self.dispatch:
                raise UserError(
                    f"training: {name}={values[name]} is no multiple of steps_per_dispatch={self.dispatch}; change one "
                    "of them, or leave steps_per_dispatch out."
                )
        if self.keep.best and self.save_every % self.evaluate_every:
            raise UserError(
                f"training: keep.best={self.keep.best!r} needs an evaluation at every checkpoint, but "
                f"save_every={self.save_every} is no multiple of evaluate_every={self.evaluate_every}."
            )
        if self.chunk_size is not None and self.chunk_size < 0:
            raise UserError(f"training: chunk_size={self.chunk_size}; expected at least 0, or None.")
        if self.batch_size % self.micro_batches:
            raise UserError(
                f"training: micro_batches={self.micro_batches} does not divide batch_size={self.batch_size}."
            )
        if not self.data_timeout > 0.0:
            raise UserError(f"training: data_timeout={self.data_timeout}; expected seconds above 0.")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"training: seed={self.seed}; expected 0 … 2³¹ − 1.")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is shown and written. Never part of a run's identity."""

    progress: bool = True
    tensorboard: bool = False
    """Also write RUN/tensorboard (needs the extra ``track``)."""
    profile: bool = False
    """Trace a few steps into RUN/profile, for XProf and TensorBoard, and print where their time goes."""

    def __post_init__(self):
        check_fields(self, "log")
