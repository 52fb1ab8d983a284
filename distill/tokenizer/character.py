"""One id per character."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable

from distill.errors import UserError


@dataclasses.dataclass(frozen=True)
class CharacterTokenizer:
    """One id per character, plus ``<pad>`` = 0 and ``<eos>`` = 1.

    Example:
      >>> tokenizer = CharacterTokenizer("0123456789+=")
      >>> tokenizer.encode("7+5=")
      [9, 12, 7, 13]
      >>> tokenizer.decode([9, 12, 7, 13, 1, 0])
      '7+5='
    """

    characters: str
    pad_id: int = 0
    eos_id: int = 1

    @property
    def symbols(self) -> tuple[str, ...]:
        """Every id's text, in order of id."""
        return ("<pad>", "<eos>", *self.characters)

    def ids(self) -> dict[str, int]:
        """Token → id."""
        return {symbol: number for number, symbol in enumerate(self.symbols)}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end what a model writes: ``eos_id``."""
        return (self.eos_id,)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.characters) + 2

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises UserError on a character outside the alphabet."""
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            shown = text if len(text) <= 60 else text[:59] + "…"
            raise UserError(f"cannot encode {shown!r}: unknown {unknown[:9]}; expected only {self.characters!r}.")
        return [self.characters.index(character) + 2 for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first ``<eos>``; ``<pad>`` writes nothing."""
        text = ""
        for token in ids:
            if token == self.eos_id:
                break
            text += "" if token == self.pad_id else self.symbols[token]
        return text

    def fingerprint(self) -> str:
        """Hash of the id → text map: equal exactly when two tokenizers read the same ids the same way."""
        return hashlib.sha256(json.dumps(self.symbols).encode()).hexdigest()[:16]
