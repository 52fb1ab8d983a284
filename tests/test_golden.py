"""Windows of a text and the golden numbers on them. A script measures the published model itself."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from builders import VOCAB, handmade

from distill.reproduce import golden


def test_nats_and_top1_are_those_of_the_next_token():
    rows = golden.windows(list(np.arange(40) % VOCAB), count=9, length=4)
    assert rows.shape == (9, 5) and (rows[1:, 0] == rows[:-1, -1]).all() and rows[-1, -1] == 39 % VOCAB
    sure = handmade(lambda tokens: 4.0 * jnp.eye(VOCAB)[(tokens + 1) % VOCAB])
    nats, top1 = golden.measure(sure, sure.init(None), rows)
    assert nats == pytest.approx(np.log(np.exp(4.0) + VOCAB - 1) - 4.0) and top1 == 1.0


def test_a_short_text_is_refused():
    with pytest.raises(ValueError, match="the text has 3 tokens; 2 windows of 4 need 9"):
        golden.windows([1, 2, 3], count=2, length=4)


def test_a_number_that_differs_is_an_error(monkeypatch, tmp_path):
    class Letters:
        def encode(self, text):
            return type("Encoding", (), {"ids": [ord(letter) % VOCAB for letter in text]})

    model = handmade(lambda tokens: jnp.zeros((*tokens.shape, VOCAB)))
    monkeypatch.setattr(golden.fetch, "fetch", lambda what, folder: tmp_path)
    monkeypatch.setattr(golden, "GGUFSource", lambda path: SimpleNamespace(path=path))
    monkeypatch.setattr(golden, "tokenizer_of", lambda source: Letters())
    monkeypatch.setattr(golden, "load", lambda source: (model, model.init(None)))
    monkeypatch.setattr(golden, "topics", lambda: "topic " * 2000)
    monkeypatch.setattr(golden, "chitchat", lambda folder: "a" * 9000)
    lines = golden.smollm2(tmp_path)
    assert len(lines) == 2 and all(f"{np.log(VOCAB):.4f} nats" in line and "nothing stored" in line for line in lines)

    digest = golden.hashlib.sha256(b"a" * 9000).hexdigest()
    first = float(ord("a") % VOCAB == 0)
    monkeypatch.setitem(golden.GOLDEN, "chitchat", golden.Golden(digest, float(np.log(VOCAB)), first))
    assert "transformers 2.3979" in golden.smollm2(tmp_path)[1]
    monkeypatch.setitem(golden.GOLDEN, "chitchat", golden.Golden(digest, 2.0, first))
    with pytest.raises(RuntimeError, match="not the stored numbers on chitchat"):
        golden.smollm2(tmp_path)
