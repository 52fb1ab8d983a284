"""The encoder: attention, padding, packing, collected values, pooling, fewer layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import random_params

from distill.models import Collect, EncoderConfig, encoder
from distill.models.encoder import bert_pooler, embed, keep_layers, pool
from distill.models.layers import layer_norm
from distill.parallel import MESH_AXES

SIZES = {"vocab_size": 12, "layers": 3, "width": 8, "heads": 2, "feed_forward": 12, "max_length": 16}
BERT = EncoderConfig(**SIZES, token_types=2, pooler=True)
MODERN = EncoderConfig(
    **SIZES,
    norm_place="pre",
    positions="rotary",
    gated=True,
    sliding_window=1,
    window_layers=(False, True, True),
    mlm_head=True,
)
BOTH = pytest.mark.parametrize("config", [BERT, MODERN], ids=["bert", "modern"])
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 6)))


def states(config, tokens, **inputs):
    model = encoder(config)
    return model.apply(random_params(model), tokens, **inputs).hidden


@BOTH
def test_a_token_sees_both_sides_and_no_padding(config):
    model = encoder(config)
    params, segments = random_params(model), jnp.asarray([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])

    ids = jnp.arange(12).reshape(2, 6)  # one row per token, so gradients show who was seen
    table = params["embedding"][TOKENS.reshape(-1)]
    gradient = jax.grad(
        lambda table: model.apply(params | {"embedding": table}, ids, segments=segments).hidden[0, 1].sum()
    )(table)
    seen = np.abs(gradient).sum(axis=-1) > 0
    assert seen.tolist() == [True, True, True, True, *[False] * 8]


def test_a_window_has_its_configured_width():
    config = dataclasses.replace(MODERN, layers=1, sliding_window=2, window_layers=(True,))
    model = encoder(config)
    params = random_params(model)
    table, ids = params["embedding"], jnp.arange(9)[None]
    gradient = jax.grad(lambda table: model.apply(params | {"embedding": table}, ids).hidden[0, 4].sum())(table)
    assert (np.abs(gradient).sum(axis=-1) > 0).tolist() == [False] * 2 + [True] * 5 + [False] * 5


@BOTH
def test_packed_documents_do_not_see_each_other(config):
    packed = jnp.concatenate([TOKENS[:1, :4], TOKENS[1:, :3]], axis=1)
    segments, positions = jnp.asarray([[1] * 4 + [2] * 3]), jnp.asarray([[0, 1, 2, 3, 0, 1, 2]])
    together = states(config, packed, segments=segments, positions=positions)
    apart = [states(config, TOKENS[:1, :4])[0], states(config, TOKENS[1:, :3])[0]]
    np.testing.assert_allclose(together[0], np.concatenate(apart), atol=1e-5)


@BOTH
def test_padding_changes_nothing(config):
    padded = jnp.concatenate([TOKENS[:, :4], 7 * jnp.ones((2, 2), jnp.int32)], axis=1)
    segments = jnp.asarray([[1, 1, 1, 1, 0, 0]] * 2)
    np.testing.assert_allclose(
        states(config, padded, segments=segments)[:, :4], states(config, TOKENS[:, :4]), atol=1e-5
    )


@BOTH
def test_collected_relations_reproduce_the_next_states(config):
    """NumPy computes the next layer from collected values; softmax of queries and keys is the collected map."""
    model = encoder(config)
    params = random_params(model)
    collect = Collect(hidden=(0, 1, 2, 3), attention=(2, 3), relations=(2,))
    output = model.apply(params, TOKENS, collect=collect)
    kept = output.collected
    np.testing.assert_array_equal(output.hidden, model.apply(params, TOKENS).hidden)
    if config.norm_place == "post":
        np.testing.assert_array_equal(kept["hidden"][3], output.hidden)
    q, k, _ = kept["relations"][2]
    scores = np.einsum("bhlk,bhsk->bhls", q, k, dtype=np.float64) / np.sqrt(config.key_size)
    near = np.abs(np.subtract.outer(np.arange(6), np.arange(6))) <= (
        6 if config.sliding_window is None else config.sliding_window
    )
    weights = np.exp(scores) * near
    np.testing.assert_allclose(kept["attention"][2], weights / weights.sum(axis=-1, keepdims=True), atol=1e-5)
    assert kept["attention"][3].shape == (2, 2, 6, 6)


@BOTH
def test_remat_saves_memory_and_changes_nothing(config):
    model = encoder(config)
    params, collect = random_params(model), Collect(relations=(2,))

    def backward(remat):
        def total(params):
            output = model.apply(params, TOKENS, collect=collect, remat=remat)
            return jnp.sum(jnp.square(output.hidden)) + sum(jnp.sum(x) for x in output.collected["relations"][2])

        return jax.vjp(total, params)[1]

    def kept(remat):
        residuals = jax.tree.leaves(jax.eval_shape(lambda: backward(remat)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in residuals)

    assert kept("none") > kept("dots") > kept("full")
    want, again = (jax.jit(lambda remat=remat: backward(remat)(1.0))() for remat in ("none", "full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), again, want)


def test_token_types_and_positions_are_added():
    bert = dataclasses.replace(BERT, layers=1)
    types = jnp.asarray([[0, 0, 1, 1, 1, 1]] * 2)
    assert float(jnp.max(jnp.abs(states(bert, TOKENS, token_types=types) - states(bert, TOKENS)))) > 1e-2
    shifted = states(bert, TOKENS, positions=jnp.broadcast_to(jnp.arange(6) + 3, (2, 6)))
    assert float(jnp.max(jnp.abs(shifted - states(bert, TOKENS)))) > 1e-2
    turned = states(MODERN, TOKENS, positions=jnp.broadcast_to(jnp.arange(6) + 3, (2, 6)))
    np.testing.assert_allclose(turned, states(MODERN, TOKENS), atol=1e-4)  # rotary positions are relative


def test_layer_norm_equals_numpy():
    rng = np.random.default_rng(0)
    x, scale, bias = rng.normal(size=(4, 6)) * 3 + 5, rng.normal(size=6), rng.normal(size=6)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1) * scale + bias
    got = layer_norm(*(jnp.asarray(value, jnp.float32) for value in (x, scale, bias)), 0.1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_axes_and_types():
    for config in (BERT, MODERN):
        model = encoder(config)
        axes = jax.tree.leaves(model.axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
        assert {name for names in axes for name in names} <= MESH_AXES.keys()
        small = encoder(dataclasses.replace(config, dtype="bfloat16"))
        params = random_params(model)
        low, high = small.apply(params, TOKENS).hidden, model.apply(params, TOKENS).hidden
        assert low.dtype == jnp.bfloat16
        assert float(jnp.max(jnp.abs(low.astype(jnp.float32) - high))) < 0.3
    assert model.logits(params, TOKENS).dtype == jnp.float32


def test_flops_are_those_of_the_products():
    kernels = 3 * (4 * 8 * 8 + 2 * 8 * 12)
    assert BERT.flops_per_token(6) == 2 * (kernels + 3 * 2 * 8 * 6)
    assert MODERN.flops_per_token(6) == 2 * (kernels + 3 * 8 * 12 + 2 * 8 * (6 + 3 + 3))


# ---- sentences


def test_pooling_by_mean_and_by_first_token():
    hidden = jnp.arange(24.0).reshape(2, 4, 3).at[0, 3].set(jnp.nan)
    segments = jnp.asarray([[1, 1, 1, 0], [0, 1, 1, 1]])
    np.testing.assert_allclose(pool(hidden, segments), [hidden[0, :3].mean(0), hidden[1, 1:].mean(0)])
    np.testing.assert_allclose(pool(hidden, segments, "cls"), [hidden[0, 0], hidden[1, 1]])
    np.testing.assert_allclose(pool(hidden, segments, "last"), [hidden[0, 2], hidden[1, 3]])
    np.testing.assert_allclose(pool(-hidden, segments, "max"), [-hidden[0, 0], -hidden[1, 1]])
    for kind in ("mean", "cls", "max", "last"):
        np.testing.assert_allclose(pool(hidden, jnp.zeros_like(segments), kind), np.zeros((2, 3)))
    gradient = jax.grad(lambda x: pool(x, segments).sum())(hidden)
    np.testing.assert_allclose(gradient[0, :, 0], [1 / 3, 1 / 3, 1 / 3, 0])


def test_sentence_embeddings_have_norm_one_and_ignore_padding():
    model = encoder(BERT)
    params, segments = random_params(model), jnp.asarray([[1, 1, 1, 1, 0, 0]] * 2)
    vectors = embed(model, params, TOKENS, segments)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(vectors, embed(model, params, TOKENS[:, :4], segments[:, :4]), atol=1e-5)


def test_kept_layers_are_those_of_the_teacher():
    params = random_params(encoder(MODERN))
    small, kept = keep_layers(MODERN, params, (0, 2))
    assert (small.layers, small.window_layers) == (2, (False, True))
    whole = Collect(hidden=(1,))
    first = [
        encoder(c).apply(p, TOKENS, collect=whole).collected["hidden"][1] for c, p in ((MODERN, params), (small, kept))
    ]
    np.testing.assert_array_equal(*first)
    for leaf, part in zip(jax.tree.leaves(params["layers"]), jax.tree.leaves(kept["layers"]), strict=True):
        np.testing.assert_array_equal(part[1], leaf[2])
    assert keep_layers(MODERN, params, (0,))[0].sliding_window is None


# ---- invalid arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers=0; expected at least 1"),
        ({"token_types": -1}, "token_types=-1"),
        ({"width": 9}, "width=9 is no multiple of heads=2"),
        ({"width": 6, "positions": "rotary"}, "size of a head is 3; rotary"),
        ({"sliding_window": 3}, "sliding_window=3 and window_layers=.. go together"),
        ({"window_layers": (True,) * 3}, "sliding_window=None and window_layers"),
        ({"sliding_window": 3, "window_layers": (True,)}, "has 1 entries; expected one for each of 3 layers"),
    ],
)
def test_invalid_encoders_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**(SIZES | options))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: states(BERT, jnp.ones((1, 17), jnp.int32)), "17 tokens, but positions for 16"),
        (lambda: encoder(BERT).logits(random_params(encoder(BERT)), TOKENS), "no head, so no logits"),
        (lambda: bert_pooler(MODERN, random_params(encoder(MODERN)), states(MODERN, TOKENS)), "no pooler"),
        (lambda: pool(states(BERT, TOKENS), TOKENS, "sum"), "kind='sum'; expected one of mean, cls, max, last"),
        (lambda: keep_layers(BERT, {}, (3,)), r"layers=\(3,\); expected some of 0 … 2"),
        (lambda: keep_layers(MODERN, {}, (1, 2)), "expected 0 first"),
        (lambda: states(BERT, TOKENS, collect=Collect(hidden=(4,))), "hidden of layers .4.; this model has"),
    ],
)
def test_invalid_calls_are_refused(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake()
