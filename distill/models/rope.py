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

BY_LENGTH = ("dynamic", "longrope")
"""Kinds of scaling whose angles depend on the length of the text."""


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


def lengths_of(segments_BL: Array, positions_BS: Array, segments_BS: Array) -> Array:
    """Length of the text of each token, ``[B, L]``: the largest position of its segment, plus 1.

    Padding and other segments of the row do not count.

    Args:
      segments_BL: of the tokens that ask.
      positions_BS: of all tokens.
      segments_BS: of all tokens.

    Example:
      >>> segments = jnp.array([[1, 1, 2, 2, 2, 0, 0, 0, 0]])
      >>> lengths_of(segments[:, :5], jnp.array([[0, 1, 0, 1, 2, 0, 1, 2, 3]]), segments)
      Array([[2, 2, 3, 3, 3]], dtype=int32)
    """
    same_BLS = segments_BL[:, :, None] == segments_BS[:, None, :]
    return jnp.max(jnp.where(same_BLS, positions_BS[:, None, :], -1), axis=2) + 1


def turns_of(
    size: int, positions_BL: Array, theta: float, scaling: RopeScaling = PLAIN, lengths_BL: Array | None = None
) -> Turns:
    """The pair (i, i + K/2) turns by position · theta^(−2i/K).

    ``scaling`` slows some pairs down; YaRN and LongRoPE also scale queries and keys, here by a factor of the turns.

    Args:
      size: K, the rotated numbers of each head.
      positions_BL: of the tokens.
      theta: the base.
      scaling: of the positions.
      lengths_BL: length of the text of each token (``lengths_of``), which the kinds in ``BY_LENGTH`` read. None: the
        row is one text, without padding.

    Example:
      >>> turns_of(8, jnp.array([[0, 1, 2]]), 1e4).cos.shape
      (1, 1, 3, 4)
    """
    half = size // 2
    if scaling.kind in BY_LENGTH:
        if lengths_BL is None:
            lengths_BL = jnp.broadcast_to(jnp.max(positions_BL, axis=1, keepdims=True) + 1, positions_BL.shape)
        by_length = _dynamic if scaling.kind == "dynamic" else _longrope
        frequency = by_length(half, lengths_BL, theta, scaling)[:, None]
    else:
        frequency = jnp.asarray(slowed(half, theta, scaling), jnp.float32)[None, None, None]
    angle = positions_BL[:, None, :, None].astype(jnp.float32) * frequency
    turns = Turns(*(backend.materialize(x) for x in (jnp.cos(angle), jnp.sin(angle))))
    return turns if scaling.magnitude == 1.0 else Turns(*(x * scaling.magnitude for x in turns))


def choose(local: Array, turns: Sequence[Turns]) -> Turns:
    """The last of one or two ``Turns`` where ``local`` is True, otherwise the first."""
    if len(turns) == 1:
        return turns[0]
    return jax.tree.map(lambda far, near: jnp.where(local, near, far), *turns)


def _longrope(half: int, lengths_BL: Array, theta: float, scaling: RopeScaling) -> Array:
    """LongRoPE's frequencies ``[B, L, K/2]``: the long factors in texts beyond the original length."""
    plain = theta ** (-np.arange(half) / half)
    short, long = (jnp.asarray(plain / np.array(f), jnp.float32) for f in (scaling.short_factors, scaling.long_factors))
    longer_BL1 = lengths_BL[..., None] > scaling.original_length
    return jnp.where(longer_BL1, long[None, None], short[None, None])


def _dynamic(half: int, lengths_BL: Array, theta: float, scaling: RopeScaling) -> Array:
    """NTK-aware frequencies ``[B, L, K/2]``: theta grows with a text's length beyond the original one."""
    length_BL = jnp.maximum(lengths_BL, scaling.original_length).astype(jnp.float32)
    stretch_BL = scaling.factor * length_BL / scaling.original_length - (scaling.factor - 1.0)
    theta_BL = theta * stretch_BL ** (half / (half - 1))
    return theta_BL[..., None] ** (-jnp.arange(half, dtype=jnp.float32) / half)[None, None]


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
