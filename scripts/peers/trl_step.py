"""The step of distill/benchmarks/step.py by TRL's GKDTrainer, its own loop: forward KL, no label, never on-policy."""

import tempfile

import numpy as np
import torch
from datasets import Dataset
from step_worker import TASK, turns
from tokenizers import Tokenizer, models
from torch_step import llama
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


class Turns(TrainerCallback):
    """A turn before every step."""

    def __init__(self):
        self.turns = turns()

    def on_step_begin(self, args, state, control, **kwargs):
        """Waits for the turn; stops when there is none."""
        if next(self.turns, self) is self:
            raise SystemExit


def main():
    """Takes two steps in every turn."""
    ids = torch.from_numpy(np.load(TASK["ids"])).long()[:, :-1]
    config = GKDConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        lmbda=0.0,
        beta=0.0,
        per_device_train_batch_size=len(ids),
        max_steps=10**6,
        learning_rate=1e-3,
        adam_beta2=0.99,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    GKDTrainer(
        llama(*TASK["student"]),
        llama(*TASK["teacher"]),
        config,
        data_collator=lambda rows: {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)},
        train_dataset=Dataset.from_dict({"row": list(range(len(ids)))}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>"),
        callbacks=[Turns()],
    ).train()


if __name__ == "__main__":
    main()
