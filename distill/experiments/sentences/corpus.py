"""Sentences of dialogues, to train on and to judge by."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from distill import fetch
from distill.batch import Batch
from distill.errors import MissingFile, UserError
from distill.experiments.sentences.config import SentenceConfig
from distill.weights.folder import located

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HELD_OUT_DIALOGUES = 700
SHORTEST = 6
"""Tokens of the shortest sentence."""


class Sentences(NamedTuple):
    """Tokenized sentences. Which of the ids are padding is known by the segments alone: any id may be a token."""

    tokens: np.ndarray
    """Ids ``[n, L]``."""
    segments: np.ndarray
    """``[n, L]``: 1 for a token, 0 for padding."""
    texts: list[str]


def teacher_folder(config: SentenceConfig) -> Path:
    """The folder of the teacher, fetched where none is given; of a run, that of its student."""
    return fetch.fetch_folder(fetch.MINILM) if config.teacher is None else located(config.teacher)


def sentences(config: SentenceConfig) -> dict[str, Sentences]:
    """Sentences of ``fetch.CHITCHAT``: ``train``, and ``held_out`` of its last dialogues, none in both.

    The corpus is fixed. Sentences are tokenized by the file tokenizer.json of the teacher, read with ``tokenizers``,
    not by ``TextTokenizer``, which is of language models.

    Raises:
      MissingFile: no tokenizer.json.
      UserError: one that cannot be read, or fewer sentences than asked for.
    """
    tokenizer = _tokenizer(teacher_folder(config) / "tokenizer.json")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    dialogues = list(json.loads(fetch.fetch(fetch.CHITCHAT).read_text()).values())
    parts = {"train": dialogues[:-HELD_OUT_DIALOGUES], "held_out": dialogues[-HELD_OUT_DIALOGUES:]}
    sides, known = {}, set()
    for name, count in (("train", config.sentences), ("held_out", config.held_out)):
        turns = (" ".join(line["text"] for line in turn) for one in parts[name] for turn in one["messages"])
        texts = [text for text in dict.fromkeys(turns) if text not in known]
        encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        fits = [i for i, ids in enumerate(encoded) if SHORTEST <= len(ids) <= config.length]
        if len(fits) < count:
            raise UserError(f"sentences: {count} of {name} asked for; there are {len(fits)} of a fitting length.")
        chosen = np.random.default_rng(0).permutation(fits)[:count]
        sides[name] = Sentences(*padded([encoded[i] for i in chosen], config.length), [texts[i] for i in chosen])
        known.update(texts)
    return sides


def _tokenizer(file: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    if not file.is_file():
        raise MissingFile(
            f"{file}: missing; of a folder with vocab.txt alone, transformers makes one: "
            "AutoTokenizer.from_pretrained(A).save_pretrained(B)."
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{file}: no tokenizer that the library tokenizers reads ({error}).") from error


def padded(encoded: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and segments ``[n, L]`` of sentences of at most ``length`` tokens.

    Example:
      >>> [rows.tolist() for rows in padded([[0, 7], [5]], 3)]
      [[[0, 7, 0], [5, 0, 0]], [[1, 1, 0], [1, 0, 0]]]
    """
    tokens = np.zeros((len(encoded), length), np.int32)
    segments = np.zeros_like(tokens)
    for i, ids in enumerate(encoded):
        tokens[i, : len(ids)], segments[i, : len(ids)] = ids, 1
    return tokens, segments


def batch_of(sentences: Sentences) -> Batch:
    """Sentences as examples: every token that is not padding counts; labels are not used."""
    tokens, segments, _ = sentences
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(tokens, tokens, segments > 0, np.ascontiguousarray(positions), segments)
