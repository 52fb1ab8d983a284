"""Training speed in floating-point operations that the models need, however a program computes them."""

import math

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
"""Prefix of ``device_kind`` → chip of ``chips.py`` with its FLOP/s; the longest prefix counts."""


def peak(kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one device by its data sheet; None where there is none (CPUs).

    Example:
      >>> peak("NVIDIA H100 80GB HBM3"), peak("cpu")
      (989000000000000.0, None)
    """
    found = [name for name in KINDS if kind.startswith(name)]
    return CHIPS[KINDS[max(found, key=len)]].flops if found else None


def flops_per_token(student: Model, teacher: Model | None, length: int) -> float | None:
    """FLOPs of a train step per token: three forward passes of the student, one of the teacher.

    A student whose layers are frozen (``Model.base``) has no gradients of their weights and counts two forward passes;
    one that shares a frozen head counts three, less the gradient of the head. Rematerialised operations count once.
    None for networks whose configuration has no ``flops_per_token``.

    Args:
      student: the model that is trained.
      teacher: where it is evaluated in the step.
      length: tokens of a row.
    """
    models = [student] if teacher is None else [student, teacher]
    if not all(hasattr(model.config, "flops_per_token") for model in models):
        return None
    of_student, *of_teacher = (float(model.config.flops_per_token(length)) for model in models)
    return 3.0 * of_student - _spared(student, of_student) + sum(of_teacher)


def _spared(student: Model, forward: float) -> float:
    """FLOPs of the gradients of weights that are not learnt; ``forward``: of a forward pass."""
    if student.base is None:
        return 0.0
    shapes = jax.eval_shape(student.base.init, jax.random.key(0))
    table = shapes.get("head", shapes.get("embedding"))  # the head, or the embedding that is one
    return forward if table is None or "layers" in shapes else 2.0 * math.prod(table.shape)


def utilisation(flops_per_second: float, devices: int) -> dict[str, float]:
    """``flops_per_second`` and, where the devices' peak is known, ``mfu``, its share of that (arXiv 2204.02311)."""
    most = peak(jax.devices()[0].device_kind)
    return {"flops_per_second": flops_per_second} | ({"mfu": flops_per_second / (devices * most)} if most else {})


def shown_share(share: float) -> str:
    """A percentage with one decimal; shares that round to 0 are shown as less than 0.1 %.

    Example:
      >>> shown_share(0.453), shown_share(0.00002)
      ('45.3%', '<0.1%')
    """
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"
