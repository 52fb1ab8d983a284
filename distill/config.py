"""Configuration: nested frozen dataclasses, built by ``distill/configs/*.py``, overridden on the command line."""

import dataclasses
import difflib
import importlib
import importlib.util
import json
import math
import os
import pkgutil
import typing
from pathlib import Path
from typing import Any, ClassVar, Literal

from distill import processes
from distill.data.addition import TOKENIZER, AdditionConfig
from distill.features import FeatureConfig
from distill.metrics import to_json
from distill.models.config import DecoderConfig
from distill.models.start import StartConfig
from distill.objective import ObjectiveConfig
from distill.optim import OptimizerConfig
from distill.parallel import ParallelConfig

MAY_CHANGE = frozenset({"keep", "on_nan", "skips_in_a_row", "data_timeout", "remat"})
"""Fields of ``TrainingConfig`` with which a run may go on changed, as it may on other devices: what it learns is the
same. One that stopped at a NaN may go on skipping."""

BETTER = {"exact_match": "max", "agreement": "max", "kl": "min", "nll": "min", "perplexity": "min"}
"""Metric of an evaluation → which of its values is the best."""


@dataclasses.dataclass(frozen=True)
class KeepConfig:
    """Which checkpoints stay: those that any of these names.

    Example:
      >>> KeepConfig(best="kl").score({"kl": 0.5}), KeepConfig(best="max:bleu").score({"bleu": 0.5})
      (-0.5, 0.5)
    """

    last: int = 2
    """The newest; with one alone, a damaged checkpoint has none before it."""
    every: int = 0
    """Those of steps that are multiples of it; 0: none."""
    best: str | None = None
    """The best by a metric of the evaluation at its step: one of ``BETTER``, or any as ``max:NAME``, ``min:NAME``."""

    def __post_init__(self):
        if self.last < 1 or self.every < 0:
            raise ValueError(f"keep: last={self.last}, every={self.every}; expected last ≥ 1 and every ≥ 0.")
        if self.best is not None and self.best not in BETTER and self.best.partition(":")[0] not in ("max", "min"):
            near = ", ".join(difflib.get_close_matches(self.best, BETTER) or BETTER)
            raise ValueError(f"keep: best={self.best!r}; expected {near}, or max:NAME or min:NAME for another metric.")

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return self.best.partition(":")[2] or self.best

    def score(self, measured: dict[str, float] | None) -> float:
        """The metric, turned so that more is better; −∞ where it was not measured or is no number."""
        value = (measured or {}).get(self.metric, math.nan)
        sign = 1.0 if BETTER.get(self.best, self.best[:3]) == "max" else -1.0
        return sign * value if math.isfinite(value) else -math.inf


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How one model is trained."""

    steps: int = 1500
    """Optimizer steps in all; a multiple of steps_per_dispatch."""
    batch_size: int = 256
    """Global batch, in examples; must be divisible by micro_batches and by the number of devices."""
    micro_batches: int = 1
    """Parts in which a batch is worked through; the update is that of the whole batch."""
    chunk_size: int | None = None
    """Positions whose logits are alive at a time; 0: all; None: chosen by the vocabulary (``step.CHUNKED_FROM``)."""
    remat: Literal["none", "dots", "full"] = "none"
    """What a layer of the student keeps for the backward pass: ``none``: all it computed; ``dots``: products with
    weights; ``full``: only its input, and the layer is computed twice. Values do not depend on it."""
    steps_per_dispatch: int = 50
    """Small steps in one program; evaluation and saving fall on its multiples."""
    evaluate_every: int = 250
    """Steps between points of the learning curve."""
    save_every: int = 500
    """Steps between checkpoints."""
    seed: int = 0
    """Of the initial weights and the order of the data."""
    keep: KeepConfig = KeepConfig()
    """Checkpoints that are not deleted."""
    on_nan: Literal["stop", "skip"] = "stop"
    """Where loss or gradients are not finite: stop; or skip: the batch is spent, parameters and optimizer stay as they
    are, to the bit, and the metrics count it."""
    skips_in_a_row: int = 10
    """So many batches skipped one after another stop the run."""
    data_timeout: float = 600.0
    """Seconds after which data that is read while the model trains, and does not come, ends the run, state saved."""
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self):
        counts = ("steps", "batch_size", "micro_batches", "steps_per_dispatch", "evaluate_every", "save_every")
        for name in (*counts, "skips_in_a_row"):
            if getattr(self, name) < 1:
                raise ValueError(f"training: {name}={getattr(self, name)}; expected at least 1.")
        for name in ("steps", "evaluate_every", "save_every"):
            if getattr(self, name) % self.steps_per_dispatch:
                raise ValueError(
                    f"training: {name}={getattr(self, name)} is no multiple of "
                    f"steps_per_dispatch={self.steps_per_dispatch}; change one of them."
                )
        if self.keep.best and self.save_every % self.evaluate_every:
            raise ValueError(
                f"training: keep.best={self.keep.best!r} needs an evaluation at every checkpoint, but "
                f"save_every={self.save_every} is no multiple of evaluate_every={self.evaluate_every}."
            )
        if self.chunk_size is not None and self.chunk_size < 0:
            raise ValueError(f"training: chunk_size={self.chunk_size}; expected at least 0, or None.")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"training: micro_batches={self.micro_batches} does not divide batch_size={self.batch_size}."
            )
        if not self.data_timeout > 0.0:
            raise ValueError(f"training: data_timeout={self.data_timeout}; expected seconds above 0.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"training: seed={self.seed}; expected 0 … 2³¹ − 1.")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model and its training."""

    model: DecoderConfig = DecoderConfig()
    training: TrainingConfig = TrainingConfig()


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
        if min(self.labels, self.validation, self.steps, self.evaluate_every, self.batch_size) < 1:
            raise ValueError("baseline: labels, validation, steps, evaluate_every and batch_size must be at least 1.")
        if not self.learning_rates or not self.weight_decays:
            raise ValueError("baseline: learning_rates and weight_decays need at least one value each.")
        if self.steps % self.evaluate_every:
            raise ValueError(
                f"baseline: steps={self.steps} is no multiple of evaluate_every={self.evaluate_every}; change one."
            )

    @property
    def runs(self) -> int:
        """Trainings in the grid."""
        return len(self.learning_rates) * len(self.weight_decays)


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is shown and written. Never part of a run's identity."""

    progress: bool = True
    tensorboard: bool = False
    """Also write RUN/tensorboard (needs the extra ``track``)."""
    profile: bool = False
    """Trace a few steps into RUN/profile, for XProf and TensorBoard, and print where their time goes."""


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
    teacher_signal: Literal["cached", "live"] = "cached"
    """cached: the teacher reads the transfer set once; live: it is evaluated in every step."""
    teacher_run: str | None = None
    """Run folder of a teacher trained before; None: RUN/teacher, trained if it isn't there."""
    baseline: SweepConfig = SweepConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self):
        for role, recipe in (("teacher", self.teacher), ("student", self.student)):
            if recipe.model.vocab_size < TOKENIZER.vocab_size:
                raise ValueError(
                    f"{role}: vocab_size={recipe.model.vocab_size}, but the tokenizer has {TOKENIZER.vocab_size} ids; "
                    f"set --{role}.model.vocab-size {TOKENIZER.vocab_size} (more is padding)."
                )
        if self.objective.features.used and self.teacher_signal == "cached":
            raise ValueError(
                "objective.features: hidden states, attention maps and relations are not cached; set "
                "--teacher-signal live."
            )


@dataclasses.dataclass(frozen=True)
class SentenceConfig:
    """A sentence encoder distilled into one with fewer of its layers (``distill/sentences.py``)."""

    kind: ClassVar[str] = "sentences"
    name: str = "minilm"
    teacher: str | None = None
    """Folder of an encoder with tokenizer.json; None: all-MiniLM-L6-v2, fetched."""
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
        if min(self.sentences, self.held_out) < 2 or self.length < 6 or not self.layers:
            raise ValueError("sentences: expected at least 2 sentences on both sides, length ≥ 6, and one layer.")
        if min(self.cosine_weight, self.similarity_weight) < 0.0 or not (
            self.cosine_weight + self.similarity_weight > 0.0 or self.features.used
        ):
            raise ValueError("sentences: weights must be at least 0, one of them above.")


@dataclasses.dataclass(frozen=True)
class ProtocolConfig:
    """The arms of the addition protocol (``distill/protocol.py``) as one configuration."""

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
            raise ValueError("protocol: expected at least 2 seeds, one number of labels and one student.")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """The dataclass ``kind`` from what ``to_dict`` gave; an unknown key is a TypeError."""
    types = typing.get_type_hints(kind)
    fields = {}
    for key, value in values.items():
        if types.get(key) is StartConfig and isinstance(value, str):  # as older run folders have it
            value = {"kind": value}
        if dataclasses.is_dataclass(types.get(key)):
            value = from_dict(types[key], value)
        fields[key] = tuple(value) if isinstance(value, list) else value
    return kind(**fields)


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all, NaN and infinity as null; of several processes, the first one does."""
    if processes.index():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(to_json(value, indent=2) + "\n")
    os.replace(partial, file)


def write_config(run: Path, config: Any) -> None:
    """RUN/config.json: the configuration of an experiment, and which kind of experiment it is.

    Raises:
      ValueError: the folder holds an experiment of another kind, whose configuration stays.
    """
    file = run / "config.json"
    if (there := _kind_of(file)) not in (None, config.kind):
        raise ValueError(f"{run}: holds an experiment of kind {there!r}; this one is {config.kind!r}: another --run.")
    write_json(file, {"kind": config.kind} | to_dict(config))


def _kind_of(file: Path) -> str | None:
    """The kind of experiment of a config.json; None where none can be read."""
    try:
        return json.loads(file.read_text()).get("kind", Config.kind)
    except (OSError, ValueError, AttributeError):
        return None


def read_config(run: Path, expected: type = Config) -> Any:
    """The configuration, of the class ``expected``, that a run folder was made with.

    Raises:
      FileNotFoundError: no run folder.
      ValueError: its config.json cannot be read.
    """
    file = run / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{run}: no config.json; expected a run folder, made by scripts/distill.py.")
    try:
        values = json.loads(file.read_text())
        if (kind := values.pop("kind", Config.kind)) != expected.kind:
            raise ValueError(f"{file}: an experiment of kind {kind!r}; expected {expected.kind!r}.")
        return from_dict(expected, values)
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); expected the configuration of a run.") from error


def load_config(name: str) -> Any:
    """``get_config()`` of ``distill/configs/NAME.py``, or of a Python file given by its path.

    Raises:
      ValueError: no such configuration (names the nearest), or a file without ``get_config``.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"--config {name}: no such file; give a Python file with get_config().")
        spec = importlib.util.spec_from_file_location("distill_user_config", name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        import distill.configs

        known = sorted(module.name for module in pkgutil.iter_modules(distill.configs.__path__))
        if name not in known:
            near = difflib.get_close_matches(name, known) or known
            raise ValueError(
                f"--config {name}: unknown; did you mean {', '.join(near)}? Or give the path of a .py file."
            )
        module = importlib.import_module(f"distill.configs.{name}")
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config {name}: the file has no get_config(); expected a function that returns a Config.")
    return module.get_config()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines ``key: old → new`` for all that differs between two nested dicts."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            lines += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return lines
    return [] if old == new else [f"{path}: {old} → {new}"]
