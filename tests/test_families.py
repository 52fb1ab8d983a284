"""Families of language models: values of transformers, and every key of ``config.json``."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import random_params, tiny
from safetensors.numpy import load_file, save_file

import distill
from distill import losses
from distill.models import Collect, DecoderConfig, RopeScaling, decoder
from distill.weights import read_config
from distill.weights.families import FAMILIES, family_of, from_json, to_json
from distill.weights.families.gemma import text_of
from distill.weights.networks import tensors

DATA = Path(__file__).resolve().parent / "data" / "families"
CASES = sorted(path.name for path in DATA.iterdir())


# ---- values of transformers


def inputs_of(length: int, vocab: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Tokens, segments and positions of two rows: one padded on the left, one of two documents."""
    rng = np.random.default_rng(1)
    tokens = np.concatenate([rng.integers(0, vocab, (n, length)) for n in (2, 1, 1)])
    count = np.arange(length)
    second = count >= length // 3
    segments = [np.ones(length), np.ones(length), count >= 3, 1 + second]
    positions = [count, count, np.maximum(count - 3, 0), np.where(second, count - length // 3, count)]
    as_ints = {"segments": np.stack(segments), "positions": np.stack(positions)}
    return jnp.asarray(tokens), {name: jnp.asarray(value, jnp.int32) for name, value in as_ints.items()}


def compare(folder: Path, theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """Asserts differences to transformers below 1e-4 of a logit and 1e-3 of a gradient; returns them."""
    model, params = distill.load(folder)
    tokens, inputs = inputs_of(*theirs["logits/rows"].shape[1:])

    def loss(params):
        logits = model.logits(params, tokens, **inputs)
        log_q = jax.nn.log_softmax(logits[:2, :-1])
        return -jnp.mean(jnp.take_along_axis(log_q, tokens[:2, 1:, None], axis=-1)), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    want = np.concatenate([theirs[f"logits/{name}"] for name in ("rows", "padded", "packed")])
    counted = np.asarray(inputs["segments"]) > 0
    worst = {"logits": float(np.max(np.abs(logits - want)[counted]))}
    assert worst["logits"] < 1e-4, (folder.name, worst)
    family = json.loads((folder / "config.json").read_text())["model_type"]
    if model.config.experts:
        for rows, name in ((slice(2), "rows"), (slice(2, 3), "padded"), (slice(3, 4), "packed")):
            given = {key: value[rows] for key, value in inputs.items()}
            balance = losses.load_balancing(*model.apply(params, tokens[rows], **given).routing)
            np.testing.assert_allclose(balance, theirs[f"load_balancing/{name}"], rtol=1e-4)
    ours = dict(tensors(model.config, family, gradient))
    want = {name.removeprefix("gradient/"): value for name, value in theirs.items() if name.startswith("gradient/")}
    assert ours.keys() == want.keys()
    errors = [np.max(np.abs(ours[name] - want[name])) / (np.max(np.abs(want[name])) or 1.0) for name in want]
    worst["gradient"] = float(max(errors))
    assert worst["gradient"] < 1e-3, (folder.name, worst)
    return worst


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(name):
    with np.load(DATA / name / "theirs.npz", allow_pickle=False) as file:
        compare(DATA / name, dict(file))


def test_every_family_and_scaling_is_compared():
    configs = [read_config(DATA / name) for name in CASES]
    kinds = {json.loads((DATA / name / "config.json").read_text())["model_type"] for name in CASES}
    assert kinds == {name for name, family in FAMILIES.items() if family.config is DecoderConfig}
    assert {config.rope_scaling.kind for config in configs} == {
        "none",
        "linear",
        "dynamic",
        "llama3",
        "yarn",
        "longrope",
    }
    assert {config.tied for config in configs} == {True, False}
    assert {config.key_size * config.heads == config.width for config in configs} == {True, False}
    stored = [sum(file.stat().st_size for file in (DATA / name).iterdir()) for name in CASES]
    assert max(stored) < 60_000


@pytest.mark.parametrize("name", CASES)
def test_a_written_configuration_is_read_as_the_same_decoder(name):
    values = json.loads((DATA / name / "config.json").read_text())
    config = from_json(values)
    again = from_json(to_json(config, values["model_type"]))
    given = config.rope_scaling.magnitude if config.rope_scaling.kind in ("yarn", "longrope") else None
    scaling = dataclasses.replace(config.rope_scaling, attention_factor=given)
    assert again == dataclasses.replace(config, rope_scaling=scaling)


@pytest.mark.parametrize("name", CASES)
def test_a_loaded_and_saved_folder_is_bit_identical(name, tmp_path):
    """Tensor by tensor, whatever a family fuses or reorders; the model loaded again is identical too."""
    model, params = distill.load(DATA / name, dtype=None)
    distill.save(tmp_path, model, params, family=json.loads((DATA / name / "config.json").read_text())["model_type"])
    there, here = (load_file(folder / "model.safetensors") for folder in (DATA / name, tmp_path))
    assert {tensor: (x.dtype, x.shape, x.tobytes()) for tensor, x in there.items()} == {
        tensor: (x.dtype, x.shape, x.tobytes()) for tensor, x in here.items()
    }
    again, once_more = distill.load(tmp_path, dtype=None)
    kept = {"rope_scaling": again.config.rope_scaling}  # its magnitude is stored explicitly
    assert again.config == dataclasses.replace(model.config, **kept)
    assert again.config.rope_scaling.magnitude == model.config.rope_scaling.magnitude
    assert jax.tree.structure(once_more) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), params, once_more))


# ---- effects of the options elsewhere


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_a_text_in_two_pieces_through_the_cache_equals_the_whole(name):
    """With collected attention; both paths support every option."""
    model, params = distill.load(DATA / name)
    tokens, _ = inputs_of(16, model.vocab_size)
    whole = model.apply(params, tokens[:2], collect=Collect(attention=(1,)))
    cache = model.init_cache(2, 16)
    first = model.apply(params, tokens[:2, :9], cache=cache)
    second = model.apply(params, tokens[:2, 9:], cache=first.cache)
    pieces = jnp.concatenate([first.hidden, second.hidden], axis=1)
    np.testing.assert_allclose(pieces, whole.hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole.collected["attention"][1].sum(axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(
        model.unembed(params, whole.hidden), model.head(params).logits(whole.hidden), rtol=1e-6, atol=1e-6
    )


def test_positions_beyond_the_table_are_refused():
    model, params = distill.load(DATA / "gpt2")
    tokens = jnp.zeros((1, 17), jnp.int32)
    for call in (lambda: model.apply(params, tokens), lambda: model.init_cache(1, 17)):
        with pytest.raises(ValueError, match="a text of 17 tokens; expected at most 16 learned positions"):
            call()
    hidden = model.apply(params, tokens, positions=jnp.arange(17)[None]).hidden
    assert jnp.all(jnp.isnan(hidden[0, 16]))


def test_a_published_gpt2_without_prefix_and_with_masks_is_read(tmp_path):
    tensors = {name.removeprefix("transformer."): x for name, x in load_file(DATA / "gpt2/model.safetensors").items()}
    tensors |= {f"h.{n}.attn.bias": np.ones((1, 1, 4, 4), np.float32) for n in range(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((DATA / "gpt2/config.json").read_text())
    same = jax.tree.map(np.testing.assert_array_equal, distill.load(tmp_path)[1], distill.load(DATA / "gpt2")[1])
    assert jax.tree.leaves(same) == []


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_the_text_model_of_a_multimodal_gemma3_is_read(prefix, tmp_path):
    tensors = load_file(DATA / "gemma3/model.safetensors")
    inner = {name: name.removeprefix("model.") if prefix.startswith("model.") else name for name in tensors}
    tensors = {prefix + inner[name] if name.startswith("model.") else name: x for name, x in tensors.items()}
    tensors["vision_tower.vision_model.head.probe"] = np.ones((1, 1, 4), np.float32)
    tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    text = json.loads((DATA / "gemma3/config.json").read_text())
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 4}, "boi_token_index": 5}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    model, params = distill.load(tmp_path)
    alone = distill.load(DATA / "gemma3")
    assert model.config == alone[0].config
    assert jax.tree.leaves(jax.tree.map(np.testing.assert_array_equal, params, alone[1])) == []
    (tmp_path / "config.json").write_text(json.dumps(whole | {"rope_theta": 5.0}))
    with pytest.raises(ValueError, match=r"rope_theta=5\.0 of model_type 'gemma3': not known"):
        distill.load(tmp_path)


def test_the_published_gemma3_27b_is_read_with_defaults():
    text = {"head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32}
    text |= {"num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168, "sliding_window": 1024}
    text |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    values = {"model_type": "gemma3", "text_config": text, "image_token_index": 262144, "mm_tokens_per_image": 256}
    config = from_json(text_of(values))
    assert (config.vocab_size, config.tied, config.rope_scaling.factor) == (262_208, True, 8.0)
    assert config.window_layers[:7] == (True,) * 5 + (False, True)
    assert decoder(config).parameter_count() == pytest.approx(27.0e9, rel=0.02)


# ---- config.json

SIZES = {
    "vocab_size": 14,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
}


def json_of(kind="llama", **keys):
    return {"model_type": kind, **SIZES} | keys


NEOX = {"model_type": "gpt_neox"} | {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}


def test_a_published_llama_is_read():
    values = json_of(
        architectures=["LlamaForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=128000,
        eos_token_id=[128001, 128008],
        head_dim=2,
        hidden_act="silu",
        initializer_range=0.02,
        max_position_embeddings=131072,
        mlp_bias=False,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling={
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        rope_theta=500000.0,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        transformers_version="4.45.0.dev0",
        use_cache=True,
    )
    expected = DecoderConfig(
        14, 3, 8, 4, 2, 2, 16, tied=True, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 32.0, 8192)
    )
    assert from_json(values) == dataclasses.replace(expected, max_length=131072)


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        (json_of(), {"norm_epsilon": 1e-6, "rope_theta": 1e4, "tied": False, "qkv_bias": False, "qk_norm": False}),
        (json_of(num_key_value_heads=None), {"kv_heads": None}),
        (json_of(attention_bias=True), {"qkv_bias": True, "output_bias": True, "mlp_bias": False}),
        (json_of(rope_interleaved=False, is_llama_config=True), {}),
        (json_of(rope_scaling={"type": "linear", "factor": 2}), {"rope_scaling": RopeScaling("linear", 2.0)}),
        (
            json_of(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=77, head_dim=4),
            {"rope_scaling": RopeScaling("dynamic", 2.0, 77)},
        ),
        (
            json_of("qwen2", rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 99}),
            {"rope_scaling": RopeScaling("yarn", 4.0, 99)},
        ),
        (
            json_of(rope_parameters={"rope_type": "yarn", "rope_theta": 7.0}, max_position_embeddings=80)
            | {"original_max_position_embeddings": 20},
            {"rope_theta": 7.0, "rope_scaling": RopeScaling("yarn", 4.0, 20)},
        ),
        (json_of("mistral"), {"sliding_window": 4096, "window_layers": ()}),
        (json_of("mistral", sliding_window=None), {"sliding_window": None}),
        (json_of("qwen2"), {"qkv_bias": True, "output_bias": False, "sliding_window": None}),
        (
            json_of("qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=2),
            {"sliding_window": 7, "window_layers": (False, False, True)},
        ),
        (json_of("qwen2", use_sliding_window=False, sliding_window=7, max_window_layers=2), {"sliding_window": None}),
        (json_of("qwen3"), {"qk_norm": True, "qkv_bias": False, "head_dim": 128}),
        (json_of("qwen3", attention_bias=True, head_dim=4), {"qkv_bias": True, "output_bias": True, "head_dim": 4}),
        (
            json_of("smollm3", no_rope_layer_interval=2),
            {"rope_layers": (True, False, True), "tied": True, "rope_theta": 2e6},
        ),
        (
            json_of("smollm3", no_rope_layers=[1, 1, 0], use_sliding_window=True, sliding_window=5),
            {"rope_layers": (True, True, False), "window_layers": (False, False, True), "sliding_window": 5},
        ),
        (
            json_of("gemma2", hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh"),
            {"attention_softcap": 50.0, "logit_softcap": 30.0, "window_layers": (True, False, True), "tied": True}
            | {"sliding_window": 4096, "attention_scalar": 256, "norm_place": "around", "activation": "gelu_tanh"},
        ),
        (
            json_of("gemma3_text", sliding_window=512, sliding_window_pattern=2, rope_theta=1e6)
            | {"rope_local_base_freq": 9.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {"rope_theta": 1e6, "rope_theta_local": 9.0, "rope_scaling": RopeScaling("linear", 8.0), "qk_norm": True}
            | {"window_layers": (True, False, True), "logit_softcap": None, "max_length": 131_072},
        ),
        (
            json_of("gemma3_text", sliding_window_pattern=1),
            {"rope_theta": 1e6, "rope_theta_local": None, "sliding_window": None},
        ),
        (json_of("olmo2"), {"norm_place": "after", "qk_norm_joint": True, "norm_epsilon": 1e-5, "tied": False}),
        (json_of("phi3", sliding_window=7, auto_map={}), {"sliding_window": 7, "rope_fraction": 1.0}),
        (
            json_of("phi3", max_position_embeddings=8192, original_max_position_embeddings=1024, head_dim=8)
            | {
                "partial_rotary_factor": 0.5,
                "rope_scaling": {"type": "su", "short_factor": [1, 2], "long_factor": [3, 4]},
            },
            {"rope_fraction": 0.5}
            | {"rope_scaling": RopeScaling("longrope", 8.0, 1024, short_factors=(1.0, 2.0), long_factors=(3.0, 4.0))},
        ),
        (
            {"model_type": "gpt2", "vocab_size": 14, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_ctx": 1024},
            {
                "positions": "learned",
                "max_length": 1024,
                "feed_forward": 32,
                "norm": "layer",
                "gated": False,
                "tied": True,
            }
            | {"activation": "gelu_tanh", "mlp_bias": True},
        ),
        (
            NEOX | {"rotary_pct": 0.5, "rotary_emb_base": 500, "num_attention_heads": 2},
            {"rope_fraction": 0.5, "rope_theta": 500.0, "parallel": True, "activation": "gelu", "output_bias": True},
        ),
    ],
)
def test_keys_of_the_configuration_become_fields(values, fields):
    config = from_json(values)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (json_of("gptj"), "model_type='gptj' is not supported; expected one of llama, mistral, qwen2, qwen3, smollm3"),
        ({}, "model_type=None"),
        ({"model_type": "llama"}, "is missing"),
        (json_of(attention_multiplier=2.0), "attention_multiplier=2.0 of model_type 'llama'"),
        (json_of(hidden_act="gelu"), "hidden_act='gelu' is not supported; expected 'silu'"),
        (json_of(quantization_config={"bits": 4}), "quantization_config={'bits': 4}"),
        (json_of(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (json_of(sliding_window=5), "sliding_window=5"),
        (json_of("qwen2", attention_bias=True), "attention_bias=True"),
        (json_of("qwen3", mlp_bias=True), "mlp_bias=True"),
        (json_of("qwen2", layer_types=["chunked_attention"] * 3), "layer_types"),
        (json_of("qwen2", layer_types=["full_attention"] * 2), "layer_types.*for 3 layers"),
        (json_of("qwen2", layer_types=["sliding_attention"] * 3), "expected a window that is used"),
        (json_of(rope_scaling={"type": "longrope"}), "rope_type 'longrope' without long_factor, short_factor"),
        (
            json_of(rope_scaling={"type": "linear", "factor": 2.0, "beta_fast": 3}),
            "beta_fast=3.0 of rope_type",
        ),
        (json_of(rope_scaling={"type": "linear"}), "without factor"),
        (json_of(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "without high_freq_factor, low_freq_factor"),
        (json_of(rope_parameters={"full_attention": {"rope_theta": 1.0}}), "full_attention="),
        (
            json_of("gemma2", hidden_activation="relu"),
            "hidden_activation='relu' is not supported; expected one of silu, gelu",
        ),
        (json_of("gemma2", hidden_act="gelu"), "hidden_act='gelu' is not supported; expected 'gelu_pytorch_tanh'"),
        (json_of("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention=True"),
        (
            json_of("gemma3_text", rope_parameters={"rope_theta": 1.0}),
            "rope_parameters has rope_theta; expected full_att",
        ),
        (
            json_of("gemma3_text", rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
            "in layers with a window; expected none",
        ),
        (json_of("phi3", rope_scaling={"type": "yarn", "factor": 2.0}), "rope_type='yarn' of model_type 'phi3'"),
        (json_of("gpt2", n_embd=8, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        (json_of("gpt2", n_embd=8, activation_function="relu"), "activation_function='relu' is not supported"),
        (NEOX | {"rotary_ndims": 3, "rotary_pct": 1.0}, "rotary_ndims=3"),
        (NEOX, "rope_fraction=0.25 rotates 0"),
    ],
)
def test_unsupported_keys_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        from_json(values)


def test_every_family_names_an_unknown_key(tmp_path):
    for folder in [*DATA.iterdir(), *(DATA.parent / "encoders").iterdir()]:
        values = json.loads((folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(values | {"logit_twist": 0.5}))
        # The head of an encoder is known from its tensors, so the file is needed.
        shutil.copyfile(folder / "model.safetensors", tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=rf"logit_twist=0\.5 of model_type '{values['model_type']}': not known"):
            read_config(tmp_path)


GEMMA = {"norm_plus_one": True, "norm_place": "around", "scaled_embedding": True, "activation": "gelu_tanh"}
GPT = {"norm": "layer", "gated": False, "mlp_bias": True, "kv_heads": 4}


@pytest.mark.parametrize(
    ("options", "family"),
    [
        ({}, "llama"),
        ({"qkv_bias": True, "output_bias": True, "mlp_bias": True}, "llama"),
        ({"width": 9, "head_dim": 4}, "mistral"),
        ({"sliding_window": 3}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qkv_bias": True, "sliding_window": 3, "window_layers": (False, True)}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({"qk_norm": True, "qkv_bias": True, "output_bias": True, "sliding_window": 3}, "qwen3"),
        ({"rope_layers": (True, False), "mlp_bias": True}, "smollm3"),
        ({"rope_fraction": 0.5, "head_dim": 4}, "phi3"),
        (
            {"qk_norm": True, "qk_norm_joint": True, "norm_place": "after", "qkv_bias": True, "output_bias": True},
            "olmo2",
        ),
        (GEMMA | {"attention_scalar": 3.0, "logit_softcap": 2.0, "sliding_window": 3}, "gemma2"),
        (
            GEMMA | {"attention_scalar": 3.0, "qk_norm": True, "sliding_window": 3, "rope_theta_local": 7.0},
            "gemma3_text",
        ),
        (GPT | {"positions": "learned", "max_length": 9, "qkv_bias": True, "output_bias": True}, "gpt2"),
        (GPT | {"parallel": True}, "gpt_neox"),
    ],
)
def test_a_decoder_is_saved_as_the_first_family_that_can_express_it(options, family):
    config = tiny(**options)
    assert family_of(config) == family
    again = from_json(to_json(config))
    filled = {"kv_heads": again.kv_heads, "head_dim": again.head_dim, "max_length": again.max_length}
    assert again == dataclasses.replace(config, **filled)
    assert (again.groups, again.key_size) == (config.groups, config.key_size)


@pytest.mark.parametrize(
    ("options", "family", "message"),
    [
        ({"qk_norm": True, "mlp_bias": True}, None, "no family among llama.*mlp_bias=True, qk_norm=True"),
        ({"output_bias": True}, None, "output_bias=True"),
        ({"norm": "layer"}, None, "norm='layer'"),
        ({"norm": "layer", "gated": False, "mlp_bias": True}, "gpt_neox", "no family among"),
        ({"qk_norm": True}, "llama", "family 'llama' has not all options of this decoder; 'qwen3' has"),
        ({}, "gptj", "family 'gptj' is not known"),
    ],
)
def test_a_decoder_without_a_family_is_refused(options, family, message, tmp_path):
    model = decoder(tiny(**options))
    with pytest.raises(ValueError, match=message):
        distill.save(tmp_path / "model", model, random_params(model), family=family)
    assert not (tmp_path / "model").exists()
