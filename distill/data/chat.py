"""Conversations as text: what the assistant wrote in it, and whether every text of a message is there.

The conversation is rendered once; that is the text. A second rendering has one private-use character inside each text
of each message. Without these characters it is the same text, and they say where the template has put each one: no
template needs to write a conversation as the beginning of a longer one.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from distill.data.calls import check_tools, written
from distill.data.messages import (
    ASSISTANT,
    REASONING,
    Message,
    Span,
    check_messages,
    counts,
    for_template,
    function_of,
)
from distill.errors import UserError, shown
from distill.tokenizer import TextTokenizer
from distill.tokenizer.template import is_marked

_MARKERS = (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD)
"""Private-use planes: first and last character."""


class Turn(NamedTuple):
    """What the assistant wrote at one place."""

    span: Span
    """Characters ``[from, to)`` of the text."""
    counts: bool
    """Whether it is learnt: False for a turn that the data mark so."""


class Conversation(NamedTuple):
    """A conversation as its template writes it."""

    text: str
    turns: tuple[Turn, ...]
    dropped: int = 0
    """Messages whose reasoning the template leaves out, as allowed by ``drop_reasoning``."""
    unmarked: int = 0
    """Turns of the assistant that the template does not mark as generated, though it marks others."""
    endless: int = 0
    """Turns after which the template writes no special token: nothing teaches the student to stop."""


class _Text(NamedTuple):
    """One text of a message."""

    message: int
    field: str
    text: str
    cut: int
    """Characters of the text before its marker."""
    answer: int = 0
    """Where the answer begins in a content that begins with reasoning, ``<think>…</think>``."""


def conversation(
    tokenizer: TextTokenizer, messages: Sequence[Message], tools: Sequence[Any] = (), *, drop_reasoning: bool = False
) -> Conversation:
    """Renders a conversation, finds every text of it, and the assistant's turns.

    If the template marks what is generated, its marks are the turns. Otherwise a turn begins after what the template
    writes to ask for an answer, and ends with the special token after the message, if one follows.

    Arguments of tool calls are given as an object or as JSON text, whichever the template writes once.

    Args:
      tokenizer: with a chat template.
      messages: with the keys of ``messages.KEYS``.
      tools: descriptions of what can be called.
      drop_reasoning: whether the template may leave out reasoning, as that of Qwen 3 does for earlier turns.

    Raises:
      UserError: no template, one that fails, one that does not write a text of a message (named), or one that writes
        another text around a content than without its marker, so that turns cannot be found.
    """
    messages = check_messages(messages, "the conversation")
    wanted = [counts(message, f"message {number}") for number, message in enumerate(messages)]
    plain, text, generated = written(tokenizer, [for_template(message) for message in messages], tools)
    texts, places = _places(tokenizer, plain, tools, text)
    found, dropped = _found(text, texts, places, drop_reasoning)
    check_tools(text, tools, messages)
    if is_marked(tokenizer.template_for(tools)):
        turns, unmarked = _marked(generated, found, wanted, plain)
        return Conversation(text, turns, dropped, unmarked, 0)
    turns, endless = _unmarked(tokenizer, plain, tools, text, found, wanted)
    return Conversation(text, turns, dropped, 0, endless)


# ---- where each text is


def _texts(messages: Sequence[Message], empty: bool) -> list[_Text]:
    """The texts of messages that have a character; with ``empty``, also of those without, to find their place."""
    found = []
    for i, message in enumerate(messages):
        own = {key: message[key] for key in (*REASONING, "content") if (message.get(key) or "").strip()}
        for key in [key for key in REASONING if key in own][1:]:
            del own[key]  # the same text under another name
        calls = message.get("tool_calls") or []
        own |= {f"tool_calls[{j}].function.name": function_of(call)["name"] for j, call in enumerate(calls)}
        if empty and not own:
            own = {"content": message.get("content") or ""}
        found += [_text_of(i, field, text) for field, text in own.items()]
    return found


def _text_of(message: int, field: str, text: str) -> _Text:
    """A text with the place of its marker: in the middle of the longest part without ``<…>`` or ``[…]``.

    Templates look for such tags, and at how a text begins and ends.
    """
    answer = text.rfind("</think>") + len("</think>") if field == "content" and "</think>" in text else 0
    answer = answer if text[answer:].strip() else 0
    ends = [(answer, answer), *(m.span() for m in re.finditer(r"<[^<>]*>|\[[^\[\]]*\]", text) if m.start() >= answer)]
    gaps = [(after - end, end, after) for (_, end), (after, _) in zip(ends, [*ends[1:], (len(text),) * 2], strict=True)]
    _, first, last = max(gaps)
    return _Text(message, field, text, (first + last) // 2, answer)


def _places(
    tokenizer: TextTokenizer, messages: list[dict[str, Any]], tools: Sequence[Any], text: str
) -> tuple[list[_Text], list[int | None]]:
    """The texts of a conversation, and for each the place of its marker in what the template writes (None: nowhere).

    Raises:
      UserError: the template writes something else if the markers are there.
    """
    for empty in (True, False):
        texts = _texts(messages, empty)
        plain, places = _render_marked(tokenizer, messages, tools, texts)
        if plain == text:
            return texts, places
    raise UserError(
        "the chat template writes another text when a private-use character stands inside a content, so the turns of "
        "the assistant cannot be found. Use a template that only copies contents, or read the conversations as text."
    )


def _render_marked(
    tokenizer: TextTokenizer, messages: list[dict[str, Any]], tools: Sequence[Any], texts: list[_Text], **options: bool
) -> tuple[str, list[int | None]]:
    """A rendering without its markers, and the last place of each."""
    first = _free_plane(messages, len(texts))
    marked = [dict(message) for message in messages]
    for number, one in enumerate(texts):
        if one.message >= len(messages):
            continue
        value = one.text[: one.cut] + chr(first + number) + one.text[one.cut :]
        message = marked[one.message]
        if one.field.startswith("tool_calls"):
            message["tool_calls"] = _with_name(message["tool_calls"], int(one.field.split("[")[1].split("]")[0]), value)
        else:  # templates read reasoning under one name or another
            message |= {key: value for key in (REASONING if one.field in REASONING else (one.field,)) if key in message}
    places: list[int | None] = [None] * len(texts)
    plain, length = [], 0
    for piece in re.split(f"([{chr(first)}-{chr(first + len(texts))}])", tokenizer.chat(marked, tools, **options)):
        if len(piece) == 1 and 0 <= ord(piece) - first < len(texts):
            places[ord(piece) - first] = length
        else:
            plain.append(piece)
            length += len(piece)
    return "".join(plain), places


def _with_name(calls: Sequence[Any], number: int, name: str) -> list[Any]:
    call = calls[number]
    named = call | ({"function": call["function"] | {"name": name}} if "function" in call else {"name": name})
    return [*calls[:number], named, *calls[number + 1 :]]


def _free_plane(messages: Sequence[Message], count: int) -> int:
    """First character of a private-use plane that the messages do not use."""
    content = json.dumps(messages, ensure_ascii=False, default=str)
    for first, last in _MARKERS:
        if count < last - first and not re.search(f"[{chr(first)}-{chr(last)}]", content):
            return first
    raise UserError("the conversation has too many messages, or private-use characters of both planes of Unicode.")


def _found(
    text: str, texts: list[_Text], places: list[int | None], drop_reasoning: bool
) -> tuple[dict[int, Span], int]:
    """Message → where its texts are, and how many messages lost their reasoning.

    Raises:
      UserError: a text that the template does not write, by its field.
    """
    found: dict[int, Span] = {}
    dropped = set()
    for one, place in zip(texts, places, strict=True):
        span = None if place is None else _around(text, place, one.text[: one.cut], one.text[one.cut :])
        if span is None and drop_reasoning and one.field in REASONING:
            dropped.add(one.message)
            continue
        if span is None and drop_reasoning and one.answer and place is not None:
            dropped.add(one.message)
            span = _around(text, place, one.text[one.answer : one.cut], one.text[one.cut :])
        if span is None:
            raise UserError(_not_written(one))
        first, last = found.get(one.message, span)
        found[one.message] = min(first, span[0]), max(last, span[1])
    return found, len(dropped)


def _not_written(one: _Text) -> str:
    reasoning = one.field in REASONING or one.answer
    advice = (
        "Templates such as that of Qwen 3 leave out the reasoning of earlier turns: give conversations of one answer, "
        "a template that writes it, or drop_reasoning=True, which learns the answers without it and logs their number."
        if reasoning
        else "Use a template that writes it, or remove it."
    )
    field = one.field + (", beside its arguments," if one.field.startswith("tool_calls") else "")
    return f"message {one.message}: the chat template does not write {field} {shown(one.text)}. {advice}"


def _around(text: str, place: int, before: str, after: str) -> Span | None:
    """Where a text is whose marker stands at ``place``; None if the template does not write it whole.

    White space may be trimmed or changed, and the text may be written as JSON, as Llama 3 writes what a tool returns.
    """
    for form in (str, lambda part: json.dumps(part, ensure_ascii=False)[1:-1]):
        first, last = _back(text, place, form(before)), _on(text, place, form(after))
        if first is not None and last is not None:
            return first, last
    return None


def _on(text: str, place: int, after: str) -> int | None:
    """End of a text that begins at ``place``, white space aside."""
    if text.startswith(after, place):
        return place + len(after)
    for part in after.split():
        while place < len(text) and text[place].isspace():
            place += 1
        if not text.startswith(part, place):
            return None
        place += len(part)
    return place


def _back(text: str, place: int, before: str) -> int | None:
    """Beginning of a text that ends at ``place``, white space aside."""
    if text.endswith(before, 0, place):
        return place - len(before)
    for part in reversed(before.split()):
        while place and text[place - 1].isspace():
            place -= 1
        if not text.endswith(part, 0, place):
            return None
        place -= len(part)
    return place


# ---- turns


def _marked(
    generated: list[Span], found: dict[int, Span], wanted: list[bool], messages: Sequence[Message]
) -> tuple[tuple[Turn, ...], int]:
    """Turns where the template marks them, and how many turns of the assistant it does not mark."""
    turns, marked = [], set()
    for first, last in generated:
        own = [i for i, (start, end) in found.items() if first < max(end, start + 1) and start < last]
        marked |= set(own)
        if first < last:
            turns.append(Turn((first, last), all(wanted[i] for i in own if messages[i]["role"] == ASSISTANT)))
    unmarked = [i for i in found if messages[i]["role"] == ASSISTANT and i not in marked and wanted[i]]
    return tuple(turns), len(unmarked)


def _unmarked(
    tokenizer: TextTokenizer,
    messages: list[dict[str, Any]],
    tools: Sequence[Any],
    text: str,
    found: dict[int, Span],
    wanted: list[bool],
) -> tuple[tuple[Turn, ...], int]:
    """Turns of a template without marks, and after how many of them no special token stands."""
    turns, endless = [], 0
    for i, message in enumerate(messages):
        if i not in found:  # and with it, where the turns beside it begin and end
            raise UserError(
                f"message {i}: an empty message, whose place in the chat template's text cannot be found. Leave the "
                "message out, or use a template that marks turns, {% generation %} … {% endgeneration %}."
            )
        if message["role"] != ASSISTANT:
            continue
        start = _start_of(tokenizer, messages[:i], tools, text, found)
        end, ended = _end_of(tokenizer, messages[: i + 1], tools, text, found)
        turns.append(Turn((start, end), wanted[i]))
        endless += not ended
    return tuple(turns), endless


def _start_of(
    tokenizer: TextTokenizer, before: list[dict[str, Any]], tools: Sequence[Any], text: str, found: dict[int, Span]
) -> int:
    """Where the turn after ``before`` begins: after what the template writes when an answer is asked for."""
    own = found[len(before)][0]
    earlier = max((end for j, (_, end) in found.items() if j < len(before)), default=0)
    written = text[earlier:own]
    asked = _tail(tokenizer, before, tools, answer=True)
    common = 0 if asked is None else _common(tokenizer, asked, written)
    if asked is not None and common == len(asked):
        return earlier + common
    # The header of an answer alone: where the template writes otherwise before the last answer than before this one.
    header = _header(tokenizer, tools)
    if header and asked is not None and asked.endswith(header) and common > len(asked) - len(header):
        return earlier + common
    return earlier + written.rfind(header) + len(header) if header and header in written else own


def _end_of(
    tokenizer: TextTokenizer, until: list[dict[str, Any]], tools: Sequence[Any], text: str, found: dict[int, Span]
) -> tuple[int, bool]:
    """Where the last turn of ``until`` ends, and whether a special token ends it.

    The end is after the last special token that the template writes after the message, if only white space follows;
    otherwise after all it writes there whether the conversation goes on or not.
    """
    own = found[len(until) - 1][1]
    later = min((start for j, (start, _) in found.items() if j >= len(until)), default=len(text))
    written = text[own:later]
    alone = written if later == len(text) else _tail(tokenizer, until, tools, answer=False)
    if alone is None:  # the template refuses the shorter conversation
        first = tokenizer.special_in(written)[:1]
        return own + (written.find(first[0]) + len(first[0]) if first else 0), bool(first)
    written = written[: _common(tokenizer, alone, written)]
    special = tokenizer.special_in(written)
    end = written.rfind(special[-1]) + len(special[-1]) if special else len(written)
    return own + (len(written) if written[end:].strip() else end), bool(special)


def _tail(
    tokenizer: TextTokenizer, messages: list[dict[str, Any]], tools: Sequence[Any], *, answer: bool
) -> str | None:
    """What the template writes after the last text of a conversation; None if it refuses it."""
    texts = _texts(messages, empty=True)
    try:
        plain, places = _render_marked(tokenizer, messages, tools, texts, answer=answer)
    except UserError:
        return None
    ends = [
        _on(plain, place, one.text[one.cut :]) for one, place in zip(texts, places, strict=True) if place is not None
    ]
    known = [end for end in ends if end is not None]
    return plain[max(known) :] if known else None


def _header(tokenizer: TextTokenizer, tools: Sequence[Any]) -> str:
    """What the template writes to ask for an answer, and only then; often ``<|im_start|>assistant`` and a new line."""
    messages = [{"role": "user", "content": "question"}]
    asked, alone = (_tail(tokenizer, messages, tools, answer=answer) for answer in (True, False))
    if asked is None or alone is None:
        return ""
    return asked[_common(tokenizer, asked, alone) :]


def _common(tokenizer: TextTokenizer, one: str, other: str) -> int:
    """Length of the common beginning of two texts, which cuts no special token."""
    pairs = zip(one, other, strict=False)
    length = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    for text in (one, other):
        at = 0
        for token in tokenizer.special_in(text):
            at = text.index(token, at)
            if at < length < at + len(token):
                length = at
            at += len(token)
    return length


# ---- tokens


def tokens_of(
    tokenizer: TextTokenizer, found: Conversation, *, everything: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a conversation, with a mask of the tokens that count.

    The text is encoded as a whole and no special token is added, because the template writes them all. A token counts
    if any of its characters lies in a turn that counts.

    Args:
      tokenizer: of the conversation.
      found: the conversation.
      everything: every token counts, but those of turns that the data mark as not to learn.

    Returns:
      ``ids [n]`` int32 and ``counts [n]`` bool.
    """
    ids, offsets = tokenizer.encode_with_offsets(found.text)
    # Tokens do not respect the limits of turns. Sums of the mask over characters answer "does any lie in a turn?".
    first, last = np.asarray(offsets, np.int64).reshape(-1, 2).T

    def lies_in(learnt: bool) -> np.ndarray:
        inside = np.zeros(len(found.text) + 1, bool)
        for span, counted in found.turns:
            inside[slice(*span)] |= counted == learnt
        seen = np.concatenate([[0], np.cumsum(inside)])
        return seen[last] > seen[first]

    return np.asarray(ids, np.int32), ~lies_in(False) if everything else lies_in(True)


def encode_chat(
    tokenizer: TextTokenizer, messages: Sequence[Message], tools: Sequence[Any] = (), *, drop_reasoning: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a conversation, with a mask of the tokens that the assistant wrote: ``tokens_of`` a ``conversation``.

    Returns:
      ``ids [n]`` int32 and ``counts [n]`` bool.

    Raises:
      UserError: as ``conversation``.
    """
    return tokens_of(tokenizer, conversation(tokenizer, messages, tools, drop_reasoning=drop_reasoning))
