"""Evaluation: exact match by greedy decoding, agreement with the teacher, calibration, efficiency.

Exact match is never teacher-forced: the model reads only the answer it writes. Measures of distributions (agreement,
KL, calibration) read both models on the same text.
"""

import statistics
import time
from typing import Any

import numpy as np

from distill.data.addition import TOKENIZER, AdditionConfig, Examples
from distill.evaluation.measures import calibration, continued, count_written, log_softmax, logits_on, nats_per_token
from distill.experiments.folder import identity
from distill.models.config import DecoderConfig
from distill.models.decoder import decoder
from distill.models.model import Model
from distill.shapes import Params


def network(config: DecoderConfig) -> Model:
    """A decoder for additions; rows of its embedding that are no token of the tokenizer get no logit."""
    return decoder(config).with_vocabulary(TOKENIZER.vocab_size)


def identity_of(config: Any, *parts: str, **more: Any) -> dict[str, Any]:
    """``identity`` of a training on additions: with the tokenizer."""
    return identity(config, *parts, tokenizer=TOKENIZER.fingerprint(), **more)


def row_length(config: AdditionConfig) -> int:
    """Tokens that a model reads of one addition."""
    return config.prompt_length + config.answer_length - 1


def row_flops(model: DecoderConfig, config: AdditionConfig) -> float:
    """FLOPs of one forward pass over one addition."""
    return row_length(config) * model.flops_per_token(row_length(config))


def write_answers(model: Model, params: Params, config: AdditionConfig, examples: Examples) -> np.ndarray:
    """``[examples, answer]`` ids the model writes for the prompts."""
    end = {"eos_ids": TOKENIZER.stop_ids, "pad_id": TOKENIZER.pad_id}
    return continued(model, params, examples.prompts(config), config.answer_length, **end)


def is_correct(model: Model, params: Params, config: AdditionConfig, examples: Examples) -> np.ndarray:
    """``[examples]`` bool: the whole answer and its end, written greedily, equal the true ones."""
    return (write_answers(model, params, config, examples) == examples.answers(config)).all(axis=1)


def by_carries(correct: np.ndarray, carries: np.ndarray) -> dict[str, dict[str, float]]:
    """Exact match and count for each number of carries."""
    groups = {str(n): correct[carries == n] for n in np.unique(carries)}
    return {n: {"exact_match": float(group.mean()), "count": len(group)} for n, group in groups.items()}


def efficiency(model: Model, params: Params, config: AdditionConfig, examples: Examples) -> dict[str, float]:
    """Parameters, FLOPs per token, seconds for one answer alone (median of 20), tokens per second for all at once."""
    one = examples.take(np.arange(1))
    write_answers(model, params, config, one)  # compiles
    tokens = count_written(write_answers(model, params, config, examples), TOKENIZER.stop_ids)
    seconds = [_seconds(lambda: write_answers(model, params, config, one)) for _ in range(20)]
    batch_seconds = min(_seconds(lambda: write_answers(model, params, config, examples)) for _ in range(3))
    return {
        "parameters": model.parameter_count(),
        "flops_per_token": model.config.flops_per_token(examples.tokens.shape[1] - 1),
        "latency_seconds": statistics.median(seconds),
        "tokens_per_second": tokens / batch_seconds,
    }


def _seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def evaluate_model(model: Model, params: Params, config: AdditionConfig, test: Examples) -> dict[str, Any]:
    """Measures of one model without its teacher, on examples nobody trained on."""
    batch = test.batch(config)
    correct = is_correct(model, params, config, test)
    logits = logits_on(model, params, batch)
    return {
        "exact_match": float(correct.mean()),
        "examples": len(correct),
        "exact_match_by_carries": by_carries(correct, test.carries),
        "nll": nats_per_token(logits, batch.labels, batch.mask),
        "calibration": calibration(logits, batch.labels, batch.mask),
        **efficiency(model, params, config, test),
    }


def soft_targets(models: dict[str, np.ndarray], config: AdditionConfig, test: Examples, temperature: float = 4.0):
    """The digit at which a teacher that is right gives a wrong symbol most, and each model's probabilities there.

    Args:
      models: ``teacher`` and others → logits ``[examples, L, V]`` on the test text.
      config: of the additions.
      test: the examples.
      temperature: of the softened teacher.
    """
    batch = test.batch(config)
    probabilities = np.exp(log_softmax(models["teacher"]))
    np.put_along_axis(probabilities, batch.labels[..., None], 0.0, axis=-1)
    right = batch.mask & (models["teacher"].argmax(axis=-1) == batch.labels)
    doubt = np.where(right, probabilities.max(axis=-1), 0.0)
    row, column = np.unravel_index(doubt.argmax(), doubt.shape)
    position = int(column) - (config.prompt_length - 1)
    said = {name: np.exp(log_softmax(logits[row, column])).tolist() for name, logits in models.items()}
    return {
        "prompt": TOKENIZER.decode(test.prompts(config)[row]),
        "written": TOKENIZER.decode(test.answers(config)[row][:position]),
        "position": position,
        "truth": TOKENIZER.symbols[batch.labels[row, column]],
        "symbols": list(TOKENIZER.symbols),
        "temperature": temperature,
        "teacher_softened": np.exp(log_softmax(models["teacher"][row, column] / temperature)).tolist(),
        **said,
    }
