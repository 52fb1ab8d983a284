"""Llama and the families that differ from it by an option or two: Mistral, Qwen2, Qwen3, SmolLM3."""

from collections.abc import Callable

from distill.models.config import DecoderConfig
from distill.weights.families import usual
from distill.weights.families.family import (
    Family,
    biases,
    layer_types,
    only,
    rotary,
    rotary_keys,
    row,
    windows,
)
from distill.weights.families.keys import Json, Keys


def _family(
    architecture: str,
    *,
    defaults: Json,
    options: Callable[[Keys], Json],
    keys: Callable[[DecoderConfig], Json],
    expresses: Callable[[DecoderConfig], bool],
) -> Family:
    return Family(
        architecture=architecture,
        sizes=usual.SIZES,
        defaults=usual.DEFAULTS | defaults,
        options=lambda given: rotary(given) | options(given),
        keys=lambda c: {"hidden_act": "silu"} | rotary_keys(c) | keys(c),
        expresses=expresses,
        row=lambda config, path: row(path, usual.NAMES, usual.LAYER),
        ignored=usual.IGNORED,
        prefix=usual.PREFIX,
        copies=usual.COPIES,
    )


def _window(keys: Keys, by_default: Callable[[int], bool]) -> Json:
    """The windows of Qwen and SmolLM3: used or not, and in which layers."""
    return windows(keys, keys.get("use_sliding_window") and keys.get("sliding_window"), by_default)


def _late_window(keys: Keys) -> Json:
    first = keys.get("max_window_layers")
    return _window(keys, lambda layer: layer >= first)


def _window_keys(c: DecoderConfig) -> Json:
    used = c.sliding_window is not None
    return {"use_sliding_window": used, "sliding_window": c.sliding_window, "layer_types": layer_types(c)}


def _late_window_keys(c: DecoderConfig) -> Json:
    """With the first windowed layer for readers that do not know ``layer_types``, if all later ones have a window."""
    kinds = layer_types(c)
    first = kinds.count("full_attention")
    late = set(kinds[first:]) <= {"sliding_attention"}
    return _window_keys(c) | ({"max_window_layers": first} if late else {})


def _smollm3(keys: Keys) -> Json:
    layers, interval = keys.get("num_hidden_layers"), keys.get("no_rope_layer_interval")
    rotated = keys.get("no_rope_layers")  # 1 where positions rotate, whatever the key is called
    if rotated is None:
        rotated = [(n + 1) % interval != 0 for n in range(layers)]
    rotated = tuple(bool(there) for there in rotated[:layers])
    fields = biases(keys) | _window(keys, lambda layer: not rotated[layer]) | {"mlp_bias": keys.get("mlp_bias")}
    return fields | {"rope_layers": () if all(rotated) else rotated}


def _smollm3_keys(c: DecoderConfig) -> Json:
    rotated = c.rope_layers or (True,) * c.layers
    own = {"no_rope_layers": [int(there) for there in rotated], "mlp_bias": c.mlp_bias}
    return {"attention_bias": c.qkv_bias, **own, **_window_keys(c)}


def _one_bias(c: DecoderConfig) -> bool:
    return c.qkv_bias == c.output_bias


_WINDOWS = {"use_sliding_window": False, "layer_types": None, "max_position_embeddings": 32_768}

FAMILIES: dict[str, Family] = {
    "llama": _family(
        "LlamaForCausalLM",
        defaults={"mlp_bias": False},
        options=lambda keys: biases(keys) | {"mlp_bias": keys.get("mlp_bias")},
        keys=lambda c: {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias},
        expresses=lambda c: _one_bias(c) and only(c, "qkv_bias", "output_bias", "mlp_bias") and c.width % c.heads == 0,
    ),
    "mistral": _family(
        "MistralForCausalLM",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131_072},
        options=lambda keys: {"sliding_window": keys.get("sliding_window")},
        keys=lambda c: {"sliding_window": c.sliding_window},  # with layer_types transformers 5 opens it as a Ministral
        expresses=lambda c: only(c, "sliding_window"),
    ),
    "qwen2": _family(
        "Qwen2ForCausalLM",
        defaults={"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32, **_WINDOWS},
        options=lambda keys: {"qkv_bias": True} | _late_window(keys),
        keys=_late_window_keys,
        expresses=lambda c: c.qkv_bias and only(c, "qkv_bias", "sliding_window", "window_layers"),
    ),
    "qwen3": _family(
        "Qwen3ForCausalLM",
        defaults={
            "sliding_window": 4096,
            "max_window_layers": 28,
            "num_key_value_heads": 32,
            "head_dim": 128,
            **_WINDOWS,
        },
        options=lambda keys: {"qk_norm": True} | biases(keys) | _late_window(keys),
        keys=lambda c: {"attention_bias": c.qkv_bias, **_late_window_keys(c)},
        expresses=lambda c: (
            c.qk_norm
            and _one_bias(c)
            and only(c, "qk_norm", "qkv_bias", "output_bias", "sliding_window", "window_layers")
        ),
    ),
    "smollm3": _family(
        "SmolLM3ForCausalLM",
        defaults={
            "sliding_window": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "num_key_value_heads": 4,
            "mlp_bias": False,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            **_WINDOWS,
        },
        options=_smollm3,
        keys=_smollm3_keys,
        expresses=lambda c: (
            _one_bias(c)
            and only(c, "qkv_bias", "output_bias", "mlp_bias", "sliding_window", "window_layers", "rope_layers")
        ),
    ),
}
