"""Every family of encoders against transformers: states, logits, gradients, folders that both open: ``make parity``.

``python tests/parity/encoders.py`` writes what ``tests/test_encoder_families.py`` compares with, where it has changed.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import stored
import torch
import transformers

DATA = Path(__file__).resolve().parents[1] / "data" / "encoders"
LENGTH, VOCAB = 12, 23
BERT = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 14,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-3,
}
DISTILBERT = {"dim": 12, "n_layers": 2, "n_heads": 4, "hidden_dim": 14, "max_position_embeddings": 16}
MODERNBERT = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 10,
    "max_position_embeddings": 64,
    "norm_eps": 1e-3,
    "local_attention": 6,
    "cls_token_id": None,
    "sep_token_id": None,
}
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}
CASES = {
    "bert": ("bert", "AutoModel", BERT),
    "bert_mlm": ("bert", "AutoModelForMaskedLM", BERT | {"hidden_act": "gelu_new", "type_vocab_size": 3}),
    "distilbert": ("distilbert", "AutoModel", DISTILBERT),
    "distilbert_mlm": ("distilbert", "AutoModelForMaskedLM", DISTILBERT | {"n_heads": 2}),
    "modernbert": ("modernbert", "AutoModel", MODERNBERT | {"layer_types": ["full_attention"] * 4}),
    "modernbert_windows": (
        "modernbert",
        "AutoModel",
        MODERNBERT
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 90.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 7.0},
            }
        },
    ),
    "modernbert_mlm": ("modernbert", "AutoModelForMaskedLM", MODERNBERT),
    "modernbert_biases": ("modernbert", "AutoModelForMaskedLM", MODERNBERT | BIASES),
}
"""Name → model_type, class, and sizes."""


def build(name: str, folder: Path) -> None:
    """Writes the folder of a case with transformers: with random parameters, none exactly 0 or 1."""
    kind, cls, options = CASES[name]
    nothing = {"vocab_size": VOCAB, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = transformers.AutoConfig.for_model(kind, **(nothing | options))
    model = getattr(transformers, cls).from_config(config, attn_implementation="eager")
    rng = np.random.default_rng(sorted(CASES).index(name))
    with torch.no_grad():
        for parameter in model.parameters():
            draw = rng.normal(size=parameter.shape) * (0.4 if parameter.ndim == 2 else 0.3)
            parameter.copy_(torch.tensor(draw + (parameter.ndim == 1 and 0.5), dtype=torch.float32))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def theirs(folder: Path) -> dict[str, np.ndarray]:
    """States after every layer, logits or pooler output, and gradients, by transformers in float32."""
    from test_encoder_families import inputs_of, weights_of

    config = json.loads((folder / "config.json").read_text())
    cls = "AutoModelForMaskedLM" if "MaskedLM" in config["architectures"][0] else "AutoModel"
    model = getattr(transformers, cls).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    tokens, given = inputs_of(LENGTH, VOCAB, config.get("type_vocab_size", 0))
    more = {"token_type_ids": torch.tensor(given["token_types"])} if "token_types" in given else {}
    if config["model_type"] != "distilbert":
        more["position_ids"] = torch.tensor(given["positions"])
    output = model(
        torch.tensor(tokens), attention_mask=torch.tensor(given["segments"]), output_hidden_states=True, **more
    )
    results = {f"hidden/{n}": state.detach().numpy() for n, state in enumerate(output.hidden_states)}
    if "logits" in output:
        results["logits"] = output.logits.detach().numpy()
        values = output.logits
    else:
        results["last"] = output.last_hidden_state.detach().numpy()
        values = output.last_hidden_state
        if output.get("pooler_output") is not None:
            results["pooled"] = output.pooler_output.detach().numpy()
            values = values + output.pooler_output[:, None] * torch.tensor(given["segments"])[:, :1, None]
    (torch.tensor(weights_of(values.shape, given["segments"])) * values).sum().backward()
    return results | {f"gradient/{key}": value.grad.numpy() for key, value in model.named_parameters()}


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, folder)
    return folder


def test_states_logits_and_gradients_are_those_of_transformers(folder):
    from test_encoder_families import compare

    print("\n", folder.name, compare(folder, theirs(folder)))


def test_transformers_opens_what_is_saved(folder, tmp_path):
    import distill

    distill.save(tmp_path, *distill.load(folder))
    before, after = theirs(folder), theirs(tmp_path)
    assert before.keys() == after.keys()
    for name in before:
        # one way to write a GELU's tanh is saved as the other
        np.testing.assert_allclose(after[name], before[name], rtol=1e-5, atol=1e-5)


def test_what_is_stored_is_what_transformers_says_now():
    assert sorted(path.name for path in DATA.iterdir()) == sorted(CASES)
    assert [name for name in CASES if not stored.agrees(DATA / name, theirs(DATA / name))] == []


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    stored.write(DATA, CASES, build, theirs)
    sys.exit(0)
