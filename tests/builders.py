"""Small models and batches shared by several tests."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill.batch import Batch, shift
from distill.models import DecoderConfig, Model, Output, decoder, from_nnx

VOCAB = 11


def tiny(**options) -> DecoderConfig:
    """A configuration of two layers, width 8 and grouped queries."""
    sizes = {"vocab_size": VOCAB, "layers": 2, "width": 8, "heads": 4, "kv_heads": 2, "feed_forward": 12}
    return DecoderConfig(**(sizes | options))


def tiny_decoder(**options) -> Model:
    return decoder(tiny(**options))


def random_params(model: Model, seed: int = 0):
    """Random parameters, including biases and norm scales, so that none is exactly 0 or 1."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), shapes)


def uneven_batch(rows: int = 8, length: int = 6, seed: int = 0) -> Batch:
    """Random tokens with a different number of counted labels in neighbouring rows."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, length + 1))
    counts = np.arange(length + 1) >= length - (np.arange(rows) * 5 % length)[:, None]
    return shift(tokens, counts)


def rows_of(batch: Batch, rows) -> Batch:
    """Selects rows of a batch."""
    return jax.tree.map(lambda field: field[rows], batch)


def on_device(batch: Batch) -> Batch:
    return jax.tree.map(jnp.asarray, batch)


def handmade(logits_of, vocab: int = VOCAB) -> Model:
    """A model of a function ``logits_of(tokens) -> [B, L, V]``, with unused parameters."""
    return Model(
        init=lambda key: {"unused": jnp.zeros(())},
        apply=lambda params, tokens, **_: Output(logits_of(tokens) + params["unused"]),
        unembed=lambda params, hidden: hidden,
        vocab_size=vocab,
    )


@partial(jax.jit, static_argnums=(0, 1))
def _values_and_slopes(function, fixed, student, teacher, traced):
    def total(student):
        nats = function(student, teacher, **dict(fixed), **traced)
        return jnp.sum(nats), nats

    (_, nats), slopes = jax.value_and_grad(total, has_aux=True)(student)
    return nats, slopes


def values_and_slopes(function, student, teacher, *, traced=(), **fixed):
    """Values of a loss, and the gradient of their sum with respect to the student's logits.

    Each loss, shape and set of ``fixed`` options compiles one program; ``traced`` options do not recompile.
    """
    return _values_and_slopes(function, tuple(fixed.items()), student, teacher, dict(traced))


class Recurrent(nnx.Module):
    """An NNX student: a running mean of the embeddings so far, and one hidden layer."""

    def __init__(self, rngs):
        self.table = nnx.Embed(VOCAB, 8, rngs=rngs)
        self.hidden = nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, VOCAB, rngs=rngs)

    def __call__(self, tokens, positions=None, segments=None):
        x_BLD = self.table(tokens)
        counts = jnp.arange(1, tokens.shape[1] + 1, dtype=x_BLD.dtype)
        mean_BLD = jnp.cumsum(x_BLD, axis=1) / counts[None, :, None]
        return jnp.tanh(self._linear(self.hidden, mean_BLD + x_BLD))

    def unembed(self, hidden_BLD):
        return self._linear(self.head, hidden_BLD)

    @staticmethod
    def _linear(layer, x_BLD):
        return jnp.einsum("bld,df->blf", x_BLD, layer.kernel[...]) + layer.bias[...][None, None]


def nnx_model() -> Model:
    return from_nnx(Recurrent, VOCAB)
