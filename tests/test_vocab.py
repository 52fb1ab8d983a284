"""Two vocabularies: equal, padded, different."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from distill import losses
from distill.vocab import Alignment, align, mask_padding, token_ids

WORDS = 10
DIVERGENCES = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    **{f"jsd_{beta}": (lambda s, t, beta=beta: losses.generalized_jsd(s, t, beta=beta)) for beta in (0.1, 0.5, 0.9)},
}


def tokens_of(text: str) -> dict[str, int]:
    return {word: i for i, word in enumerate(text.split())}


def logits_of(rows: int, seed: int):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(4, 5, rows)), jnp.float32)


@pytest.fixture(params=DIVERGENCES)
def divergence(request):
    return DIVERGENCES[request.param]


# ---- one tokenizer, embeddings padded to different numbers of rows


def test_equal_vocabularies_pass_without_a_message(caplog):
    tokens = tokens_of("<pad> <eos> a b c")
    with caplog.at_level(logging.INFO, logger="distill"):
        alignment = align(tokens, dict(reversed(tokens.items())), 5, 5)  # the order of a dict is irrelevant
    assert alignment == Alignment(5, 5, 5) and not caplog.records
    student, teacher = logits_of(5, 0), logits_of(5, 1)
    matched = alignment.match(student, teacher)
    assert matched[0] is student and matched[1] is teacher


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(12, 16), (16, 12), (16, 16), (10, 12)])
def test_padded_rows_have_no_probability_on_either_side(divergence, student_rows, teacher_rows):
    """Fault: one tokenizer with different padding is refused."""
    alignment = Alignment(WORDS, student_rows, teacher_rows)
    student, teacher = logits_of(student_rows, 0), logits_of(teacher_rows, 1)

    def loss(student, teacher):
        return jnp.sum(divergence(*alignment.match(student, teacher)))

    def sliced(student, teacher):
        return jnp.sum(divergence(student[..., :WORDS], teacher[..., :WORDS]))

    value, slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(student, teacher)
    want, expected = jax.jit(jax.value_and_grad(sliced, argnums=(0, 1)))(student, teacher)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    assert value > 1.0
    for slope, right in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(slope, right, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(slope[..., WORDS:], 0.0)
    for logits in alignment.match(student, teacher):
        assert logits.shape[-1] == min(student_rows, teacher_rows)
        np.testing.assert_array_equal(jax.nn.softmax(logits)[..., WORDS:], 0.0)


def test_garbage_in_padded_rows_changes_nothing(divergence):
    """Fault: one tokenizer with different padding is refused."""
    alignment, student, teacher = Alignment(WORDS, 12, 14), logits_of(12, 0), logits_of(14, 1)

    def loss(student, teacher):
        return jnp.sum(divergence(*alignment.match(student, teacher)))

    want = jax.value_and_grad(loss)(student, teacher)
    for garbage in (jnp.nan, jnp.inf, 1e30):
        got = jax.value_and_grad(loss)(student.at[..., WORDS:].set(garbage), teacher.at[..., WORDS:].set(garbage))
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_padding_is_logged_in_one_line(caplog):
    tokens = {f"t{i}": i for i in range(20)}
    with caplog.at_level(logging.INFO, logger="distill"):
        assert align(tokens, tokens, 24, 32) == Alignment(20, 24, 32)
    (record,) = caplog.records
    assert record.name == "distill.vocab" and "\n" not in record.getMessage()
    assert all(text in record.getMessage() for text in ("below 20", "4 of the student's 24", "12 of the teacher's 32"))


def test_the_sizes_of_qwen_are_aligned():
    """Fault: one tokenizer with different padding is refused."""
    tokens = {f"t{i}": i for i in range(151_665)}
    assert align(tokens, tokens, 151_936, 152_064).vocab_size == 151_665


# ---- padded with zero logits


def test_identical_models_with_64_padded_rows_score_0(divergence):
    """Fault: padded with zero logits."""
    logits = logits_of(WORDS, 0)
    padded = jnp.concatenate([logits, logits_of(64, 1)], axis=-1)
    alignment = Alignment(WORDS, WORDS + 64, WORDS)
    student, teacher = alignment.match(padded, logits)
    np.testing.assert_allclose(divergence(student, teacher), 0.0, atol=1e-6)
    slope = jax.grad(lambda s: jnp.sum(divergence(*alignment.match(s, logits))))(padded)
    np.testing.assert_array_equal(slope[..., WORDS:], 0.0)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)


def test_zero_logits_would_not_score_0(divergence):
    """Fault: padded with zero logits."""
    logits = logits_of(WORDS, 0)
    student = jnp.concatenate([logits, logits_of(64, 1)], axis=-1)
    teacher = jnp.pad(logits, ((0, 0), (0, 0), (0, 64)))  # the fault: padded with zeros
    assert np.all(divergence(student, teacher) > 0.01)
    masked = divergence(mask_padding(student, WORDS), mask_padding(teacher, WORDS))
    np.testing.assert_allclose(masked, 0.0, atol=1e-6)


def test_the_mask_needs_as_many_rows_as_tokens():
    with pytest.raises(ValueError, match=r"3 rows.*vocab_size=4"):
        mask_padding(jnp.zeros(3), 4)
    with pytest.raises(ValueError, match=r"teacher logits have 5 rows; expected 6"):
        Alignment(4, 4, 6).match(jnp.zeros(4), jnp.zeros(5))


# ---- equal sizes, different tokens


def test_equal_sizes_with_another_map_are_refused_with_the_ids():
    """Fault: vocabularies of equal size but another map are accepted."""
    with pytest.raises(ValueError) as error:
        align(tokens_of("<pad> a b c d"), tokens_of("<pad> a c b d"), 8, 8)
    text = str(error.value)
    assert "2 ids" in text and "2 is 'b' and 'c'" in text and "3 is 'c' and 'b'" in text
    assert "1 is" not in text and "4 is" not in text and "tokenizer" in text


def test_an_error_names_only_the_first_ids():
    student, teacher = {f"s{i}": i for i in range(1000)}, {f"t{i}": i for i in range(1000)}
    with pytest.raises(ValueError, match=r"1000 ids.* 0 is 's0' and 't0', .*4 is 's4' and 't4', …") as error:
        align(student, teacher, 1000, 1000)
    assert "5 is" not in str(error.value) and len(str(error.value)) < 500


def test_a_token_on_one_side_only_is_a_difference():
    with pytest.raises(ValueError, match="1 ids different meanings: 3 is nothing and 'c'"):
        align(tokens_of("<pad> a b"), tokens_of("<pad> a b c"), 4, 4)
    with pytest.raises(ValueError, match="1 ids different meanings: 2 is 'b'/'c' and 'b'"):
        align({"a": 1, "b": 2, "c": 2}, {"a": 1, "b": 2}, 4, 4)


def test_tokens_without_a_row_are_refused():
    tokens = tokens_of("<pad> a b c")
    with pytest.raises(ValueError, match="the student has 3 rows of logits for ids up to 3"):
        align(tokens, tokens, 3, 4)
    with pytest.raises(ValueError, match="the teacher has 2 rows"):
        align(tokens, tokens, 4, 2)
    with pytest.raises(ValueError, match="without tokens"):
        align({}, {}, 3, 4)


# ---- tokenizers of other libraries


def trained(text: str, *added: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<pad>"], show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in added])
    return tokenizer


def test_tokenizers_with_added_tokens():
    text = "the cat sat on the mat while the other cat sat on the hat"
    one, other = trained(text, "<eos>", "<user>"), trained(text, "<eos>", "<user>")
    tokens = token_ids(one)
    assert tokens["<user>"] == len(tokens) - 1 == one.token_to_id("<user>")
    assert list(tokens.values()) == list(range(one.get_vocab_size()))
    assert align(tokens, token_ids(other), 64, 128).vocab_size == one.get_vocab_size()
    swapped = token_ids(trained(text, "<user>", "<eos>"))
    assert len(swapped) == len(tokens)
    with pytest.raises(ValueError, match=f"2 ids.*: {len(tokens) - 2} is '<eos>' and '<user>'"):
        align(tokens, swapped, 64, 64)


def test_tokenizers_wrapped_by_transformers():
    transformers = pytest.importorskip("transformers")
    tokenizer = trained("ab abc abcd bcd", "<eos>")
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert token_ids(wrapped) == token_ids(tokenizer)
    wrapped.add_special_tokens({"pad_token": "<fill>"})
    with pytest.raises(ValueError, match=f"1 ids.*: {len(token_ids(tokenizer))} is '<fill>' and nothing"):
        align(token_ids(wrapped), token_ids(tokenizer), 64, 64)


def test_an_object_without_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="str has no get_vocab"):
        token_ids("gpt2")
