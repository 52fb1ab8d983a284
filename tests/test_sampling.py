"""Greedy decoding with the cache equals decoding without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from builders import VOCAB, nnx_model, random_params, tiny, tiny_decoder

from distill.generation.sampler import greedy
from distill.models import Model, Output, decoder

ROWS, PROMPT, NEW = 24, 4, 6


@pytest.fixture(scope="module")
def case():
    model = tiny_decoder()
    prompts = np.random.default_rng(0).integers(0, VOCAB, (ROWS, PROMPT))
    return model, random_params(model), jnp.asarray(prompts, jnp.int32)


@pytest.fixture(scope="module")
def endless(case):
    """``[ROWS, NEW]`` argmax tokens by a full forward pass over all tokens so far, without an end token."""
    model, params, text = case
    logits = jax.jit(model.logits)
    for _ in range(NEW):
        padded = jnp.pad(text, ((0, 0), (0, PROMPT + NEW - text.shape[1])))  # causal: later positions have no effect
        following = jnp.argmax(logits(params, padded)[:, text.shape[1] - 1], axis=-1)
        text = jnp.concatenate([text, following[:, None].astype(jnp.int32)], axis=1)
    return np.asarray(text[:, PROMPT:])


def test_greedy_decoding_equals_the_naive_loop(case, endless):
    model, params, prompts = case
    written = greedy(model, params, prompts, max_new_tokens=NEW, eos_ids=(VOCAB,))  # an id that is never generated
    assert written.shape == (ROWS, NEW) and written.dtype == jnp.int32
    assert len(np.unique(endless)) > 3
    np.testing.assert_array_equal(written, endless)


# The end token is generated once, then padding; other rows continue.
def test_decoding_stops_at_the_end_token_and_pads_after_it(case, endless):
    model, params, prompts = case
    eos = int(np.bincount(endless[:, 1:4].ravel()).argmax())  # a token that some rows generate halfway
    ended = np.cumsum(endless == eos, axis=1) - (endless == eos) > 0
    assert 0 < np.sum(ended.any(axis=1)) < ROWS
    written = greedy(model, params, prompts, max_new_tokens=NEW, eos_ids=(eos,), pad_id=VOCAB - 1)
    np.testing.assert_array_equal(written, np.where(ended, VOCAB - 1, endless))


def test_each_stop_token_ends_a_row(case, endless):
    model, params, prompts = case
    stops = tuple(np.unique(endless[:, 1:4]).tolist()[:3])
    ended = np.cumsum(np.isin(endless, stops), axis=1) - np.isin(endless, stops) > 0
    assert all((np.isin(endless, stops) & ~ended)[endless == one].any() for one in stops)  # each ends a row
    written = greedy(model, params, prompts, max_new_tokens=NEW, eos_ids=stops, pad_id=VOCAB - 1)
    np.testing.assert_array_equal(written, np.where(ended, VOCAB - 1, endless))
    never = greedy(model, params, prompts, max_new_tokens=NEW, eos_ids=())
    np.testing.assert_array_equal(never, endless)


def test_jit_does_not_change_the_tokens(case, endless):
    model, params, prompts = case
    written = jax.jit(lambda p, x: greedy(model, p, x, max_new_tokens=NEW, eos_ids=(VOCAB,)))(params, prompts)
    np.testing.assert_array_equal(written, endless)


def test_decoding_a_single_token(case, endless):
    model, params, prompts = case
    np.testing.assert_array_equal(greedy(model, params, prompts, max_new_tokens=1, eos_ids=(VOCAB,)), endless[:, :1])


def test_decoding_ends_early_when_every_row_has_ended():
    calls = []

    def apply(params, tokens, cache):
        jax.debug.callback(lambda: calls.append(1))
        return Output(jax.nn.one_hot(jnp.ones_like(tokens), 3), cache)

    always_eos = Model(dict, apply, lambda params, hidden: hidden, 3, init_cache=lambda batch, length: jnp.zeros(()))
    written = greedy(always_eos, {}, jnp.zeros((2, 3), jnp.int32), max_new_tokens=50, eos_ids=(1,))
    jax.effects_barrier()
    np.testing.assert_array_equal(written, [[1] + [0] * 49] * 2)
    assert len(calls) == 2  # the prompt and the next token


def test_a_model_without_a_cache_is_refused():
    model = nnx_model()
    with pytest.raises(ValueError, match="init_cache"):
        greedy(model, model.init(jax.random.key(0)), jnp.zeros((1, 2), jnp.int32), max_new_tokens=2, eos_ids=(1,))


@pytest.mark.parametrize(("prompt", "new"), [(0, 3), (2, 0)])
def test_decoding_nothing_is_refused(case, prompt, new):
    model, params, prompts = case
    with pytest.raises(ValueError, match=f"prompts of {prompt} tokens, max_new_tokens={new}"):
        greedy(model, params, prompts[:, :prompt], max_new_tokens=new, eos_ids=(1,))


# At this size, the last written token fills the last slot; one more column of learned positions would not exist.
def test_decoding_fills_the_cache_to_its_last_slot():
    model = tiny_decoder(positions="learned", max_length=PROMPT + NEW)
    params, prompts = random_params(model), jnp.ones((2, PROMPT), jnp.int32)
    written = greedy(model, params, prompts, max_new_tokens=NEW, eos_ids=(VOCAB,))
    text = jnp.concatenate([prompts, written], axis=1)
    np.testing.assert_array_equal(jnp.argmax(model.logits(params, text), -1)[:, PROMPT - 1 : -1], written)
    with pytest.raises(ValueError, match=f"a text of {PROMPT + NEW + 1} tokens; expected at most {PROMPT + NEW}"):
        greedy(model, params, prompts, max_new_tokens=NEW + 1, eos_ids=(VOCAB,))


@pytest.mark.parametrize("window", [1, 3, PROMPT + NEW])
def test_a_window_decodes_to_the_last_slot(window):
    """Layers with and without the window, against argmax of whole forward passes in float64."""
    config = tiny(sliding_window=window, window_layers=(True, False), layers=2)
    model = decoder(config)
    params, prompts = random_params(model, 3), np.random.default_rng(2).integers(0, VOCAB, (3, PROMPT))
    write = jax.jit(lambda p, x: greedy(model, p, x, max_new_tokens=NEW, eos_ids=(VOCAB,)))
    written = write(params, jnp.asarray(prompts))
    text = np.concatenate([prompts, written], axis=1)
    want = np.argmax(reference.decoder_logits(config, params, text), axis=-1)
    np.testing.assert_array_equal(written, want[:, PROMPT - 1 : -1])
