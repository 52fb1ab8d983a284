"""Text data: sources of documents, the held-out split, and tokenisation.

A source is a file, a folder, or one of two corpora that need no manual download: ``pydoc``, the language
reference that Python's ``help()`` shows (79 pages in Python 3.11; it changes with the version of Python), and
``chitchat``, 7 168 dialogues of people (``fetch.CHITCHAT``, MIT, fetched once with pip and known by hash).
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from distill.data import readers
from distill.data.chat import encode_chat
from distill.data.readers import Document, Fields, Format, Part
from distill.errors import UserError
from distill.tokenizer import TextTokenizer

SIDES = ("train", "heldout")
Side = Literal["train", "heldout"]
BUILT_IN = ("pydoc", "chitchat")


@dataclasses.dataclass(frozen=True)
class TextDataConfig:
    """The text, its held-out part, and its conversion to rows."""

    source: str = "pydoc"
    """pydoc, chitchat, or a path: .txt, .md, .jsonl, .parquet, .arrow, or a folder of them (a data set of the hub)."""
    split: str = "train"
    """Split to train on, where a folder holds several."""
    heldout_source: str | None = None
    """Source of held-out documents; None: ``source``."""
    heldout_split: str | None = None
    """Split that is held out; None without a heldout_source: documents are drawn from those of the source."""
    heldout_fraction: float = 0.1
    """Share of documents that are held out, by a hash of their content, so equal documents are on one side."""
    split_seed: int = 0
    """Seed of that draw."""
    max_documents: int | None = None
    """Number of documents read from the beginning of each source; None: all."""
    format: Format = "auto"
    """Kind of the records; auto: by their fields. ``text`` reads chitchat as plain text, one line per turn."""
    fields: Fields = Fields()
    """Names of the fields of a record."""
    separator: str = ""
    """Separates the documents of a plain text file; empty: a file is one document."""
    loss: Literal["completion", "all"] = "completion"
    """Tokens that count: completions and the assistant's turns, or all. In plain text all tokens count."""
    length: int = 256
    """Tokens of a row, L; a stored row has one more, the last label."""
    overflow: Literal["split", "keep_start", "keep_end"] = "split"
    """Treatment of a document longer than a row: split over further rows (the last token of one is the first of the
    next, so every token is predicted once), or only its start or end is kept."""

    def __post_init__(self):
        if self.length < 1:
            raise UserError(f"data: length={self.length}; expected at least 1.")
        if self.max_documents is not None and self.max_documents < 1:
            raise UserError(f"data: max_documents={self.max_documents}; expected at least 1, or None.")
        if not self.separate and not 0.0 < self.heldout_fraction < 1.0:
            raise UserError(f"data: heldout_fraction={self.heldout_fraction}; expected a number between 0 and 1.")

    @property
    def separate(self) -> bool:
        """Whether held-out documents have a separate source or split."""
        return self.heldout_source is not None or self.heldout_split is not None


class Encoded(NamedTuple):
    """The tokens of a document."""

    ids: np.ndarray
    """``[n]`` int32."""
    counts: np.ndarray
    """``[n]`` bool: tokens to predict."""


def documents(config: TextDataConfig, side: Side) -> Iterator[Document]:
    """The documents of one side, in the order of the source.

    Raises:
      MissingFile: no such source.
      UserError: a file that cannot be read, with its line number.
    """
    if config.separate:
        yield from itertools.islice(_all(config, side), config.max_documents)
        return
    for document in itertools.islice(_all(config, side), config.max_documents):
        if (_draw(document, config.split_seed) < config.heldout_fraction) == (side == "heldout"):
            yield document


def _draw(document: Document, seed: int) -> float:
    """A number in [0, 1) that depends on the seed and the content of the document alone."""
    digest = hashlib.sha256(f"{seed}\n{document.content()}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _source_of(config: TextDataConfig, side: Side) -> tuple[str, str]:
    """Source and split of a side."""
    if side == "heldout" and config.separate:
        return config.heldout_source or config.source, config.heldout_split or config.split
    return config.source, config.split


def _all(config: TextDataConfig, side: Side) -> Iterator[Document]:
    source, split = _source_of(config, side)
    if source == "pydoc":
        yield from _pydoc()
    elif source == "chitchat":
        yield from _chitchat(as_text=config.format == "text")
    else:
        for file in readers.files_of(source, split):
            yield from readers.read(file, config.format, config.fields, config.separator)


def _pydoc() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, page in sorted(topics.items()):
        yield Document((Part(page, True),), where=f"pydoc:{name}")


def _chitchat(as_text: bool) -> Iterator[Document]:
    """Dialogues in which the first speaker is the user; a turn of several lines is one message."""
    from distill import fetch

    dialogues = json.loads(fetch.fetch(fetch.CHITCHAT).read_text(encoding="utf-8"))
    for name, dialogue in dialogues.items():
        turns = ["\n".join(line["text"] for line in turn) for turn in dialogue["messages"]]
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        parts = (Part("\n".join(turns), True),)
        where = f"chitchat:{name}"
        yield Document(parts, where=where) if as_text else Document(messages=tuple(messages), where=where)


def source_hash(config: TextDataConfig) -> str:
    """Hash of all content that is read, including the names of files.

    Raises:
      MissingFile: no such source.
      UserError: a folder without readable files.
    """
    from distill import fetch

    total = hashlib.sha256()
    for source, split in dict.fromkeys(_source_of(config, side) for side in SIDES):
        if source == "pydoc":
            total.update(json.dumps([document.parts for document in _pydoc()]).encode())
        elif source == "chitchat":
            total.update(fetch.CHITCHAT.sha256.encode())
        else:
            for file in readers.files_of(source, split):
                total.update(f"{file.name} {fetch.sha256_of(file)}\n".encode())
    return total.hexdigest()[:16]


def encode(found: Iterable[Document], tokenizer: TextTokenizer, config: TextDataConfig) -> Iterator[Encoded]:
    """Tokenises documents, in order.

    A text, or a prompt with its completion, starts with ``tokenizer.start`` and ends with the end-of-text token, which
    counts; a text that has them already gets no second ones. Parts are encoded one by one, so that a prompt has the
    same tokens as at generation. A conversation is encoded as its template renders it.

    Raises:
      UserError: a conversation without a chat template, or one that the template rejects, with file and line number.
    """
    for group in _groups(found, 256):  # fast tokenizers encode a list in parallel
        texts = tokenizer.encode_all([part.text for document in group for part in document.parts])
        pieces = iter(texts)
        for document in group:
            own = [(next(pieces), part.counts or config.loss == "all") for part in document.parts]
            yield _join(own, tokenizer) if own else _chat(document, tokenizer, config)


def _groups(found: Iterable[Document], size: int) -> Iterator[list[Document]]:
    found = iter(found)
    while group := list(itertools.islice(found, size)):
        yield group


def _join(parts: list[tuple[list[int], bool]], tokenizer: TextTokenizer) -> Encoded:
    start, end = list(tokenizer.start), list(tokenizer.end) or [tokenizer.eos_id]
    if start and parts[0][0][: len(start)] != start:
        parts = [(start, False), *parts]
    if parts[-1][0][-len(end) :] != end:
        parts = [*parts, (end, parts[-1][1])]
    counts = [np.full(len(ids), counted) for ids, counted in parts]
    return Encoded(np.concatenate([np.asarray(ids, np.int32) for ids, _ in parts]), np.concatenate(counts))


def _chat(document: Document, tokenizer: TextTokenizer, config: TextDataConfig) -> Encoded:
    try:
        ids, counts = encode_chat(tokenizer, document.messages, document.tools)
    except ValueError as error:
        raise UserError(f"{document.where}: {error}") from error
    return Encoded(ids, np.ones_like(counts) if config.loss == "all" else counts)


def file_name(config: TextDataConfig) -> str:
    """Short name of the source, for folders."""
    return "".join(c if c.isalnum() else "_" for c in Path(config.source).stem)[:40] or "text"
