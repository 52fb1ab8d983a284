"""Tokenizers: one id per character, or the tokenizer of a language model."""

from collections.abc import Sequence

import numpy as np

from distill.tokenizer.character import CharacterTokenizer
from distill.tokenizer.text import TextTokenizer

__all__ = ["CharacterTokenizer", "TextTokenizer", "Tokenizing", "decode_all"]

Tokenizing = CharacterTokenizer | TextTokenizer
"""Either kind: ``encode``, ``decode``, ``ids``, ``vocab_size``, ``eos_id``, ``stop_ids``, ``pad_id``, ``fingerprint``.
"""


def decode_all(tokenizer: Tokenizing, rows: Sequence[Sequence[int]] | np.ndarray) -> list[str]:
    """``decode`` of every row."""
    return [tokenizer.decode(row) for row in rows]
