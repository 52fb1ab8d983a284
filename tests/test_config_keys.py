"""Every key of ``config.json``: kind and range when read, JSON type when written, and what transformers reads."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from builders import tiny

import distill
from distill.errors import UserError
from distill.models import DecoderConfig, EncoderConfig, RopeScaling
from distill.weights import read_config
from distill.weights.families import FAMILIES, from_json, to_json
from distill.weights.families.keys import KINDS, Keys, shown
from distill.weights.safetensors import SafetensorsSource

DATA = Path(__file__).resolve().parent / "data"
FOLDERS = {}
for _folder in sorted([*(DATA / "families").iterdir(), *(DATA / "encoders").iterdir()]):
    FOLDERS.setdefault(json.loads((_folder / "config.json").read_text())["model_type"], _folder)
"""A folder of every family."""


def values_of(kind: str) -> dict:
    return json.loads((FOLDERS[kind] / "config.json").read_text())


# ---- read


PUBLISHED = {
    "Qwen2.5-0.5B": ("qwen2", {"use_mrope": False}),
    "Phi-4-mini": ("phi3", {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}),
    "gpt2-medium": ("gpt2", {"n_special": 0, "predict_special_tokens": True}),
    "gpt2-xl": ("gpt2", {"output_past": True}),
    "distilgpt2": ("gpt2", {"_num_labels": 1, "task_specific_params": {"text-generation": {"do_sample": True}}}),
    "gpt-neox-20b": ("gpt_neox", {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0}),
    "vicuna-7b": ("llama", {"max_sequence_length": 2048}),
    "distilbert-base-multilingual": ("distilbert", {"output_past": True}),
    "TinyBERT_General_4L_312D": (
        "bert",
        {"cell": {}, "emb_size": 312, "pre_trained": "", "structure": [], "training": ""},
    ),
    "ms-marco-MiniLM": ("bert", {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}),
}
"""Published models: family, and keys of their config.json that change no logit."""
EVERYWHERE = {
    "_attn_implementation_autoset": True,
    "pruned_heads": {},
    "torchscript": False,
    "num_beams": 1,
    "top_k": 50,
}
EVERYWHERE |= {"add_cross_attention": False, "cross_attention_hidden_size": None, "temperature": 1.0, "prefix": None}
EVERYWHERE |= {"tokenizer_class": "PreTrainedTokenizerFast", "use_bfloat16": False, "finetuning_task": None}
"""Some of the keys that transformers 4 writes for every model."""


def read_as(kind: str, keys: dict):
    tensors = SafetensorsSource(FOLDERS[kind]).names()
    return from_json(values_of(kind) | keys, lambda: tensors)


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_of_published_models_that_change_no_logit_are_read(name):
    kind, keys = PUBLISHED[name]
    assert read_as(kind, keys) == read_as(kind, {})


@pytest.mark.parametrize("kind", FOLDERS)
def test_what_older_releases_write_for_every_model_is_read(kind):
    assert read_as(kind, EVERYWHERE) == read_as(kind, {})


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("qwen2", {"use_mrope": True}),
        ("phi3", {"lm_head_bias": True}),
        ("phi3", {"full_attn_mod": 2}),
        ("gpt2", {"n_special": 3}),
        ("llama", {"pruned_heads": {"0": [1]}}),
        ("bert", {"pruned_heads": {"0": [1]}}),
        ("mistral", {"add_cross_attention": True}),
    ],
)
def test_the_same_keys_with_values_that_change_logits_are_refused(kind, keys):
    with pytest.raises(UserError, match=next(iter(keys))):
        from_json(values_of(kind) | keys)


def test_every_key_that_a_family_reads_has_a_kind(monkeypatch):
    seen = set()
    given = Keys.given
    monkeypatch.setattr(Keys, "given", lambda self, key: (seen.add(key), given(self, key))[1])
    for kind, folder in FOLDERS.items():
        read_config(folder)
        assert seen <= KINDS.keys(), kind
    for family in FAMILIES.values():
        assert family.defaults.keys() | set(family.sizes.values()) <= KINDS.keys()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "num_hidden_layers=0; expected a whole number from 1 to 16384"),
        (-1, "num_hidden_layers=-1; expected"),
        (1.5, "num_hidden_layers=1.5; expected"),
        (10**12, "num_hidden_layers=1000000000000; expected"),
        (2**63, "num_hidden_layers=9223372036854775808; expected"),
        ("2", "num_hidden_layers='2'; expected"),
        (None, "num_hidden_layers=None; expected"),
        ([], r"num_hidden_layers=\[\]; expected"),
        (True, "num_hidden_layers=True; expected"),
        (float("nan"), "num_hidden_layers=nan; expected"),
        (float("inf"), "num_hidden_layers=inf; expected"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "smollm3", "qwen3_moe", "gemma3_text", "modernbert"])
def test_a_number_of_layers_that_is_none_is_refused_at_once(kind, value, message):
    start = time.monotonic()
    with pytest.raises(UserError, match=message):
        from_json(values_of(kind) | {"num_hidden_layers": value})
    assert time.monotonic() - start < 1.0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rms_norm_eps", 0, "rms_norm_eps=0; expected a number above 0"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps='1e-5'; expected a number above 0"),
        ("rms_norm_eps", None, "rms_norm_eps=None"),
        ("tie_word_embeddings", "false", "tie_word_embeddings='false'; expected true or false"),
        ("attention_bias", 1, "attention_bias=1; expected true or false"),
        ("rope_theta", -1.0, "rope_theta=-1.0; expected a number above 0"),
        ("rope_parameters", [], r"rope_parameters=\[\]; expected an object, or null"),
        ("rope_parameters", {"rope_type": []}, r"rope_type=\[\]; expected text"),
        ("rope_parameters", {"rope_theta": 0}, "rope_theta=0; expected a number above 0"),
        ("rope_scaling", {"type": "linear", "factor": "2"}, "rope_scaling.factor='2'; expected a number from 1"),
        ("rope_scaling", {"type": "linear", "factor": float("nan")}, "factor=nan"),
        ("rope_scaling", {"type": "linear", "rope_type": "dynamic"}, "rope_type='dynamic' and type='linear'"),
        (
            "rope_parameters",
            {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0},
            "rope_theta=1.0; yarn needs more than 1",
        ),
        ("model_type", ["llama"], r"model_type=\['llama'\] is not supported"),
        ("quantization_config", {"quant_method": "fp8", "modules_to_not_convert": ["a"] * 400}, "'fp8'}: .*quantised"),
        ("quantization", {"group_size": 64, "bits": 4}, r"quantization=\{'bits': 4\}: the weights are quantised"),
        ("attention_multiplier", "x" * 5000, "attention_multiplier='x+...* of model_type"),
    ],
)
def test_a_value_of_another_kind_is_one_short_error_that_names_the_key(key, value, message):
    values = {"model_type": "llama", "vocab_size": 14, "hidden_size": 8, "num_hidden_layers": 1}
    values |= {"num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(UserError, match=message) as raised:
        from_json(values | {key: value})
    assert len(str(raised.value)) < 500


def test_null_and_whole_floats_are_read_as_transformers_reads_them():
    values = {"model_type": "qwen2", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 2, "intermediate_size": 24, "num_key_value_heads": 2}
    for key, value, field, want in (
        ("num_key_value_heads", None, "groups", 2),
        ("head_dim", None, "key_size", 8),
        ("head_dim", 8.0, "head_dim", 8),
        ("hidden_size", 32.0, "width", 32),
        ("sliding_window", None, "sliding_window", None),
    ):
        got = getattr(from_json(values | {key: value}), field)
        assert (got, type(got)) == (want, type(want)), key
    with pytest.raises(UserError, match="rope_theta=None; expected a number above 0"):
        from_json(values | {"rope_theta": None})
    inside = {"rope_theta": None, "rope_parameters": {"rope_theta": 7.0}}
    assert from_json(values | inside).rope_theta == 7.0


MUTATIONS = (
    None,
    -1,
    0,
    1.5,
    10**12,
    2**70,
    "x",
    "8",
    [],
    {},
    [[]],
    {"a": []},
    True,
    float("nan"),
    float("inf"),
    [None],
)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_damaged_configuration_opens_or_is_refused(kind, tmp_path):
    """Thirty random changes of each family's ``config.json``, a key or an entry of a rotary object each."""
    rng, values, opened = np.random.default_rng(len(kind)), values_of(kind), 0
    shutil.copy(FOLDERS[kind] / "model.safetensors", tmp_path)
    known = sorted(values.keys() | (FAMILIES[kind].defaults.keys() - {"model_type"}))
    start = time.monotonic()
    for _ in range(30):
        changed = json.loads(json.dumps(values))
        key = known[rng.integers(len(known))]
        if rng.integers(8) == 0:
            changed.pop(key, None)
        elif isinstance(changed.get(key), dict) and rng.integers(2) and changed[key]:
            inner = sorted(changed[key])
            changed[key][inner[rng.integers(len(inner))]] = MUTATIONS[rng.integers(len(MUTATIONS))]
        else:
            changed[key] = MUTATIONS[rng.integers(len(MUTATIONS))]
        (tmp_path / "config.json").write_text(json.dumps(changed))
        try:
            read_config(tmp_path)
            if opened < 3:
                opened += 1
                distill.load(tmp_path)
        except UserError:
            pass
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_configuration_with_a_number_that_is_none_is_refused(wrong):
    for name in ("norm_epsilon", "rope_theta", "attention_scalar", "attention_softcap", "logit_softcap"):
        with pytest.raises(UserError, match=f"model: {name}={wrong}; expected a (number above 0|finite number)"):
            DecoderConfig(**{name: wrong})
    for name in ("norm_epsilon", "rope_theta", "rope_theta_local"):
        with pytest.raises(UserError, match=f"encoder: {name}={wrong}; expected a (number above 0|finite number)"):
            EncoderConfig(**{name: wrong})
    for name in ("factor", "beta_fast", "beta_slow", "attention_factor"):
        with pytest.raises(UserError, match=f"rope_scaling: {name}={wrong}; expected"):
            RopeScaling("yarn", **({"factor": 2.0, "original_length": 8} | {name: wrong}))


# ---- written, for this version of transformers and for older readers

GEMMA = {"norm_plus_one": True, "norm_place": "around", "scaled_embedding": True, "activation": "gelu_tanh"}
GPT = {"norm": "layer", "gated": False, "mlp_bias": True, "kv_heads": 4}
LONG = RopeScaling("longrope", 4, 32, short_factors=(1,), long_factors=(2,))
TWO = RopeScaling("longrope", 4, 32, short_factors=(1, 1), long_factors=(2, 2))
SCALINGS = (
    RopeScaling(),
    RopeScaling("linear", 2),
    RopeScaling("dynamic", 2, 77),
    RopeScaling("llama3", 8, 32, low_frequency=1, high_frequency=4),
    RopeScaling("yarn", 4, 32, beta_fast=32, beta_slow=1),
    RopeScaling("yarn", 4.0, 32, attention_factor=1.5, truncate=False),
)
COMMON = {
    "tied": (True, False),
    "norm_epsilon": (1e-5, 1),
    "rope_theta": (10_000, 5e5, 77.5),
    "rope_scaling": SCALINGS,
    "max_length": (None, 4096),
    "head_dim": (4, 6),
}
WINDOWS = {"windows": (None, (4, ()), (4, (False, True)), (4, (True, False)))}
FAMILY_OPTIONS = {
    "llama": ({"head_dim": 4}, {"biases": (True, False), "mlp_bias": (True, False)}),
    "mistral": ({}, {"sliding_window": (None, 3)}),
    "qwen2": ({"qkv_bias": True}, WINDOWS),
    "qwen3": ({"qk_norm": True}, WINDOWS | {"biases": (True, False)}),
    "smollm3": ({}, WINDOWS | {"rope_layers": ((), (True, False))}),
    "mixtral": ({"experts": 3}, {"router_loss_weight": (0, 1, 0.5), "sliding_window": (None, 3)}),
    "qwen3_moe": ({"experts": 4, "qk_norm": True}, {"normalize_experts": (True, False), "sliding_window": (None, 3)}),
    "gemma2": (GEMMA, WINDOWS | {"attention_scalar": (None, 224.0, 7), "attention_softcap": (None, 50)}),
    "gemma3_text": (GEMMA | {"qk_norm": True}, WINDOWS | {"logit_softcap": (None, 30, 2.5), "local": (None, 7, 1e4)}),
    "olmo2": ({"qk_norm": True, "qk_norm_joint": True, "norm_place": "after"}, {"biases": (True, False)}),
    "phi3": ({"head_dim": 2}, {"rope_scaling": (RopeScaling(), LONG)}),
    "gpt2": (
        GPT | {"positions": "learned", "max_length": 9, "qkv_bias": True, "output_bias": True, "head_dim": 2},
        {"rope_scaling": (RopeScaling(),), "rope_theta": (10_000.0,), "max_length": (9,)},
    ),
    "gpt_neox": (GPT | {"head_dim": 2}, {"parallel": (True, False), "rope_scaling": SCALINGS[:2] + SCALINGS[3:]}),
}
"""Family → what makes a decoder its own, and choices; ``biases`` and ``windows`` stand for two fields each."""


OLDER = {"rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_emb_base", "rotary_pct"}
OLDER |= {"partial_rotary_factor", "sliding_window_pattern", "torch_dtype", "dtype"}
"""Keys that older readers need and transformers 5 knows by other names."""


def draw(kind: str, rng: np.random.Generator) -> DecoderConfig:
    fixed, choices = FAMILY_OPTIONS[kind]
    options = {}
    for name, values in (COMMON | choices).items():
        options[name] = values[rng.integers(len(values))]
    options |= fixed
    if options.pop("biases", False):
        options |= {"qkv_bias": True, "output_bias": True}
    if (windows := options.pop("windows", None)) is not None:
        options |= dict(zip(("sliding_window", "window_layers"), windows, strict=True))
    local = options.pop("local", None)
    if kind == "gemma3_text":
        options["rope_theta_local"] = local if windows else None
        if windows and local is None:
            options["rope_scaling"] = RopeScaling()
    if options["rope_scaling"].kind == "dynamic":
        options["max_length"] = 77
    return tiny(**options)


def as_read(config: DecoderConfig, again: DecoderConfig) -> DecoderConfig:
    """What a file says beside the configuration: sizes that were left out, a magnitude, theta in every layer."""
    filled = {name: getattr(again, name) for name in ("kv_heads", "head_dim", "max_length", "rope_theta_local")}
    scaling = config.rope_scaling
    if scaling.kind in ("yarn", "longrope"):
        scaling = dataclasses.replace(scaling, attention_factor=again.rope_scaling.attention_factor)
    if config.rope_theta_local is None:
        assert again.rope_theta_local in (None, config.rope_theta)
    if config.scaled_embedding and config.attention_scalar is None:
        filled["attention_scalar"] = config.key_size
    return dataclasses.replace(config, **filled, rope_scaling=scaling)


@pytest.mark.parametrize("kind", FAMILY_OPTIONS)
def test_transformers_reads_a_saved_configuration_as_the_same_decoder(kind, tmp_path):
    from transformers import AutoConfig

    rng = np.random.default_rng(7)
    for _ in range(12):
        config = draw(kind, rng)
        given = to_json(config, kind)
        (tmp_path / "config.json").write_text(json.dumps(given))
        theirs = AutoConfig.from_pretrained(tmp_path)
        for key, value in given.items():
            if key not in OLDER and key != "rope_parameters":
                held = getattr(theirs, key)
                assert held == value and type(held) is type(value), (key, held, value)
        again = from_json(json.loads(theirs.to_json_string(use_diff=False)))
        assert again == as_read(config, again)
        assert from_json(given) == again


@pytest.mark.parametrize("kind", FAMILY_OPTIONS)
def test_theta_and_scaling_stand_in_the_older_spelling_too(kind):
    """A reader that knows no ``rope_parameters`` finds the same numbers; so does one that knows nothing else."""
    rng = np.random.default_rng(11)
    for _ in range(6):
        config = draw(kind, rng)
        given = to_json(config, kind)
        older = {key: value for key, value in given.items() if key != "rope_parameters"}
        newer = {key: value for key, value in given.items() if key not in OLDER}
        assert from_json(older) == as_read(config, from_json(older)) and from_json(newer) == from_json(given)
        if config.positions == "rotary":
            assert given["rope_theta"] == config.rope_theta and isinstance(given["rope_theta"], float)
            assert ("rope_scaling" in given) == (config.rope_scaling.kind != "none")
            assert given.get("rope_scaling", {}).get("type", "none") == config.rope_scaling.kind
    assert given["dtype"] == given["torch_dtype"] == "float32"


@pytest.mark.parametrize("windows", [None, (4, (False, True, False, False)), (4, (False, True, False, True))])
def test_an_encoder_is_written_for_older_and_newer_readers(windows, tmp_path):
    from transformers import AutoConfig

    options = {"norm_place": "pre", "positions": "rotary", "gated": True, "norm_epsilon": 1, "rope_theta": 90}
    sizes = {"vocab_size": 23, "layers": 4, "width": 8, "heads": 2, "feed_forward": 12, "max_length": 64}
    if windows:
        options |= dict(zip(("sliding_window", "window_layers"), windows, strict=True))
    config = EncoderConfig(**sizes, **options)
    given = to_json(config)
    older = {key: value for key, value in given.items() if key not in ("rope_parameters", "layer_types")}
    assert (older["global_rope_theta"], older["local_rope_theta"]) == (90.0, 10_000.0)
    (tmp_path / "config.json").write_text(json.dumps(given))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["full_attention"]["rope_theta"] == 90.0 and theirs.norm_eps == 1.0
    for values in (given, json.loads(theirs.to_json_string(use_diff=False))):
        read = from_json(values)
        assert dataclasses.replace(read, mlm_bias=True) == config
    if windows and not windows[1][3]:  # no pattern: a reader that knows patterns alone gets null, not its default
        assert older["global_attn_every_n_layers"] is None
        with pytest.raises(UserError, match="global_attn_every_n_layers=None without layer_types"):
            from_json(older)
    else:
        assert dataclasses.replace(from_json(older), mlm_bias=True) == config


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("llama", {"rope_theta": 5.0}, "rope_theta is .* in the rotary object and 5.0 beside it"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 3.0}},
            "rope_scaling gives .*linear.*; rope_parameters",
        ),
        ("gpt_neox", {"rotary_emb_base": 5.0}, "rope_theta is .* 5.0 beside it"),
        ("gpt_neox", {"rotary_pct": 0.75}, "partial_rotary_factor is .* 0.75 beside it"),
        ("gpt_neox", {"rope_theta": 5.0}, "rope_theta=5.0 is not supported"),
        ("phi3", {"partial_rotary_factor": 0.25}, "partial_rotary_factor is .* 0.25 beside it"),
        ("gemma3_text", {"rope_local_base_freq": 5.0}, "rope_theta is 7.0 in the rotary object and 5.0"),
        ("modernbert", {"local_rope_theta": 5.0}, "rope_theta is .* 5.0 beside it"),
    ],
)
def test_two_spellings_that_contradict_each_other_are_refused(kind, changed, message):
    with pytest.raises(UserError, match=message):
        from_json(values_of(kind) | changed)


def test_one_rotary_object_for_all_layers_is_refused_where_there_are_two():
    for kind in ("gemma3_text", "modernbert"):
        with pytest.raises(UserError, match="rope_parameters has rope_theta; expected full_attention and sliding"):
            from_json(values_of(kind) | {"rope_parameters": {"rope_theta": 5.0}})


def test_two_spellings_without_theta_in_the_older_are_refused():
    """transformers takes the older one, and 10 000 as theta."""
    both = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    both |= {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    with pytest.raises(UserError, match="rope_theta=10000.0, .*rope_theta=500000.0"):
        from_json(values_of("llama") | both)
    assert from_json(values_of("llama") | both | {"rope_theta": 5e5}).rope_theta == 5e5


def test_a_scalar_that_transformers_cannot_hold_has_no_family():
    gemma = tiny(**GEMMA, attention_scalar=10.5)
    with pytest.raises(UserError, match=r"no family .*attention_scalar=10.5"):
        to_json(gemma)


def test_the_three_keys_of_phi3_are_written_where_they_say_it_all():
    plain = tiny(max_length=128, rope_scaling=LONG)
    assert to_json(plain, "phi3")["rope_scaling"] == {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    other = dataclasses.replace(plain, rope_scaling=dataclasses.replace(LONG, attention_factor=1.1))
    assert to_json(other, "phi3")["rope_scaling"]["attention_factor"] == 1.1  # more keys: transformers 4 refuses it


def test_the_magnitude_of_yarn_is_written_as_mlx_reads_it():
    """mlx-lm computes (0.1 m ln f + 1) / (0.1 · 0 · ln f + 1) of ``mscale`` m and the factor f."""
    scaling = RopeScaling("yarn", 4.0, 32, attention_factor=1.7)
    older = to_json(tiny(head_dim=4, rope_scaling=scaling))["rope_scaling"]
    assert older["attention_factor"] == 1.7 and older["mscale_all_dim"] == 0.0
    assert 0.1 * older["mscale"] * np.log(4.0) + 1.0 == pytest.approx(1.7)
    plain = to_json(tiny(head_dim=4, rope_scaling=RopeScaling("yarn", 4.0, 32)))["rope_scaling"]
    assert "mscale" not in plain and plain["attention_factor"] == pytest.approx(0.1 * np.log(4.0) + 1.0)


def test_keys_that_other_readers_need_are_written():
    """GPT-2's n_ctx, Phi-3's original length, the first late window of Qwen, the step of Gemma 3's windows."""
    gpt2 = tiny(**FAMILY_OPTIONS["gpt2"][0])
    assert to_json(gpt2)["n_ctx"] == to_json(gpt2)["n_positions"] == 9
    assert to_json(tiny(head_dim=4, rope_fraction=0.5, max_length=64))["original_max_position_embeddings"] == 64
    for windows, first in (((False, True), 1), ((True, True), 0), ((True, False), None)):
        config = tiny(qkv_bias=True, sliding_window=3, window_layers=windows)
        assert to_json(config).get("max_window_layers") == first
    gemma = {**GEMMA, "qk_norm": True, "layers": 3, "sliding_window": 3}
    for windows, step in (((True, False, True), 2), ((True, True, False), 3), ((False, True, True), None)):
        assert to_json(tiny(**gemma, window_layers=windows))["sliding_window_pattern"] == step
    none = to_json(tiny(**GEMMA, qk_norm=True))
    assert (none["sliding_window"], none["sliding_window_pattern"]) == (4096, 1)
    assert none["hidden_act"] == none["hidden_activation"] == "gelu_pytorch_tanh"


def test_longrope_on_heads_of_their_own_size_is_not_saved_as_phi3():
    """transformers counts the factors by hidden_size / heads and refuses the file."""
    with pytest.raises(UserError, match="family 'phi3' has not all options of this decoder; 'llama' has"):
        to_json(tiny(head_dim=4, width=12, rope_scaling=TWO), "phi3")


def test_a_long_value_is_cut():
    assert len(shown(["a"] * 1000)) == 80 and shown(3) == "3"
