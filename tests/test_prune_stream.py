"""Pruned vocabularies: every text can still be written. Rows from the disk: in the order of ``Loader``."""

import json

import jax
import numpy as np
import pytest
from builders import random_params, tiny_decoder
from text_builders import TEXTS, tiny_tokenizer, write_lines

from distill.batch import shift
from distill.data.loader import Loader
from distill.data.packing import Encoded, pack
from distill.data.prepared import prepare
from distill.data.stream import StreamLoader, open_rows
from distill.data.text import TextDataConfig
from distill.students.vocabulary import prune, prune_model, report

TOKENIZER = tiny_tokenizer(True)


@pytest.mark.parametrize("size", [None, 275, 290])
def test_every_text_can_still_be_written(size, tmp_path):
    pruned = prune(TOKENIZER, TEXTS[:2], size)
    small, rng = pruned.tokenizer, np.random.default_rng(0)
    assert len(pruned.ids) == small.vocab_size < TOKENIZER.vocab_size and small.vocab_size <= (size or 999)
    old = {i: token for token, i in TOKENIZER.ids().items()}
    assert small.ids() == {old[i]: new for new, i in enumerate(pruned.ids.tolist())}
    assert small.start == (small.bos_id,) and {small.decode([i], special=True) for i in small.special_ids} == {
        *TOKENIZER.special_tokens
    }
    for _ in range(100):
        letters = [chr(c) for c in rng.integers(32, 0x2FFF, 12)] + list("the quick fox brown</s>") + TEXTS
        text = "".join(rng.choice(letters, 15))
        ids = small.encode(text)
        assert small.decode(ids, special=True) == text
        whole = TOKENIZER.encode(text)
        if set(whole) <= set(pruned.ids.tolist()):  # nothing needed is missing: cut as before
            assert pruned.ids[ids].tolist() == whole
    small.save(tmp_path)
    assert type(small).from_folder(tmp_path).ids() == small.ids()


def test_corpus_is_cut_as_before_and_merges_are_closed():
    pruned = prune(TOKENIZER, TEXTS[:2])
    for text in TEXTS[:2]:
        assert pruned.ids[pruned.tokenizer.encode(text)].tolist() == TOKENIZER.encode(text)
    model = json.loads(pruned.tokenizer.serialized)["model"]
    made = {a + b for a, b in map(tuple, model["merges"])}
    assert {token for token in model["vocab"] if len(token) > 1} - {*TOKENIZER.special_tokens} == made
    assert all(part in model["vocab"] for pair in model["merges"] for part in pair)
    assert "of 315 tokens kept" in report(TOKENIZER, pruned, TEXTS[:2]) and "+0.00%" in report(
        TOKENIZER, pruned, TEXTS[:2]
    )


def test_pruning_what_cannot_be_pruned():
    from tokenizers import Tokenizer, models

    from distill.tokenizer import TextTokenizer

    with pytest.raises(ValueError, match="size=9; bytes and special tokens alone are 261"):
        prune(TOKENIZER, TEXTS, 9)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="kind WordLevel; expected a byte-level BPE"):
        prune(TextTokenizer(words.to_str(), eos="a"), TEXTS)
    model = tiny_decoder()
    with pytest.raises(ValueError, match="ids outside 0 … 10"):
        prune_model(model, random_params(model), np.array([11]))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_kept_tokens_are_as_before(tied):
    model, ids = tiny_decoder(tied=tied), np.array([1, 4, 5, 9])
    params = random_params(model)
    small, cut = prune_model(model, params, ids)
    assert small.vocab_size == 4
    new = np.array([[0, 3, 2, 1, 1]])
    want = model.logits(params, ids[new])[..., ids]
    np.testing.assert_allclose(small.logits(cut, new), want, rtol=1e-5, atol=1e-6)


# Packed = unpacked, per document.
def test_packed_documents_do_not_see_each_other():
    rng, model = np.random.default_rng(0), tiny_decoder()
    found = [Encoded(rng.integers(1, 11, n).astype(np.int32), np.ones(n, bool)) for n in (3, 5, 4, 6, 2, 4, 12)]
    (rows,) = pack(found, 11)
    assert rows.fill == 0.75 and rows.segments.max() == 3
    params, batch = random_params(model), rows.batch()
    apply = jax.jit(model.logits)
    packed = apply(params, batch.inputs, positions=batch.positions, segments=batch.segments)
    for document in found:
        alone = np.zeros((1, 12), np.int32)
        alone[0, : len(document.ids)] = document.ids
        one = shift(np.repeat(alone, 2, 0), np.ones((2, 12)))
        want = apply(params, one.inputs, positions=one.positions, segments=one.segments)[0, : len(document.ids) - 1]
        places = [
            (r, c)
            for r, c in zip(*np.nonzero(batch.positions == 0), strict=True)
            if rows.tokens[r, c : c + len(document.ids)].tolist() == document.ids.tolist()
        ]
        (r, c), *_ = places
        np.testing.assert_allclose(packed[r, c : c + len(document.ids) - 1], want, atol=1e-5)


# ---- rows on the disk


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    path = write_lines(folder / "a.jsonl", [{"text": f"{text} {i}"} for i in range(9) for text in TEXTS])
    config = TextDataConfig(source=str(path), length=24)
    return prepare(config, TOKENIZER, folder)["train"], open_rows(config, TOKENIZER, "train", folder)


def test_rows_from_the_disk_come_in_the_order_of_the_loader(stored):
    rows, source = stored
    loader, stream = Loader(rows.batch(), 6, seed=3), StreamLoader(source, 6, seed=3)
    for k in (0, 17, 5, 2):  # any order: batch k is a function of k
        jax.tree.map(np.testing.assert_array_equal, stream.batch(k), loader.batch(k))


@pytest.mark.parametrize("processes", [2, 3])
def test_order_does_not_depend_on_the_number_of_processes(stored, processes):
    _, source = stored
    places = np.arange(6).reshape(processes, -1)
    parts = [StreamLoader(source, 6, 1, own=own) for own in places]
    for k in (0, 7):
        whole = StreamLoader(source, 6, 1).batch(k)
        for own, part in zip(places, parts, strict=True):
            mine = part.batch(k)
            jax.tree.map(lambda a, b, own=own: np.testing.assert_array_equal(a[own], b[own]), mine, whole)
            assert not np.delete(mine.mask, own, axis=0).any() and mine.inputs.shape == whole.inputs.shape


def test_bad_streams_are_refused(stored):
    with pytest.raises(ValueError, match="0 rows in batches of 2"):
        StreamLoader([], 2, 0)
    with pytest.raises(ValueError, match=r"places \[5, 6\]; expected some of 0 … 5"):
        StreamLoader(stored[1], 6, 0, own=np.array([5, 6]))
