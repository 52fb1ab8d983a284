"""The addition data: every pair once, never on both sides, loss on the answer alone."""

import concurrent.futures
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distill.data import addition as module
from distill.data.addition import (
    TOKENIZER,
    AdditionConfig,
    Examples,
    assert_disjoint,
    count_carries,
    encode,
    pairs,
    split_heldout,
)  # fmt: skip
from distill.errors import UserError
from distill.tokenizer import CharacterTokenizer, decode_all

ROOT = Path(__file__).resolve().parents[1]
DIGITS = (1, 2, 3, 4)


def as_set(operands):
    return {tuple(pair) for pair in operands.tolist()}


def unordered(operands):
    return {frozenset(pair) for pair in operands.tolist()}


# ---- pairs and their split


def test_two_digits_have_all_pairs_once_in_equal_halves():
    sides = pairs(AdditionConfig())
    assert len(sides["train"]) == len(sides["test"]) == 5000
    assert as_set(np.concatenate([sides["train"], sides["test"]])) == {(a, b) for a in range(100) for b in range(100)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("digits", DIGITS)
def test_no_unordered_pair_is_on_both_sides(digits, seed):
    sides = pairs(AdditionConfig(digits=digits, split_seed=seed))
    assert not unordered(sides["train"]) & unordered(sides["test"])
    for operands in sides.values():
        assert as_set(operands) == as_set(operands[:, ::-1])  # both orders are on the same side


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("digits", "asked"), [(1, 99), (2, 5000), (2, 9999), (3, 10_000), (4, 10_000), (9, 500)])
def test_the_configured_number_of_distinct_pairs_is_drawn(digits, asked, seed):
    sides = pairs(AdditionConfig(digits=digits, max_examples=asked, split_seed=seed))
    drawn = np.concatenate(list(sides.values()))
    assert len(as_set(drawn)) == len(drawn)
    assert asked - 1 <= len(drawn) <= asked  # both orders or none, so an odd number cannot always be reached
    assert drawn.min() >= 0 and drawn.max() < 10**digits
    assert drawn.max() >= 0.9 * 10**digits


def test_the_seed_decides_the_split():
    first, again, other = (as_set(pairs(AdditionConfig(split_seed=seed))["test"]) for seed in (0, 0, 1))
    assert first == again
    assert 0.3 < len(first & other) / len(first) < 0.7


def test_test_fraction_is_the_share_of_the_test_side():
    sides = pairs(AdditionConfig(test_fraction=0.2))
    assert len(sides["test"]) == 2000 and len(sides["train"]) == 8000


def test_the_validation_side_and_the_test_share_no_pair():
    """Curves and the choice of a checkpoint look at a tenth of the held-out pairs, the test at the others."""
    config = AdditionConfig()
    heldout = encode(config, pairs(config)["test"])
    sides = split_heldout(config, heldout)
    assert_disjoint(config, sides["validation"], sides["test"])
    assert len(sides["validation"].tokens) == pytest.approx(500, rel=0.02)
    together = np.concatenate([sides["validation"].tokens, sides["test"].tokens])
    np.testing.assert_array_equal(np.unique(together, axis=0), np.unique(heldout.tokens, axis=0))
    assert len(together) == len(heldout.tokens)
    with pytest.raises(UserError, match="1 held-out pair; expected one to validate on and one to test on"):
        split_heldout(config, encode(config, np.array([[1, 2], [2, 1]])))


def test_a_pair_on_both_sides_is_detected():
    config = AdditionConfig()
    left, right = encode(config, np.array([[12, 34], [5, 6]])), encode(config, np.array([[34, 12], [7, 8]]))
    with pytest.raises(ValueError, match=r"34\+12"):
        assert_disjoint(config, left, right)
    assert_disjoint(config, left, right.take(np.array([1])))


# ---- encoding


@pytest.mark.parametrize(("reverse", "answer"), [(True, "231"), (False, "132")])
def test_answers_in_both_orders_of_digits(reverse, answer):
    config = AdditionConfig(reverse=reverse)
    examples = encode(config, np.array([[47, 85], [5, 7]]))
    assert decode_all(TOKENIZER, examples.prompts(config)) == ["47+85=", "05+07="]
    assert decode_all(TOKENIZER, examples.answers(config)) == [answer, "210" if reverse else "012"]
    np.testing.assert_array_equal(examples.answers(config)[:, -1], TOKENIZER.eos_id)
    assert config.value(answer) == "132" and config.value("210" if reverse else "012") == "12"
    assert config.value("000") == "0"


@pytest.mark.parametrize("digits", DIGITS)
def test_answers_are_right(digits):
    config = AdditionConfig(digits=digits, max_examples=200)
    operands = pairs(config)["train"]
    examples = encode(config, operands)
    assert examples.tokens.shape == (len(operands), 3 * digits + 4) and examples.tokens.dtype == np.int32
    for (a, b), prompt, answer in zip(
        operands,
        decode_all(TOKENIZER, examples.prompts(config)),
        decode_all(TOKENIZER, examples.answers(config)),
        strict=True,
    ):
        assert config.parse(prompt) == (a, b)
        assert int(answer[::-1]) == a + b and len(answer) == digits + 1


@pytest.mark.parametrize("digits", DIGITS)
def test_carries_match_addition_by_hand(digits):
    rng = np.random.default_rng(digits)
    operands = rng.integers(0, 10**digits, (300, 2))
    operands[:2] = [[10**digits - 1, 1], [10**digits - 1, 10**digits - 1]]  # a chain of carries
    by_hand = []
    for a, b in operands.tolist():
        carry = carries = 0
        for _ in range(digits):
            carry = int(a % 10 + b % 10 + carry >= 10)
            carries, a, b = carries + carry, a // 10, b // 10
        by_hand.append(carries)
    np.testing.assert_array_equal(count_carries(operands[:, 0], operands[:, 1], digits), by_hand)
    np.testing.assert_array_equal(encode(AdditionConfig(digits=digits), operands).carries, by_hand)
    assert by_hand[:2] == [digits, digits] and len(set(by_hand)) == digits + 1


# The loss is on the answer including its end; each label follows its input.
@pytest.mark.parametrize("reverse", [True, False])
def test_loss_is_on_the_answer_and_its_end(reverse):
    config = AdditionConfig(reverse=reverse)
    examples = encode(config, np.array([[47, 85], [5, 7], [99, 99]]))
    batch = examples.batch(config)
    np.testing.assert_array_equal(batch.inputs, examples.tokens[:, :-1])
    np.testing.assert_array_equal(batch.labels, examples.tokens[:, 1:])
    assert not batch.mask[:, : config.prompt_length - 1].any() and batch.mask[:, config.prompt_length - 1 :].all()
    np.testing.assert_array_equal(batch.labels[batch.mask].reshape(3, -1), examples.answers(config))
    assert batch.mask.dtype == bool


def test_a_generated_answer_counts_up_to_its_first_end():
    config, eos = AdditionConfig(), TOKENIZER.eos_id
    examples = encode(config, np.array([[47, 85]] * 4))
    written = np.array([[5, eos, 0, 0], [eos, eos, eos, eos], [5, 4, 3, eos], [5, 4, 3, 2]], np.int32)
    rewritten = examples.with_answers(config, written)
    np.testing.assert_array_equal(rewritten.prompts(config), examples.prompts(config))
    batch = rewritten.batch(config)
    want = [[True, True, False, False], [True, False, False, False], [True] * 4, [True] * 4]
    np.testing.assert_array_equal(batch.mask[:, config.prompt_length - 1 :], want)
    assert not batch.mask[:, : config.prompt_length - 1].any()


def test_pad_and_end_are_two_tokens():
    """Fault: padding with the end token masks the real end."""
    assert len({TOKENIZER.pad_id, TOKENIZER.eos_id, *TOKENIZER.encode("0123456789+=")}) == TOKENIZER.vocab_size == 14
    assert TOKENIZER.decode([2, 0, 3, 1, 4]) == "01"


def test_unknown_characters_are_named():
    with pytest.raises(ValueError, match="'-'"):
        TOKENIZER.encode("1-2")


def test_fingerprints_of_tokenizers_differ():
    """Fault: a cache of another teacher, tokenizer, order or data is used."""
    same, other = CharacterTokenizer("0123456789+="), CharacterTokenizer("0123456789=+")
    assert TOKENIZER.fingerprint() == same.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("text", ["47", "47+", "4x+1", "1+2+3", "100+1", "-1+2", "²+1", ""])
def test_other_prompts_are_refused(text):
    with pytest.raises(ValueError, match="prompt"):
        AdditionConfig().parse(text)
    assert AdditionConfig().parse("5 + 7") == AdditionConfig().parse("05+07=") == (5, 7)


@pytest.mark.parametrize(
    "options",
    [{"digits": 0}, {"digits": 10}, {"test_fraction": 0.0}, {"test_fraction": 1.0}, {"max_examples": 3}],
)
def test_impossible_data_is_refused(options):
    with pytest.raises(ValueError, match=f"data: {next(iter(options))}"):
        AdditionConfig(**options)


# ---- storage


def test_stored_examples_equal_encoded_ones(addition):
    config, sides = addition
    for side, operands in pairs(config).items():
        want = encode(config, operands)
        assert isinstance(sides[side], Examples) and len(want.tokens) in (49, 51)
        for stored, encoded in zip(sides[side], want, strict=True):
            np.testing.assert_array_equal(stored, encoded)
            assert stored.dtype == np.int32


def contents(folder: Path):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_preparing_twice_gives_the_same_bytes(tmp_path):
    config = AdditionConfig(digits=1)
    for name in ("first", "second"):
        module.load(config, tmp_path / name)
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert any("array_record" in name for name in first)
    assert first == second
    module.load(config, tmp_path / "first")  # the third time only reads
    assert contents(tmp_path / "first") == second


def test_two_processes_may_prepare_at_once(tmp_path):
    """Of runs that start together on a new machine one writes the examples and the others wait."""
    config = AdditionConfig(digits=1)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: module.load(config, tmp_path)["train"].tokens, range(4)))
    for tokens in found:
        np.testing.assert_array_equal(tokens, encode(config, pairs(config)["train"]).tokens)


def test_other_settings_are_stored_in_another_folder(tmp_path):
    config = AdditionConfig(digits=1)
    first = module.load(config, tmp_path)
    for change in ({"reverse": False}, {"split_seed": 1}, {"test_fraction": 0.2}):
        other = module.load(dataclasses.replace(config, **change), tmp_path)
        assert not np.array_equal(other["train"].tokens, first["train"].tokens)
    for stored, again in zip(first["train"], module.load(config, tmp_path)["train"], strict=True):
        np.testing.assert_array_equal(stored, again)


def test_tensorflow_is_never_imported(tmp_path):
    decoy = tmp_path / "tensorflow"
    decoy.mkdir()
    (decoy / "__init__.py").write_text("raise SystemExit('tensorflow was imported')")
    code = f"from distill.data.addition import *; print(len(load(AdditionConfig(digits=1), {str(tmp_path)!r})))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "2"
