"""Liger's heads, for scripts/benchmark.py liger: the chunked one (PyTorch, compiled) and the one with a Triton kernel.

JAX's arrays are copied; Liger's heads are ``[V, D]``, ours ``[D, V]``.
"""

import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from liger_kernel.transformers import LigerFusedLinearJSD

from distill.benchmarks.head import Rival


def _rival(loss, arrays):
    """``loss(student_hidden, student_head, teacher_hidden, teacher_head, labels)`` and its gradients."""
    hidden, kernel, teacher_hidden, teacher_kernel, labels = (torch.from_dlpack(x).clone() for x in arrays[:5])
    weight, teacher_weight, labels = kernel.t().contiguous(), teacher_kernel.t().contiguous(), labels.long()
    del kernel, teacher_kernel
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    own = sum(x.nbytes for x in (hidden, weight, teacher_hidden, teacher_weight, labels))

    def once():
        for leaf in leaves:
            leaf.grad = None
        value = loss(hidden, weight, teacher_hidden, teacher_weight, labels)
        value.backward()
        return value

    def run(steps):
        for _ in range(steps):
            once()
            if hidden.is_cuda:
                torch.cuda.synchronize()

    def peak():
        if not hidden.is_cuda:
            return 0
        hidden.grad = weight.grad = None
        others = torch.cuda.memory_allocated() - own
        torch.cuda.reset_peak_memory_stats()
        run(1)
        return torch.cuda.max_memory_allocated() - others

    def value():
        total = once().detach()
        return [x.float().cpu().numpy() for x in (total, hidden.grad, weight.grad.t())]

    return Rival(run, value, peak)


def chunked(mixture, arrays):
    """``LigerFusedLinearJSDLoss`` as in training: chunks of 1 024 tokens, ``torch.compile`` where there is a GPU."""
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=mixture.hard,
        weight_soft_loss=mixture.soft,
        beta=mixture.beta,
        temperature=1.0,
        compiled=torch.cuda.is_available(),
    )
    return _rival(loss, arrays)


def triton(mixture, arrays):
    """``LigerFusedLinearJSD``, which has no cross-entropy."""
    if mixture.hard == 0.0 and mixture.soft == 1.0:
        return _rival(LigerFusedLinearJSD(jsd_beta=mixture.beta, temperature=1.0), arrays)
    return None


PEERS = {"Liger chunked": chunked, "Liger Triton": triton}
