"""Readers: plain text, JSON lines, parquet, arrow, or a folder of them → documents, one at a time.

A ``Document`` holds parts of text, of which some count in the loss, or the messages of a conversation. ``text.encode``
applies the tokenizer and its chat template.
"""

import collections
import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distill.data.messages import check_messages, well_formed, without_nulls
from distill.errors import MissingFile, UserError, check_fields

Format = Literal["auto", "text", "prompt", "messages"]
PLAIN = (".txt", ".md")
"""Suffixes of plain text."""
SUFFIXES = (*PLAIN, ".jsonl", ".parquet", ".arrow")
"""Suffixes of the files that are read."""
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


log = logging.getLogger(__name__)

LeftOut = collections.Counter
"""Reason → how many documents, turns or parts of them are not learnt as they stand."""


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

    def text(self) -> str:
        """The parts as one text."""
        return "".join(part.text for part in self.parts)

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

    def __post_init__(self):
        check_fields(self, "fields")


def files_of(path: str | Path, split: str = "train") -> list[Path]:
    """The files of a source, in the order of their names.

    Args:
      path: a file, or a folder as data sets are kept on the hub or saved by ``datasets``.
      split: which split to read of a folder whose files or sub-folders are named after splits
        (``train-00000-of-00002.parquet``, ``test/data-00000-of-00001.arrow``). Without such names all files are read.

    Raises:
      MissingFile: no such path, or a file that ``state.json`` names.
      UserError: a file of another kind, a folder without files, or without this split.

    Links to folders are followed. Of a folder that ``datasets`` saved, the files in its ``state.json`` are read: tables
    that its ``map`` keeps beside them hold the same rows again. Files of the folder that are not read are logged once,
    by their names, and so are the folders of a split that lies in several, which may be subsets.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFile(f"{path}: no such file or folder; expected text ({', '.join(SUFFIXES)}).")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: files {path.suffix or 'without suffix'} are not read; {', '.join(SUFFIXES)} are.")
        if split not in ("train", _split_of(Path(path.name))):
            raise UserError(f"{path}: one file, no split {split!r}; expected a folder with files named after splits.")
        return [path]
    below = sorted(_below(path))
    found = [p for p in below if p.suffix in SUFFIXES and not _hidden(p.relative_to(path)) and p.name != "README.md"]
    _log_other_kinds(path, tuple(sorted(p.name for p in below if _other(p, path))))
    found = _as_saved(path, found)
    if not found:
        raise UserError(f"{path}: no files to read in this folder; expected {', '.join(SUFFIXES)}.")
    splits = {p: _split_of(p.relative_to(path)) for p in found}
    if not any(splits.values()):
        if split != "train":
            raise UserError(
                f"{path}: no split {split!r}: no file is named after a split, such as {split}-0.jsonl; all are of "
                "the split 'train'."
            )
        return found
    chosen = [p for p in found if splits[p] == split]
    if not chosen:
        there = sorted({name for name in splits.values() if name})
        raise UserError(f"{path}: no files of a split {split!r}; the folder has {', '.join(there)}.")
    _log_other_splits(path, split, tuple(str(p.relative_to(path)) for p in chosen), tuple(map(str, found)))
    _log_subsets(path, split, tuple(dict.fromkeys(str(p.parent.relative_to(path)) for p in chosen)))
    return chosen


def _below(folder: Path) -> Iterator[Path]:
    """Files below a folder; links to folders are followed, each folder once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place) / name for name in names)


def _as_saved(path: Path, found: list[Path]) -> list[Path]:
    """The files without the tables that ``datasets`` keeps beside those of a saved data set."""
    own: dict[Path, set[str]] = {}
    for folder in {p.parent for p in found if p.suffix == ".arrow"}:
        if (state := folder / "state.json").is_file():
            own[folder] = _named_by(state)
            for name in sorted(own[folder] - {p.name for p in found if p.parent == folder}):
                raise MissingFile(f"{folder / name}: missing; state.json names it. Was the copy cut off?")
    kept = [p for p in found if p.suffix != ".arrow" or p.name in own.get(p.parent, {p.name})]
    _log_cached(path, tuple(str(p.relative_to(path)) for p in found if p not in kept))
    return kept


def _named_by(state: Path) -> set[str]:
    """The tables in a ``state.json`` of ``datasets``."""
    try:
        return {entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{state}: expected the names of the tables beside it, '_data_files' ({error!r}).") from error


def _other(file: Path, folder: Path) -> bool:
    """Whether a file of a folder is of a kind that is not read."""
    about = ("README.md", "dataset_info.json", "state.json", "dataset_dict.json", "LICENSE")
    return (
        file.is_file()
        and file.suffix not in SUFFIXES
        and not _hidden(file.relative_to(folder))
        and file.name not in about
    )


@functools.lru_cache
def _log_other_kinds(folder: Path, names: tuple[str, ...]) -> None:
    if names:
        log.warning("%s: %s; files %s are read", folder, _files(names), ", ".join(SUFFIXES))


@functools.lru_cache
def _log_other_splits(folder: Path, split: str, chosen: tuple[str, ...], found: tuple[str, ...]) -> None:
    """Names what is left out: a file may have the name of a split in its own by chance."""
    rest = tuple(name for file in found if (name := str(Path(file).relative_to(folder))) not in chosen)
    if rest:
        log.warning("%s: split %r is read, %d files (%s …); %s", folder, split, len(chosen), chosen[0], _files(rest))


@functools.lru_cache
def _log_cached(folder: Path, names: tuple[str, ...]) -> None:
    if names:
        log.warning("%s: %s; state.json does not name them", folder, _files(names))


@functools.lru_cache
def _log_subsets(folder: Path, split: str, places: tuple[str, ...]) -> None:
    if len(places) > 1:
        log.warning(
            "%s: split %r is read from %d folders, perhaps subsets with the same texts: %s; for one, give its path",
            folder,
            split,
            len(places),
            ", ".join(places[:5]),
        )


def _files(names: tuple[str, ...]) -> str:
    return f"{len(names)} files are left out: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _split_of(path: Path) -> str | None:
    """``data/train-00000-of-00002.parquet`` → ``train``."""
    names = [name for part in reversed(path.with_suffix("").parts) for name in re.split(r"[^A-Za-z0-9]+", part)]
    return next((name for name in names if name in _SPLITS), None)


def read(
    path: Path, form: Format, fields: Fields, separator: str = "", left_out: LeftOut[str] | None = None
) -> Iterator[Document]:
    """Reads the documents of one file.

    Args:
      path: the file.
      form: kind of the records; ``auto``: decided by the fields of the first record.
      fields: names of the fields.
      separator: separates the documents of a plain text; empty: the file is one document.
      left_out: receives what is not read, by reason.

    Halves of surrogate pairs are read as U+FFFD and counted; a byte order mark at the beginning of a text is no text.

    Raises:
      UserError: what cannot be read, with file and line (or row) number.
    """
    left_out = collections.Counter() if left_out is None else left_out
    if path.suffix in PLAIN:
        if form not in ("auto", "text"):
            raise UserError(
                f"{path}: plain text; format={form!r} is of records in {', '.join(SUFFIXES[len(PLAIN) :])}."
            )
        yield from _read_text(path, separator, left_out)
        return
    records = {".jsonl": _json_lines, ".parquet": _parquet, ".arrow": _arrow}[path.suffix](path)
    for number, record in records:
        where = f"{path}:{number}"
        # Decided once per file: a later record of another kind is then an error instead of a silent mixture.
        form = guess(record, fields, where) if form == "auto" else form
        try:
            clean = well_formed(record)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if clean != record:  # also where a byte order mark was taken away
            left_out["records with half of a surrogate pair, which is read as U+FFFD"] += _broken(record)
        if unread := [str(name) for name in sorted(set(clean) - _read_by(form, fields)) if clean[name] is not None]:
            left_out[f"records with fields that are not read ({', '.join(unread[:8])})"] += 1
        document = document_of(clean, form, fields, where)
        if form == "text" and not document.text().strip():  # as in plain text; wikitext has thousands of them
            left_out["empty documents"] += 1
            continue
        yield document


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
    tools = _from_json(record.get(fields.tools)) or ()
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise UserError(f"{where}: field {fields.tools!r} is a {type(tools).__name__}; expected a list.")
    try:
        json.dumps([messages, tools])
    except (TypeError, ValueError) as error:  # tables hold dates, bytes and decimals too
        raise UserError(f"{where}: {error}; expected text, numbers, lists and objects in a conversation.") from error
    return Document(messages=messages, tools=tuple(tools), where=where)


def _from_json(value: Any) -> Any:
    """Tools as files of tables keep them, a list written as JSON; other values unchanged."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _read_by(form: Format, fields: Fields) -> set[str]:
    """Names of the fields that a kind of record uses."""
    if form == "text":
        return {fields.text}
    return {fields.prompt, fields.completion} if form == "prompt" else {fields.messages, fields.tools}


def _broken(value: Any) -> bool:
    """Whether a record holds half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_text(path: Path, separator: str, left_out: LeftOut[str]) -> Iterator[Document]:
    content = path.read_bytes()
    _refuse_utf_16(path, content[:2])
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte {error.start} of the file); convert it.") from error
    line = 1
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as files opened as text are read
    left_out[f"files in which the separator {separator!r} does not occur: each is one document"] += (
        separator not in text  # the empty one is in every text
    )
    for piece in text.split(separator) if separator else [text]:
        if piece.strip():
            yield Document((Part(piece, True),), where=f"{path}:{line}")
        left_out["empty documents"] += not piece.strip()
        line += piece.count("\n") + separator.count("\n")


def _refuse_utf_16(path: Path, begin: bytes) -> None:
    if begin in _UTF_16:
        raise UserError(f"{path}:1: UTF-16; expected UTF-8. Convert it: iconv -f UTF-16 -t UTF-8.")


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                _refuse_utf_16(path, line[:2])
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
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
            yield number, {name: without_nulls(field) for name, field in record.items()}
