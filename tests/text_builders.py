"""Small tokenizers, and files to read."""

import functools
import json

import numpy as np
from builders import random_params
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import distill
from distill.data.text import TextDataConfig
from distill.experiments.text.config import StudentConfig, TextConfig
from distill.models import DecoderConfig, decoder
from distill.optim import OptimizerConfig
from distill.parallel import ParallelConfig
from distill.tokenizer import TextTokenizer
from distill.training import LogConfig, TrainingConfig

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["the quick brown fox jumps over the lazy dog", "a brown dog and a quick fox", "user assistant system 0123"]
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "user", "content": "a quick fox?"},
    {"role": "assistant", "content": "the lazy dog"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": " brown, 12"},
]


@functools.cache
def byte_level(bos: bool = False, size: int = 320) -> Tokenizer:
    """A byte-level BPE tokenizer; with ``bos`` it prepends <s> to every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def tiny_tokenizer(starts: bool = False, **options) -> TextTokenizer:
    return TextTokenizer(byte_level(starts).to_str(), **({"eos": "</s>", "bos": "<s>"} | options))


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


WORDS = "the cat sat on a mat and saw that the dog ran to it while no one was at home".split()


def sentences(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 30)) + "." for _ in range(count)]


def teacher_and_text(folder):
    """Writes a random teacher with a tokenizer of 300 tokens, and text.txt; returns the folder."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], show_progress=False)
    backend.train_from_iterator(sentences(40), trainer)
    model = decoder(DecoderConfig(vocab_size=320, layers=3, width=16, heads=2, feed_forward=24, tied=True))
    distill.save(folder / "teacher", model, random_params(model, 1), TextTokenizer(backend.to_str(), "<eos>"))
    (folder / "text.txt").write_text("\n\n".join(sentences(60)))
    return folder


def text_config(folder, **changes) -> TextConfig:
    """Configuration of a student with two of the teacher's three layers, on FOLDER's text, on one device."""
    values = {
        "teacher": str(folder / "teacher"),
        "data": TextDataConfig(source=str(folder / "text.txt"), separator="\n\n", length=24, heldout_fraction=0.2),
        "student": StudentConfig(layers=2),
        "training": TrainingConfig(
            steps=8,
            batch_size=8,
            steps_per_dispatch=2,
            evaluate_every=4,
            save_every=4,
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        ),
        "prompts": 2,
        "prompt_tokens": 4,
        "new_tokens": 5,
        "data_dir": str(folder / "prepared"),
        "parallel": ParallelConfig(backend="one_device"),
        "log": LogConfig(progress=False),
    }
    return TextConfig(**(values | changes))
