"""The step of distill/benchmarks/pair.py as a plain PyTorch loop: models of transformers, bfloat16, ``F.kl_div``."""

import json
import sys
import time

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM


def network(values, dtype):
    """A model of this configuration with random weights, on the GPU where there is one."""
    config = AutoConfig.for_model(**values, use_cache=False)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def main():
    """Prints JSON: seconds of every step, peak GB (0 on a CPU), the device."""
    task = json.loads(sys.argv[1])
    teacher = network(task["teacher_config"], torch.bfloat16).eval()
    student = network(task["student_config"], torch.float32)
    update = torch.optim.AdamW(student.parameters(), lr=1e-5, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    cuda, vocab = teacher.device.type == "cuda", task["student_config"]["vocab_size"]
    ids = torch.randint(vocab, (task["batch"], task["length"] + 1), device=teacher.device)
    inputs, labels, seconds = ids[:, :-1], ids[:, 1:].flatten(), []
    for _ in range(task["steps"] + 2):
        start = time.perf_counter()
        with torch.autocast(teacher.device.type, torch.bfloat16):
            with torch.no_grad():
                target = F.log_softmax(teacher(inputs).logits.flatten(0, 1).float(), -1)
            logits = student(inputs).logits.flatten(0, 1).float()
        kl = F.kl_div(F.log_softmax(logits, -1), target, log_target=True, reduction="batchmean")
        loss = 0.9 * kl + 0.1 * F.cross_entropy(logits, labels)
        update.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        update.step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    kind = torch.cuda.get_device_name() if cuda else "cpu"
    print(json.dumps([seconds[2:], torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0, kind]))


if __name__ == "__main__":
    main()
