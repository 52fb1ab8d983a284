"""Softmax attention against loops in float64: groups, masks, scale, softcap."""

import functools
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from distill.devices import backend
from distill.models import DecoderConfig, attention, decoder
from distill.models.attention import attend, attention_weights, of_whole_text
from distill.models.attention_forms import fused, in_blocks
from distill.parallel import ParallelConfig, make_mesh


def plain(q, k, v, mask, scale=None, softcap=None):
    """Attention by loops over queries and keys in float64."""
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
def test_attention_equals_float64(options):
    q, k, v, mask = drawn()
    assert np.abs(attend(q, k, v, mask, **options) - plain(q, k, v, mask, **options)).max() < 2e-6


def test_a_row_without_keys_is_uniform():
    q, k, _, mask = drawn()
    mask = mask.copy()
    mask[1, 2] = False
    assert np.allclose(attention_weights(q, k, jnp.asarray(mask), softcap=5.0)[1, :, :, 2], 1 / 6)
    assert jnp.isfinite(attention_weights(q, k, jnp.asarray(mask))).all()


@pytest.mark.parametrize("options", [{}, {"scale": 0.7, "softcap": 1.5}])
def test_attention_in_blocks_equals_plain_attention(options):
    """Values against float64, gradients against the plain form; 11 queries in blocks of 4 leave a short last block."""
    q, k, v, mask = drawn(length=11)
    g = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    mask = jnp.asarray(mask)
    assert np.abs(in_blocks(q, k, v, mask, block=4, **options) - plain(q, k, v, mask, **options)).max() < 2e-6

    def gradients(function, **more):
        return jax.jit(jax.grad(lambda *x: jnp.sum(g * function(*x, mask, **more, **options)), argnums=(0, 1, 2)))(
            q, k, v
        )

    for ours, whole in zip(gradients(in_blocks, block=4), gradients(attend), strict=True):
        assert np.abs(ours - whole).max() < 5e-6 * np.abs(whole).max()


FORMS = {
    "plain": jax.jit(attend),
    "blocks of 4": jax.jit(functools.partial(in_blocks, block=4)),
    "fused": jax.jit(functools.partial(fused, implementation="xla")),
}


@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(
    st.integers(0, 2**16),
    st.sampled_from([1, 2, 5, 11, 30]),
    st.lists(st.integers(1, 11), min_size=2, max_size=2),
    st.lists(st.integers(1, 11), min_size=2, max_size=2),
    st.sampled_from([1.0, 30.0, 1e3]),
)
def test_every_form_agrees_on_windows_packing_and_padding(seed, window, firsts, reals, size):
    """Two documents a row, then padding, through a window, against loops in float64."""
    q, k, v, _ = drawn(length=11, seed=seed)
    index = np.arange(11)
    segments = np.stack(
        [np.where(index < first, 1, 2) * (index < real) for first, real in zip(firsts, reals, strict=True)]
    )
    near = (index[:, None] >= index) & (index[:, None] - index < window)
    mask = near[None] & (segments[:, :, None] == segments[:, None, :])
    want = plain(q * size, k, v, mask)
    for name, form in FORMS.items():
        got = form(q * np.float32(size), k, v, jnp.asarray(mask))
        np.testing.assert_allclose(got, want, atol=2e-6 * size, rtol=0.0, err_msg=name)


def test_attention_in_blocks_has_all_derivatives():
    """Forward mode, forward over reverse, and vmap, as of the plain form."""
    q, k, v, mask = drawn(length=11)
    mask = jnp.asarray(mask)
    along = [np.random.default_rng(i).normal(size=x.shape).astype(np.float32) for i, x in enumerate((q, k, v))]

    def derivatives(function, **more):
        def value(*x):
            return jnp.sum(jnp.sin(function(*x, mask, **more)))

        def both(*along):
            slopes = jax.grad(value, argnums=(0, 1, 2))
            return jax.jvp(value, (q, k, v), along)[1], jax.jvp(slopes, (q, k, v), along)[1]

        return jax.jit(jax.vmap(both))(*(np.stack([x, -2 * x]) for x in along))

    ours, whole = derivatives(in_blocks, block=4), derivatives(attend)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
        assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()


@pytest.mark.parametrize("groups", [2, 4])
def test_products_of_gradients_sum_over_the_last_axis_of_their_first_factor(groups):
    """The fastest product on XLA:CPU; autodiff would sum over rows for keys and values."""
    q, k, v, mask = drawn(groups=groups, length=16)

    def loss(q, k, v, mask):
        return jnp.sum(jnp.square(in_blocks(q, k, v, mask, block=8)))

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, mask).compile().as_text()
    summed = re.findall(r" dot\(.*lhs_contracting_dims=\{(\d+)\}", program)
    assert len(summed) == 2 * 6 and set(summed) == {"2"}  # per block two products forward and four backward


def test_a_masked_key_has_no_effect_however_large_its_score():
    q, k, v, mask = drawn(length=8)
    k[1, :, 3], mask = k[1, :, 3] * 1e6, np.array(mask)
    mask[1, 4:, 3], mask[0, 5] = False, False
    out = in_blocks(q, k, v, jnp.asarray(mask), block=4)
    want = plain(q[1:, :, 4:], k[1:], v[1:], mask[1:, 4:])
    assert np.abs(out[1:, :, 4:] - want).max() < 2e-6
    mean = np.repeat(v[0].mean(axis=1), 2, axis=0)  # a query that sees no key: uniform weights, no NaN
    assert np.abs(out[0, :, 5] - mean).max() < 1e-6


def test_blocks_see_no_later_key():
    q, k, v, _ = drawn(length=8)
    k[:, :, 4:], v[:, :, 4:] = np.nan, np.nan
    seen = in_blocks(q, k, v, jnp.ones((2, 8, 8), bool), block=4)
    assert np.isfinite(seen[:, :, :4]).all() and np.isnan(seen[:, :, 4:]).all()


def test_long_causal_texts_are_computed_in_blocks(monkeypatch):
    q, k, v, _ = drawn(length=8)
    v[:, :, 7:] = np.nan
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((8, 8), bool)), (2, 8, 8))
    finite = lambda **options: bool(np.isfinite(attend(q, k, v, mask, **options)[0, 0, 0]).all())  # noqa: E731
    assert not finite(causal=True)  # 0 · NaN: the plain form multiplies all keys
    monkeypatch.setattr(backend, "BLOCKED_FROM", 8)
    monkeypatch.setattr(attention, "in_blocks", lambda *x, **options: in_blocks(*x, **options, block=4))
    assert finite(causal=True) and not finite()


def test_a_decoder_in_blocks_equals_one_without(monkeypatch):
    """Gradients with packed documents, grouped heads and a window, with and without blocks."""
    config = DecoderConfig(
        vocab_size=14, layers=2, width=16, heads=4, kv_heads=2, feed_forward=24, sliding_window=5, qkv_bias=True
    )
    model, tokens = decoder(config), np.random.default_rng(0).integers(0, 14, (2, 12))
    segments = jnp.asarray(np.repeat([[1, 2], [1, 1]], [6, 6], axis=1).reshape(2, 12))
    params = model.init(jax.random.key(0))

    def gradients(params):
        return jax.grad(lambda p: jnp.sum(jnp.square(model.logits(p, tokens, segments=segments))))(params)

    short = jax.jit(gradients)(params)
    monkeypatch.setattr(backend, "BLOCKED_FROM", 8)
    monkeypatch.setattr(attention, "in_blocks", lambda *x, **options: in_blocks(*x, **options, block=4))
    long = jax.jit(lambda p: gradients(p))(params)
    for ours, other in zip(jax.tree.leaves(long), jax.tree.leaves(short), strict=True):
        assert np.abs(ours - other).max() < 1e-5 * max(np.abs(other).max(), 1.0)


# ---- the fused kernel


def test_the_cases_for_the_fused_kernel():
    yes = {"platform": "cuda", "dtype": "bfloat16", "length": 512, "size": 64, "softcap": None}
    assert backend.fuse_attention(**yes) and backend.fuse_attention(**yes | {"dtype": jnp.float16, "size": 128})
    for no in (
        *({"platform": name} for name in ("cpu", "tpu", "rocm")),
        *({"length": length} for length in (128, 513)),
        *({"size": size} for size in (36, 192)),
        {"dtype": "float32"},
        {"softcap": 50.0},
    ):
        assert not backend.fuse_attention(**yes | no)
    assert backend.platform() == "cpu"


@pytest.mark.parametrize("options", [{}, {"scale": 0.7}])
def test_the_arguments_of_the_fused_kernel_give_float64_attention(options):
    """With the XLA implementation of JAX in place of cuDNN: groups, masks, scale and the order of axes are right."""
    q, k, v, mask = drawn()
    got = fused(*map(jnp.asarray, (q, k, v, mask)), implementation="xla", **options)
    assert np.abs(got - plain(q, k, v, mask, **options)).max() < 2e-6


def test_the_fused_kernel_is_called_where_the_rule_says(monkeypatch):
    q, k, v, mask = (jnp.asarray(x) for x in drawn(length=256))
    called = []
    monkeypatch.setattr(attention, "fused", lambda *arrays, scale: called.append(scale) or arrays[0])
    monkeypatch.setattr(backend, "platform", lambda: "cuda")
    narrow = [x.astype(jnp.bfloat16) for x in (jnp.tile(q, 2), jnp.tile(k, 2), jnp.tile(v, 2))]
    attend(*narrow, mask, causal=True, scale=0.5)
    attend(*narrow, mask, causal=False)
    attend(*narrow, mask, causal=True, softcap=5.0)
    assert called == [0.5]


def test_keys_are_gathered_where_positions_lie_over_a_mesh():
    mesh = make_mesh(ParallelConfig(sequence=2, tensor=2))
    placed = jax.device_put(jnp.ones((2, 2, 6, 4)), NamedSharding(mesh, PartitionSpec("data", "tensor", "sequence")))

    @jax.jit
    def gathered(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return of_whole_text(x)

    assert placed.sharding.shard_shape(placed.shape) == (1, 1, 3, 4)
    assert gathered(placed).sharding.shard_shape(placed.shape) == (1, 1, 6, 4)
    assert of_whole_text(placed) is placed


def test_a_single_layer_computes_its_cosines_once():
    """Not once per head, forward and backward."""
    model = decoder(DecoderConfig(vocab_size=7, layers=1, width=8, heads=2, feed_forward=8))
    params = model.init(jax.random.key(0))
    tokens = jnp.ones((2, 5), jnp.int32)
    program = jax.jit(jax.grad(lambda params: model.apply(params, tokens).hidden.sum())).lower(params).compile()
    assert program.as_text().count(" cosine(") == 1
