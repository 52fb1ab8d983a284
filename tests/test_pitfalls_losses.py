"""How losses, data and heads of distillation go wrong, and the tests that would see it: a table, and what it lacked."""

import ast
import dataclasses
import functools
import inspect
from pathlib import Path

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

HERE = "test_pitfalls_losses"
FAULTS = {
    1: ("divided by positions, sequences or words", "test_objective: test_mean_is_over_the_counted_tokens"),
    2: (
        "a mean of the means of micro-batches",
        "test_step: test_micro_batches_are_the_whole_batch test_mean_of_means_is_another_number",
    ),
    3: (
        "a mean of the means of devices",
        "test_parallel: test_same_weights_as_on_one_device test_same_metrics_as_on_one_device",
    ),
    5: (
        "divided twice",
        "test_objective: test_repeating_the_batch_changes_nothing; test_step: test_repeating_the_batch_changes_nothing",
    ),
    6: (
        "everything masked is NaN",
        "test_objective: test_nothing_counted_is_zero_with_zero_gradient; test_chunked: test_nothing_counts; "
        "test_step: test_nothing_counted_changes_nothing test_nothing_counted_leaves_adam_finite",
    ),
    7: ("one term summed, the other averaged", "test_objective: test_both_terms_scale_alike"),
    8: ("a mean over the words", "test_divergences: test_three_words_by_hand"),
    9: (
        "no shift, or two",
        "test_step: test_copying_scores_badly_and_foreseeing_perfectly; test_loader: test_label_is_the_next_token",
    ),
    10: (
        "padding carries loss",
        "test_step: test_garbage_in_padding_changes_nothing; test_objective: "
        "test_garbage_where_nothing_counts_changes_nothing; test_chunked: test_garbage_in_padding_changes_nothing",
    ),
    11: (
        "prompts or the output of tools are trained",
        f"{HERE}: test_prompts_and_tool_output_are_read_but_not_trained; "
        "test_addition: test_loss_is_on_the_answer_and_its_end",
    ),
    12: (
        "padding with the end token masks the real end",
        f"{HERE}: test_padding_with_the_end_token_leaves_the_real_end; "
        "test_addition: test_first_end_of_a_written_answer_counts test_pad_and_end_are_two_tokens",
    ),
    13: (
        "packed documents see or count each other",
        "test_models: test_packed_documents_are_as_if_alone; test_step: test_packing_changes_nothing; "
        "test_loader: test_documents_and_padding_in_a_row",
    ),
    14: (
        "loss · mask keeps NaN",
        "test_labels_reduce: test_what_does_not_count_stays_out; "
        "test_objective: test_garbage_where_nothing_counts_changes_nothing",
    ),
    15: (
        "cut on the wrong side; special tokens lost on the way through text",
        f"{HERE}: test_no_token_is_cut_off_or_lost_on_the_way_through_text",
    ),
    16: ("one backend ignores the mask", f"{HERE}: test_every_backend_honours_the_mask"),
    17: (
        "the two KLs exchanged, β reversed",
        "test_divergences: test_three_words_by_hand test_beta_is_the_weight_of_the_teacher "
        "test_ends_of_the_jsd_are_the_kls test_half_way_jsd_is_symmetric_and_bounded; "
        "test_more_divergences: test_skew_is_the_share_of_the_first_argument_of_the_kl",
    ),
    18: ("a mixture averaged in log space", "test_divergences: test_mixture_is_of_probabilities"),
    19: (
        "the teacher's entropy left in",
        "test_divergences: test_self_divergence_is_zero; "
        "test_step: test_student_equal_to_its_teacher_has_nothing_to_learn",
    ),
    20: (
        "T² missing, or in one backend only",
        "test_divergences: test_temperature_only_divides_the_logits; test_objective: "
        "test_temperature_squared_is_a_factor_of_the_soft_term_alone test_gradient_norm_is_flat_in_a_high_temperature; "
        f"{HERE}: test_every_backend_multiplies_by_the_squared_temperature_once",
    ),
    21: (
        "one temperature for sampling and for the loss",
        f"{HERE}: test_the_temperature_of_the_loss_is_not_one_of_sampling",
    ),
    22: (
        "right value, wrong gradient",
        "test_divergences: test_gradient_is_that_of_float64 test_reference_gradients_are_finite_differences; "
        "test_chunked: test_gradients_are_finite_differences test_bfloat16_inputs; "
        "test_step: test_gradient_is_a_finite_difference; test_hidden: test_gradient_is_a_finite_difference_of_float64",
    ),
    23: (
        "words at −inf are NaN",
        "test_divergences: test_words_that_cannot_occur_are_as_if_absent test_one_sided_zero; "
        "test_labels_reduce: test_words_that_cannot_occur_are_as_if_absent",
    ),
    24: (
        "bf16 arithmetic inside a loss",
        "test_divergences: test_value_is_that_of_float64 test_close_distributions_in_bf16_keep_their_distance; "
        "test_labels_reduce: test_sum_is_float32_whatever_the_values; test_models: "
        "test_bfloat16_is_float32_up_to_its_digits",
    ),
    25: (
        "mixtures underflow to log 0",
        "test_divergences: test_extreme_disagreement_stays_finite; test_more_divergences: test_ratios_out_of_range",
    ),
    26: ("a truncated sum called KL, below 0", "test_sparse: test_never_negative"),
    27: ("both sides renormalised on the support", "test_sparse: test_mass_off_the_support_is_punished"),
    28: ("the teacher alone renormalised", "test_sparse: test_bias_of_a_renormalised_teacher"),
    29: ("a reverse KL that mass leaks out of", "test_sparse: test_leaking_mass_raises_the_reverse_kl"),
    30: (
        "cached at one temperature, used at another",
        "test_sparse: test_another_temperature_is_refused_or_exact",
    ),
    31: (
        "cached of another teacher, tokenizer, order or data",
        f"{HERE}: test_another_teacher_tokenizer_or_data_is_refused_naming_both; "
        "test_loader: test_batch_takes_every_field; test_train: test_changed_identity_is_refused_with_the_difference; "
        "test_addition: test_fingerprint_tells_tokenizers_apart",
    ),
    33: (
        "one tokenizer, differently padded, refused",
        "test_vocab: test_padded_rows_carry_no_probability_on_either_side test_sizes_of_qwen "
        "test_garbage_in_padded_rows_changes_nothing; test_chunked: test_padded_words_are_as_if_absent",
    ),
    34: (
        "padded with zero logits",
        "test_vocab: test_identical_models_with_64_padded_rows_score_0 test_zero_logits_would_not_score_0",
    ),
    35: (
        "equal size, other map, accepted",
        "test_vocab: test_equal_size_but_another_map_is_refused_naming_ids",
    ),
    51: (
        "which index is the embedding, which norm is inside",
        "test_collect: test_index_0_is_the_embedding test_last_index_is_before_the_final_norm",
    ),
    52: (
        "hidden losses over padding, or times the width",
        "test_hidden: test_padding_carries_no_hidden_loss test_the_mask_does_not_multiply_by_the_width",
    ),
    53: (
        "a head's bias, scale or softcap forgotten",
        "test_chunked: test_every_head_is_its_definition test_value_and_gradients_are_those_of_the_plain_computation",
    ),
}
"""Row → the fault, and the tests that fail with it."""


@functools.cache
def functions_of(module):
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", FAULTS)
def test_every_fault_has_its_test(row):
    _, listed = FAULTS[row]
    for part in listed.split("; "):
        module, names = part.split(": ")
        assert names.split() and set(names.split()) <= functions_of(module)


def test_no_fault_is_forgotten():
    wanted = {*range(1, 4), *range(5, 32), *range(33, 36), *range(51, 54)}
    assert set(FAULTS) == wanted
    assert len({fault for fault, _ in FAULTS.values()}) == len(FAULTS)


# ---- which positions are trained

SGD = optax.sgd(1.0)  # the parameters move by the gradient
TERMS = terms_of(ObjectiveConfig(temperature=3.0, task_weight=1.0))


def trained_positions(batch):
    """``[B, L]``: where a student whose parameters are its logits has moved, by both terms; and the tokens counted."""
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


# Row 11.
def test_prompts_and_tool_output_are_read_but_not_trained():
    written_by = np.array([list("ppaatttaap"), list("paattaappa")])  # prompt, assistant, tool; two turns
    tokens = np.arange(20).reshape(2, 10) % VOCAB
    batch = shift(tokens, written_by == "a")
    np.testing.assert_array_equal(batch.inputs, tokens[:, :-1])  # all of it is read
    moved, counted = trained_positions(batch)
    np.testing.assert_array_equal(moved, written_by[:, 1:] == "a")
    assert counted == np.sum(written_by == "a")


# Row 12.
def test_padding_with_the_end_token_leaves_the_real_end():
    end = 1
    tokens = np.array([[5, 6, end, end, end, end], [5, 6, 7, 8, end, end], [5, 6, 7, 8, 9, end]])
    segments = np.arange(6) < np.array([[3], [5], [6]])  # the real lengths, the end included
    batch = shift(tokens, np.ones_like(tokens), segments.astype(np.int32))
    moved, _ = trained_positions(batch)
    np.testing.assert_array_equal(moved, segments[:, 1:])
    np.testing.assert_array_equal(np.sum(moved & (batch.labels == end), axis=1), 1)  # one end a row, and it counts


# Row 15.
@pytest.mark.parametrize("reverse", [True, False])
def test_no_token_is_cut_off_or_lost_on_the_way_through_text(reverse):
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


# Row 16.
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_honours_the_mask(backend):
    clean, dirty, whole = (stepped(*which, 1.0) for which in ((backend, 0), (backend, VOCAB - 1), ("whole", 0)))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), clean, whole)
    assert float(clean[1]["loss"][1]) == 1 + 3 + 5 + 7


# Row 20.
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_multiplies_by_the_squared_temperature_once(backend):
    metrics = stepped(backend, 0, 4.0)[1]
    np.testing.assert_allclose(metrics["loss"][0], 16.0 * metrics["forward_kl"][0], rtol=1e-5)
    assert float(metrics["forward_kl"][0]) > 0.01
    norm, of_whole = metrics["gradient_norm"][0], stepped("whole", 0, 4.0)[1]["gradient_norm"][0]
    np.testing.assert_allclose(norm, of_whole, rtol=1e-4)


# ---- temperatures and identities


def owners(value, name):
    """The dataclasses inside a configuration that have a field of which ``name`` is a part."""
    found = set()
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        found |= {type(value)} if name in field.name else set()
        found |= owners(inner, name) if dataclasses.is_dataclass(inner) else set()
    return found


# Row 21.
@pytest.mark.parametrize("config", ["addition", "addition_arms"])
def test_the_temperature_of_the_loss_is_not_one_of_sampling(config):
    assert owners(load_config(config), "temperature") == {ObjectiveConfig}
    assert "temperature" not in inspect.signature(greedy).parameters  # what the teacher writes knows of none


# Row 31.
@pytest.mark.parametrize("what", ["teacher_weights", "tokenizer", "data.split_seed"])
def test_another_teacher_tokenizer_or_data_is_refused_naming_both(what, tmp_path, monkeypatch):
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
