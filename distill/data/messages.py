"""Messages of a conversation: one list of their keys, and what each means.

A key that is not in the list is an error, because it may hold text that no template writes or a mark that nobody
reads. Every text of a message is looked for in what the chat template writes (``chat.py``).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from distill.errors import UserError, shown

Message = Mapping[str, Any]
Span = tuple[int, int]
"""Characters ``[from, to)`` of a text."""

ASSISTANT = "assistant"
"""Role of the turns that are learnt."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of text that an assistant wrote before its answer; templates read the first, and get it under each name."""
MARKS = ("weight", "train", "trainable", "loss_mask")
"""Keys that say whether a turn counts: 1 or true, 0 or false."""
KEYS = ("role", "content", *REASONING, "tool_calls", "tool_call_id", "name", "tools", *MARKS)
"""All keys. ``name`` and ``tool_call_id`` are identifiers, which many templates leave out; other text is written."""


def check_messages(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Checks the messages of a conversation and drops fields that are None.

    Raises:
      UserError: not a list of objects with a ``role`` and, unless tools are called, ``content``, both text; a key that
        is not in ``KEYS``; marks that contradict each other.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UserError(f"{where}: messages are {shown(value)}; expected a list of {{'role': …, 'content': …}}.")
    checked = []
    for number, message in enumerate(value):
        here = f"{where}: message {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"{here} is {shown(message)}; expected 'role' and 'content', both text.")
        message = {key: field for key, field in message.items() if field is not None}
        _check(message, here)
        checked.append(message)
    return tuple(checked)


def _check(message: Mapping[str, Any], here: str) -> None:
    unknown = sorted(set(message) - set(KEYS))
    if "role" not in message and "from" in unknown:
        raise UserError(f"{here} has the keys 'from' and 'value'; expected 'role' (user, assistant, …) and 'content'.")
    if unknown:
        raise UserError(
            f"{here}: key {unknown[0]!r} is not known; known are {', '.join(KEYS)}. Remove it, or put its text "
            "into one of these."
        )
    calls = message.get("tool_calls") or []
    if not isinstance(message.get("role"), str) or not isinstance(message.get("content", "" if calls else None), str):
        raise UserError(f"{here} is {shown(message)}; expected 'role' and 'content', both text.")
    for key in REASONING:
        if not isinstance(message.get(key, ""), str):
            raise UserError(f"{here}: {key} is {shown(message[key])}; expected text.")
    if len({message[key] for key in REASONING if key in message}) > 1:
        raise UserError(f"{here}: {', '.join(key for key in REASONING if key in message)} differ; give one of them.")
    if not isinstance(calls, list | tuple) or not all(isinstance(function_of(call), Mapping) for call in calls):
        raise UserError(f"{here}: tool_calls are {shown(calls)}; expected a list of objects with 'function'.")
    for call in calls:
        if not isinstance(function_of(call).get("name"), str):
            raise UserError(f"{here}: a tool call is {shown(call)}; expected 'function' with 'name' and 'arguments'.")
    counts(message, here)


def function_of(call: Any) -> Any:
    """Name and arguments of a tool call: under ``function``, or the call itself."""
    return call.get("function", call) if isinstance(call, Mapping) else call


def counts(message: Mapping[str, Any], here: str = "a message") -> bool:
    """Whether a turn counts, by its role and its marks (``MARKS``); a turn without marks counts.

    Raises:
      UserError: a mark that is neither 0 nor 1, marks that contradict each other, or one that asks to learn what the
        assistant did not write.

    Example:
      >>> [counts({"role": "assistant", "content": "a"} | mark) for mark in ({}, {"weight": 0}, {"train": True})]
      [True, False, True]
    """
    marks = {key: message[key] for key in MARKS if key in message}
    for key, mark in marks.items():
        if not isinstance(mark, bool | int | float) or mark not in (0, 1):
            raise UserError(f"{here}: {key} is {shown(mark)}; expected 0 or 1: a turn counts whole, or not at all.")
    if len(set(map(bool, marks.values()))) > 1:
        raise UserError(f"{here}: {marks} contradict each other; give one of them.")
    wanted = all(map(bool, marks.values()))
    if message["role"] != ASSISTANT and marks and wanted:
        raise UserError(
            f"{here}: {marks} of a message of the role {message['role']!r}; only turns of the role {ASSISTANT!r} count "
            "(loss='all' counts every token)."
        )
    return wanted and message["role"] == ASSISTANT


def for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the chat template gets it: without marks, and with tools that are called, or none."""
    plain = {key: field for key, field in message.items() if key not in MARKS and (key != "tool_calls" or field)}
    return {"content": None} | plain if "tool_calls" in plain else plain


def without_nulls(value: Any) -> Any:
    """A value without the keys that are None, at every depth: arrow gives each row the keys of all rows.

    Example:
      >>> without_nulls({"a": None, "b": [{"c": None, "d": 1}]})
      {'b': [{'d': 1}]}
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def well_formed(value: Any, depth: int = 100) -> Any:
    """A value whose texts are Unicode: halves of surrogate pairs become U+FFFD, a byte order mark in front goes.

    Raises:
      UserError: lists and objects inside one another, deeper than ``depth``.

    Example:
      >>> well_formed({"text": "\\ufeffa \\ud83d smile"})
      {'text': 'a � smile'}
    """
    if isinstance(value, str):
        text = value.removeprefix("\ufeff")
        return text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text)
    if depth < 0:
        raise UserError("lists or objects inside one another, more than 100 deep; expected a flatter record.")
    if isinstance(value, Mapping):
        return {well_formed(key): well_formed(inner, depth - 1) for key, inner in value.items()}
    return [well_formed(inner, depth - 1) for inner in value] if isinstance(value, list | tuple) else value
