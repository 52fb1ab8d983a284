"""Families of language models: ``config.json`` to a decoder and a name table, and back.

A key of ``config.json`` is used, or known not to matter, or an error with its value: nothing is passed over silently.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from distill.models import DecoderConfig
from distill.weights.assemble import Row, Table, flat, linear, same, shapes_of
from distill.weights.rope_json import from_rope_json, to_rope_json

Json = dict[str, Any]

_ABSENT = object()


class Family(NamedTuple):
    """What is particular to one ``model_type``."""

    architecture: str
    """Name of the class in transformers."""
    defaults: Json
    """Values of keys that a ``config.json`` leaves out, where the decoder depends on them."""
    options: Callable[["_Keys"], Json]
    """Fields of ``DecoderConfig`` from keys only this family has."""
    keys: Callable[[DecoderConfig], Json]
    """The inverse of ``options``."""
    expresses: Callable[[DecoderConfig], bool]
    """Whether this family has all of a decoder's options."""


class _Keys:
    """A ``config.json`` that remembers which keys were looked at."""

    def __init__(self, values: Json, defaults: Json):
        self.values, self.defaults, self.seen = values, defaults, {"model_type"}

    def get(self, key: str) -> Any:
        self.seen.add(key)
        value = self.values.get(key, _ABSENT)
        if value is _ABSENT:
            value = self.defaults.get(key, _ABSENT)
        if value is _ABSENT:
            raise ValueError(f"config.json: {key} is missing.")
        return value

    def neutral(self, key: str, *values: Any) -> None:
        """A key that must have one of these values if it is there."""
        self.seen.add(key)
        value = self.values.get(key, values[0])
        if value not in values:
            raise ValueError(f"config.json: {key}={value!r} is not supported; expected {values[0]!r}.")


HARMLESS = {
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "max_window_layers",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}
"""Keys that change no logit: what a training drew, a sampler wants, or a program wrote for itself."""

NEUTRAL = {
    "attention_bias": (False,),
    "hidden_act": ("silu",),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False,),
    "use_sliding_window": (False,),
}
"""Keys that mean nothing at these values and something else at any other, unless a family uses them."""

IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")
"""Tensors of older files that are computed, not learned."""


# ---- options by family


def _biases(keys: _Keys) -> Json:
    """One key for the biases of queries, keys, values and the output."""
    bias = bool(keys.get("attention_bias"))
    return {"qkv_bias": bias, "output_bias": bias}


def _window(keys: _Keys, by_default: Callable[[int], bool]) -> Json:
    """The windows of Qwen and SmolLM3: used or not, and in which layers."""
    layers, window = keys.get("num_hidden_layers"), keys.get("sliding_window")
    kinds, used = keys.get("layer_types"), keys.get("use_sliding_window") and window
    if kinds is None:
        kinds = ["sliding_attention" if used and by_default(n) else "full_attention" for n in range(layers)]
    if set(kinds) - {"sliding_attention", "full_attention"} or len(kinds) != layers:
        raise ValueError(
            f"config.json: layer_types={kinds!r}; expected sliding_attention or full_attention for {layers} layers."
        )
    windowed = tuple(kind == "sliding_attention" for kind in kinds)
    if not any(windowed):
        return {}
    if not used:
        raise ValueError(
            f"config.json: layer_types={kinds!r} with sliding_window={window!r} and "
            f"use_sliding_window={keys.get('use_sliding_window')!r}; expected a window that is used."
        )
    return {"sliding_window": window, "window_layers": () if all(windowed) else windowed}


def _late_window(keys: _Keys) -> Json:
    first = keys.get("max_window_layers")
    return _window(keys, lambda layer: layer >= first)


def _window_keys(c: DecoderConfig) -> Json:
    windowed = [c.sliding_window is not None] * c.layers if not c.window_layers else c.window_layers
    kinds = ["sliding_attention" if there else "full_attention" for there in windowed]
    used = c.sliding_window is not None
    return {"use_sliding_window": used, "sliding_window": c.sliding_window, "layer_types": kinds}


def _mistral(keys: _Keys) -> Json:
    return {"sliding_window": keys.get("sliding_window")}


def _smollm3(keys: _Keys) -> Json:
    layers, interval = keys.get("num_hidden_layers"), keys.get("no_rope_layer_interval")
    rotated = keys.get("no_rope_layers")  # 1 where positions rotate, whatever the key is called
    if rotated is None:
        rotated = [(n + 1) % interval != 0 for n in range(layers)]
    rotated = tuple(bool(there) for there in rotated[:layers])
    fields = _biases(keys) | _window(keys, lambda layer: not rotated[layer]) | {"mlp_bias": bool(keys.get("mlp_bias"))}
    return fields | {"rope_layers": () if all(rotated) else rotated}


def _smollm3_keys(c: DecoderConfig) -> Json:
    rotated = c.rope_layers or (True,) * c.layers
    own = {"no_rope_layers": [int(there) for there in rotated], "mlp_bias": c.mlp_bias}
    return {"attention_bias": c.qkv_bias, **own, **_window_keys(c)}


def _plain(c: DecoderConfig, *but: str) -> bool:
    """Whether a decoder has none of the options that few families have, but those named."""
    options = ("qkv_bias", "output_bias", "mlp_bias", "qk_norm", "sliding_window", "window_layers", "rope_layers")
    return not any(getattr(c, option) for option in options if option not in but)


def _one_bias(c: DecoderConfig) -> bool:
    return c.qkv_bias == c.output_bias


_COMMON = {"head_dim": None, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "max_position_embeddings": 2048}
_COMMON |= {"tie_word_embeddings": False, "rope_scaling": None, "rope_parameters": None}
_COMMON |= {"original_max_position_embeddings": None, "num_key_value_heads": None, "attention_bias": False}
_ROPE = ("rope_scaling", "rope_parameters", "rope_theta", "max_position_embeddings", "original_max_position_embeddings")
_WINDOWS = {"use_sliding_window": False, "layer_types": None, "max_position_embeddings": 32_768}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        {"mlp_bias": False},
        lambda keys: _biases(keys) | {"mlp_bias": bool(keys.get("mlp_bias"))},
        lambda c: {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias},
        lambda c: _one_bias(c) and _plain(c, "qkv_bias", "output_bias", "mlp_bias") and c.width % c.heads == 0,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131_072},
        _mistral,
        lambda c: {"sliding_window": c.sliding_window},
        lambda c: _plain(c, "sliding_window"),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32, **_WINDOWS},
        lambda keys: {"qkv_bias": True} | _late_window(keys),
        _window_keys,
        lambda c: c.qkv_bias and _plain(c, "qkv_bias", "sliding_window", "window_layers"),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32, "head_dim": 128, **_WINDOWS},
        lambda keys: {"qk_norm": True} | _biases(keys) | _late_window(keys),
        lambda c: {"attention_bias": c.qkv_bias, **_window_keys(c)},
        lambda c: (
            c.qk_norm
            and _one_bias(c)
            and _plain(c, "qk_norm", "qkv_bias", "output_bias", "sliding_window", "window_layers")
        ),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            "sliding_window": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "num_key_value_heads": 4,
            "mlp_bias": False,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            **_WINDOWS,
        },
        _smollm3,
        _smollm3_keys,
        lambda c: (
            _one_bias(c)
            and _plain(c, "qkv_bias", "output_bias", "mlp_bias", "sliding_window", "window_layers", "rope_layers")
        ),
    ),
}
"""``model_type`` → family, the most common first: a decoder is saved as the first that has all it needs."""


# ---- config.json → decoder


def from_json(values: Json) -> DecoderConfig:
    """The decoder a ``config.json`` describes.

    Example:
      >>> sizes = {"vocab_size": 14, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 16}
      >>> heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6}
      >>> from_json({"model_type": "qwen3", **sizes, **heads}).qk_norm
      True

    Raises:
      ValueError: a family that is not known, a key that is missing, not known, or has a value not supported here.
    """
    name = values.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"config.json: model_type={name!r} is not supported; expected one of {', '.join(FAMILIES)}.")
    family = FAMILIES[name]
    keys = _Keys(values, _COMMON | family.defaults)
    options = family.options(keys)
    for key, allowed in NEUTRAL.items():
        if key not in keys.seen:
            keys.neutral(key, *allowed)
    config = DecoderConfig(
        vocab_size=keys.get("vocab_size"),
        layers=keys.get("num_hidden_layers"),
        width=keys.get("hidden_size"),
        heads=keys.get("num_attention_heads"),
        kv_heads=keys.get("num_key_value_heads"),
        head_dim=keys.get("head_dim"),
        feed_forward=keys.get("intermediate_size"),
        tied=bool(keys.get("tie_word_embeddings")),
        norm_epsilon=keys.get("rms_norm_eps"),
        max_length=keys.get("max_position_embeddings"),
        **from_rope_json(*(keys.get(key) for key in _ROPE)),
        **options,
    )
    unknown = [f"{key}={value!r}" for key, value in values.items() if key not in keys.seen | HARMLESS]
    if unknown:
        raise ValueError(f"config.json: {', '.join(unknown)} of model_type {name!r}: not known, and it might matter.")
    return config


# ---- decoder → config.json


def family_of(config: DecoderConfig) -> str:
    """The ``model_type`` a decoder is saved as: the first family that has all its options.

    Raises:
      ValueError: none has.
    """
    for name, family in FAMILIES.items():
        if family.expresses(config):
            return name
    plain = DecoderConfig()
    options = [f"{f.name}={getattr(config, f.name)!r}" for f in dataclasses.fields(config) if f.name in _PARTICULAR]
    options = [text for text in options if text not in {f"{n}={getattr(plain, n)!r}" for n in _PARTICULAR}]
    raise ValueError(f"no family among {', '.join(FAMILIES)} has a decoder with {', '.join(options)}.")


_PARTICULAR = ("width", "heads", "qkv_bias", "output_bias", "mlp_bias", "qk_norm")
_PARTICULAR += ("rope_layers", "sliding_window", "window_layers")


def to_json(config: DecoderConfig, family: str | None = None, dtype: str = "float32") -> Json:
    """The ``config.json`` of a decoder, as transformers reads it: ``from_json`` of it describes the same decoder.

    Args:
      config: the decoder.
      family: its ``model_type``; None: ``family_of(config)``.
      dtype: of the tensors beside it.

    Raises:
      ValueError: a family that is not known or has not all of this decoder's options.
    """
    name = family or family_of(config)
    if name not in FAMILIES:
        raise ValueError(f"family {name!r} is not known; expected one of {', '.join(FAMILIES)}.")
    if not FAMILIES[name].expresses(config):
        raise ValueError(f"family {name!r} has not all options of this decoder; {family_of(config)!r} has.")
    return {
        "architectures": [FAMILIES[name].architecture],
        "model_type": name,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.key_size,
        "hidden_act": "silu",
        "max_position_embeddings": _length(config),
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": to_rope_json(config.rope_theta, config.rope_scaling),
        "tie_word_embeddings": config.tied,
        "use_cache": True,
        **FAMILIES[name].keys(config),
    }


def _length(config: DecoderConfig) -> int:
    """Dynamic scaling reads the original length from here; the others read nothing."""
    scaling = config.rope_scaling
    if scaling.kind == "dynamic":
        return scaling.original_length
    return config.max_length or max(2048, int(scaling.factor * scaling.original_length))


# ---- names


def table_of(config: DecoderConfig) -> Table:
    """The names of a decoder's tensors in files for transformers: the same in all these families."""
    return {path: _row(path) for path in shapes_of(config)}


_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "norm/scale": "model.norm.weight",
    "layers/attention_norm/scale": "input_layernorm.weight",
    "layers/mlp_norm/scale": "post_attention_layernorm.weight",
    "layers/attention/query_norm/scale": "self_attn.q_norm.weight",
    "layers/attention/key_norm/scale": "self_attn.k_norm.weight",
    "layers/attention/query": "self_attn.q_proj",
    "layers/attention/key": "self_attn.k_proj",
    "layers/attention/value": "self_attn.v_proj",
    "layers/attention/output": "self_attn.o_proj",
    "layers/mlp/gate": "mlp.gate_proj",
    "layers/mlp/up": "mlp.up_proj",
    "layers/mlp/down": "mlp.down_proj",
}


def _row(path: tuple[str, ...]) -> Row:
    prefix = "model.layers.{layer}." if path[0] == "layers" else ""
    key = "/".join(path)
    if path[-1] in ("kernel", "bias"):
        name = prefix + _NAMES["/".join(path[:-1])] + (".weight" if path[-1] == "kernel" else ".bias")
        if path[-1] == "kernel":
            return Row(name, linear(2 if path[-2] == "output" else 1))
        return Row(name, flat if path[-2] in ("query", "key", "value") else same)
    return Row(prefix + _NAMES[key], linear() if key == "head" else same)
