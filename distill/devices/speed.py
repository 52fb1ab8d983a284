"""How fast training is, in floating-point operations: those the models need, whatever a program does for them."""

import jax

from distill.devices.chips import CHIPS
from distill.models.model import Model

KINDS = {
    "TPU v5": "v5p",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100": "a100",
    "NVIDIA H100 80GB": "h100",
    "NVIDIA H200": "h100",
}
"""How ``device_kind`` begins → the chip of ``chips.py`` with its FLOP/s; the longest beginning counts."""


def peak(kind: str) -> float | None:
    """bfloat16 FLOP/s of one device at most, as its maker states it; None where nobody does (CPUs).

    Example:
      >>> peak("NVIDIA H100 80GB HBM3"), peak("cpu")
      (989000000000000.0, None)
    """
    found = [name for name in KINDS if kind.startswith(name)]
    return CHIPS[KINDS[max(found, key=len)]].flops if found else None


def flops_per_token(student: Model, teacher: Model | None, length: int) -> float | None:
    """FLOPs of a train step per token: three forward passes of the student, one of the teacher.

    A student of which only a part is learnt (``Model.base``) has no gradients for the rest: two forward passes' worth.
    Nothing is counted twice that is computed twice (rematerialisation). None for networks that do not say what they
    cost.

    Args:
      student: what is trained.
      teacher: where it is evaluated in the step.
      length: tokens of a row.
    """
    sides = [(student, 3.0 if student.base is None else 2.0)] + ([(teacher, 1.0)] if teacher is not None else [])
    if not all(hasattr(model.config, "flops_per_token") for model, _ in sides):
        return None
    return sum(factor * model.config.flops_per_token(length) for model, factor in sides)


def utilisation(flops_per_second: float, devices: int) -> dict[str, float]:
    """``flops_per_second`` and, where the devices' peak is known, ``mfu``, its share of that (arXiv 2204.02311)."""
    most = peak(jax.devices()[0].device_kind)
    return {"flops_per_second": flops_per_second} | ({"mfu": flops_per_second / (devices * most)} if most else {})


def shown_share(share: float) -> str:
    """As per cent; what one decimal rounds to nothing is said to be less than it.

    Example:
      >>> shown_share(0.453), shown_share(0.00002)
      ('45.3%', '<0.1%')
    """
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"
