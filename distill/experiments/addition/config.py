"""Configuration of the addition experiment and of its protocol."""

import dataclasses
from typing import ClassVar, Literal

from distill.data.addition import TOKENIZER, AdditionConfig
from distill.errors import UserError, check_fields
from distill.models.config import DecoderConfig
from distill.objective import ObjectiveConfig
from distill.parallel import ParallelConfig
from distill.students.config import StartConfig
from distill.teacher.signal import SignalConfig, check, check_size
from distill.training import LogConfig, TrainingConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model and its training."""

    model: DecoderConfig = DecoderConfig()
    training: TrainingConfig = TrainingConfig()

    def __post_init__(self):
        check_fields(self, "recipe")


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """The grid over which a student trained alone is tuned; chosen by exact match on a validation split."""

    labels: int = 100
    """Labelled examples the student alone may train on."""
    validation: int = 500
    """Further labelled examples, to choose learning rate, weight decay and steps by."""
    learning_rates: tuple[float, ...] = (1e-2, 2e-2)
    weight_decays: tuple[float, ...] = (1.0, 2.0)
    steps: int = 1500
    evaluate_every: int = 250
    """Steps between the points at which a run may be stopped."""
    batch_size: int = 100

    def __post_init__(self):
        check_fields(self, "baseline")
        if min(self.labels, self.validation, self.steps, self.evaluate_every, self.batch_size) < 1:
            raise UserError("baseline: labels, validation, steps, evaluate_every and batch_size must be at least 1.")
        if not self.learning_rates or not self.weight_decays:
            raise UserError("baseline: learning_rates and weight_decays need at least one value each.")
        if self.steps % self.evaluate_every:
            raise UserError(
                f"baseline: steps={self.steps} is no multiple of evaluate_every={self.evaluate_every}; change one."
            )

    @property
    def runs(self) -> int:
        """Trainings in the grid."""
        return len(self.learning_rates) * len(self.weight_decays)


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment: a teacher, a student distilled from it, and the same student alone."""

    kind: ClassVar[str] = "addition"
    name: str = "addition"
    data: AdditionConfig = AdditionConfig()
    teacher: Recipe = Recipe()
    student: Recipe = Recipe()
    objective: ObjectiveConfig = ObjectiveConfig()
    answers: Literal["teacher", "labels"] = "teacher"
    """Who writes the answers the student is distilled on: the teacher (no label is used) or the labels. The teacher's,
    with kd_weight 0 and task_weight 1, are sequence-level distillation (arXiv 1606.07947)."""
    student_start: StartConfig = StartConfig()
    signal: SignalConfig = SignalConfig("stored")
    """Where the teacher's soft targets come from: it reads the transfer set once, or is evaluated in every step."""
    teacher_run: str | None = None
    """Run folder of a teacher trained before; None: RUN/teacher, trained if it isn't there."""
    baseline: SweepConfig = SweepConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self):
        check_fields(self, "addition")
        for role, recipe in (("teacher", self.teacher), ("student", self.student)):
            if recipe.model.vocab_size < TOKENIZER.vocab_size:
                raise UserError(
                    f"{role}: vocab_size={recipe.model.vocab_size}, but the tokenizer has {TOKENIZER.vocab_size} ids; "
                    f"set --{role}.model.vocab-size {TOKENIZER.vocab_size} (more is padding)."
                )
        check(self.signal, self.objective)
        check_size(self.signal, TOKENIZER.vocab_size)


@dataclasses.dataclass(frozen=True)
class ProtocolConfig:
    """The arms of the addition protocol (``distill/experiments/addition/protocol.py``) as one configuration."""

    teacher: Recipe
    students: dict[str, Recipe]
    """Name → student and how its untuned arms (unlabelled, skyline, controls) are trained."""
    data: AdditionConfig = AdditionConfig()
    labels: tuple[int, ...] = (100, 300, 600)
    seeds: int = 5
    """Each with its own split, teachers and initial weights."""
    sweep: SweepConfig = SweepConfig()
    """The grid of ``alone`` and of ``same_prompts``, alike; its ``labels`` are replaced by those above."""
    unlabelled: ObjectiveConfig = ObjectiveConfig()
    same_prompts: ObjectiveConfig = ObjectiveConfig(temperature=8.0)

    def __post_init__(self):
        if self.seeds < 2 or not self.labels or not self.students:
            raise UserError("protocol: expected at least 2 seeds, one number of labels and one student.")
