"""How fast a step can be at best: what it must compute, move through memory and send, against what a chip can.

    seconds ≥ max(FLOPs / peak, bytes of memory / bandwidth, bytes sent / links)

FLOPs are those of matrix products, N parameters costing about 2N a token forward and 6N with the backward pass. Bytes
of memory are the least: every product reads its operands and writes its result once.
"""

from typing import NamedTuple

from distill.devices.chips import Chip
from distill.models.config import DecoderConfig

LOGIT_BYTES = 30
"""Memory traffic of a chunked head for each token and word: about seven passes over float32 logits."""
OPTIMIZER_BYTES = 28
"""Of an update for each parameter: parameter, two moments and gradient are read, all but the gradient written."""


class Work(NamedTuple):
    """A distillation step, of the whole batch."""

    student: DecoderConfig
    teacher: DecoderConfig
    tokens: int
    length: int
    remat: bool
    """The student's forward pass is computed again in the backward pass."""


class Split(NamedTuple):
    """How the work is divided."""

    rows: int
    """Devices among which tokens are divided."""
    tensor: int
    """Devices among which heads, units and words are divided."""
    student: int
    """Devices among which the student's parameters are."""
    micro_batches: int
    chunk: int
    """Positions of the head at a time."""
    fused: bool
    """Attention that never writes its scores."""


def flops(work: Work) -> dict[str, float]:
    """FLOPs of a step: ``student`` (three times its forward pass), ``teacher`` (forward alone), ``model`` (their sum),
    ``teacher_share``, and ``hardware``, which counts what is computed twice (``Work.remat``) twice.

    Example:
      >>> small = DecoderConfig(vocab_size=16, layers=1, width=8, heads=2, feed_forward=16)
      >>> values = flops(Work(small, small, tokens=100, length=10, remat=False))
      >>> values["student"] / values["teacher"], values["teacher_share"]
      (3.0, 0.25)
    """
    forward = work.tokens * work.student.flops_per_token(work.length)
    student, teacher = 3 * forward, work.tokens * work.teacher.flops_per_token(work.length)
    head = 2.0 * work.tokens * work.student.width * work.student.vocab_size
    again = forward - head if work.remat else 0.0
    model = student + teacher
    return {
        "student": student,
        "teacher": teacher,
        "model": model,
        "teacher_share": teacher / model,
        "hardware": model + again,
    }


def traffic(work: Work, split: Split, parameters: int) -> dict[str, float]:
    """Bytes through the memory of one device in a step: ``student``, ``teacher``, ``head``, ``optimizer``.

    Args:
      work: what is done.
      split: among whom.
      parameters: of the student.
    """
    tokens = work.tokens / split.rows
    passes = 4 if work.remat else 3
    words = work.student.vocab_size / split.tensor
    widths = work.student.width, work.teacher.width
    chunks = tokens / split.chunk
    kernels = chunks * words * (2 * 2 * widths[0] + 2 * widths[1] + 8 * widths[0])  # twice, once; its gradient
    states = 2 * tokens * (3 * widths[0] + widths[1])
    return {
        "student": passes * _layers(work.student, work.length, tokens, split),
        "teacher": _layers(work.teacher, work.length, tokens, split),
        "head": tokens * words * LOGIT_BYTES + kernels + states,
        "optimizer": parameters / split.student * (OPTIMIZER_BYTES + 12 * (split.micro_batches - 1)),
    }


def _layers(config: DecoderConfig, length: int, tokens: float, split: Split) -> float:
    """Of one pass through the layers: kernels in bfloat16 for each micro-batch, activations in bfloat16."""
    inner = config.key_size * (config.heads + config.groups) * 2 / split.tensor  # queries and outputs, keys and values
    units = (3 if config.gated else 2) * config.feed_forward / split.tensor
    experts = max(config.experts_per_token if config.experts else 1, 1)
    kernels = config.width * (inner + units * max(config.experts, 1))
    across = 2 * inner + 4 * config.width + experts * units
    scores = 0.0 if split.fused else 2 * 4 * length * config.heads / split.tensor
    return config.layers * (2 * kernels * split.micro_batches + tokens * (2 * across + scores))


def times(chip: Chip, devices: int, hardware: float, moved: float, sent: float) -> dict[str, float | str]:
    """Least seconds of a step, and what bounds it.

    Args:
      chip: of which there are ``devices``.
      devices: how many.
      hardware: FLOPs of all of them.
      moved: bytes through the memory of one.
      sent: bytes one sends.

    Example:
      >>> from distill.devices.chips import CHIPS
      >>> values = times(CHIPS["v5e"], 2, hardware=197e12, moved=0.0, sent=20e9)
      >>> values["compute"], values["interconnect"], values["bound"]
      (0.5, 0.1, 'compute')
    """
    parts = {"compute": hardware / (devices * chip.flops), "memory": moved / chip.bandwidth}
    parts["interconnect"] = sent / chip.links
    bound = max(parts, key=parts.__getitem__)
    return parts | {"step": parts[bound], "bound": bound}


def price(tokens: int, seconds: float, devices: int, dollars_per_hour: float) -> float:
    """Dollars for 10⁹ tokens.

    Example:
      >>> round(price(tokens=1_000_000, seconds=3.6, devices=10, dollars_per_hour=2.0), 9)
      20.0
    """
    return devices * dollars_per_hour / 3600.0 * seconds / tokens * 1e9
