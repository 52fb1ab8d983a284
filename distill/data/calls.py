"""Calls of tools in a conversation: the template writes their arguments once, from an object or from text.

Data have arguments as an object or as JSON text (OpenAI's form), and templates write either. Which one a template takes
is seen in what it writes.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distill.data.messages import Message, Span, function_of
from distill.errors import UserError
from distill.tokenizer.text import TextTokenizer


def written(
    tokenizer: TextTokenizer, messages: list[dict[str, Any]], tools: Sequence[Any]
) -> tuple[list[dict[str, Any]], str, list[Span]]:
    """The messages as the template takes them, the text, and what is marked as generated.

    Raises:
      UserError: the template fails, or writes the arguments of a tool call in neither form.
    """
    calls = [(i, j, call) for i, m in enumerate(messages) for j, call in enumerate(m.get("tool_calls") or [])]
    if not calls:
        return messages, *tokenizer.chat_with_marks(messages, tools)
    failed: UserError | None = None
    for as_object, given in itertools.product((True, False), _contents(messages)):
        formed = [_with_arguments(message, as_object) for message in given]
        try:
            text, generated = tokenizer.chat_with_marks(formed, tools)
        except UserError as error:  # some templates take one form only
            failed = failed or error
            continue
        wrong = [(i, j) for i, j, call in calls if not _arguments_in(text, function_of(call).get("arguments"))]
        if not wrong:
            return _without_none(tokenizer, formed, tools, text, generated)
    if failed is not None:
        raise failed
    raise UserError(
        f"message {wrong[0][0]}: the chat template does not write tool_calls[{wrong[0][1]}].function.arguments as they "
        "are, neither given as an object nor as JSON text. Use a template that writes them, or put the call into the "
        "content."
    )


def _contents(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The messages, and with empty content for calls without one, for templates that fail over none."""
    filled = [message | {"content": message.get("content") or ""} for message in messages]
    return [messages] if filled == messages else [messages, filled]


def _without_none(
    tokenizer: TextTokenizer, messages: list[dict[str, Any]], tools: Sequence[Any], text: str, generated: list[Span]
) -> tuple[list[dict[str, Any]], str, list[Span]]:
    """The same, with empty content for calls without one, where the template would write ``None`` for it."""
    if all(message.get("content") is not None for message in messages):
        return messages, text, generated
    filled = _contents(messages)[-1]
    try:
        other, marks = tokenizer.chat_with_marks(filled, tools)
    except UserError:
        return messages, text, generated
    return (filled, other, marks) if other.count("None") < text.count("None") else (messages, text, generated)


def _with_arguments(message: dict[str, Any], as_object: bool) -> dict[str, Any]:
    """A message whose tool calls have arguments as an object, or as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        value = function_of(call).get("arguments")
        value = _parsed(value) if as_object else _as_text(value)
        if "arguments" in function_of(call):
            nested = "function" in call
            call = call | ({"function": call["function"] | {"arguments": value}} if nested else {"arguments": value})
        calls.append(call)
    return message | {"tool_calls": calls}


def _parsed(arguments: Any) -> Any:
    """Arguments as an object; text that is no JSON object stays text."""
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _arguments_in(text: str, arguments: Any) -> bool:
    """Whether a text has arguments as JSON, or each name and value of them; not as Python and not in quotes."""
    value = _parsed(arguments)
    if not value:
        return True
    if isinstance(value, str):
        return value in text
    spellings = {_as_text(arguments)} | {
        json.dumps(value, ensure_ascii=ascii, indent=indent, separators=separators)
        for ascii in (False, True)
        for indent, separators in ((None, None), (None, (",", ":")), (2, None), (4, None))
    }
    if any(spelling in text for spelling in spellings):
        return True
    bare = text.replace("\\", "")  # JSON inside a JSON text has its quotes behind backslashes
    if repr(value) in text or any(spelling.replace("\\", "") in bare for spelling in spellings):
        return False
    return all(part in text for part in _leaves(value))


def _leaves(value: Any) -> Iterator[str]:
    """Names and values inside arguments, for templates that write them one by one."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value.strip()
    elif not isinstance(value, bool) and value is not None:  # of these, templates have spellings of their own
        yield json.dumps(value)


def check_tools(text: str, tools: Sequence[Any], messages: Sequence[Message]) -> None:
    """Raises UserError if the name of a tool is not in the text."""
    own = [tool for message in messages for tool in message.get("tools") or () if isinstance(tool, Mapping)]
    for tool in [*tools, *own]:
        name = function_of(tool).get("name") if isinstance(tool, Mapping) else None
        if isinstance(name, str) and name not in text:
            raise UserError(
                f"the chat template does not write the tool {name!r} of 'tools'. Use a template that writes tools, "
                "describe them in the content, or remove the field."
            )
