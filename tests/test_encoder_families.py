"""Families of encoders: values of transformers, keys of ``config.json``, round trips of folders."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import random_params

import distill
from distill.models import Collect, EncoderConfig, encoder
from distill.models.encoder import bert_pooler
from distill.weights import read_config
from distill.weights.families import encoders, from_json, to_json
from distill.weights.networks import tensors
from distill.weights.safetensors import SafetensorsSource, write

DATA = Path(__file__).resolve().parent / "data" / "encoders"
CASES = sorted(path.name for path in DATA.iterdir()) if DATA.is_dir() else []


# ---- values of transformers


def inputs_of(length: int, vocab: int, types: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Three rows: whole, padded on the right, padded on the left."""
    rng = np.random.default_rng(1)
    tokens, count = rng.integers(0, vocab, (3, length)), np.arange(length)
    inputs = {
        "segments": np.stack([np.ones(length), count < length - 4, count >= 3]).astype(np.int32),
        "positions": np.stack([count, count, count]).astype(np.int32),
    }
    return tokens, inputs | ({"token_types": rng.integers(0, types, (3, length))} if types else {})


def weights_of(shape, segments) -> np.ndarray:
    """Weights of states or logits in the loss; 0 at padding."""
    draw = np.random.default_rng(2).normal(size=shape).astype(np.float32) / 10
    return draw * (segments > 0)[..., None].astype(np.float32)


def compare(folder: Path, theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """Asserts differences to transformers below 1e-4 of a state or logit and 1e-3 of a gradient; returns them."""
    model, params = distill.load(folder)
    config = model.config
    tokens, inputs = inputs_of(theirs["hidden/0"].shape[1], config.vocab_size, config.token_types)
    target = theirs["logits" if config.mlm_head else "last"]
    given = {name: jnp.asarray(value) for name, value in inputs.items()}

    def loss(params):
        output = model.apply(params, jnp.asarray(tokens), collect=Collect(hidden=tuple(range(config.layers))), **given)
        values = model.unembed(params, output.hidden) if config.mlm_head else output.hidden
        pooled = bert_pooler(config, params, output.hidden) if config.pooler else None
        first = inputs["segments"][:, :1, None] > 0  # a padded first token attends otherwise there
        summed = values if pooled is None else values + first * jnp.broadcast_to(pooled[:, None], values.shape)
        return jnp.sum(weights_of(target.shape, inputs["segments"]) * summed), (output, values, pooled)

    gradient, (output, values, pooled) = jax.jit(jax.grad(loss, has_aux=True))(params)
    real, ours = inputs["segments"] > 0, dict(output.collected["hidden"]) | {config.layers: output.hidden}
    pairs = [(ours[n][real], theirs[f"hidden/{n}"][real]) for n in range(config.layers + 1)]
    pairs.append((values[real], target[real]))
    if config.pooler:
        pairs.append((pooled[real[:, 0]], theirs["pooled"][real[:, 0]]))
    worst = {"states": float(max(np.max(np.abs(one - other)) for one, other in pairs))}
    assert worst["states"] < 1e-4, (folder.name, worst)
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    ours = dict(tensors(config, kind, gradient))
    want = {name.removeprefix("gradient/"): value for name, value in theirs.items() if name.startswith("gradient/")}
    assert ours.keys() == want.keys()
    largest = max(np.max(np.abs(value)) for value in want.values())  # the bias of keys has no effect: its gradient is 0
    errors = [np.max(np.abs(ours[n] - want[n])) / max(np.max(np.abs(want[n])), 1e-3 * largest) for n in want]
    worst["gradient"] = float(max(errors))
    assert worst["gradient"] < 1e-3, (folder.name, worst)
    return worst


@pytest.mark.parametrize("name", CASES)
def test_states_logits_and_gradients_equal_transformers(name):
    with np.load(DATA / name / "theirs.npz", allow_pickle=False) as file:
        compare(DATA / name, dict(file))


def test_every_family_is_compared_with_a_head_and_without():
    configs = [read_config(DATA / name) for name in CASES]
    kinds = [json.loads((DATA / name / "config.json").read_text())["model_type"] for name in CASES]
    assert {(kind, c.mlm_head) for kind, c in zip(kinds, configs, strict=True)} == {
        (kind, head) for kind in encoders.FAMILIES for head in (True, False)
    }
    assert max(sum(file.stat().st_size for file in (DATA / name).iterdir()) for name in CASES) < 100_000


# ---- round trips


@pytest.mark.parametrize("name", CASES)
def test_a_loaded_model_is_saved_bit_identically(name, tmp_path):
    model, params = distill.load(DATA / name)
    distill.save(tmp_path, model, params)
    there, here = SafetensorsSource(DATA / name), SafetensorsSource(tmp_path)
    assert there.names() == here.names()
    assert all((there.get(tensor) == here.get(tensor)).all() for tensor in there.names())
    again, once_more = distill.load(tmp_path)
    assert again.config == model.config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, once_more))


def rewritten(tmp_path: Path, name: str, change) -> Path:
    """A copy of a case with the tensors that ``change`` returns."""
    source = SafetensorsSource(DATA / name)
    shutil.copyfile(DATA / name / "config.json", tmp_path / "config.json")
    write(tmp_path, change({tensor: source.get(tensor) for tensor in sorted(source.names())}).items())
    return tmp_path


def test_older_names_are_read_and_unused_tensors_ignored(tmp_path):
    def older(tensors):
        renamed = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
            for name, array in tensors.items()
        }
        table = renamed["bert.embeddings.word_embeddings.weight"]
        zeros = np.zeros(3, np.float32)
        return renamed | {
            "bert.embeddings.position_ids": zeros,
            "bert.pooler.dense.weight": zeros,
            "cls.seq_relationship.weight": zeros,
            "cls.predictions.decoder.weight": table,
        }

    model, params = distill.load(rewritten(tmp_path, "bert_mlm", older))
    known, want = distill.load(DATA / "bert_mlm")
    assert model.config == known.config and not model.config.pooler
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, want))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "bert",
            lambda t: t | {"encoder.layer.0.extra": np.zeros(2, np.float32)},
            "not understood: encoder.layer.0",
        ),
        ("bert", lambda t: {n: t[n] for n in t if "layer.1.output.dense" not in n}, "missing: encoder.layer.1.output"),
        ("bert", lambda t: t | {"bert.pooler.dense.bias": t["pooler.dense.bias"]}, "which are one tensor"),
        ("modernbert", lambda t: t | {"layers.0.attn_norm.weight": t["final_norm.weight"]}, "should have none"),
        (
            "modernbert",
            lambda t: t | {"layers.1.attn.Wqkv.weight": np.zeros((8, 4), np.float32)},
            r"expected \(48, 16\)",
        ),
        ("modernbert", lambda t: t | {"layers.1.mlp.Wi.weight": np.zeros((8, 4), np.float32)}, r"expected \(20, 16\)"),
    ],
)
def test_tensors_of_another_model_are_refused(name, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        distill.load(rewritten(tmp_path, name, change))


# ---- config.json

SIZES = {
    "bert": {"num_hidden_layers": 3, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16},
    "distilbert": {"n_layers": 3, "dim": 8, "n_heads": 2, "hidden_dim": 16},
}
SIZES["modernbert"] = SIZES["bert"]


def read(kind, names=frozenset(), **keys):
    return from_json({"model_type": kind, "vocab_size": 14, **SIZES[kind]} | keys, lambda: names)


@pytest.mark.parametrize(
    ("kind", "keys", "fields"),
    [
        (
            "bert",
            {},
            {"token_types": 2, "norm_epsilon": 1e-12, "norm_place": "post", "pooler": False},
        ),
        ("bert", {"position_embedding_type": "absolute", "hidden_dropout_prob": 0.1}, {"activation": "gelu"}),
        ("bert", {"hidden_act": "gelu_new"}, {"activation": "gelu_tanh"}),
        ("distilbert", {"tie_weights_": True, "sinusoidal_pos_embds": False}, {"token_types": 0, "max_length": 512}),
        (
            "modernbert",
            {"layer_norm_eps": 1e-5, "position_embedding_type": "absolute", "global_rope_theta": 9.0},
            {"sliding_window": 64, "window_layers": (False, True, True), "rope_theta": 9.0, "rope_theta_local": 1e4}
            | {
                "norm_place": "pre",
                "gated": True,
                "qkv_bias": False,
                "output_bias": False,
                "norm_bias": False,
                "norm_epsilon": 1e-5,
            },
        ),
        ("modernbert", {"global_attn_every_n_layers": 1}, {"sliding_window": None, "window_layers": ()}),
    ],
)
def test_keys_of_the_configuration_become_fields(kind, keys, fields):
    config = read(kind, **keys)
    assert {name: getattr(config, name) for name in fields} == fields
    assert from_json(to_json(config, kind)) == config


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("bert", {"spline": 3}, "spline=3 of model_type 'bert': not known"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("bert", {"hidden_act": "relu"}, "hidden_act='relu' is not supported; expected one of gelu"),
        ("bert", {"is_decoder": True}, "is_decoder=True"),
        ("bert", {"hidden_size": 9}, "width=9 is no multiple of heads=2"),
        ("distilbert", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ("modernbert", {"layer_types": ["full_attention"] * 2}, "for 3 layers"),
        ("modernbert", {"classifier_activation": "gelu_new"}, "expected that of the layers, 'gelu'"),
        ("modernbert", {"decoder_bias": False}, "decoder_bias=False"),
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "expected rope_type 'default'"),
        ("modernbert", {"rope_scaling": {"type": "linear"}}, "rope_scaling="),
    ],
)
def test_unsupported_keys_are_named(kind, keys, message):
    with pytest.raises(ValueError, match=message):
        read(kind, **keys)


def test_a_missing_size_is_named():
    with pytest.raises(ValueError, match="num_hidden_layers is missing"):
        from_json({"model_type": "bert", "vocab_size": 14, "hidden_size": 8})


@pytest.mark.parametrize(
    ("options", "family", "message"),
    [
        ({"gated": True}, None, "no family among bert, distilbert, modernbert"),
        ({"token_types": 2}, "distilbert", "family 'distilbert' has not all options of this encoder"),
        ({}, "roberta", "family 'roberta' is not known"),
    ],
)
def test_an_encoder_without_a_family_is_refused(options, family, message, tmp_path):
    model = encoder(EncoderConfig(vocab_size=14, width=8, feed_forward=16, **options))
    with pytest.raises(ValueError, match=message):
        distill.save(tmp_path / "model", model, random_params(model), family=family)
    assert not (tmp_path / "model").exists()
