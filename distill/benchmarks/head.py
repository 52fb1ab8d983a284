"""Benchmark of the loss head: in chunks against all logits at once, and against the heads of other libraries."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill import losses
from distill.benchmarks.rounds import Run, in_turn, ratio, spread
from distill.errors import UserError
from distill.head import Head
from distill.reports import page

HEADS = (
    ("8192 tokens, V=128256, D=2048/4096", 8192, 2048, 4096, 128_256),
    ("8192 tokens, V=151936, D=256/512", 8192, 256, 512, 151_936),
    ("8192 tokens, V=32768, D=256/512", 8192, 256, 512, 32_768),
)
"""Name, tokens, widths of student and teacher, vocabulary size: shapes for which other libraries publish memory."""

Shapes = tuple[jax.ShapeDtypeStruct, ...]


def task_and_kl(student_logits, teacher_logits, labels):
    """Half cross-entropy and half forward KL at temperature 2, T² included."""
    soft = 4.0 * losses.forward_kl(student_logits, teacher_logits, temperature=2.0)
    return 0.5 * soft + 0.5 * losses.cross_entropy(student_logits, labels)


def plain_head(hidden, kernel, teacher_hidden, teacher_kernel, labels, mask):
    """The mean loss with all logits at once."""
    logits, teacher_logits = Head(kernel).logits(hidden), Head(teacher_kernel).logits(teacher_hidden)
    return losses.divide(losses.masked_sum(task_and_kl(logits, teacher_logits, labels), mask))


def chunked_head(hidden, kernel, teacher_hidden, teacher_kernel, labels, mask, **options: Any):
    """The mean loss in chunks; ``options`` are those of ``losses.chunked``."""
    heads = (hidden, Head(kernel)), (teacher_hidden, Head(teacher_kernel))
    return losses.divide(losses.chunked(task_and_kl, *heads, labels, mask, **options))


CONTESTANTS = {"plain": plain_head, "chunked": chunked_head}


def head_shapes(tokens: int, width: int, teacher_width: int, vocab: int, dtype: Any) -> Shapes:
    """Shapes of the arguments of ``plain_head`` and ``chunked_head``."""
    sizes = (tokens, width), (width, vocab), (tokens, teacher_width), (teacher_width, vocab)
    shapes = (jax.ShapeDtypeStruct(size, dtype) for size in sizes)
    return *shapes, jax.ShapeDtypeStruct((tokens,), jnp.int32), jax.ShapeDtypeStruct((tokens,), bool)


def compiled(function: Callable, shapes: Shapes) -> Any:
    """Compiles value and gradients with respect to the student's hidden states and head."""
    return jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(*shapes).compile()


def _temporary(function: Callable, shapes: Shapes) -> float:
    """Temporary memory in GiB, without inputs and gradients; compiled, not run."""
    return compiled(function, shapes).memory_analysis().temp_size_in_bytes / 2**30


def arguments(shapes: Shapes) -> list[jax.Array]:
    """Random arrays of ``shapes``; every position counts."""
    keys = jax.random.split(jax.random.key(0), 5)
    arrays = [
        (jax.random.normal(key, s.shape) * s.shape[0] ** -0.25).astype(s.dtype)
        for key, s in zip(keys, shapes[:4], strict=False)
    ]
    return [
        *arrays,
        jax.random.randint(keys[4], shapes[4].shape, 0, shapes[1].shape[1]),
        jnp.ones(shapes[5].shape, bool),
    ]


def head_run(function: Callable, shapes: Shapes) -> Run:
    """``run(n)``, which computes value and gradients n times."""
    arrays, program = arguments(shapes), compiled(function, shapes)

    def run(steps: int) -> None:
        for _ in range(steps):
            jax.block_until_ready(program(*arrays))

    return run


def _race(shapes: Shapes, steps: int, rounds: int) -> tuple[list[float], list[float]]:
    """Runs per second of the chunked head, and its speed relative to the plain one."""
    speeds = in_turn({name: head_run(f, shapes) for name, f in CONTESTANTS.items()}, steps, rounds)
    return speeds["chunked"], ratio(speeds, "chunked", "plain")


def memory(cases: tuple = HEADS) -> list[str]:
    """Lines: temporary memory of both heads at the shapes of ``cases``."""
    lines = []
    for name, *sizes in cases:
        plain, chunked = (_temporary(f, head_shapes(*sizes, jnp.float32)) for f in CONTESTANTS.values())
        lines.append(f"{name}, float32: plain {plain:.2f} GiB, chunked {chunked:.2f} GiB, {plain / chunked:.1f}x less")
    return lines


def speed(vocabularies: tuple[int, ...] = (8192, 49_152), tokens: int = 2048, rounds: int = 5) -> list[str]:
    """Lines: time at large vocabularies, in float32 and bfloat16."""
    lines = []
    for vocab in vocabularies:
        for dtype in (jnp.float32, jnp.bfloat16):
            speeds, ratios = _race(head_shapes(tokens, 256, 512, vocab, dtype), steps=2, rounds=rounds)
            name = f"{tokens} tokens, V={vocab}, D=256/512, {jnp.dtype(dtype).name}"
            seconds = 1 / statistics.median(speeds)
            lines.append(f"{name}: chunked {seconds:.3f} s, {spread(ratios)} times as fast as plain")
    return lines


def small_vocabularies(
    vocabularies: tuple[int, ...] = (256, 512, 1024, 2048, 4096), tokens: int = 2048, rounds: int = 7
) -> list[str]:
    """Lines: the vocabulary size from which the chunked head is faster; the source of ``step.CHUNKED_FROM``."""
    lines = []
    for widths in ((64, 128), (256, 512)):
        name, faster = f"{tokens} tokens, D={widths[0]}/{widths[1]}, float32", None
        for vocab in vocabularies:
            steps = max(1, 16 * 1024 // vocab)  # about the same time in every round
            _, ratios = _race(head_shapes(tokens, *widths, vocab, jnp.float32), steps, rounds)
            faster = (faster or vocab) if min(ratios) > 1 else None
            lines.append(f"{name}, V={vocab}: chunked {spread(ratios)} times as fast as plain")
        lines.append(f"{name}: chunked is faster in every round from V={faster or 'more'} on")
    return lines


def curve(figure: Path, counts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16_384), vocab: int = 32_768) -> str:
    """Draws temporary memory against the number of tokens to ``figure``."""
    names = {"plain": "all logits at once", "chunked": "in chunks"}
    curves = {
        names[name]: [_temporary(f, head_shapes(n, 256, 512, vocab, jnp.float32)) for n in counts]
        for name, f in CONTESTANTS.items()
    }
    page.curves(figure, list(counts), curves, "tokens", f"temporary memory, GiB (V = {vocab:,}, float32)")
    return f"{figure}: temporary memory against tokens"


def head(figure: Path) -> list[str]:
    """Lines of the head benchmark: temporary memory, time by vocabulary size, and a curve.

    Args:
      figure: PNG of temporary memory against the number of tokens; overwritten.
    """
    return [*memory(), *speed(), *small_vocabularies(), curve(figure)]


# ---- beside another library, on a GPU


class Mixture(NamedTuple):
    """The loss soft · JSD(β) + hard · cross-entropy at temperature 1; β = 0 is forward KL."""

    beta: float
    soft: float
    hard: float

    def loss(self, student_logits, teacher_logits, labels):
        """The loss per position."""
        soft = self.soft * losses.generalized_jsd(student_logits, teacher_logits, beta=self.beta)
        return soft + self.hard * losses.cross_entropy(student_logits, labels) if self.hard else soft

    def head(self, hidden, kernel, teacher_hidden, teacher_kernel, labels, mask):
        """The mean loss in chunks."""
        heads = (hidden, Head(kernel)), (teacher_hidden, Head(teacher_kernel))
        return losses.divide(losses.chunked(self.loss, *heads, labels, mask))


class Rival(NamedTuple):
    """The head of another library on given arrays."""

    run: Run
    value: Callable[[], tuple[Any, Any, Any]]
    """Loss, and gradients in our layout: ``[tokens, D]`` and ``[D, V]``."""
    peak: Callable[[], int]
    """Peak memory of a run in bytes, including its inputs; 0 where it is unknown."""


Peers = dict[str, Callable[[Mixture, list[jax.Array]], Rival | None]]
"""Name → a function that makes the rival, None where the library lacks this loss; from scripts/peers."""

MIXTURES = {
    "JSD + cross-entropy": Mixture(0.5, 0.5, 0.5),
    "forward KL + cross-entropy": Mixture(0.0, 0.5, 0.5),
    "JSD": Mixture(0.5, 1.0, 0.0),
}
BESIDE = (8192, 2048, 4096, 128_256)
"""Tokens, widths of student and teacher, vocabulary size: the shape of the figures that Liger publishes."""


def need_gpu() -> None:
    """Raises UserError where JAX sees no GPU."""
    if jax.default_backend() != "gpu":
        raise UserError(f"this measures on a GPU, and JAX sees only {jax.default_backend()}; pip install -e '.[cuda]'.")


def rivals(mixture: Mixture, peers: Peers, arrays: list[jax.Array]) -> dict[str, Rival]:
    """The ``peers`` that implement this loss."""
    made = {name: peer(mixture, arrays) for name, peer in peers.items()}
    return {name: rival for name, rival in made.items() if rival is not None}


def liger(load: Callable[[], Peers]) -> list[str]:
    """Lines of ``agreement`` and ``beside``; the peers are loaded only if JAX sees a GPU."""
    need_gpu()
    peers = load()
    return [*agreement(peers), *beside(peers)]


def agreement(peers: Peers, sizes: tuple[int, ...] = (96, 16, 24, 160)) -> list[str]:
    """Lines: relative difference of the peers' loss and gradients from ours, in float32 on a small shape."""
    lines, shapes = [], head_shapes(*sizes, jnp.float32)
    for name, mixture in MIXTURES.items():
        arrays = arguments(shapes)
        with jax.default_matmul_precision("highest"):
            loss, gradients = compiled(mixture.head, shapes)(*arrays)
        for peer, rival in rivals(mixture, peers, arrays).items():
            pairs = zip((loss, *gradients), rival.value(), strict=True)
            far = [np.max(np.abs(theirs - ours)) / np.max(np.abs(ours)) for ours, theirs in pairs]
            lines.append("{}: {} is off by {:.0e}, its gradients by {:.0e} and {:.0e}".format(name, peer, *far))
    return lines


def beside(peers: Peers, sizes: tuple[int, ...] = BESIDE, steps: int = 5, rounds: int = 7) -> list[str]:
    """Lines: milliseconds and peak memory of our head and the peers', with bfloat16 hidden states and heads."""
    tokens, width, teacher_width, vocab = sizes
    lines, shapes = [], head_shapes(*sizes, jnp.bfloat16)
    title = f"{tokens} tokens, V={vocab}, D={width}/{teacher_width}, bfloat16"
    for name, mixture in MIXTURES.items():
        found, memory = rivals(mixture, peers, arguments(shapes)), compiled(mixture.head, shapes).memory_analysis()
        contestants = {"distill": head_run(mixture.head, shapes)} | {peer: rival.run for peer, rival in found.items()}
        speeds = in_turn(contestants, steps, rounds)
        ours = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        peaks = {"distill": ours} | {peer: rival.peak() for peer, rival in found.items()}
        for one, values in speeds.items():
            milliseconds = spread([1e3 / value for value in values])
            line = f"{title}, {name}: {one} {milliseconds} ms, peak {peaks[one] / 1e9:.2f} GB"
            faster = "" if one == "distill" else f"; distill {spread(ratio(speeds, 'distill', one))} times as fast"
            lines.append(line + faster)
    return lines
