"""How losses, data and heads of distillation go wrong: the faults that no other file of tests would see."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import VOCAB, random_params, tiny_decoder

from distill import losses
from distill.batch import shift
from distill.checkpoint import refuse_changes
from distill.config import load_config
from distill.data.addition import TOKENIZER, AdditionConfig, encode
from distill.experiments.addition import measure
from distill.experiments.fingerprints import of_tree
from distill.generation.sampler import greedy
from distill.models import Model, Output
from distill.objective import ObjectiveConfig, terms_of
from distill.state import init_state
from distill.step import make_train_step
from distill.tokenizer import CharacterTokenizer

# ---- which positions are trained

SGD = optax.sgd(1.0)  # so that parameters change by the gradient
TERMS = terms_of(ObjectiveConfig(temperature=3.0, task_weight=1.0))


def trained_positions(batch):
    """``[B, L]``: positions at which a student whose parameters are its logits changed, and the counted tokens."""
    shape = (*batch.inputs.shape, VOCAB)
    student = Model(
        init=lambda key: {"logits": jnp.zeros(shape)},
        apply=lambda params, tokens, **_: Output(params["logits"]),
        unembed=lambda params, hidden: hidden,
        vocab_size=VOCAB,
    )
    state = init_state(student.init(jax.random.key(0)), SGD)
    other = {"logits": jax.random.normal(jax.random.key(1), shape)}
    new, metrics = jax.jit(make_train_step(student, TERMS, SGD, teacher=student))(state, other, batch)
    return np.any(np.asarray(new.params["logits"]) != 0.0, axis=-1), float(metrics["loss"][1])


def test_prompts_and_tool_output_are_read_but_not_trained():
    """Fault: prompts or the output of tools are trained."""
    written_by = np.array([list("ppaatttaap"), list("paattaappa")])  # prompt, assistant, tool; two turns
    tokens = np.arange(20).reshape(2, 10) % VOCAB
    batch = shift(tokens, written_by == "a")
    np.testing.assert_array_equal(batch.inputs, tokens[:, :-1])  # all of it is input
    moved, counted = trained_positions(batch)
    np.testing.assert_array_equal(moved, written_by[:, 1:] == "a")
    assert counted == np.sum(written_by == "a")


def test_padding_with_the_end_token_keeps_the_real_end():
    """Fault: padding with the end token masks the real end."""
    end = 1
    tokens = np.array([[5, 6, end, end, end, end], [5, 6, 7, 8, end, end], [5, 6, 7, 8, 9, end]])
    segments = np.arange(6) < np.array([[3], [5], [6]])  # the real lengths, the end included
    batch = shift(tokens, np.ones_like(tokens), segments.astype(np.int32))
    moved, _ = trained_positions(batch)
    np.testing.assert_array_equal(moved, segments[:, 1:])
    np.testing.assert_array_equal(np.sum(moved & (batch.labels == end), axis=1), 1)  # one end per row, and it counts


@pytest.mark.parametrize("reverse", [True, False])
def test_no_token_is_cut_off_or_lost_in_a_round_trip_through_text(reverse):
    """Fault: cut on the wrong side; special tokens lost on the way through text."""
    config = AdditionConfig(digits=2, reverse=reverse)
    operands = np.array([[0, 0], [99, 99], [7, 85], [10, 0]])
    examples = encode(config, operands)
    for (a, b), row, prompt, answer in zip(
        operands.tolist(), examples.tokens, examples.prompts(config), examples.answers(config), strict=True
    ):
        text = TOKENIZER.decode(row)
        assert text == config.prompt(a, b) + config.answer(a, b)
        assert row.tolist() == [*TOKENIZER.encode(text), TOKENIZER.eos_id] == [*prompt, *answer]
        assert TOKENIZER.decode(prompt) == config.prompt(a, b) and int(config.value(TOKENIZER.decode(answer))) == a + b
        assert len(prompt) == config.prompt_length and len(answer) == config.answer_length


# ---- every way of computing the loss

STUDENT, TEACHER = tiny_decoder(layers=1, feed_forward=14), tiny_decoder(layers=1, width=12, head_dim=4)
BACKENDS = {
    "whole": {"teacher": TEACHER, "chunk_size": 0},
    "chunks": {"teacher": TEACHER, "chunk_size": 3},
    "micro-batches": {"teacher": TEACHER, "chunk_size": 0, "micro_batches": 2},
    "chunks of micro-batches": {"teacher": TEACHER, "chunk_size": 3, "micro_batches": 2},
    "stored logits": {},
}


@functools.cache
def both_params():
    return random_params(STUDENT), random_params(TEACHER, seed=1)


def padded(filler):
    """Four rows of 2, 4, 6 and 8 tokens in 8 places; ids, labels and stored logits of the padding are ``filler``."""
    segments = (np.arange(8) < np.array([[2], [4], [6], [8]])).astype(np.int32)
    tokens = np.where(segments > 0, np.random.default_rng(2).integers(0, VOCAB, (4, 8)), filler)
    batch = jax.tree.map(jnp.asarray, shift(tokens, np.ones_like(tokens), segments))
    logits = TEACHER.logits(both_params()[1], batch.inputs, positions=batch.positions, segments=batch.segments)
    logits = jnp.where(batch.mask[..., None], logits, jnp.nan if filler else 0.0)
    labels = jnp.where(batch.mask, batch.labels, -100 if filler else 0)
    return batch._replace(labels=labels, targets=losses.DenseTargets(logits))


@functools.cache
def stepped(backend, filler, temperature):
    """New parameters and metrics of a step."""
    params, teacher_params = both_params()
    terms = terms_of(ObjectiveConfig(temperature=temperature))
    step = jax.jit(make_train_step(STUDENT, terms, SGD, **BACKENDS[backend]))
    batch = padded(filler)
    if backend != "stored logits":
        batch = batch._replace(targets=None)
    new, metrics = step(init_state(params, SGD), teacher_params, batch)
    return new.params, metrics


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_honours_the_mask(backend):
    """Fault: one backend ignores the mask."""
    clean, dirty, whole = (stepped(*which, 1.0) for which in ((backend, 0), (backend, VOCAB - 1), ("whole", 0)))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), clean, whole)
    assert float(clean[1]["loss"][1]) == 1 + 3 + 5 + 7


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_multiplies_by_the_squared_temperature_once(backend):
    """Fault: T² missing, or in one backend only."""
    metrics = stepped(backend, 0, 4.0)[1]
    np.testing.assert_allclose(metrics["loss"][0], 16.0 * metrics["forward_kl"][0], rtol=1e-5)
    assert float(metrics["forward_kl"][0]) > 0.01
    norm, of_whole = metrics["gradient_norm"][0], stepped("whole", 0, 4.0)[1]["gradient_norm"][0]
    np.testing.assert_allclose(norm, of_whole, rtol=1e-4)


# ---- temperatures and identities


def owners(value, name):
    """The dataclasses inside a configuration with a field whose name contains ``name``."""
    found = set()
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        found |= {type(value)} if name in field.name else set()
        found |= owners(inner, name) if dataclasses.is_dataclass(inner) else set()
    return found


@pytest.mark.parametrize("config", ["addition", "addition_arms"])
def test_the_temperature_of_the_loss_does_not_affect_sampling(config):
    """Fault: one temperature for sampling and for the loss."""
    assert owners(load_config(config), "temperature") == {ObjectiveConfig}
    assert "temperature" not in inspect.signature(greedy).parameters  # the teacher's answers do not depend on one


@pytest.mark.parametrize("what", ["teacher_weights", "tokenizer", "data.split_seed"])
def test_another_teacher_tokenizer_or_data_is_refused_naming_both(what, tmp_path, monkeypatch):
    """Fault: a cache of another teacher, tokenizer, order or data is used."""
    config, params = load_config("addition"), random_params(TEACHER)
    before = measure.identity_of(config, "data", teacher_weights=of_tree(params))
    refuse_changes(tmp_path, before, before)
    if what == "teacher_weights":
        params = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].multiply(1.0 + 2.0**-23), params)
    if what == "tokenizer":
        monkeypatch.setattr(measure, "TOKENIZER", CharacterTokenizer("0123456789=+"))
    if what == "data.split_seed":
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, split_seed=1))
    after = measure.identity_of(config, "data", teacher_weights=of_tree(params))
    sides = ("0", "1") if what == "data.split_seed" else (before[what], after[what])
    assert sides[0] != sides[1]
    with pytest.raises(ValueError, match=f"{what}: .?{sides[0]}.? → .?{sides[1]}"):
        refuse_changes(tmp_path, before, after)
