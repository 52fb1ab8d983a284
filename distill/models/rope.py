"""Rotary positions, and their scaling beyond the length a model was trained on."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill.devices import backend
from distill.models.config import RopeScaling
from distill.shapes import Array

PLAIN = RopeScaling()
"""No scaling."""


class Turns(NamedTuple):
    """Cosine and sine of the angle of every pair at every position, ``[B, 1, L, K/2]``."""

    cos: Array
    sin: Array


def rotate(x_BHLK: Array, turns: Turns) -> Array:
    """Rotary positions (arXiv 2104.09864): turns the pair (i, i + K/2) by its angle, in float32.

    Args:
      x_BHLK: queries or keys. Numbers beyond the K of ``turns`` are not rotated.
      turns: of their tokens, from ``turns_of``; computed once for all layers.
    """
    rotated = 2 * turns.cos.shape[-1]
    first, second = jnp.split(x_BHLK[..., :rotated].astype(jnp.float32), 2, axis=-1)
    turned = [first * turns.cos - second * turns.sin, second * turns.cos + first * turns.sin]
    turned += [x_BHLK[..., rotated:].astype(jnp.float32)] if rotated < x_BHLK.shape[-1] else []
    return jnp.concatenate(turned, axis=-1).astype(x_BHLK.dtype)


def turns_of(size: int, positions_BL: Array, theta: float, scaling: RopeScaling = PLAIN) -> Turns:
    """The pair (i, i + K/2) turns by position · theta^(−2i/K).

    ``scaling`` slows some pairs down; YaRN and LongRoPE also scale queries and keys, here by a factor of the turns.

    Args:
      size: K, the rotated numbers of each head.
      positions_BL: of the tokens.
      theta: the base.
      scaling: of the positions.

    Example:
      >>> turns_of(8, jnp.array([[0, 1, 2]]), 1e4).cos.shape
      (1, 1, 3, 4)
    """
    half = size // 2
    if scaling.kind == "dynamic":
        frequency = _dynamic(half, positions_BL, theta, scaling)
    elif scaling.kind == "longrope":
        frequency = _by_length(half, positions_BL, theta, scaling)
    else:
        frequency = jnp.asarray(slowed(half, theta, scaling), jnp.float32)
    frequency = frequency[None, None, None] if frequency.ndim == 1 else frequency[:, None, None]
    angle = positions_BL[:, None, :, None].astype(jnp.float32) * frequency
    turns = Turns(*(backend.materialize(x) for x in (jnp.cos(angle), jnp.sin(angle))))
    return turns if scaling.magnitude == 1.0 else Turns(*(x * scaling.magnitude for x in turns))


def choose(local: Array, turns: Sequence[Turns]) -> Turns:
    """The last of one or two ``Turns`` where ``local`` is True, otherwise the first."""
    if len(turns) == 1:
        return turns[0]
    return jax.tree.map(lambda far, near: jnp.where(local, near, far), *turns)


def _by_length(half: int, positions_BL: Array, theta: float, scaling: RopeScaling) -> Array:
    """LongRoPE's frequencies ``[B, K/2]``: the long factors in rows beyond the original length."""
    plain = theta ** (-np.arange(half) / half)
    short, long = (jnp.asarray(plain / np.array(f), jnp.float32) for f in (scaling.short_factors, scaling.long_factors))
    longer_B = jnp.max(positions_BL, axis=1) + 1 > scaling.original_length
    return jnp.where(longer_B[:, None], long[None], short[None])


def _dynamic(half: int, positions_BL: Array, theta: float, scaling: RopeScaling) -> Array:
    """NTK-aware frequencies ``[B, K/2]``: theta grows with a row's length beyond the original one.

    Each row depends on its length alone, not on the other rows of the batch.
    """
    length_B = jnp.maximum(jnp.max(positions_BL, axis=1) + 1, scaling.original_length).astype(jnp.float32)
    stretch_B = scaling.factor * length_B / scaling.original_length - (scaling.factor - 1.0)
    theta_B = theta * stretch_B ** (half / (half - 1))
    return theta_B[:, None] ** (-jnp.arange(half, dtype=jnp.float32) / half)[None]


def slowed(half: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Radians per position of each pair, ``[K/2]`` float64, for the kinds that do not depend on the text's length.

    Example:
      >>> slowed(2, 100.0, RopeScaling("linear", factor=4.0)).tolist()
      [0.25, 0.025]
    """
    frequency = theta ** (-np.arange(half) / half)
    if scaling.kind in ("none", "linear"):
        return frequency / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_length * frequency / (2.0 * math.pi)  # in a text of the original length
        kept = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
        kept = np.clip(kept, 0.0, 1.0)
    else:
        low, high = (_pair_that_turns(turns, half, theta, scaling) for turns in (scaling.beta_fast, scaling.beta_slow))
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        kept = 1.0 - np.clip((np.arange(half) - low) / (high - low if high != low else 1e-3), 0.0, 1.0)
    return frequency * (kept + (1.0 - kept) / scaling.factor)


def _pair_that_turns(turns: float, half: int, theta: float, scaling: RopeScaling) -> float:
    """Fractional index of the pair that makes ``turns`` turns in a text of the original length."""
    return half * math.log(scaling.original_length / (turns * 2.0 * math.pi)) / math.log(theta)
