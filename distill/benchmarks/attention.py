"""Benchmark of causal attention by length: the form of this platform against the plain form with all scores."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from distill.benchmarks.rounds import Run, in_turn, ratio, spread
from distill.models.attention import attention_weights, mix
from distill.models.attention_forms import fused, in_blocks
from distill.shapes import Array


class Case(NamedTuple):
    """Form and shapes to measure on a platform."""

    name: str
    form: Callable[..., Array]
    tokens: int
    heads: int
    groups: int
    size: int
    dtype: jnp.dtype
    lengths: tuple[int, ...]


CPU = Case("blocks", in_blocks, 2048, 8, 8, 64, jnp.dtype("float32"), (32, 64, 128, 256, 512))
GPU = Case("cuDNN", fused, 16_384, 16, 8, 128, jnp.dtype("bfloat16"), (64, 128, 256, 512, 1024, 2048, 4096))


def plain(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Plain attention, which materialises all scores."""
    return mix(attention_weights(q, k, mask), v)


def _program(form: Callable[..., Array], case: Case, length: int) -> tuple[Callable, list[Array]]:
    """The compiled value and gradients with respect to queries, keys and values, and its arguments."""
    batch, keys = case.tokens // length, jax.random.split(jax.random.key(0), 4)
    heads = (case.heads, case.groups, case.groups, case.heads)
    *qkv, g = (
        jax.random.normal(key, (batch, n, length, case.size), case.dtype) for key, n in zip(keys, heads, strict=True)
    )
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))

    def both(q, k, v, mask, g):
        y, back = jax.vjp(lambda *x: form(*x, mask), q, k, v)
        return y, back(g)

    return jax.jit(both), [*qkv, mask, g]


def _run(program: Callable, arrays: list[Array]) -> Run:
    def run(steps: int) -> None:
        for _ in range(steps):
            out = program(*arrays)
        jax.block_until_ready(out)

    return run


def far(case: Case, length: int) -> float:
    """Largest difference of values and gradients between the forms, over the largest number of the plain one."""
    (one, arrays), (other, _) = (_program(form, case, length) for form in (case.form, plain))
    pairs = zip(jax.tree.leaves(one(*arrays)), jax.tree.leaves(other(*arrays)), strict=True)
    return max(float(jnp.max(jnp.abs(a - b).astype(jnp.float32)) / jnp.max(jnp.abs(b))) for a, b in pairs)


def attention(case: Case | None = None, steps: int = 5, rounds: int = 5) -> list[str]:
    """Lines for every length: milliseconds, speed relative to the plain form, and their largest difference.

    Args:
      case: what to measure; None: the case of the platform.
      steps: steps of a round.
      rounds: measured rounds, after one of warm-up.
    """
    case = case or (GPU if jax.default_backend() == "gpu" else CPU)
    shape = f"{case.tokens} tokens, {case.heads} heads of {case.size}, {case.groups} groups, {case.dtype.name}"
    lines = []
    for length in case.lengths:
        contestants = {
            name: _run(*_program(form, case, length)) for name, form in ((case.name, case.form), ("plain", plain))
        }
        speeds = in_turn(contestants, steps, rounds)
        milliseconds = spread([1e3 / x for x in speeds[case.name]])
        lines.append(
            f"{shape}, texts of {length}: {case.name} {milliseconds} ms with gradients, "
            f"{spread(ratio(speeds, case.name, 'plain'))} times as fast as plain, off by {far(case, length):.0e}"
        )
    return lines
