"""Golden numbers: nats per token of published weights on fixed text, compared with transformers on the same file.

The model is SmolLM2-135M-Instruct from its GGUF file, in float32. The last ``WINDOWS`` · ``LENGTH`` + 1 tokens of each
text are evaluated in independent windows of ``LENGTH``.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill import fetch, losses
from distill.errors import UserError
from distill.models.model import Model
from distill.shapes import Params
from distill.weights.folder import load
from distill.weights.gguf import GGUFSource
from distill.weights.gguf_tokenizer import tokenizer_of

LENGTH, WINDOWS, BATCH = 256, 32, 8
TOLERANCE = 1e-4
"""Tolerance of the comparison in nats per token."""


class Golden(NamedTuple):
    """Numbers of transformers 5.23 on PyTorch 2.13: logits in float32, their softmax and the mean in float64."""

    text_sha256: str
    nats: float
    """Mean negative log-likelihood over all positions of the windows."""
    top1: float
    """Share of positions whose next token is the most likely one."""


GOLDEN = {
    "topics": Golden("71f2ff5d99bdc1f9c48c5c2353ad138201c5ca1c377e0226857ef8fa89b8bcee", 2.539544, 0.489746),
    "chitchat": Golden("564024eb131582d32f99fca928d5c5f292938151923024532ded9812e50aa201", 4.113546, 0.262939),
}


def topics() -> str:
    """The language reference that Python's ``help()`` shows. It depends on the version of Python (stored: 3.11.7)."""
    from pydoc_data.topics import topics as pages

    return "\n\n".join(pages.values())


def chitchat(folder: Path | None = None) -> str:
    """The last 200 dialogues of ``fetch.CHITCHAT``, with one line per turn and an empty line between dialogues."""
    dialogues = json.loads(fetch.fetch(fetch.CHITCHAT, folder).read_text())
    turns = [[" ".join(part["text"] for part in turn) for turn in one["messages"]] for one in dialogues.values()]
    return "\n\n".join("\n".join(dialogue) for dialogue in turns[-200:])


def windows(ids: list[int], count: int = WINDOWS, length: int = LENGTH) -> np.ndarray:
    """The end of a text as windows ``[count, length + 1]``; the last token of a window is the first of the next.

    Example:
      >>> windows([9, 1, 2, 3, 4, 5], count=2, length=2).tolist()
      [[1, 2, 3], [3, 4, 5]]
    """
    end = np.asarray(ids[-(count * length + 1) :], np.int32)
    if len(end) != count * length + 1:
        raise UserError(f"the text has {len(end)} tokens; {count} windows of {length} need {count * length + 1}.")
    return np.stack([end[i * length : (i + 1) * length + 1] for i in range(count)])


def measure(model: Model, params: Params, rows: np.ndarray) -> tuple[float, float]:
    """Nats per token and top-1 accuracy on rows ``[n, length + 1]``."""

    @jax.jit
    def positions(params: Params, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.logits(params, rows[:, :-1])
        return losses.cross_entropy(logits, rows[:, 1:]), jnp.argmax(logits, axis=-1) == rows[:, 1:]

    parts = [positions(params, rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
    nats, right = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in (0, 1))
    return float(nats.mean(dtype=np.float64)), float(right.mean())


def smollm2(folder: Path | None = None) -> list[str]:
    """Measures every text, compares it with the stored numbers, and returns a line for each.

    Raises:
      UserError: a file cannot be fetched.
      RuntimeError: a number differs from the stored one.
    """
    source = GGUFSource(fetch.fetch(fetch.SMOLLM2, folder))
    tokenizer, (model, params) = tokenizer_of(source), load(source.path)
    lines, wrong = [], []
    for name, text in (("topics", topics()), ("chitchat", chitchat(folder))):
        nats, top1 = measure(model, params, windows(tokenizer.encode(text).ids))
        want, line = GOLDEN[name], f"{name}: {nats:.4f} nats per token, {top1:.2%} right"
        if hashlib.sha256(text.encode()).hexdigest() != want.text_sha256:
            lines.append(f"{line}; nothing stored for this text, another version of Python has another")
            continue
        lines.append(f"{line}; transformers {want.nats:.4f}, {want.top1:.2%}")
        if abs(nats - want.nats) > TOLERANCE or abs(top1 - want.top1) > 2 / (WINDOWS * LENGTH):
            wrong.append(name)
    if wrong:
        raise RuntimeError(f"not the stored numbers on {', '.join(wrong)}: " + "; ".join(lines))
    return lines
