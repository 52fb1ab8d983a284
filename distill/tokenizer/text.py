"""The tokenizer of a language model: ids, special tokens, chat template, and the tokens at which its writing stops."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError, shown
from distill.tokenizer import files, template

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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
      templates: further chat templates by name; ``tool_use`` is taken for conversations with tools.
      stops: further tokens that end what a model writes (``stop_ids``).

    Two tokenizers are equal, and have equal fingerprints, if they give every text the same ids; ``stops`` and
    ``options`` do not matter to that.

    Raises:
      UserError: the text is no tokenizer, one of the tokens is not in its vocabulary, or an id is above 2³¹ − 1.

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
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False, hash=False)
    stops: tuple[str, ...] = dataclasses.field(default=(), repr=False, compare=False)

    def __post_init__(self):
        known = self._ids
        tokens = {"eos": self.eos, "bos": self.bos, "pad": self.pad, "unknown": self.unknown}
        for name, token in (*tokens.items(), *(("stops", token) for token in self.stops)):
            if token is not None and token not in known:
                raise UserError(f"tokenizer: {name}={token!r} is not in its vocabulary of {len(known)} tokens.")
        if max(known.values()) >= 2**31:
            raise UserError(f"tokenizer: ids up to {max(known.values())}; expected ids below 2³¹.")

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, eos: str | None = None, pad: str | None = None, template: str | None = None
    ) -> "TextTokenizer":
        """The tokenizer of a Hugging Face folder, or of a ``tokenizer.json``.

        Every file beside ``tokenizer.json`` that can change a token is used, known to agree, or refused
        (``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json``, ``vocab.json``, ``merges.txt``,
        the chat templates), so that the ids are those of transformers' AutoTokenizer (``files.py`` says where its
        release 5 has others). ``generation_config.json`` and ``config.json`` give ``stops``. A ``tokenizer.model`` is
        not opened, as in every reader that finds a ``tokenizer.json``.

        Args:
          folder: holds ``tokenizer.json`` and, as a rule, ``tokenizer_config.json``; or the first file itself.
          eos: replaces the one of the folder.
          pad: replaces the one of the folder.
          template: name of the chat template, where there are several; None: ``default``, or the only one.

        Raises:
          MissingFile: no ``tokenizer.json``.
          UserError: a file that cannot be read, two that disagree, or no end-of-text token is named.
        """
        folder = Path(folder)
        folder, file = (folder.parent, folder) if folder.suffix == ".json" else (folder, folder / "tokenizer.json")
        given = {name: token for name, token in (("eos", eos), ("pad", pad)) if token is not None}
        found = files.read(folder, file, given=given)
        tokens = found.tokens | given
        if "eos" not in tokens:
            raise UserError(f"{folder}: no file names an end-of-text token; give one: from_folder(..., eos='</s>').")
        chosen = files.choose(folder, found.templates, template)
        more = {name: text for name, text in found.templates.items() if text != chosen}
        special = {name: tokens.get(name) for name in ("bos", "pad", "unknown")}
        try:
            made = cls(
                found.serialized,
                tokens["eos"],
                **special,
                chat_template=chosen,
                options=found.options,
                templates=more,
                stops=found.stops,
            )
            ends = {"add_bos_token": made.bos_id in made.start, "add_eos_token": made.eos_id in made.end}
        except ValueError as error:
            raise UserError(f"{file}: {error}") from error
        files.check_ends(folder, ends)
        return made

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
        """Writes the tokenizer as transformers and other readers open it.

        ``tokenizer.json``; ``tokenizer_config.json``, with the chat template inside; the same template as
        ``chat_template.jinja``; ``generation_config.json`` with ``stop_ids``.
        """
        names = {key: getattr(self, name) for name, key in files.SPECIAL.items()}
        tokens = {key: token for key, token in names.items() if token is not None}
        config = {**self.options, **tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
        default = {} if self.chat_template is None else {"default": self.chat_template}
        ids = {key: value for key, value in self.special_token_ids().items() if value is not None}
        files.write(Path(folder), self.serialized, config, default | dict(self.templates), ids)

    def special_token_ids(self) -> dict[str, int | list[int] | None]:
        """Ids by their keys in ``config.json`` and ``generation_config.json``; of several stop tokens a list."""
        stops = list(self.stop_ids)
        pad = None if self.pad is None else self.pad_id
        return {
            "bos_token_id": self.bos_id,
            "eos_token_id": stops if len(stops) > 1 else stops[0],
            "pad_token_id": pad,
        }

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
        with _refusing("a"):
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

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end what a model writes, ascending.

        ``eos``, ``stops``, and the special token that the chat template writes after an answer: models of
        conversations end their turns with it, and seldom with ``eos``.
        """
        ends = () if self.chat_template is None else self._turn_end()
        return tuple(sorted({self._ids[token] for token in (self.eos, *self.stops, *ends)}))

    def _turn_end(self) -> tuple[str, ...]:
        """The first special token after the answer of a small conversation, if there is one."""
        asked, answered = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
        for messages in ([asked, answered], [answered]):
            try:
                after = self.chat(messages).rpartition("answer")[2]
            except UserError:
                continue  # a template may refuse either
            return tuple(self.special_in(after)[:1])
        return ()

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(filter(None, self.special_tokens), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) is found nowhere

    def special_in(self, text: str) -> list[str]:
        """The special tokens written in a text, in order."""
        return self._special_pattern.findall(text)

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
        """Ids of a text; nothing is added at its ends, special tokens written in it are found.

        Raises:
          UserError: half of a surrogate pair, or a text over which the tokenizer's regular expression fails.
        """
        return self.encode_with_offsets(text)[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of every text, on all cores."""
        with _refusing(*texts):
            return [one.ids for one in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and, for each, which characters ``[from, to)`` of the text it stands for."""
        with _refusing(text):
            found = self._plain.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of ids; special tokens are left out unless ``special``."""
        return self._plain.decode([int(i) for i in ids], skip_special_tokens=not special)

    def decode_all(self, rows: Sequence[Sequence[int]], *, special: bool = False) -> list[str]:
        """``decode`` of every row, on all cores."""
        return self._plain.decode_batch([list(map(int, row)) for row in rows], skip_special_tokens=not special)

    def template_for(self, tools: Sequence[Any] = ()) -> str:
        """The chat template for a conversation, by whether it has tools.

        Raises:
          UserError: there is none.
        """
        found = self.templates.get("tool_use", self.chat_template) if tools else self.chat_template
        if found is None:
            raise UserError(
                "the tokenizer has no chat template; give one, TextTokenizer(..., chat_template=...) or a file "
                "chat_template.jinja in its folder, or read the conversations as text."
            )
        return found

    @property
    def marks_turns(self) -> bool:
        """Whether the chat template marks generated text, ``{% generation %} … {% endgeneration %}``."""
        return template.is_marked(self.chat_template)

    def chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, answer: bool = False) -> str:
        """Text of a conversation by the chat template, special tokens included, ready for ``encode``.

        A template that writes today's date gets ``template.TODAY``, so that a conversation has one text.

        Args:
          messages: each with ``role`` and ``content``.
          tools: JSON schemas of what can be called.
          answer: also write the beginning of an answer that is to be generated.

        Raises:
          UserError: no chat template, or it refuses the conversation, fails, or does not end.
        """
        return self._render(messages, tools, answer).text

    def chat_with_marks(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()
    ) -> tuple[str, list[tuple[int, int]]]:
        """``chat`` and the characters ``[from, to)`` that the template marks as generated (``marks_turns``).

        Raises:
          UserError: as ``chat``.
        """
        return self._render(messages, tools, False)

    def _render(self, messages, tools, answer: bool) -> template.Rendered:
        names = {"eos_token": self.eos, "bos_token": self.bos, "pad_token": self.pad, "unk_token": self.unknown}
        given = {name: token for name, token in names.items() if token is not None}
        return template.render(self.template_for(tools), messages, tools, answer=answer, **given)

    def fingerprint(self) -> str:
        """Hash of everything that determines the ids of a text or a conversation."""
        file = json.loads(self.serialized)
        rules = {key: value for key, value in file.items() if key not in ("truncation", "padding")}
        ends: list[Any] = [self.eos, self.bos, self.pad, self.unknown, self.chat_template]
        ends += [dict(self.templates)] if self.templates else []
        return hashlib.sha256(json.dumps([rules, ends], sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _refusing(*texts: str) -> Iterator[None]:
    """Turns what the library raises over a text into a UserError."""
    try:
        yield
    except TypeError as error:
        for text in texts:
            if isinstance(text, str) and (found := re.search("[\ud800-\udfff]", text)):
                raise UserError(
                    f"a text holds half of a surrogate pair, U+{ord(found[0]):04X}, at character {found.start()} "
                    f"({shown(text[: found.start()][-20:])} before it); expected Unicode."
                ) from error
        raise
    except BaseException as error:
        # The library raises nothing narrower than Exception, and in a panic of its Rust code something wider: its
        # regular expressions give up after ten million steps.
        if type(error) is not Exception and type(error).__module__ != "pyo3_runtime":
            raise
        several = " and others" if len(texts) > 1 else ""
        raise UserError(f"the tokenizer fails over {shown(texts[0])}{several}: {error}") from error
