"""Sentences of dialogues, to train on and to judge by."""

import json
from pathlib import Path

import numpy as np

from distill import fetch
from distill.batch import Batch
from distill.errors import UserError
from distill.experiments.sentences.config import SentenceConfig

HELD_OUT_DIALOGUES = 700
SHORTEST = 6
"""Tokens of the shortest sentence."""
Sentences = tuple[np.ndarray, list[str]]
"""Ids ``[n, L]`` with 0 for padding, and the texts."""


def teacher_folder(config: SentenceConfig) -> Path:
    """The folder of the teacher, fetched where none is given."""
    return fetch.fetch_folder(fetch.MINILM) if config.teacher is None else Path(config.teacher)


def sentences(config: SentenceConfig) -> dict[str, Sentences]:
    """Sentences of ``fetch.CHITCHAT``: ``train``, and ``held_out`` of its last dialogues, none in both.

    The corpus is fixed. Sentences are tokenized by the file tokenizer.json of the teacher, read with ``tokenizers``,
    not by ``TextTokenizer``, which is of language models.

    Raises:
      UserError: fewer sentences than asked for.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(teacher_folder(config) / "tokenizer.json"))
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
        rows = np.zeros((count, config.length), np.int32)
        for row, i in zip(rows, chosen, strict=True):
            row[: len(encoded[i])] = encoded[i]
        sides[name] = rows, [texts[i] for i in chosen]
        known.update(texts)
    return sides


def batch_of(tokens: np.ndarray) -> Batch:
    """Sentences as examples: every token that is not padding counts; labels are not used."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(tokens, tokens, tokens > 0, np.ascontiguousarray(positions), (tokens > 0).astype(np.int32))
