"""Collected values: hidden states of layers, attention maps and relations."""

import functools

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from builders import VOCAB, nnx_model, random_params, tiny, tiny_decoder

from distill.models import Collect, Output, Relations, decoder, from_linen
from distill.models.layers import rms_norm
from distill.models.parameters import parameter
from distill.parallel import ParallelConfig, make_mesh, param_shardings

DEEP = {"layers": 4, "qkv_bias": True}
EVERYTHING = Collect(hidden=(0, 1, 2, 3, 4), attention=(1, 2, 3, 4), relations=(1, 2, 3, 4))
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]])


@pytest.fixture(scope="module")
def deep():
    """Model, parameters, tokens, and ``apply`` compiled with positions and segments."""
    model = tiny_decoder(**DEEP)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 6)), jnp.int32)

    @functools.partial(jax.jit, static_argnames="collect")
    def apply(params, tokens, collect=None):
        return model.apply(params, tokens, positions=POSITIONS, segments=SEGMENTS, collect=collect)

    return model, random_params(model), tokens, apply


# ---- collected values


def by_layer(config, params, row, positions, segments):
    """Float64 hidden states 0 … N, attention maps and (queries, keys, values) of layers 1 … N for one text."""
    params = reference._float64(params)
    hidden, maps, relations = [params["embedding"][row]], [], []
    for n in range(config.layers):
        leaves = reference._take(params["layers"], n)
        normed = [reference._rms_norm(x, leaves["attention_norm"]["scale"], config.norm_epsilon) for x in hidden[-1]]
        q, k, v = (
            np.array([reference._project(x, leaves["attention"][name], "d,dhk->hk") for x in normed]).swapaxes(0, 1)
            for name in ("query", "key", "value")
        )
        q, k = (
            np.array([[reference._rotate(x, p, config.rope_theta) for x, p in zip(head, positions, strict=True)]
                      for head in heads])
            for heads in (q, k)
        )  # fmt: skip
        attention = np.zeros((config.heads, len(row), len(row)))
        for h in range(config.heads):
            for t in range(len(row)):
                seen = [s for s in range(t + 1) if segments[s] == segments[t]]
                keys = k[h * config.groups // config.heads]
                attention[h, t, seen] = reference.softmax(keys[seen] @ q[h, t] / np.sqrt(config.key_size))
        hidden.append(reference._layer(config, leaves, hidden[-1], positions, segments))
        maps.append(attention)
        relations.append(Relations(q, k, v))
    return hidden, maps, relations


# Index 0 is the embedding, n the output of layer n.
def test_collected_states_equal_a_layer_by_layer_reference(deep):
    model, params, tokens, apply = deep
    got = apply(params, tokens, EVERYTHING).collected
    assert {name: list(layers) for name, layers in got.items()} == {
        "hidden": [0, 1, 2, 3, 4],
        "attention": [1, 2, 3, 4],
        "relations": [1, 2, 3, 4],
    }
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
    for b, row in enumerate(np.asarray(tokens)):
        hidden, maps, relations = by_layer(model.config, params, row, POSITIONS[b], SEGMENTS[b])
        for n in range(5):
            close(got["hidden"][n][b], hidden[n])
        for n in range(1, 5):
            close(got["attention"][n][b], maps[n - 1])
            for ours, theirs in zip(got["relations"][n], relations[n - 1], strict=True):
                close(ours[b], theirs)
    assert got["attention"][1].shape == (2, 4, 6, 6)
    assert [x.shape for x in got["relations"][1]] == [(2, 4, 6, 2), (2, 2, 6, 2), (2, 2, 6, 2)]


# Index 0 is the embedding.
def test_index_0_is_the_embedding(deep):
    _, params, tokens, apply = deep
    got = apply(params, tokens, Collect(hidden=(0,))).collected["hidden"]
    np.testing.assert_array_equal(got[0], params["embedding"][tokens])


# The last hidden state is taken before the final norm, Output.hidden after it.
def test_the_last_index_is_before_the_final_norm(deep):
    model, params, tokens, apply = deep
    output = apply(params, tokens, Collect(hidden=(4,)))
    last = output.collected["hidden"][4]
    normed = rms_norm(last, params["norm"]["scale"], model.config.norm_epsilon)
    np.testing.assert_allclose(output.hidden, normed, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(output.hidden - last)) > 0.1
    other = apply(params | {"norm": {"scale": 2 * params["norm"]["scale"]}}, tokens, Collect(hidden=(4,)))
    np.testing.assert_array_equal(other.collected["hidden"][4], last)


@pytest.mark.parametrize(
    "collect",
    [
        Collect(hidden=(3,)),
        Collect(hidden=(2, 1, 2)),
        Collect(attention=(1,)),
        Collect(attention=(4, 2), relations=(3,)),
        Collect(hidden=(0, 1, 4), relations=(1, 4)),
        Collect(),
    ],
    ids=str,
)
def test_some_collected_layers_equal_those_of_all(deep, collect):
    _, params, tokens, apply = deep
    output, everything = apply(params, tokens, collect), apply(params, tokens, EVERYTHING)
    np.testing.assert_allclose(output.hidden, apply(params, tokens).hidden, rtol=1e-5, atol=1e-6)
    for name, layers in output.collected.items():
        assert set(layers) == set(getattr(collect, name))
        for n, value in layers.items():
            close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
            jax.tree.map(close, value, everything.collected[name][n])


def test_the_gradient_of_a_layer_equals_that_of_the_truncated_model(deep):
    model, params, tokens, _ = deep
    cut = tiny_decoder(**DEEP | {"layers": 2})

    def loss(params, model):
        output = model.apply(params, tokens, collect=Collect(hidden=(2,), attention=(1,), relations=(2,)))
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(output.collected))

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    got, want = slope(params, model), slope(params | {"layers": jax.tree.map(lambda x: x[:2], params["layers"])}, cut)
    for ours, theirs in zip(*map(jax.tree.leaves, (got["layers"], want["layers"])), strict=True):
        np.testing.assert_allclose(ours[:2], theirs, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(ours[2:], 0.0)
    np.testing.assert_allclose(got["embedding"], want["embedding"], rtol=1e-4, atol=1e-5)
    assert all(np.max(np.abs(leaf)) > 1e-3 for leaf in jax.tree.leaves(want["layers"]["attention"]["query"]))


def test_collected_maps_with_a_cache_include_its_keys(deep):
    model, params, tokens, _ = deep
    collect = Collect(hidden=(2,), attention=(3,), relations=(3,))

    @jax.jit
    def both(params):
        whole = model.apply(params, tokens, collect=collect)
        first = model.apply(params, tokens[:, :4], cache=model.init_cache(2, 8))
        return whole.collected, model.apply(params, tokens[:, 4:], cache=first.cache, collect=collect).collected

    whole, rest = both(params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(rest["hidden"][2], whole["hidden"][2][:, 4:])
    close(rest["attention"][3][..., :6], whole["attention"][3][:, :, 4:])
    np.testing.assert_array_equal(rest["attention"][3][..., 6:], 0.0)  # slots not written yet
    close(rest["relations"][3].keys[:, :, :6], whole["relations"][3].keys)


def test_states_are_bfloat16_and_maps_float32():
    model = tiny_decoder(**DEEP, dtype="bfloat16")
    output = jax.eval_shape(
        lambda params, tokens: model.apply(params, tokens, collect=EVERYTHING),
        jax.eval_shape(model.init, jax.random.key(0)),
        jax.ShapeDtypeStruct((2, 6), jnp.int32),
    )
    types = {name: {str(leaf.dtype) for leaf in jax.tree.leaves(kept)} for name, kept in output.collected.items()}
    assert types == {"hidden": {"bfloat16"}, "attention": {"float32"}, "relations": {"bfloat16"}}


def test_collecting_on_a_mesh_equals_one_device(deep):
    *_, tokens, _ = deep
    mesh = make_mesh(ParallelConfig(fsdp=2, tensor=2))
    model = tiny_decoder(**DEEP, vocab_size=12)
    params = random_params(model)
    apply = jax.jit(lambda params: model.apply(params, tokens, collect=EVERYTHING).collected)
    sharded = jax.device_put(params, param_shardings(model, mesh))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, jax.device_get(apply(sharded)), jax.device_get(apply(params)))


# ---- only chosen layers are kept


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of all values of a program, including inner programs."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {variable.aval.shape for variable in equation.outvars}
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found |= shapes_in(getattr(inner, "jaxpr", inner))
    return found


def stacks(collect) -> set[tuple[int, ...]]:
    """Shapes ``[n, B, …]`` with n > 1 that hold states, maps or relations of n layers."""
    model = tiny_decoder(layers=7, width=24, heads=3, kv_heads=3)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((5, 9), jnp.int32)

    def apply(params, tokens):
        return jax.tree.leaves(model.apply(params, tokens, collect=collect).collected)

    jaxpr = jax.make_jaxpr(apply)(params, tokens).jaxpr
    rows = {(5, 9, 24), (5, 3, 9, 9), (5, 3, 9, 8)}
    return {shape for shape in shapes_in(jaxpr) if shape[1:] in rows and shape[0] > 1}


def test_only_the_chosen_layers_are_kept():
    assert stacks(Collect(hidden=(3,), attention=(7,), relations=(1,))) == set()
    assert stacks(Collect(hidden=(0, 7))) == set()
    assert stacks(Collect(hidden=(2, 5), attention=(1, 2, 6))) == {(2, 5, 9, 24), (3, 5, 3, 9, 9)}
    assert stacks(Collect(relations=tuple(range(1, 8)))) == {(7, 5, 3, 9, 8)}  # and the check can fail


def test_memory_grows_with_the_chosen_layers(monkeypatch):
    monkeypatch.setattr("distill.devices.backend.BLOCKED_FROM", 97)  # with maps or without, the same form of attention
    config = tiny(layers=16, width=32, heads=2, kv_heads=1, head_dim=4, feed_forward=16)
    model = decoder(config)
    params, tokens = random_params(model), jnp.zeros((4, 96), jnp.int32)
    state, attention = 4 * 96 * 32 * 4, 4 * 2 * 96 * 96 * 4  # bytes of one

    def bytes_for(transform, **layers):
        def loss(params):
            output = model.apply(params, tokens, collect=Collect(**layers))
            return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves((output.hidden, output.collected)))

        return jax.jit(transform(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    forward = functools.partial(bytes_for, lambda loss: loss)
    ends, one, every = forward(hidden=(0, 16)), forward(hidden=(8,)), forward(hidden=tuple(range(17)))
    assert one - ends < 4 * state
    assert every - ends > 14 * state
    backward = functools.partial(bytes_for, jax.grad)
    assert backward(attention=(8,)) - backward() < 4 * attention  # without a further residual per layer


def test_nothing_is_collected_by_default(deep):
    model, params, tokens, _ = deep
    assert model.apply(params, tokens).collected is None

    def carried(collect):
        jaxpr = jax.make_jaxpr(lambda p: model.apply(p, tokens, collect=collect))(params).jaxpr
        (scan,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
        (body,) = jax.extend.core.jaxprs_in_params(scan.params)
        inside, outside = ([v.aval.shape for v in equation.outvars] for equation in (body, scan))
        return sum(a == b for a, b in zip(inside, outside, strict=True))  # stacked values have one more leading axis

    assert [carried(None), carried(Collect(hidden=(0, 4))), carried(Collect(hidden=(2,)))] == [1, 1, 2]


# ---- refusals


@pytest.mark.parametrize(
    ("collect", "message"),
    [
        (Collect(hidden=(0, 5)), r"hidden of layers \[5\].* 0 … 4 \(0 is the embedding\)"),
        (Collect(hidden=(-1,)), r"hidden of layers \[-1\]"),
        (Collect(attention=(0, 4, 9)), r"attention of layers \[0, 9\].* 1 … 4, counted from 1"),
        (Collect(relations=(0,)), r"relations of layers \[0\]"),
    ],
)
def test_unknown_layers_are_refused(deep, collect, message):
    model, params, tokens, _ = deep
    with pytest.raises(ValueError, match=message):
        model.apply(params, tokens, collect=collect)


class Bigram(nn.Module):
    """A Linen module without layers."""

    @nn.compact
    def __call__(self, tokens, positions=None, segments=None):
        return Output(self.param("table", parameter(("vocab", "embed"), std=1.0), (VOCAB, VOCAB))[tokens])

    def unembed(self, hidden):
        return hidden


@pytest.mark.parametrize("model", [nnx_model(), from_linen(Bigram(), VOCAB)], ids=["nnx", "linen"])
def test_models_that_cannot_collect_raise(model):
    params, tokens = model.init(jax.random.key(0)), jnp.zeros((1, 3), jnp.int32)
    assert model.apply(params, tokens, collect=None).collected is None
    with pytest.raises(ValueError, match="collect: (Recurrent|Bigram) gives only its last hidden states"):
        model.apply(params, tokens, collect=Collect(hidden=(0,)))
