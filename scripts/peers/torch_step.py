"""The distillation step of distill/benchmarks/step.py as a plain PyTorch loop: Llama of transformers, ``F.kl_div``."""

import numpy as np
import torch
import torch.nn.functional as F
from step_worker import TASK, turns
from transformers import LlamaConfig, LlamaForCausalLM


def llama(layers, width):
    """A Llama of this shape, with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TASK["vocab"],
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            max_position_embeddings=512,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )


def main():
    """Takes two steps in every turn."""
    student, teacher = llama(*TASK["student"]), llama(*TASK["teacher"]).eval()
    update = torch.optim.AdamW(student.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    ids = torch.from_numpy(np.load(TASK["ids"])).long()
    inputs, labels = ids[:, :-1], ids[:, 1:]
    for _ in turns():
        with torch.no_grad():
            target = F.log_softmax(teacher(inputs).logits.flatten(0, 1) / 2, -1)
        logits = student(inputs).logits.flatten(0, 1)
        kl = F.kl_div(F.log_softmax(logits / 2, -1), target, log_target=True, reduction="batchmean")
        loss = 0.5 * 4 * kl + 0.5 * F.cross_entropy(logits, labels.flatten())
        update.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        update.step()


if __name__ == "__main__":
    main()
