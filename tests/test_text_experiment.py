"""A distillation on text, whole, with a teacher drawn at random and a tokenizer trained here."""

import json

import numpy as np
import pytest
from builders import random_params

import distill
from distill import text_experiment
from distill.config import LogConfig, TrainingConfig
from distill.data.text import TextDataConfig
from distill.models import DecoderConfig, decoder
from distill.optim import OptimizerConfig
from distill.parallel import ParallelConfig
from distill.text_config import StudentConfig, TextConfig
from distill.tokenizer import TextTokenizer

WORDS = "the cat sat on a mat and saw that the dog ran to it while no one was at home".split()


def sentences(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 30)) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher's folder, and the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    here = tmp_path_factory.mktemp("text")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], show_progress=False)
    backend.train_from_iterator(sentences(40), trainer)
    tokenizer = TextTokenizer(backend.to_str(), "<eos>")
    model = decoder(DecoderConfig(vocab_size=320, layers=3, width=16, heads=2, feed_forward=24, tied=True))
    distill.save(here / "teacher", model, random_params(model, 1), tokenizer)
    (here / "text.txt").write_text("\n\n".join(sentences(60)))
    return here


@pytest.fixture(scope="module")
def config(folder):
    return TextConfig(
        teacher=str(folder / "teacher"),
        data=TextDataConfig(source=str(folder / "text.txt"), separator="\n\n", length=24, heldout_fraction=0.2),
        student=StudentConfig(layers=2),
        training=TrainingConfig(
            steps=8,
            batch_size=8,
            steps_per_dispatch=2,
            evaluate_every=4,
            save_every=4,
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        ),
        prompts=2,
        prompt_tokens=4,
        new_tokens=5,
        data_dir=str(folder / "prepared"),
        parallel=ParallelConfig(backend="one_device"),
        log=LogConfig(progress=False),
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "text"
    return run, text_experiment.run_experiment(config, run)


def test_every_arm_is_measured_on_the_same_text(finished, config):
    run, summary = finished
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert all(name in summary for name in ("teacher", "student", "equal_tokens", "equal_time", "start"))
    assert summary["student"]["kl"] < summary["start"]["kl"]  # it has learnt
    assert evaluation["student"]["training_tokens"] == evaluation["equal_tokens"]["training_tokens"] == 8 * 8 * 24
    assert len(evaluation["student"]["written"]) == len(evaluation["prompts"]) == 2
    text_experiment.print_summary(summary, run)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
