"""Text data: sources of documents, the held-out split, and tokenisation.

A source is a file, a folder, or one of two corpora that need no manual download: ``pydoc``, the language
reference that Python's ``help()`` shows (79 pages in Python 3.11; it changes with the version of Python), and
``chitchat``, 7 168 dialogues of people (``fetch.CHITCHAT``, MIT, fetched once with pip and known by hash).
"""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from distill.data import readers
from distill.data.chat import conversation, tokens_of
from distill.data.messages import ASSISTANT, counts
from distill.data.readers import Document, Fields, Format, LeftOut, Part
from distill.errors import UserError, check_fields
from distill.tokenizer import TextTokenizer
from distill.tokenizer.template import TODAY, writes_date

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
    """Tokens that count: completions and the assistant's turns, or all. In plain text all tokens count. Turns with
    ``weight: 0`` or ``train: false`` never count."""
    drop_reasoning: bool = False
    """Whether a chat template may leave out reasoning, as that of Qwen 3 does for earlier turns; it is counted."""
    length: int = 256
    """Tokens of a row, L; a stored row has one more, the last label."""
    overflow: Literal["split", "keep_start", "keep_end"] = "split"
    """Treatment of a document longer than a row: split over further rows (each begins with the beginning-of-text token,
    if the tokenizer has one, and the last token of the row before; every token is predicted once), or only its start or
    end is kept."""

    def __post_init__(self):
        drawn = (not self.separate, "neither heldout_source nor heldout_split")
        check_fields(self, "data", lambda: {"heldout_fraction": drawn, "split_seed": drawn})
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


def documents(config: TextDataConfig, side: Side, left_out: LeftOut[str] | None = None) -> Iterator[Document]:
    """The documents of one side, in the order of the source.

    Args:
      config: which text.
      side: of it.
      left_out: receives what is not read, by reason; of both sides, where they share a source.

    Raises:
      MissingFile: no such source.
      UserError: a file that cannot be read, with its line number.
    """
    if config.separate:
        yield from itertools.islice(_all(config, side, left_out), config.max_documents)
        return
    for document in itertools.islice(_all(config, side, left_out), config.max_documents):
        if (_draw(document, config.split_seed) < config.heldout_fraction) == (side == "heldout"):
            yield document


def _draw(document: Document, seed: int) -> float:
    """A number in [0, 1) that depends on the seed and the content of the document alone."""
    digest = hashlib.sha256(f"{seed}\n{document.content()}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _source_of(config: TextDataConfig, side: Side) -> tuple[str, str]:
    """Source and split of a side."""
    if side == "heldout" and config.separate:
        source = config.heldout_source or config.source
        usual = config.split if Path(source).is_dir() else "train"  # one file has no splits
        return source, config.heldout_split or usual
    return config.source, config.split


def _all(config: TextDataConfig, side: Side, left_out: LeftOut[str] | None = None) -> Iterator[Document]:
    source, split = _source_of(config, side)
    if source in BUILT_IN and split != "train":
        raise UserError(f"data: split {split!r} of {source}, which has none; expected heldout_split=None.")
    if source == "pydoc":
        yield from _pydoc()
    elif source == "chitchat":
        yield from _chitchat(as_text=config.format == "text")
    else:
        for file in readers.files_of(source, split):
            yield from readers.read(file, config.format, config.fields, config.separator, left_out)


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
      UserError: a folder without readable files, or a separator without plain text.
    """
    from distill import fetch

    _check_separator(config)
    total = hashlib.sha256()
    for number, (source, split) in enumerate(dict.fromkeys(_source_of(config, side) for side in SIDES)):
        total.update(b"\n" * number)  # a file that moves from one source to the other gives other rows
        if source == "pydoc":
            total.update(json.dumps([document.parts for document in _pydoc()]).encode())
        elif source == "chitchat":
            total.update(fetch.CHITCHAT.sha256.encode())
        else:
            for file in readers.files_of(source, split):
                total.update(f"{file.name} {fetch.sha256_of(file)}\n".encode())
    return total.hexdigest()[:16]


def shared_files(config: TextDataConfig) -> tuple[str, ...]:
    """Files that are trained on and held out: the model is then judged by text that it has seen."""
    if not config.separate:
        return ()
    train, heldout = ({file.resolve(): str(file) for file in _files(config, side)} for side in SIDES)
    return tuple(sorted(name for file, name in heldout.items() if file in train))


def _files(config: TextDataConfig, side: Side) -> list[Path]:
    """Files of a side; of a corpus without files its name."""
    source, split = _source_of(config, side)
    return [Path(source)] if source in BUILT_IN else readers.files_of(source, split)


def _check_separator(config: TextDataConfig) -> None:
    """Raises UserError for a separator that cuts nothing: records and the built-in corpora have none."""
    if config.separator and not any(f.suffix in readers.PLAIN for side in SIDES for f in _files(config, side)):
        raise UserError(
            f"data: separator={config.separator!r} cuts plain text ({', '.join(readers.PLAIN)}), and {config.source} "
            "has none; expected an empty one."
        )


def encode(
    found: Iterable[Document], tokenizer: TextTokenizer, config: TextDataConfig, left_out: LeftOut[str] | None = None
) -> Iterator[Encoded]:
    """Tokenises documents, in order.

    A text, or a prompt with its completion, starts with ``tokenizer.start`` and ends with the end-of-text token, which
    counts; a text that has them already gets no second ones. Parts are encoded one by one, so that a prompt has the
    same tokens as at generation: a token never spans the boundary. What the tokenizer puts before every text, such as
    the space of Llama 2, is put before the first part alone, so that the tokens decode to prompt + completion; where no
    encoding of the completion alone does that, the whole text is encoded and cut, and a token across the boundary
    belongs to the completion. A conversation is encoded as its template renders it.

    Args:
      found: documents.
      tokenizer: gives the ids.
      config: which tokens count.
      left_out: receives, by reason, how many documents and turns do not count, or are not learnt as they stand.

    Raises:
      UserError: a conversation without a chat template, one that the template rejects or does not write whole, or a
        text that the tokenizer fails over, with file and line number.
    """
    left_out = collections.Counter() if left_out is None else left_out
    for group in _groups(found, 256):  # fast tokenizers encode a list in parallel
        ids = iter(_encoded(group, tokenizer))
        parts = [[next(ids) for _ in document.parts] for document in group]
        decoded = tokenizer.decode_all([list(itertools.chain(*pieces)) for pieces in parts], special=True)
        for document, pieces, text in zip(group, parts, decoded, strict=True):
            if not pieces:
                yield _chat(document, tokenizer, config, left_out)
                continue
            if text != document.text():
                pieces = _whole(document, pieces, tokenizer, left_out)
            counted = [part.counts or config.loss == "all" for part in document.parts]
            yield _join(list(zip(pieces, counted, strict=True)), tokenizer)


def _groups(found: Iterable[Document], size: int) -> Iterator[list[Document]]:
    found = iter(found)
    while group := list(itertools.islice(found, size)):
        yield group


def _encoded(group: list[Document], tokenizer: TextTokenizer) -> list[list[int]]:
    """Ids of all parts of some documents.

    Raises:
      UserError: the document that the tokenizer fails over.
    """
    texts = [part.text for document in group for part in document.parts]
    try:
        return tokenizer.encode_all(texts)
    except UserError:
        for document in group:  # once more, one by one, to name it
            try:
                tokenizer.encode_all([part.text for part in document.parts])
            except UserError as error:
                raise UserError(f"{document.where}: {error}") from error
        raise


def _whole(
    document: Document, pieces: list[list[int]], tokenizer: TextTokenizer, left_out: LeftOut[str]
) -> list[list[int]]:
    """The parts of a document so that they decode to what its whole text decodes to."""
    text = document.text()
    want = tokenizer.decode(whole := tokenizer.encode(text), special=True)
    left_out["documents that their tokens do not decode to, such as text without a token"] += want != text
    if len(pieces) == 1:
        return pieces
    prompt, completion = pieces
    for ids in (completion, *_without_prefix(document.parts[1].text, tokenizer)):
        if tokenizer.decode([*prompt, *ids], special=True) == want:
            return [prompt, ids]
    _, offsets = tokenizer.encode_with_offsets(text)
    boundary = sum(last <= len(document.parts[0].text) for _, last in offsets)
    return [whole[:boundary], whole[boundary:]]


def _without_prefix(text: str, tokenizer: TextTokenizer) -> Iterator[list[int]]:
    """Ids of a text without what the tokenizer puts before it, found behind a guard that has its own tokens."""
    for guard in ("\n", "a", "=", "."):
        before, both = tokenizer.encode(guard), tokenizer.encode(guard + text)
        if both[: len(before)] == before:
            yield both[len(before) :]


def _join(parts: list[tuple[list[int], bool]], tokenizer: TextTokenizer) -> Encoded:
    start, end = list(tokenizer.start), list(tokenizer.end) or [tokenizer.eos_id]
    if start and parts[0][0][: len(start)] != start:
        parts = [(start, False), *parts]
    if parts[-1][0][-len(end) :] != end:
        parts = [*parts, (end, parts[-1][1])]
    counts = [np.full(len(ids), counted) for ids, counted in parts]
    return Encoded(np.concatenate([np.asarray(ids, np.int32) for ids, _ in parts]), np.concatenate(counts))


def _chat(document: Document, tokenizer: TextTokenizer, config: TextDataConfig, left_out: LeftOut[str]) -> Encoded:
    try:
        found = conversation(tokenizer, document.messages, document.tools, drop_reasoning=config.drop_reasoning)
        ids, counted = tokens_of(tokenizer, found, everything=config.loss == "all")
    except ValueError as error:
        raise UserError(f"{document.where}: {error}") from error
    roles = [message["role"] for message in document.messages]
    learnt = [counts(message) for message in document.messages]
    if ASSISTANT not in roles:
        names = ", ".join(sorted(set(roles)))
        left_out[f"conversations without a turn of the role {ASSISTANT!r} (their roles: {names})"] += 1
    left_out["turns of the assistant marked as not to learn (weight, train, …)"] += roles.count(ASSISTANT) - sum(learnt)
    left_out["turns of the assistant outside what the chat template marks as generated"] += found.unmarked
    left_out["answers learnt without their reasoning (drop_reasoning)"] += found.dropped
    left_out["answers after which the chat template writes no special token: nothing teaches an end"] += found.endless
    decoded = tokenizer.decode(ids, special=True)
    left_out["documents that their tokens do not decode to, such as text without a token"] += decoded != found.text
    if writes_date(tokenizer.template_for(document.tools)):
        left_out[f"conversations whose template writes the date of today; {TODAY:%d %b %Y} stands for it"] += 1
    if tokenizer.start and tuple(ids[: len(tokenizer.start)]) != tokenizer.start:
        left_out["conversations that the chat template does not begin with the beginning-of-text token"] += 1
    return Encoded(ids, counted)


def file_name(config: TextDataConfig) -> str:
    """Short name of the source, for folders."""
    return "".join(c if c.isalnum() else "_" for c in Path(config.source).stem)[:40] or "text"
