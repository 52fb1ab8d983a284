"""Softmax attention beside loops in float64: groups, masks, scale, softcap."""

import numpy as np
import pytest
from jax import numpy as jnp

from distill.models.attention import attend, attention_weights


def plain(q, k, v, mask, scale=None, softcap=None):
    """Query by query, key by key, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, shared = np.zeros(q.shape), q.shape[1] // k.shape[1]
    for b, h, i in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(mask[b, i])
        scores = np.array([q[b, h, i] @ k[b, h // shared, j] for j in keys])
        scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, h, i] = (weights / weights.sum()) @ v[b, h // shared, keys]
    return out


def drawn(batch=2, heads=4, groups=2, length=6, size=4, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, n, length, size) for n in (heads, groups, groups)]
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    mask = np.tril(rng.random((batch, length, length)) < 0.6) | np.eye(length, dtype=bool)
    return q * 2, k * 2, v, mask


@pytest.mark.parametrize("options", [{}, {"scale": 0.7}, {"softcap": 1.5}, {"scale": 0.3, "softcap": 0.8}])
def test_attention_is_that_of_float64(options):
    q, k, v, mask = drawn()
    assert np.abs(attend(q, k, v, mask, **options) - plain(q, k, v, mask, **options)).max() < 2e-6


def test_a_row_without_keys_is_uniform():
    q, k, _, mask = drawn()
    mask = mask.copy()
    mask[1, 2] = False
    assert np.allclose(attention_weights(q, k, jnp.asarray(mask), softcap=5.0)[1, :, :, 2], 1 / 6)
    assert jnp.isfinite(attention_weights(q, k, jnp.asarray(mask))).all()
