"""Rotary positions whose angles depend on the length of the text: packing, padding and the cache change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from builders import VOCAB, random_params, tiny, tiny_decoder
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.batch import shift
from distill.generation.sampler import greedy
from distill.models import Collect, RopeScaling, decoder
from distill.models.rope import lengths_of, turns_of
from distill.parallel import ParallelConfig, make_mesh

ROW, PROMPT, ORIGINAL = 14, 4, 5
SCALINGS = {
    "none": RopeScaling(),
    "linear": RopeScaling("linear", 2.0),
    "llama3": RopeScaling("llama3", 8.0, 40),
    "yarn": RopeScaling("yarn", 4.0, 60),
    "dynamic": RopeScaling("dynamic", 3.0, ORIGINAL),
    "longrope": RopeScaling("longrope", 4.0, ORIGINAL, short_factors=(1.0, 1.5), long_factors=(2.0, 9.0)),
}


@functools.cache
def made(kind):
    """Configuration, parameters, and compiled: logits of a row, and logits of a row decoded token by token."""
    config = tiny(rope_scaling=SCALINGS[kind], layers=2, head_dim=4, rope_theta=20.0)
    model = decoder(config)

    @jax.jit
    def decoded(params, tokens, positions, segments):
        def read(start, end, cache):
            at = {"positions": positions[:, start:end], "segments": segments[:, start:end]}
            output = model.apply(params, tokens[:, start:end], cache=cache, **at)
            return output.cache, model.unembed(params, output.hidden)[0, -1]

        def one(cache, column):
            token, position, segment = (x[:, None] for x in column)
            output = model.apply(params, token, positions=position, segments=segment, cache=cache)
            return output.cache, model.unembed(params, output.hidden)[0, 0]

        cache, _ = read(0, PROMPT, model.init_cache(1, ROW))
        columns = (tokens[:, PROMPT:].T, positions[:, PROMPT:].T, segments[:, PROMPT:].T)
        return jax.lax.scan(one, cache, columns)[1]

    return config, random_params(model, 2), jax.jit(model.logits), decoded


def packed(lengths, seed=0):
    """One row of documents of these lengths, then padding: ``(documents, batch)``."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, VOCAB, n) for n in lengths]
    tokens, segments = np.full((1, ROW + 1), 3), np.zeros((1, ROW + 1), int)
    tokens[0, : sum(lengths)] = np.concatenate(documents)
    segments[0, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return documents, shift(tokens, segments > 0, segments)


@pytest.mark.parametrize("kind", SCALINGS)
@settings(max_examples=8, deadline=None, database=None, derandomize=True)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=3).filter(lambda lengths: sum(lengths) <= ROW))
def test_a_packed_document_is_the_document_alone(kind, lengths):
    config, params, logits, _ = made(kind)
    documents, batch = packed(lengths)
    got = logits(params, batch.inputs, positions=batch.positions, segments=batch.segments)[0]
    start = 0
    for document in documents:
        want = reference.decoder_logits(config, params, document[None])[0]
        np.testing.assert_allclose(got[start : start + len(document)], want, rtol=1e-4, atol=5e-5)
        start += len(document)


@pytest.mark.parametrize("kind", [kind for kind in SCALINGS if kind != "dynamic"])
@settings(max_examples=6, deadline=None, database=None, derandomize=True)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=2).filter(lambda lengths: PROMPT < sum(lengths) <= ROW))
def test_decoding_across_the_original_length_equals_decoding_without_a_cache(kind, lengths):
    config, params, _, decoded = made(kind)
    documents, batch = packed(lengths)
    got = decoded(params, batch.inputs, batch.positions, batch.segments)
    slot = 0
    for document in documents:
        for end in range(1, len(document) + 1):
            if slot >= PROMPT:
                want = reference.decoder_logits(config, params, document[None, :end])[0, -1]
                np.testing.assert_allclose(got[slot - PROMPT], want, rtol=1e-4, atol=5e-5)
            slot += 1


def test_rows_of_a_batch_outgrow_the_original_length_at_their_own_time():
    """Greedy decoding of LongRoPE against the argmax of whole forward passes in float64."""
    config, params, *_ = made("longrope")
    model, prompts = decoder(config), np.random.default_rng(1).integers(0, VOCAB, (3, 4))
    written = jax.jit(lambda p, x: greedy(model, p, x, max_new_tokens=6, eos_ids=(VOCAB,)))(
        params, jnp.asarray(prompts)
    )
    text = prompts
    for _ in range(6):
        following = reference.decoder_logits(config, params, text)[:, -1].argmax(-1)
        text = np.concatenate([text, following[:, None]], axis=1)
    np.testing.assert_array_equal(written, text[:, 4:])

    # Row 0 is padded by two slots in front and therefore crosses two tokens later.
    segments = jnp.asarray([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    offset = jnp.asarray([2, 0, 0])[:, None]
    cache, got = model.init_cache(3, 10), []
    step = jax.jit(model.apply)
    for start, end in ((0, 4), *((i, i + 1) for i in range(4, 10))):
        inside = segments if not start else jnp.ones((3, 1), jnp.int32)
        at = {"positions": jnp.maximum(jnp.arange(start, end)[None] - offset, 0), "segments": inside}
        output = step(params, jnp.asarray(text[:, start:end]), cache=cache, **at)
        cache = output.cache
        got.append(output.hidden[:, -1] @ params["head"])
    for end, logits in zip(range(4, 11), got, strict=True):
        want = np.concatenate(
            [reference.decoder_logits(config, params, text[:1, 2:end])[:, -1],
             reference.decoder_logits(config, params, text[1:, :end])[:, -1]]
        )  # fmt: skip
        np.testing.assert_allclose(logits, want, rtol=1e-4, atol=5e-5)


def test_dynamic_decoding_turns_new_tokens_by_the_length_so_far():
    """Keys of earlier tokens stay as they were turned, in the layer that reads the embedding."""
    model = tiny_decoder(rope_scaling=SCALINGS["dynamic"], layers=1, head_dim=4, rope_theta=20.0)
    params, tokens = random_params(model), jnp.asarray([[1, 5, 2, 7, 3, 8]])
    cache = model.init_cache(1, 6)
    step = jax.jit(model.apply)
    for i in range(6):
        cache = step(params, tokens[:, i : i + 1], cache=cache).cache
    prompt = step(params, tokens, cache=model.init_cache(1, 6)).cache
    np.testing.assert_allclose(cache.values_NBGSK, prompt.values_NBGSK, rtol=1e-5, atol=1e-6)
    turned = [turns_of(4, jnp.asarray([[i]]), 20.0, SCALINGS["dynamic"], jnp.asarray([[i + 1]])) for i in range(6)]
    whole = turns_of(4, jnp.arange(6)[None], 20.0, SCALINGS["dynamic"])
    for i, one in enumerate(turned):
        ours, at_once = (c.keys_NBGSK[0, 0, :, i] for c in (cache, prompt))
        inverse = [at_once[:, :2] * whole.cos[0, :, i] + at_once[:, 2:] * whole.sin[0, :, i],
                   at_once[:, 2:] * whole.cos[0, :, i] - at_once[:, :2] * whole.sin[0, :, i]]  # fmt: skip
        want = [inverse[0] * one.cos[0, 0] - inverse[1] * one.sin[0, 0],
                inverse[1] * one.cos[0, 0] + inverse[0] * one.sin[0, 0]]  # fmt: skip
        np.testing.assert_allclose(ours, jnp.concatenate(want, axis=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_meshes_recomputation_collecting_and_scans_keep_the_logits(kind):
    config, params, logits, _ = made(kind)
    model, batch = decoder(config), jax.tree.map(lambda x: np.repeat(x, 4, axis=0), packed((3, 9))[1])
    at = {"positions": batch.positions, "segments": batch.segments}
    want = logits(params, batch.inputs, **at)
    with jax.set_mesh(make_mesh(ParallelConfig(fsdp=2, sequence=2))):
        np.testing.assert_allclose(jax.jit(model.logits)(params, batch.inputs, **at), want, rtol=1e-4, atol=1e-5)
    full = jax.jit(lambda p: model.apply(p, batch.inputs, remat="full", collect=Collect(hidden=(1,)), **at))(params)
    np.testing.assert_allclose(model.unembed(params, full.hidden), want, rtol=1e-4, atol=1e-5)


def test_lengths_are_those_of_segments():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0], [4, 4, 0, 0, 0, 0]])
    positions = jnp.asarray([[0, 1, 7, 0, 1, 9], [0, 1, 2, 3, 4, 5]])
    got = lengths_of(segments, positions, segments)
    np.testing.assert_array_equal(got, [[8, 8, 8, 2, 2, 10], [2, 2, 6, 6, 6, 6]])
