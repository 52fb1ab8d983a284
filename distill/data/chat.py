"""Loss mask of conversations: which characters the assistant wrote."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.errors import UserError
from distill.tokenizer import TextTokenizer

Spans = list[tuple[int, int]]


def chat_with_turns(
    tokenizer: TextTokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()
) -> tuple[str, Spans]:
    """Renders a conversation as text, with the characters ``[from, to)`` of the assistant's turns.

    If the template marks what is generated, its marks are used. Otherwise the text up to a turn is rendered with and
    without it: the turn is the difference. White space after its last special token does not belong to it.

    Raises:
      UserError: no template, a template that fails, or one without marks that rewrites earlier text when messages
        follow, such as a template that drops earlier reasoning. A turn has no position in such a text.
    """
    if tokenizer.marks_turns:
        text, spans = tokenizer.chat_with_marks(messages, tools)
        return text, [span for span in spans if span[0] < span[1]]
    text, spans = tokenizer.chat(messages, tools), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.chat(messages[:number], tools, answer=True)
        after = tokenizer.chat(messages[: number + 1], tools)
        if not (after.startswith(before) and text.startswith(after)):
            raise UserError(
                f"the chat template is not prefix-stable: what it writes up to message {number} is not how the whole "
                "conversation begins, so the assistant's turn cannot be found in it. Use a template that marks turns, "
                "{% generation %} … {% endgeneration %}, or conversations of one turn."
            )
        spans.append((len(before), _end_of_turn(tokenizer, after, len(before))))
    return text, spans


def _end_of_turn(tokenizer: TextTokenizer, text: str, start: int) -> int:
    """End of a turn: after its last special token if only white space follows, otherwise the end of the text."""
    ends = [
        text.rfind(token, start) + len(token) for token in tokenizer.special_tokens if text.rfind(token, start) >= 0
    ]
    return max(ends) if ends and not text[max(ends) :].strip() else len(text)


def encode_chat(
    tokenizer: TextTokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a conversation, with a mask of the tokens that the assistant wrote.

    The text is encoded as a whole and no special token is added, because the template writes them all. A token counts
    if any of its characters lies in a turn.

    Returns:
      ``ids [n]`` int32 and ``counts [n]`` bool.

    Raises:
      UserError: as ``chat_with_turns``.
    """
    text, spans = chat_with_turns(tokenizer, messages, tools)
    ids, offsets = tokenizer.encode_with_offsets(text)
    # Tokens do not respect the limits of turns. Sums of the mask over characters answer "does any lie in a turn?".
    inside = np.zeros(len(text) + 1, bool)
    for first, last in spans:
        inside[first:last] = True
    seen = np.concatenate([[0], np.cumsum(inside)])
    first, last = np.asarray(offsets, np.int64).reshape(-1, 2).T
    return np.asarray(ids, np.int32), seen[last] > seen[first]
