"""Order and shift: batch k depends on k alone; labels are the next tokens of the same document."""

import grain
import jax
import numpy as np
import pytest

from distill.batch import Batch, shift
from distill.data.loader import FEW, Loader, rows_of
from distill.losses import SparseTargets


def numbered(examples: int) -> Batch:
    """Examples with distinct first tokens."""
    tokens = np.arange(examples)[:, None] + np.array([0, 1000, 2000])
    return shift(tokens, np.ones_like(tokens))


@pytest.mark.parametrize(
    ("examples", "batch_size"), [(7, 3), (8, 4), (5, 5), (5, 12), (3, 7), (1, 2), (50, 16)], ids=str
)
@pytest.mark.parametrize("seed", [0, 11, 2**32 - 1])
def test_few_examples_are_ordered_by_philox(examples, batch_size, seed):
    order = []
    for epoch in range(260):
        drawn = np.random.Philox([seed, epoch]).random_raw(examples)
        order += sorted(range(examples), key=drawn.__getitem__)
    loader = Loader(numbered(examples), batch_size, seed)
    for k in (0, 1, 2, 3, 5, 10, 23, 101):  # across many epochs
        np.testing.assert_array_equal(loader.batch(k).inputs[:, 0], order[k * batch_size :][:batch_size])


def test_the_order_of_few_examples_is_pinned():
    want = [[0, 2, 5, 1, 4, 6, 3], [3, 0, 5, 1, 2, 4, 6], [0, 2, 5, 6, 3, 4, 1]]
    np.testing.assert_array_equal(rows_of(7, 7, 11, 0, 3), want)


@pytest.mark.parametrize("examples", [FEW, FEW + 1, 100_003])
@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_many_examples_are_ordered_as_by_grain(examples, seed):
    pipeline = grain.MapDataset.source(range(examples)).shuffle(seed).repeat().batch(48)
    for k in (0, 1, examples // 48 - 1, examples // 48, examples // 48 + 1, 3 * examples // 48):
        np.testing.assert_array_equal(rows_of(examples, 48, seed, k, 1)[0], pipeline[k])


def test_a_batch_is_a_function_of_its_number():
    loader, fresh = Loader(numbered(9), 4, seed=1), Loader(numbered(9), 4, seed=1)
    forwards = [loader.batch(k).inputs for k in range(12)]
    backwards = [fresh.batch(k).inputs for k in reversed(range(12))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    assert len({batch.tobytes() for batch in forwards}) == 12


def test_rows_of_several_batches_equal_those_of_each():
    loader = Loader(numbered(10), 4, seed=2)
    rows = loader.rows(3, 6)
    assert rows.shape == (6, 4) and rows.dtype == np.int32
    np.testing.assert_array_equal(rows, [loader.rows(k, 1)[0] for k in range(3, 9)])


def test_every_example_occurs_once_per_epoch_in_a_new_order():
    rows = Loader(numbered(12), 4, seed=0).rows(0, 6).reshape(2, 12)
    np.testing.assert_array_equal(np.sort(rows, axis=1), [np.arange(12)] * 2)
    assert not np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], Loader(numbered(12), 4, seed=5).rows(0, 3).ravel())


def test_a_batch_selects_rows_of_every_field():
    """Fault: a cache of another teacher, tokenizer, order or data is used."""
    rng = np.random.default_rng(0)
    targets = {"top": SparseTargets(rng.integers(0, 9, (6, 2, 3)), rng.normal(size=(6, 2, 3)), temperature=2.0)}
    examples = numbered(6)._replace(targets=targets | {"logits": rng.normal(size=(6, 2, 9))})
    loader = Loader(examples, 4, seed=3)
    rows, got = loader.rows(5, 1)[0], loader.batch(5)
    jax.tree.map(lambda field, whole: np.testing.assert_array_equal(field, whole[rows]), got, examples)
    assert got.targets["top"].temperature == 2.0
    assert Loader(numbered(6), 4, seed=3).batch(5).targets is None


@pytest.mark.parametrize(("examples", "batch_size"), [(0, 2), (4, 0), (4, -1)])
def test_empty_examples_and_batches_are_refused(examples, batch_size):
    with pytest.raises(ValueError, match=f"{examples} examples in batches of {batch_size}"):
        Loader(numbered(examples), batch_size, seed=0)


# ---- the shift


# Fault: no shift, or two.
def test_labels_are_the_next_tokens():
    tokens = np.array([[5, 6, 7, 8], [1, 2, 3, 4]])
    batch = shift(tokens, np.array([[0, 0, 1, 1], [0, 1, 0, 1]]))
    np.testing.assert_array_equal(batch.inputs, [[5, 6, 7], [1, 2, 3]])
    np.testing.assert_array_equal(batch.labels, [[6, 7, 8], [2, 3, 4]])
    np.testing.assert_array_equal(batch.mask, [[False, True, True], [True, False, True]])  # the segment of the label
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2]] * 2)
    np.testing.assert_array_equal(batch.segments, 1)
    assert {field.dtype for field in batch[:2] + batch[3:5]} == {np.dtype(np.int32)} and batch.mask.dtype == bool


# No label crosses a border or lies in padding; positions restart.
def test_no_label_crosses_documents_or_padding():
    tokens, counts = np.arange(1, 9)[None], np.ones((1, 8))
    batch = shift(tokens, counts, np.array([[1, 1, 1, 2, 2, 0, 0, 0]]))
    np.testing.assert_array_equal(batch.mask, [[True, True, False, True, False, False, False]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0, 1, 0, 1]])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 2, 2, 0, 0]])


def test_a_batch_is_a_pytree():
    doubled = jax.tree.map(lambda field: np.concatenate([field, field]), numbered(3))
    assert isinstance(doubled, Batch) and doubled.inputs.shape == (6, 2)
