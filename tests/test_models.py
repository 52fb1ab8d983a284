"""Decoder and adapters: float64 references, and identities between two ways to compute the same logits."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from builders import VOCAB, Recurrent, nnx_model, random_params, tiny, tiny_decoder
from flax import nnx

from distill.batch import shift
from distill.errors import UserError
from distill.models import DecoderConfig, Output, RopeScaling, decoder, from_linen, from_nnx
from distill.models.layers import rms_norm
from distill.models.rope import rotate, turns_of
from distill.parallel import ParallelConfig, make_mesh, param_shardings

ALL_BIASES = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
VARIANTS = {
    "grouped": {},
    "one_group": {"kv_heads": 1, "layers": 1},
    "no_groups": {"kv_heads": None, "layers": 1},
    "tied": {"tied": True},
    "biases": ALL_BIASES,
    "wide_heads": {"head_dim": 6, "rope_theta": 100.0, "norm_epsilon": 0.1},
    "narrow_heads": {"head_dim": 2, "heads": 2, "tied": True, **ALL_BIASES},
    "normed_heads": {"qk_norm": True, "head_dim": 6},
    "window": {"sliding_window": 2},
    "some_windows": {"sliding_window": 3, "layers": 3, "window_layers": (False, True, False)},
    "some_rotations": {"rope_layers": (True, False), "qk_norm": True},
    "everything": {
        **ALL_BIASES,
        "qk_norm": True,
        "head_dim": 6,
        "sliding_window": 2,
        "window_layers": (True, False),
        "rope_layers": (False, True),
        "rope_scaling": RopeScaling("yarn", factor=4.0, original_length=40),
    },
}
SCALINGS = {
    "linear": RopeScaling("linear", factor=2.0),
    "dynamic": RopeScaling("dynamic", factor=2.0, original_length=3),
    "dynamic, short text": RopeScaling("dynamic", factor=2.0, original_length=50),
    "llama3": RopeScaling("llama3", factor=8.0, original_length=40),
    "llama3, other bounds": RopeScaling("llama3", 4.0, 100, low_frequency=2.0, high_frequency=9.0),
    "yarn": RopeScaling("yarn", factor=4.0, original_length=60),
    "yarn, other bounds": RopeScaling("yarn", 3.0, 30, beta_fast=3.0, beta_slow=0.5, truncate=False),
    "yarn, given magnitude": RopeScaling("yarn", 3.0, 60, attention_factor=1.5),
}


@pytest.fixture(scope="module")
def biased():
    """Model, parameters, and its functions compiled: ``logits`` and ``cached(params, tokens, segments, cache)``."""
    model = tiny_decoder(**ALL_BIASES)

    @jax.jit
    def cached(params, tokens, segments, cache):
        output = model.apply(params, tokens, segments=segments, cache=cache)
        return model.unembed(params, output.hidden), output.cache

    return model, random_params(model), jax.jit(model.logits), cached


def tokens_of(rows, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (rows, length)), jnp.int32)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_float64(options):
    config = tiny(**options)
    model, tokens = decoder(config), tokens_of(2, 5)
    params = random_params(model)
    logits = jax.jit(model.logits)(params, tokens)
    assert logits.shape == (2, 5, VOCAB) and logits.dtype == jnp.float32
    np.testing.assert_allclose(
        logits, reference.decoder_logits(config, params, np.asarray(tokens)), rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_scaled_positions_equal_float64(scaling):
    config = tiny(rope_scaling=scaling, head_dim=8, rope_theta=50.0, layers=1)
    model, tokens = decoder(config), tokens_of(2, 6, seed=1)
    params = random_params(model)
    positions = np.array([[0, 1, 5, 6, 7, 19], [0, 1, 2, 3, 4, 5]])  # rows of different lengths
    logits = jax.jit(model.logits)(params, tokens, positions=positions)
    want = reference.decoder_logits(config, params, np.asarray(tokens), positions)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=2e-5)
    plain = decoder(dataclasses.replace(config, rope_scaling=RopeScaling()))
    difference = np.max(np.abs(plain.logits(params, tokens, positions=positions) - logits))
    assert difference < 1e-5 if scaling.original_length == 50 else difference > 1e-2


def test_a_window_with_the_cache_equals_the_full_forward_pass():
    model = tiny_decoder(sliding_window=3, window_layers=(True, False))
    params, tokens, cache = random_params(model), tokens_of(2, 7), model.init_cache(2, 9)
    written, step = [], jax.jit(lambda tokens, cache: model.apply(params, tokens, cache=cache))
    for part in (tokens[:, :4], tokens[:, 4:6], tokens[:, 6:]):
        output = step(part, cache)
        written.append(model.unembed(params, output.hidden))
        cache = output.cache
    np.testing.assert_allclose(jnp.concatenate(written, axis=1), model.logits(params, tokens), rtol=1e-4, atol=1e-5)


def test_given_positions_and_segments_equal_float64():
    config = tiny()
    model, tokens = decoder(config), tokens_of(2, 6, seed=1)
    params = random_params(model)
    segments = np.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 5, 5]])
    positions = np.array([[7, 9, 0, 1, 4, 2], [0, 1, 2, 3, 0, 1]])
    logits = jax.jit(model.logits)(params, tokens, positions=positions, segments=segments)
    want = reference.decoder_logits(config, params, np.asarray(tokens), positions, segments)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=2e-5)


# Activations in bf16, logits accumulated in float32.
@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_equals_float32_up_to_its_precision(tied):
    config = tiny(dtype="bfloat16", tied=tied)
    model, tokens = decoder(config), tokens_of(3, 6)
    params = random_params(model)
    logits = jax.jit(model.logits)(params, tokens)
    want = reference.decoder_logits(config, params, np.asarray(tokens))
    assert jax.eval_shape(model.apply, params, tokens).hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert np.any(logits.astype(jnp.bfloat16).astype(jnp.float32) != logits)  # not rounded to bf16 in between
    error = np.sqrt(np.mean((np.asarray(logits) - want) ** 2) / np.mean(want**2))
    assert 1e-5 < error < 0.03


# Norm and rotation compute in float32 and round to bf16 once, at the end.
def test_norm_and_rotation_round_once():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 5, 8, 64)) * 3, jnp.bfloat16)
    exact, scale = np.asarray(x.astype(jnp.float32), np.float64), rng.normal(size=64)
    normed = rms_norm(x[0], jnp.asarray(scale, jnp.float32), 1e-5)
    want = exact[0] / np.sqrt(np.mean(exact[0] ** 2, axis=-1, keepdims=True) + 1e-5) * scale
    assert_rounded_once(normed, want)
    positions = jnp.array([[0, 1, 2, 100, 300, 1000, 3000, 5000]])
    angle = np.asarray(positions, np.float64)[:, None, :, None] * 1e4 ** (-np.arange(32) / 32)
    first, second = exact[..., :32], exact[..., 32:]
    want = [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
    assert_rounded_once(rotate(x, turns_of(64, positions, 1e4)), np.concatenate(want, axis=-1))


def assert_rounded_once(got, exact):
    assert got.dtype == jnp.bfloat16
    got = np.asarray(got.astype(jnp.float32))
    np.testing.assert_allclose(got, exact, rtol=2.0**-8, atol=4e-3)
    nearest = np.asarray(jnp.asarray(exact, jnp.bfloat16).astype(jnp.float32))
    assert np.mean(got == nearest) > 0.98  # the others lie halfway between two bf16 numbers


def test_causality_by_gradients():
    model = tiny_decoder()
    params, length = random_params(model), 6
    tokens = jnp.arange(length, dtype=jnp.int32)[None]  # one row of the table per position

    def hidden(table):
        return model.apply(params | {"embedding": table}, tokens).hidden[0]

    slopes = jax.jit(jax.jacobian(hidden))(params["embedding"])  # [L, D, V, D]
    reach = np.max(np.abs(slopes), axis=(1, 3))[:, :length]  # output position, input position
    assert np.all(reach[np.tril_indices(length)] > 1e-4)
    np.testing.assert_array_equal(reach[np.triu_indices(length, 1)], 0.0)


# Fault: documents that attend across their border, or positions that do not restart.
def test_packed_documents_are_independent(biased):
    _, params, logits, _ = biased
    lengths = (3, 5, 2)
    tokens = np.asarray(tokens_of(1, 11))  # a token of padding at the end
    segments = np.repeat([1, 2, 3, 0], [*lengths, 1])[None]
    batch = shift(tokens, np.ones_like(tokens), segments)
    packed = logits(params, batch.inputs, positions=batch.positions, segments=batch.segments)[0]
    alone = np.zeros((3, 10), np.int32)  # attention is causal: padding at the end has no effect
    for row, start, length in zip(alone, (0, 3, 8), lengths, strict=True):
        row[:length] = tokens[0, start : start + length]
    alone = logits(params, alone)
    want = np.concatenate([rows[:length] for rows, length in zip(alone, lengths, strict=True)])
    np.testing.assert_allclose(packed, want, rtol=1e-4, atol=1e-5)
    crossed = logits(params, batch.inputs)[0]
    assert np.max(np.abs(crossed[3:] - packed[3:])) > 0.1


@pytest.mark.parametrize("parts", [(7,), (3, 4), (1,) * 7, (4, 1, 1, 1)], ids=str)
def test_cached_decoding_equals_the_full_forward_pass(biased, parts):
    model, params, logits, cached = biased
    tokens = tokens_of(2, 7)
    cache, start, written = model.init_cache(2, 9), 0, []  # longer than needed
    for part in parts:
        some, cache = cached(params, tokens[:, start : start + part], None, cache)
        written.append(some)
        start += part
    assert int(cache.length) == 7
    np.testing.assert_allclose(jnp.concatenate(written, axis=1), logits(params, tokens), rtol=1e-4, atol=1e-5)


def test_the_cache_separates_segments(biased):
    model, params, logits, cached = biased
    tokens, segments = tokens_of(2, 7), jnp.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 2, 2]])
    _, cache = cached(params, tokens[:, :3], segments[:, :3], model.init_cache(2, 9))
    rest, _ = cached(params, tokens[:, 3:], segments[:, 3:], cache)
    want = logits(params, tokens, segments=segments)[:, 3:]
    np.testing.assert_allclose(rest, want, rtol=1e-4, atol=1e-5)
    assert np.max(np.abs(want - logits(params, tokens)[:, 3:])) > 0.1


def test_tokens_beyond_the_room_of_the_cache_are_refused_or_nan(biased):
    """An error where the number of tokens is known; under jit NaN, never the last slots written over."""
    model, params, _, cached = biased
    tokens = tokens_of(2, 5)
    with pytest.raises(ValueError, match="5 tokens for a key/value cache with room for 4"):
        cached(params, tokens, None, model.init_cache(2, 4))
    full, cache = cached(params, tokens[:, :4], None, model.init_cache(2, 4))
    assert jnp.isfinite(full).all()
    with pytest.raises(ValueError, match="5 tokens for a key/value cache with room for 4"):
        model.apply(params, tokens[:, 4:], cache=cache)
    for _ in range(2):
        beyond, cache = cached(params, tokens[:, 4:], None, cache)
        assert jnp.isnan(beyond).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 10, "heads": 4}, "width=10"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads=3"),
        ({"head_dim": 3}, "even"),
        ({"layers": 0}, "layers=0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"kv_heads": 0}, "kv_heads=0"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"heads": 0, "kv_heads": None, "head_dim": 4}, "heads=0"),
        ({"heads": 0, "kv_heads": None}, "heads=0"),
        ({"width": 4, "heads": 8, "kv_heads": None}, "width=4"),
        ({"rope_layers": (True,)}, "rope_layers has 1 entries; expected one for each of 2 layers"),
        ({"window_layers": (True, False)}, "window_layers without a sliding_window"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"rope_scaling": RopeScaling("dynamic", 2.0, 9)}, "heads of size 4 or more; got 2"),
    ],
)
def test_invalid_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 2.0}, "has no kind"),
        ({"kind": "linear", "factor": 0.5}, "factor=0.5"),
        ({"kind": "yarn", "factor": 2.0}, "yarn needs original_length"),
        ({"kind": "llama3", "factor": 2.0, "original_length": 9, "low_frequency": 4.0}, "must be below"),
    ],
)
def test_invalid_scalings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**options)


# ---- initial parameters


@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights_have_the_declared_spread(tied):
    config = DecoderConfig(
        vocab_size=200, layers=3, width=48, heads=4, head_dim=16, feed_forward=80, tied=tied, **ALL_BIASES
    )
    params = decoder(config).init(jax.random.key(0))
    spread = {
        "embedding": 48**-0.5 if tied else 1.0,
        **({} if tied else {"head": 48**-0.5}),
        **{f"layers/attention/{name}/kernel": 48**-0.5 for name in ("query", "key", "value")},
        "layers/attention/output/kernel": 64**-0.5,
        **{f"layers/mlp/{name}/kernel": 48**-0.5 for name in ("gate", "up")},
        "layers/mlp/down/kernel": 80**-0.5,
    }
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in tree_items(params)}
    for name, leaf in leaves.items():
        assert leaf.dtype == jnp.float32
        if name in spread:
            np.testing.assert_allclose(np.std(leaf), spread[name], rtol=0.05)
            assert abs(np.mean(leaf)) < 0.05 * spread[name]
        else:
            assert name.endswith(("scale", "bias"))
            np.testing.assert_array_equal(leaf, 1.0 if name.endswith("scale") else 0.0)
    assert spread.keys() < leaves.keys()


def tree_items(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_no_two_initial_matrices_are_equal():
    model = tiny_decoder()
    params, other = model.init(jax.random.key(0)), model.init(jax.random.key(1))
    kernels = [leaf[n].ravel() for path, leaf in tree_items(params["layers"]) for n in (0, 1) if "kernel" in str(path)]
    heads = {tuple(np.round(kernel[:8].tolist(), 4)) for kernel in kernels}
    assert len(heads) == len(kernels) == 14
    assert np.max(np.abs(params["embedding"] - other["embedding"])) > 0.1


def test_initial_parameters_do_not_depend_on_the_mesh():
    model = tiny_decoder(**ALL_BIASES, vocab_size=12)
    shardings = param_shardings(model, make_mesh(ParallelConfig(fsdp=2, tensor=2)))
    sharded = jax.jit(model.init, out_shardings=shardings)(jax.random.key(3))
    assert not sharded["layers"]["mlp"]["up"]["kernel"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, sharded, model.init(jax.random.key(3)))


# ---- counts


def test_the_parameter_count_is_that_of_the_tree():
    d, v, h, g, k, f, n = 8, VOCAB, 4, 2, 6, 12, 2
    layer = d * k * (2 * h + 2 * g) + 3 * d * f + 2 * d
    assert tiny_decoder(head_dim=k).parameter_count() == n * layer + d + 2 * v * d
    assert tiny_decoder(head_dim=k, tied=True).parameter_count() == n * layer + d + v * d


def test_flops_are_two_per_multiply_add():
    config, length = tiny(head_dim=6), 9
    shapes = jax.eval_shape(decoder(config).init, jax.random.key(0))
    weights = sum(leaf.size for path, leaf in tree_items(shapes) if "kernel" in str(path) or "head'" in str(path))
    keys_seen = sum(range(1, length + 1)) / length
    attention = 2 * config.layers * config.heads * 6 * keys_seen  # scores and values
    assert config.flops_per_token(length) == pytest.approx(2 * (weights + attention))


def test_a_window_saves_flops():
    full, length = tiny(head_dim=6, layers=3), 9
    config = dataclasses.replace(full, sliding_window=4, window_layers=(True, False, True))
    saved = sum(max(0, seen - 4) for seen in range(1, length + 1)) / length
    difference = full.flops_per_token(length) - config.flops_per_token(length)
    assert difference == pytest.approx(2 * 2 * 2 * config.heads * 6 * saved)
    assert dataclasses.replace(full, sliding_window=50).flops_per_token(length) == full.flops_per_token(length)


def test_flops_are_close_to_xlas_count():
    # One layer, because XLA counts the body of a scan once. It also counts norms, softmax, rotations and the upper
    # triangle of the scores, a few per cent with these sizes.
    config = DecoderConfig(vocab_size=256, layers=1, width=64, heads=4, feed_forward=256)
    model, length = decoder(config), 16
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    cost = jax.jit(model.logits).lower(shapes, tokens).compile().cost_analysis()
    ratio = cost["flops"] / (length * config.flops_per_token(length))
    assert 1.0 < ratio < 1.15


# ---- NNX


def test_the_nnx_adapter_returns_the_logits_of_the_module():
    model, tokens = nnx_model(), tokens_of(2, 5)
    module = Recurrent(rngs=nnx.Rngs(jax.random.key(4)))
    params = model.init(jax.random.key(4))
    want = module.unembed(module(tokens))
    np.testing.assert_allclose(model.logits(params, tokens), want, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(model.logits)(params, tokens), want, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(model.logits(model.init(jax.random.key(5)), tokens) - want)) > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "learned"}, "learned positions need max_length, got None"),
        ({"positions": "learned", "max_length": 4, "rope_fraction": 0.5}, "no rope options"),
        ({"qk_norm_joint": True}, "qk_norm_joint without qk_norm"),
        ({"logit_softcap": 0.0}, "logit_softcap=0.0; expected a number above 0"),
        ({"attention_scalar": -1.0}, "attention_scalar=-1.0"),
        ({"rope_fraction": 0.5, "head_dim": 6}, "rope_fraction=0.5 rotates 3; rotary positions need an even number"),
        ({"rope_fraction": 1.5}, "rope_fraction=1.5 rotates"),
        ({"rope_theta_local": 5.0}, "rope_theta_local without a sliding_window"),
        (
            {"rope_scaling": RopeScaling("longrope", 2.0, 9, short_factors=(1.0,) * 3, long_factors=(1.0,) * 3)},
            "3 factors of longrope; expected 1",
        ),
    ],
)
def test_incompatible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)
    with pytest.raises(ValueError, match="1 short_factors and 0 long_factors"):
        RopeScaling("longrope", 2.0, 9, short_factors=(1.0,))


def test_nnx_parameters_are_a_plain_pytree_of_arrays():
    model = nnx_model()
    params = model.init(jax.random.key(0))
    assert set(params) == {"table", "hidden", "head"}
    assert type(params) is dict and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert model.parameter_count() == VOCAB * 8 + 8 * 8 + 8 + 8 * VOCAB + VOCAB
    doubled = model.logits(params | {"head": jax.tree.map(lambda x: 2 * x, params["head"])}, tokens_of(1, 3))
    np.testing.assert_allclose(doubled, 2 * model.logits(params, tokens_of(1, 3)), rtol=1e-5)


class Dropping(nnx.Module):
    """An NNX student with dropout, a norm and whatever else a test gives it."""

    def __init__(self, rngs, deterministic=True, more=None):
        self.table, self.norm = nnx.Embed(VOCAB, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=deterministic, rngs=rngs)
        if more is not None:
            self.more = more()

    def __call__(self, tokens, positions=None, segments=None):
        return self.drop(self.norm(self.table(tokens)))

    def unembed(self, hidden):
        return self.table.attend(hidden)


def test_random_keys_of_an_nnx_module_are_no_parameters():
    model = from_nnx(Dropping, VOCAB)
    params = model.init(jax.random.key(4))
    assert set(params) == {"table", "norm"}
    module = Dropping(rngs=nnx.Rngs(jax.random.key(4)))
    want = module.unembed(module(tokens_of(2, 3)))
    np.testing.assert_allclose(jax.jit(model.logits)(params, tokens_of(2, 3)), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deterministic": False}, "Dropping draws random numbers or changes its state"),
        ({"more": lambda: nnx.BatchStat(jnp.zeros(3))}, r"state beside its parameters: BatchStat \(more\)"),
        ({"more": lambda: nnx.Cache(jnp.zeros(3))}, r"Cache \(more\)"),
        ({"more": lambda: nnx.Variable(jnp.zeros(3))}, r"Variable \(more\)"),
    ],
)
def test_other_state_of_an_nnx_module_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        from_nnx(functools.partial(Dropping, **options), VOCAB)
    with pytest.raises(ValueError, match=f"gives {VOCAB} logits; expected vocab_size=5"):
        from_nnx(Dropping, 5)


# ---- Linen


class Set(nn.Module):
    """Submodules in ``setup``, the head used by ``unembed`` alone."""

    norm: type[nn.Module] = nn.LayerNorm
    rate: float = 0.0
    tied: bool = False

    def setup(self):
        self.table, self.normed, self.drop = nn.Embed(VOCAB, 8), self.norm(), nn.Dropout(self.rate, deterministic=None)
        self.head = nn.Dense(VOCAB)

    def __call__(self, tokens, positions=None, segments=None):
        x_BLD = self.drop(self.table(tokens), deterministic=self.rate == 0.5)
        return self.normed(x_BLD)

    def unembed(self, hidden):
        return self.table.attend(hidden) if self.tied else self.head(hidden)


class Compact(nn.Module):
    @nn.compact
    def __call__(self, tokens, positions=None, segments=None):
        return Output(nn.LayerNorm()(nn.Embed(VOCAB, 8, name="table")(tokens)))

    def unembed(self, hidden):
        return hidden @ self.variables["params"]["table"]["embedding"].T


@pytest.mark.parametrize(
    "module", [Set(), Set(tied=True), Set(rate=0.5), Compact()], ids=["set", "tied", "drop", "compact"]
)
def test_an_ordinary_linen_module_is_a_model(module):
    model, tokens = from_linen(module, VOCAB), tokens_of(2, 3)
    params = model.init(jax.random.key(1))
    assert ("head" in params) == (isinstance(module, Set) and not module.tied)
    table = params["table"]["embedding"]
    assert np.std(table) > 0.1  # drawn by its own initialiser
    x = np.asarray(table, np.float64)[np.asarray(tokens)]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    want = x @ np.asarray(params["head"]["kernel"] if "head" in params else table.T, np.float64)
    np.testing.assert_allclose(jax.jit(model.logits)(params, tokens), want, rtol=1e-4, atol=1e-5)


class Unaware(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Embed(VOCAB, 8)(tokens)

    def unembed(self, hidden):
        return hidden


class Headless(nn.Module):
    @nn.compact
    def __call__(self, tokens, positions=None, segments=None):
        return nn.Embed(VOCAB, 8)(tokens)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Set(norm=functools.partial(nn.BatchNorm, use_running_average=True)), "Set has variables in batch_stats"),
        (Set(rate=0.3), "Set draws random numbers"),
        (Unaware(), "Unaware.__call__ takes tokens; expected tokens, positions and segments"),
        (Headless(), "Headless has no unembed"),
    ],
    ids=["batch_stats", "dropout", "positions", "unembed"],
)
def test_what_a_linen_module_must_not_hold_is_refused_by_name(module, message):
    with pytest.raises(ValueError, match=message):
        from_linen(module, VOCAB)


class Required(nn.Module):
    """Positions and segments without defaults."""

    @nn.compact
    def __call__(self, tokens, positions, segments):
        return nn.Embed(VOCAB, VOCAB)(tokens) + positions[..., None] + 100 * segments[..., None]

    def unembed(self, hidden):
        return hidden


class RequiredNnx(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Embed(VOCAB, VOCAB, rngs=rngs)

    def __call__(self, tokens, positions, segments):
        return self.table(tokens) + positions[..., None] + 100 * segments[..., None]

    def unembed(self, hidden):
        return hidden


@pytest.mark.parametrize("model", [from_linen(Required(), VOCAB), from_nnx(RequiredNnx, VOCAB)], ids=["linen", "nnx"])
def test_positions_and_segments_may_be_required(model):
    params, tokens = model.init(jax.random.key(0)), tokens_of(2, 3)
    given = {"positions": jnp.arange(3)[None].repeat(2, 0), "segments": jnp.ones((2, 3), jnp.int32)}
    plain = model.logits(params, tokens)
    np.testing.assert_array_equal(plain, model.logits(params, tokens, **given))
    np.testing.assert_allclose(plain[:, 1:] - plain[:, :-1], 1.0 + jnp.diff(_rows(params)[tokens], axis=1), atol=1e-4)


def _rows(params):
    return jax.tree.leaves(params)[0]


class UnawareNnx(RequiredNnx):
    def __call__(self, tokens):
        return self.table(tokens)


class HeadlessNnx(RequiredNnx):
    unembed = None


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (UnawareNnx, "from_nnx: UnawareNnx.__call__ takes tokens; expected tokens, positions and segments"),
        (HeadlessNnx, "from_nnx: HeadlessNnx has no unembed"),
    ],
)
def test_an_nnx_module_that_cannot_be_a_model_is_refused_by_name(construct, message):
    with pytest.raises(UserError, match=message):
        from_nnx(construct, VOCAB)


def test_another_vocabulary_of_a_linen_module_is_refused():
    with pytest.raises(ValueError, match=f"Set gives {VOCAB} logits; expected vocab_size=7"):
        from_linen(Set(), 7)
