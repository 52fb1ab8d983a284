"""Values of TRL, Liger and PyTorch on the rows of ``distill/reproduce/conformance.py``, on CPU.

Liger's Triton kernels run in Triton's interpreter, patched here to pass floats as compiled kernels get them. Heads are
identities, so that the hidden states are the logits.
"""

import os
import warnings
from importlib.metadata import version
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import distillm_losses
import numpy as np
import torch
import torch.nn.functional as F
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from liger_kernel.transformers import LigerFusedLinearJSD, LigerKLDIVLoss
from liger_kernel.transformers.tvd import LigerTVDLoss
from triton import language as tl
from triton.runtime import interpreter
from trl.experimental.gkd import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from distill.reproduce import conformance
from distill.reproduce.conformance import ROWS

_convert = interpreter._implicit_cvt


def _convert_floats_too(argument):
    """Scalars of kernels are tensors, floats included; the interpreter leaves these as Python numbers."""
    if not isinstance(argument, float):
        return _convert(argument)
    return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)


interpreter._implicit_cvt = _convert_floats_too

BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}


def _beta(row):
    """β of a loss that is a case of the generalised JSD, otherwise None."""
    return dict(row.options).get("beta", BETAS.get(row.loss))


def _tensors(case):
    return torch.from_numpy(case.student), torch.from_numpy(case.teacher), torch.from_numpy(case.labels)


def _heads(case):
    """Flat hidden states (the logits) and heads (identities)."""
    student, teacher, labels = _tensors(case)
    flat = [logits.flatten(0, 1) for logits in (student, teacher)]
    return flat[0], torch.eye(flat[0].shape[-1]), flat[1], torch.eye(flat[1].shape[-1]), labels.flatten()


def _log_probs(case):
    student, teacher, labels = _tensors(case)
    both = [F.log_softmax(logits / case.temperature, -1).flatten(0, 1) for logits in (student, teacher)]
    return *both, labels.flatten()


def trl_gkd(row):
    """``GKDTrainer.generalized_jsd_loss``."""
    if _beta(row) is not None:
        student, teacher, labels = _tensors(row.case)
        options = {"beta": _beta(row), "temperature": row.case.temperature}
        return GKDTrainer.generalized_jsd_loss(student, teacher, labels=labels, **options)


def trl_distillation(row):
    """The loss of ``DistillationTrainer``."""
    if _beta(row) is not None:
        student, student_head, teacher, teacher_head, labels = _heads(row.case)
        one = _chunked_divergence_loss
        arguments = student[None], teacher[None], student_head, teacher_head, (labels != -100)[None], _beta(row)
        return one(*arguments, temperature=row.case.temperature)[0]


def liger_chunked(row):
    """``LigerFusedLinearJSDLoss``, the soft loss alone; for cross-entropy the hard one."""
    hard = row.loss == "cross_entropy"
    if _beta(row) is not None or hard:
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=float(hard),
            weight_soft_loss=float(not hard),
            beta=0.5 if hard else _beta(row),
            temperature=row.case.temperature,
            compiled=False,
        )
        return loss(*_heads(row.case))


def liger_triton(row):
    """``LigerFusedLinearJSD``; for total variation ``LigerTVDLoss`` of probabilities."""
    if row.loss == "total_variation":
        student, teacher, labels = _log_probs(row.case)
        return LigerTVDLoss()(student.exp(), teacher.exp(), labels)
    if _beta(row) is not None:
        loss = LigerFusedLinearJSD(jsd_beta=_beta(row), temperature=row.case.temperature)
        return loss(*_heads(row.case))


PEERS = {
    "TRL GKD": trl_gkd,
    "TRL Distillation": trl_distillation,
    "Liger chunked": liger_chunked,
    "Liger Triton": liger_triton,
    "DistiLLM": distillm_losses.value,
}


# ---- calls that look like a row but compute something else


def _trl_trainer(case):
    """``GKDTrainer.compute_loss`` of a trainer with this temperature, around models with fixed logits."""
    shifted = [torch.cat([logits, torch.zeros_like(logits[:, :1])], 1) for logits in _tensors(case)[:2]]
    labels = torch.cat([torch.full((len(case.labels), 1), -100), _tensors(case)[2]], 1)
    models = [torch.nn.Module(), torch.nn.Module()]
    for model, logits in zip(models, shifted, strict=True):
        model.forward = lambda logits=logits, **_: SimpleNamespace(logits=logits)
    trainer = SimpleNamespace(
        teacher_model=models[1],
        beta=0.0,
        temperature=case.temperature,
        generalized_jsd_loss=GKDTrainer.generalized_jsd_loss,
    )
    inputs = {"input_ids": labels, "attention_mask": labels, "labels": labels}
    return GKDTrainer.compute_loss(trainer, models[0], inputs)


def _liger_kl(case, **options):
    student, teacher, _ = _log_probs(case)
    return LigerKLDIVLoss(log_target=True, **options)(student, teacher)


def _torch_kl(case, reduction):
    student, teacher, _ = _tensors(case)
    return F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), reduction=reduction, log_target=True)


CALLS = {
    "TRL compute_loss": _trl_trainer,
    "TRL no labels": lambda case: GKDTrainer.generalized_jsd_loss(*_tensors(case)[:2], beta=0.0),
    "TRL mean": lambda case: GKDTrainer.generalized_jsd_loss(*_tensors(case), beta=0.0, reduction="mean"),
    "Liger defaults": lambda case: LigerFusedLinearJSDLoss(temperature=case.temperature, compiled=False)(*_heads(case)),
    "Liger KL": lambda case: _liger_kl(case, reduction="batchmean"),
    "Liger KL mean": lambda case: _liger_kl(case, reduction="mean"),
    "PyTorch batchmean": lambda case: _torch_kl(case, "batchmean"),
    "PyTorch mean": lambda case: _torch_kl(case, "mean"),
    "DistiLLM symmetric": lambda case: distillm_losses.symmetric_kl(case.student, case.teacher, case.labels),
    "DistiLLM JS": lambda case: distillm_losses.js_distance(case.student, case.teacher, case.labels),
}


def _measured(function, argument):
    """The value as a number, ``"nan"``, ``"refused"`` (an exception), or None: there is no such loss."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = function(argument)
        except (RuntimeError, ValueError):
            return "refused"
    return None if value is None else "nan" if float(value) != float(value) else float(value)


def measure():
    """Row → library → value, call → value, and what they were made with."""
    rows = {name: {peer: _measured(function, row) for peer, function in PEERS.items()} for name, row in ROWS.items()}
    rows = {name: {peer: value for peer, value in row.items() if value is not None} for name, row in rows.items()}
    calls = {name: _measured(CALLS[name], call.case) for name, call in conformance.CALLS.items()}
    return rows, calls, {name: version(name) for name in ("torch", "triton", "trl", "liger-kernel")}
