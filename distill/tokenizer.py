"""Tokenizers: one id per character, or the tokenizer of a language model."""

import dataclasses
import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.errors import MissingFile, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.characters) + 2

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises UserError on a character outside the alphabet."""
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            raise UserError(f"cannot encode {text!r}: unknown {unknown}; expected only {self.characters!r}.")
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


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer of the library ``tokenizers`` as a value: its file, its special tokens and its chat template.

    ``encode`` adds no token at the ends of a text (``start`` and ``end`` hold those that the tokenizer would add), and
    recognises special tokens in the text. Truncation and padding of the file are switched off: they would cut texts
    silently.

    Args:
      serialized: content of ``tokenizer.json``.
      eos: the token that ends a document or an answer.
      bos: the token that starts it; None: none.
      pad: fills rows; None: ``eos`` does (segments and masks tell them apart, never the id).
      unknown: the token for text without a token; None: none.
      chat_template: Jinja template of a conversation.
      options: further keys of ``tokenizer_config.json``, kept when saving.

    Raises:
      UserError: the text is no tokenizer, or one of the tokens is not in its vocabulary.

    Example:
      >>> from tokenizers import Tokenizer, models, pre_tokenizers
      >>> inner = Tokenizer(models.WordLevel({"</s>": 0, "good": 1, "day": 2}, unk_token="</s>"))
      >>> inner.pre_tokenizer = pre_tokenizers.Whitespace()
      >>> tokenizer = TextTokenizer(inner.to_str(), eos="</s>")
      >>> tokenizer.encode("good day"), tokenizer.decode([1, 2]), tokenizer.eos_id, tokenizer.pad_id
      ([1, 2], 'good day', 0, 0)
    """

    serialized: str = dataclasses.field(repr=False)
    eos: str
    bos: str | None = None
    pad: str | None = None
    unknown: str | None = None
    chat_template: str | None = dataclasses.field(default=None, repr=False)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self):
        known = self.ids()
        tokens = {"eos": self.eos, "bos": self.bos, "pad": self.pad, "unknown": self.unknown}
        for name, token in tokens.items():
            if token is not None and token not in known:
                raise UserError(f"tokenizer: {name}={token!r} is not in its vocabulary of {len(known)} tokens.")

    @classmethod
    def from_folder(cls, folder: str | Path, *, eos: str | None = None, pad: str | None = None) -> "TextTokenizer":
        """The tokenizer of a Hugging Face folder, or of a ``tokenizer.json``.

        Args:
          folder: holds ``tokenizer.json`` and, as a rule, ``tokenizer_config.json``; or the first file itself.
          eos: replaces the one of the folder.
          pad: replaces the one of the folder.

        Raises:
          MissingFile: no ``tokenizer.json``.
          UserError: a file that cannot be read, or no end-of-text token is named.
        """
        folder = Path(folder)
        folder, file = (folder.parent, folder) if folder.suffix == ".json" else (folder, folder / "tokenizer.json")
        if not file.is_file():
            raise MissingFile(
                f"{file}: missing; expected a folder with a tokenizer.json. Of a folder with tokenizer.model or "
                "vocab.json alone, transformers makes one: AutoTokenizer.from_pretrained(A).save_pretrained(B)."
            )
        config = _read_json(folder / "tokenizer_config.json")
        named = _read_json(folder / "special_tokens_map.json") | config
        tokens = {name: _content(named.get(f"{name}_token")) for name in ("eos", "bos", "pad", "unk")}
        eos, pad = eos or tokens["eos"], pad or tokens["pad"]
        if eos is None:
            raise UserError(f"{folder}: no file names an end-of-text token; give one: from_folder(..., eos='</s>').")
        kept = {key: value for key, value in config.items() if key not in _NOT_KEPT}
        text = file.read_text(encoding="utf-8")
        try:
            return cls(text, eos, tokens["bos"], pad, tokens["unk"], _template(folder, config), kept)
        except ValueError as error:
            raise UserError(f"{file}: {error}") from error

    @classmethod
    def from_transformers(cls, tokenizer: Any, *, eos: str | None = None, pad: str | None = None) -> "TextTokenizer":
        """The same tokenizer as one of transformers, read from the files it saves.

        Raises:
          MissingFile: it saves no ``tokenizer.json`` (a slow one).
        """
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return cls.from_folder(folder, eos=eos, pad=pad)

    def within(self, rows: int) -> "TextTokenizer":
        """This tokenizer without the control tokens beyond the rows of an embedding.

        Gemma 3 has a token for images that its text model has no row for.

        Raises:
          UserError: a token of text has no row, or a special token that is needed.
        """
        if self.vocab_size <= rows:
            return self
        beyond = {token for token, i in self._ids.items() if i >= rows}
        needed = sorted(beyond - set(self.special_tokens) | beyond & {self.eos, self.bos, self.pad, self.unknown})
        if needed:
            raise UserError(
                f"the tokenizer has ids up to {self.vocab_size - 1}, the embedding {rows} rows, none for "
                f"{', '.join(map(repr, needed[:3]))}; they do not belong together."
            )
        file = json.loads(self.serialized)
        file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] not in beyond]
        if isinstance(vocabulary := file["model"].get("vocab"), dict):
            file["model"]["vocab"] = {token: i for token, i in vocabulary.items() if token not in beyond}
        return dataclasses.replace(self, serialized=json.dumps(file, ensure_ascii=False))

    def save(self, folder: str | Path) -> None:
        """Writes ``tokenizer.json``, ``tokenizer_config.json`` and the chat template, as transformers opens them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {"eos_token": self.eos, "bos_token": self.bos, "pad_token": self.pad, "unk_token": self.unknown}
        tokens = {name: token for name, token in names.items() if token is not None}
        config = {**self.options, **tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer.json").write_text(self.serialized, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        template = folder / "chat_template.jinja"
        if self.chat_template is None:
            template.unlink(missing_ok=True)
        else:
            template.write_text(self.chat_template, encoding="utf-8")
        (folder / "special_tokens_map.json").unlink(missing_ok=True)

    @functools.cached_property
    def _plain(self) -> "Tokenizer":
        """The tokenizer without what it adds around a text, and without truncation and padding."""
        backend = self.backend()
        backend.post_processor = None
        return backend

    def backend(self) -> "Tokenizer":
        """A fresh object of ``tokenizers``, truncation and padding switched off.

        Raises:
          UserError: what was given is no tokenizer.
        """
        from tokenizers import Tokenizer

        try:
            backend = Tokenizer.from_str(self.serialized)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"no tokenizer that the library tokenizers reads ({error}).") from error
        backend.no_truncation()
        backend.no_padding()
        return backend

    @functools.cached_property
    def _ends(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        probe = self.backend().encode("a", add_special_tokens=True)
        inner = [i for i, added in enumerate(probe.special_tokens_mask) if not added]
        first, last = (inner[0], inner[-1] + 1) if inner else (len(probe.ids), len(probe.ids))
        return tuple(probe.ids[:first]), tuple(probe.ids[last:])

    @property
    def start(self) -> tuple[int, ...]:
        """Ids that the tokenizer itself puts before a text, such as the beginning-of-text token; often none."""
        return self._ends[0]

    @property
    def end(self) -> tuple[int, ...]:
        """Ids that the tokenizer itself puts after a text; usually none."""
        return self._ends[1]

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return dict(sorted(self._plain.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]))

    def ids(self) -> dict[str, int]:
        """Token → id, added tokens included, by id."""
        return dict(self._ids)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: rows that an embedding needs."""
        return max(self._ids.values()) + 1

    @property
    def eos_id(self) -> int:
        """Id of ``eos``."""
        return self._ids[self.eos]

    @property
    def bos_id(self) -> int | None:
        """Id of ``bos``, None if there is none."""
        return None if self.bos is None else self._ids[self.bos]

    @property
    def pad_id(self) -> int:
        """Id of ``pad``, that of ``eos`` if there is none."""
        return self._ids[self.eos if self.pad is None else self.pad]

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that ``decode`` leaves out: control tokens, not text."""
        return frozenset(i for i, token in self._plain.get_added_tokens_decoder().items() if token.special)

    @functools.cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Their texts."""
        return tuple(token for token, i in self._ids.items() if i in self.special_ids)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; nothing is added at its ends, special tokens written in it are found."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of every text, on all cores."""
        return [one.ids for one in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and, for each, which characters ``[from, to)`` of the text it stands for."""
        found = self._plain.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of ids; special tokens are left out unless ``special``."""
        return self._plain.decode([int(i) for i in ids], skip_special_tokens=not special)

    @property
    def marks_turns(self) -> bool:
        """Whether the chat template marks generated text, ``{% generation %} … {% endgeneration %}``."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.chat_template or "") is not None

    def chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, answer: bool = False) -> str:
        """Text of a conversation by the chat template, special tokens included, ready for ``encode``.

        Args:
          messages: each with ``role`` and ``content``.
          tools: JSON schemas of what can be called.
          answer: also write the beginning of an answer that is to be generated.

        Raises:
          UserError: no chat template, or it refuses the conversation.
        """
        return self._render(messages, tools, answer, False)[0]

    def chat_with_marks(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()
    ) -> tuple[str, list[tuple[int, int]]]:
        """``chat`` and the characters ``[from, to)`` that the template marks as generated (``marks_turns``).

        Raises:
          UserError: as ``chat``.
        """
        return self._render(messages, tools, False, True)

    def _render(self, messages, tools, answer: bool, marks: bool) -> tuple[str, list[tuple[int, int]]]:
        """Renders in the sandbox of transformers, which is hardened against hostile templates."""
        if self.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template; give one, TextTokenizer(..., chat_template=...) or a file "
                "chat_template.jinja in its folder, or read the conversations as text."
            )
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        names = {"eos_token": self.eos, "bos_token": self.bos, "pad_token": self.pad, "unk_token": self.unknown}
        try:
            texts, spans = render_jinja_template(
                [[dict(message) for message in messages]],
                tools=list(tools) or None,
                chat_template=self.chat_template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=answer,
                **{name: token for name, token in names.items() if token is not None},
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise UserError(f"the chat template fails: {error}") from error
        return texts[0], spans[0] if marks else []

    def fingerprint(self) -> str:
        """Hash of everything that determines the ids of a text or a conversation."""
        file = json.loads(self.serialized)
        rules = {key: value for key, value in file.items() if key not in ("truncation", "padding")}
        ends = [self.eos, self.bos, self.pad, self.unknown, self.chat_template]
        return hashlib.sha256(json.dumps([rules, ends], sort_keys=True).encode()).hexdigest()[:16]


_NOT_KEPT = {
    *("eos_token", "bos_token", "pad_token", "unk_token", "chat_template"),  # fields of the class
    *("added_tokens_decoder", "add_bos_token", "add_eos_token", "add_prefix_space"),  # stand in tokenizer.json
    *("tokenizer_class", "tokenizer_file", "name_or_path", "backend", "auto_map"),  # of where it comes from
    *("is_local", "local_files_only"),
}


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not readable as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: a JSON {type(value).__name__}; expected an object.")
    return value


def _content(token: Any) -> str | None:
    """A token's text; files have it as text or as an object with properties."""
    return token.get("content") if isinstance(token, dict) else token


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template of a folder: a file, or an entry of the configuration; of several, ``default``."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        return {one["name"]: one["template"] for one in template}.get("default")
    return template


Tokenizing = CharacterTokenizer | TextTokenizer
"""Either kind: ``encode``, ``decode``, ``ids``, ``vocab_size``, ``eos_id``, ``pad_id``, ``fingerprint``."""


def decode_all(tokenizer: Tokenizing, rows: Sequence[Sequence[int]] | np.ndarray) -> list[str]:
    """``decode`` of every row."""
    return [tokenizer.decode(row) for row in rows]
