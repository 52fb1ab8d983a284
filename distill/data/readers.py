"""Readers: plain text, JSON lines, parquet, arrow, or a folder of them → documents, one at a time.

A ``Document`` holds parts of text, of which some count in the loss, or the messages of a conversation. ``text.encode``
applies the tokenizer and its chat template.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distill.errors import MissingFile, UserError

Format = Literal["auto", "text", "prompt", "messages"]
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet", ".arrow")
"""Suffixes of the files that are read."""
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


class Part(NamedTuple):
    """A piece of a document."""

    text: str
    counts: bool
    """Whether its tokens are predicted."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, one prompt with its completion, or one conversation."""

    parts: tuple[Part, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    """Messages of a conversation, each with ``role`` and ``content``; a conversation has no parts."""
    tools: tuple[Any, ...] = ()
    """Descriptions of tools for the chat template."""
    where: str = ""
    """Origin for error messages, ``file:line``."""

    def content(self) -> str:
        """The whole document as one text; equal documents have equal texts."""
        return json.dumps([self.parts, self.messages, self.tools], sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Fields:
    """Names of the fields of a record."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    tools: str = "tools"


def files_of(path: str | Path, split: str = "train") -> list[Path]:
    """The files of a source, in the order of their names.

    Args:
      path: a file, or a folder as data sets are kept on the hub or saved by ``datasets``.
      split: which split to read of a folder whose files or sub-folders are named after splits
        (``train-00000-of-00002.parquet``, ``test/data-00000-of-00001.arrow``). Without such names all files are read.

    Raises:
      MissingFile: no such path.
      UserError: a file of another kind, a folder without files, or without this split.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFile(f"{path}: no such file or folder; expected text ({', '.join(SUFFIXES)}).")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: files {path.suffix or 'without suffix'} are not read; {', '.join(SUFFIXES)} are.")
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and not _hidden(p.relative_to(path)))
    found = [p for p in found if p.suffix != ".md" or p.name != "README.md"]
    if not found:
        raise UserError(f"{path}: no files to read in this folder; expected {', '.join(SUFFIXES)}.")
    splits = {p: _split_of(p.relative_to(path)) for p in found}
    if not any(splits.values()):
        return found
    chosen = [p for p in found if splits[p] == split]
    if not chosen:
        there = sorted({name for name in splits.values() if name})
        raise UserError(f"{path}: no files of a split {split!r}; the folder has {', '.join(there)}.")
    return chosen


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _split_of(path: Path) -> str | None:
    """``data/train-00000-of-00002.parquet`` → ``train``."""
    names = [name for part in reversed(path.with_suffix("").parts) for name in re.split(r"[^A-Za-z0-9]+", part)]
    return next((name for name in names if name in _SPLITS), None)


def read(path: Path, form: Format, fields: Fields, separator: str = "") -> Iterator[Document]:
    """Reads the documents of one file.

    Args:
      path: the file.
      form: kind of the records; ``auto``: decided by the fields of the first record.
      fields: names of the fields.
      separator: separates the documents of a plain text; empty: the file is one document.

    Raises:
      UserError: what cannot be read, with file and line (or row) number.
    """
    if path.suffix in (".txt", ".md"):
        yield from _read_text(path, separator)
        return
    records = {".jsonl": _json_lines, ".parquet": _parquet, ".arrow": _arrow}[path.suffix](path)
    for number, record in records:
        where = f"{path}:{number}"
        # Decided once per file: a later record of another kind is then an error instead of a silent mixture.
        form = guess(record, fields, where) if form == "auto" else form
        yield document_of(record, form, fields, where)


def guess(record: Mapping[str, Any], fields: Fields, where: str) -> Format:
    """Kind of a record by its fields: a conversation, otherwise a prompt with completion, otherwise a text."""
    if fields.messages in record:
        return "messages"
    if fields.prompt in record and fields.completion in record:
        return "prompt"
    if fields.text in record:
        return "text"
    raise UserError(
        f"{where}: fields {', '.join(sorted(record)) or '(none)'}; expected {fields.text!r}, {fields.prompt!r} with "
        f"{fields.completion!r}, or {fields.messages!r}. Other names can be configured."
    )


def document_of(record: Mapping[str, Any], form: Format, fields: Fields, where: str) -> Document:
    """Converts a record into a document.

    Raises:
      UserError: a missing field, or one of another type, with file and line number.
    """

    def text(name: str) -> str:
        value = record.get(name)
        if not isinstance(value, str):
            found = f"a {type(value).__name__}" if name in record else "missing"
            raise UserError(f"{where}: field {name!r} is {found}; expected text.")
        return value

    if form == "text":
        return Document((Part(text(fields.text), True),), where=where)
    if form == "prompt":
        return Document((Part(text(fields.prompt), False), Part(text(fields.completion), True)), where=where)
    messages = check_messages(record.get(fields.messages), where)
    tools = record.get(fields.tools) or ()
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise UserError(f"{where}: field {fields.tools!r} is a {type(tools).__name__}; expected a list.")
    return Document(messages=messages, tools=tuple(tools), where=where)


def check_messages(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Checks the messages of a conversation and drops fields that are None.

    Raises:
      UserError: not a list of objects with a ``role`` and, unless tools are called, ``content``, both text.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UserError(f"{where}: messages are {value!r}; expected a list of {{'role': …, 'content': …}}.")
    for number, message in enumerate(value):
        role, content = (message.get(k) if isinstance(message, Mapping) else None for k in ("role", "content"))
        empty = content is None and isinstance(message, Mapping) and bool(message.get("tool_calls"))
        if not isinstance(role, str) or not (isinstance(content, str) or empty):
            raise UserError(f"{where}: message {number} is {message!r}; expected 'role' and 'content', both text.")
    return tuple({key: field for key, field in message.items() if field is not None} for message in value)


def _read_text(path: Path, separator: str) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte {error.start} of the file); convert it.") from error
    line = 1
    for piece in text.split(separator) if separator else [text]:
        if piece.strip():
            yield Document((Part(piece, True),), where=f"{path}:{line}")
        line += piece.count("\n") + separator.count("\n")


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # UnicodeDecodeError is one
                raise UserError(f"{path}:{number}: not JSON ({error}).") from error
            if not isinstance(record, dict):
                raise UserError(f"{path}:{number}: a JSON {type(record).__name__}; expected an object on every line.")
            yield number, record


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _numbered(file.iter_batches(batch_size=1024))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as parquet ({error}).") from error


def _arrow(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads both formats of arrow: the stream that ``datasets`` writes, and the file with an index at its end."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                table = pyarrow.ipc.open_file(file)
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
            else:
                file.seek(0)
                batches = pyarrow.ipc.open_stream(file)
            yield from _numbered(batches)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as arrow ({error}).") from error


def _numbered(batches: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of tables with their numbers, from 1."""
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield number, record
