"""Alignment of two vocabularies: whether an id is the same token for student and teacher.

Equal maps are accepted. An embedding often has more rows than there are tokens (Qwen 2.5: 151 665 tokens, 151 936
rows in the small models and 152 064 in the large), so equal maps may have logits of different widths. Rows without a
token are masked on both sides. Different maps are refused.
"""

import dataclasses
import logging
from typing import Any

import jax.numpy as jnp

from distill.errors import UserError
from distill.shapes import Logits

NAMED = 5
"""Differing ids that an error names."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Result of ``align``: ids below ``vocab_size`` have probability, later rows do not."""

    vocab_size: int
    student_rows: int
    teacher_rows: int

    def match(self, student_logits: Logits, teacher_logits: Logits) -> tuple[Logits, Logits]:
        """Both logits with padded rows at −inf, cut to the smaller number of rows; unchanged without padding.

        Example:
          >>> student, teacher = Alignment(2, 3, 4).match(jnp.zeros(3), jnp.zeros(4))
          >>> student, teacher
          (Array([  0.,   0., -inf], dtype=float32), Array([  0.,   0., -inf], dtype=float32))
        """
        width = min(self.student_rows, self.teacher_rows)
        sides = {"student": (student_logits, self.student_rows), "teacher": (teacher_logits, self.teacher_rows)}
        for name, (logits, rows) in sides.items():
            if logits.shape[-1] != rows:
                raise UserError(f"Alignment: {name} logits have {logits.shape[-1]} rows; expected {rows}.")
        student, teacher = (mask_padding(logits[..., :width], self.vocab_size) for logits, _ in sides.values())
        return student, teacher


def align(
    student_tokens: dict[str, int], teacher_tokens: dict[str, int], student_rows: int, teacher_rows: int
) -> Alignment:
    """Checks that two vocabularies are equal, and returns how many of their rows have probability.

    Args:
      student_tokens: token → id, from ``token_ids``.
      teacher_tokens: the same of the teacher.
      student_rows: width of the student's logits: the ids with a row in its head.
      teacher_rows: the same of the teacher.

    Returns:
      An ``Alignment``. If rows are padded on either side, one line is logged.

    Raises:
      UserError: an id means different tokens (the first such ids are named), or a token has no row.

    Example:
      >>> tokens = {"<pad>": 0, "a": 1, "b": 2}
      >>> align(tokens, tokens, student_rows=3, teacher_rows=4)
      Alignment(vocab_size=3, student_rows=3, teacher_rows=4)
      >>> align(tokens, {"<pad>": 0, "b": 1, "a": 2}, student_rows=3, teacher_rows=3)
      Traceback (most recent call last):
      distill.errors.UserError: student and teacher give 2 ids different meanings: 1 is 'a' and 'b', 2 is 'b' and 'a' \
(student's and teacher's token). Distil into a student with the teacher's tokenizer.
    """
    if student_tokens != teacher_tokens:
        raise UserError(_difference(student_tokens, teacher_tokens))
    if not student_tokens or min(student_tokens.values()) < 0:
        raise UserError("a vocabulary without tokens, or with a negative id; expected token → id from 0 on.")
    vocab_size = max(student_tokens.values()) + 1
    for name, rows in (("student", student_rows), ("teacher", teacher_rows)):
        if rows < vocab_size:
            raise UserError(
                f"the {name} has {rows} rows of logits for ids up to {vocab_size - 1}: its tokenizer and its weights "
                "do not belong together, or tokens were added and the embedding was not resized."
            )
    if max(student_rows, teacher_rows) > vocab_size:
        log.info(
            "vocabulary: ids below %d carry probability; padded rows are masked: %d of the student's %d, %d of the "
            "teacher's %d",
            vocab_size,
            student_rows - vocab_size,
            student_rows,
            teacher_rows - vocab_size,
            teacher_rows,
        )
    return Alignment(vocab_size, student_rows, teacher_rows)


def mask_padding(logits: Logits, vocab_size: int) -> Logits:
    """Logits with rows ≥ ``vocab_size`` at −inf: no probability, no gradient. Unchanged if there are none.

    Zero logits would leave padding a probability: exp(0) is more than many tokens have.

    Raises:
      UserError: fewer rows than ``vocab_size``.

    Example:
      >>> mask_padding(jnp.zeros(4), 3)
      Array([  0.,   0.,   0., -inf], dtype=float32)
    """
    rows = logits.shape[-1]
    if rows < vocab_size:
        raise UserError(f"mask_padding: {rows} rows of logits; expected at least vocab_size={vocab_size}.")
    if rows == vocab_size:
        return logits
    real = jnp.broadcast_to(jnp.arange(rows) < vocab_size, logits.shape)
    return jnp.where(real, logits, -jnp.inf)


def token_ids(tokenizer: Any) -> dict[str, int]:
    """Token → id of a tokenizer of transformers or tokenizers, added tokens included.

    Raises:
      UserError: it has no ``get_vocab``.

    Example:
      >>> from tokenizers import Tokenizer, models
      >>> tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
      >>> tokenizer.add_special_tokens(["<eos>"])
      1
      >>> token_ids(tokenizer)
      {'a': 0, 'b': 1, '<eos>': 2}
    """
    if not hasattr(tokenizer, "get_vocab"):
        raise UserError(f"token_ids: {type(tokenizer).__name__} has no get_vocab(); give its token → id map instead.")
    return dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))


def _difference(student_tokens: dict[str, int], teacher_tokens: dict[str, int]) -> str:
    """Message for two maps that differ: the first ids, their number, and what to do."""
    student, teacher = _by_id(student_tokens), _by_id(teacher_tokens)
    ids = [i for i in sorted(student.keys() | teacher.keys()) if student.get(i) != teacher.get(i)]
    named = ", ".join(f"{i} is {student.get(i, 'nothing')} and {teacher.get(i, 'nothing')}" for i in ids[:NAMED])
    return (
        f"student and teacher give {len(ids)} ids different meanings: {named}{', …' if len(ids) > NAMED else ''} "
        "(student's and teacher's token). Distil into a student with the teacher's tokenizer."
    )


def _by_id(tokens: dict[str, int]) -> dict[int, str]:
    """Id → the tokens that have it, quoted; more than one is possible."""
    names: dict[int, list[str]] = {}
    for token, i in sorted(tokens.items()):
        names.setdefault(i, []).append(repr(token if len(token) <= 40 else token[:39] + "…"))
    return {i: "/".join(some) for i, some in names.items()}
