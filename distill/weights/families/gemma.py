"""Gemma 2 (arXiv 2408.00118) and the text models of Gemma 3 (arXiv 2503.19786), also as part of a model for images."""

from collections.abc import Callable

from distill.errors import UserError, shown, some
from distill.models.config import DecoderConfig, RopeScaling
from distill.weights.families import usual
from distill.weights.families.family import (
    HARMLESS,
    Family,
    activation,
    activation_key,
    beside,
    biases,
    by_kind,
    every,
    has,
    layer_types,
    only,
    rotary,
    rotary_keys,
    row,
    windows,
)
from distill.weights.families.keys import Json, Keys
from distill.weights.families.rope_json import from_rope_json, to_older_json, to_rope_json
from distill.weights.table import ParameterPath, Row

NAMES = usual.NAMES | {
    "layers/attention_post_norm": "post_attention_layernorm",
    "layers/mlp_norm": "pre_feedforward_layernorm",
    "layers/mlp_post_norm": "post_feedforward_layernorm",
}

_ALWAYS = {"norm_plus_one": True, "norm_place": "around", "scaled_embedding": True}

_WINDOW = 4096
"""Where no layer has a window: transformers runs no layer without this key."""

_DEFAULTS = {
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_activation": None,
    "query_pre_attn_scalar": 256,
    "sliding_window": _WINDOW,
    "layer_types": None,
}


def _row(_: DecoderConfig, path: ParameterPath) -> Row:
    return row(path, NAMES, usual.LAYER)


def _common(keys: Keys, windowed: Callable[[int], bool]) -> Json:
    """Options that both have."""
    keys.neutral("use_bidirectional_attention", False, None)
    given = keys.get("hidden_activation") or "gelu_pytorch_tanh"
    keys.neutral("hidden_act", given)
    kind = activation("hidden_activation", given)
    fields = _ALWAYS | biases(keys) | windows(keys, keys.get("sliding_window"), windowed)
    softcaps = {
        "attention_softcap": keys.get("attn_logit_softcapping"),
        "logit_softcap": keys.get("final_logit_softcapping"),
    }
    return fields | softcaps | {"activation": kind, "attention_scalar": keys.get("query_pre_attn_scalar")}


def _common_keys(c: DecoderConfig) -> Json:
    kind = activation_key(c)
    return {
        "hidden_act": kind,
        "hidden_activation": kind,
        "attention_bias": c.qkv_bias,
        "query_pre_attn_scalar": c.key_size if c.attention_scalar is None else c.attention_scalar,
        "attn_logit_softcapping": c.attention_softcap,
        "final_logit_softcapping": c.logit_softcap,
        "sliding_window": _WINDOW if c.sliding_window is None else c.sliding_window,
        "layer_types": layer_types(c),
    }


def _expresses(c: DecoderConfig, *more: str) -> bool:
    options = ("qkv_bias", "output_bias", "activation", "attention_scalar", "attention_softcap", "logit_softcap")
    options += ("sliding_window", "window_layers")
    return (
        has(c, _ALWAYS)
        and c.qkv_bias == c.output_bias
        and only(c, *_ALWAYS, *options, *more)
        and c.width % c.heads == 0
        and float(c.attention_scalar or 1).is_integer()  # transformers takes a whole number only
    )


def _every_other(layer: int) -> bool:
    return layer % 2 == 0


# ---- Gemma 3: two sets of rotary positions


def _gemma3(keys: Keys) -> Json:
    step, kinds = keys.get("sliding_window_pattern"), keys.get("layer_types")
    if step is None and kinds is None:
        raise UserError("config.json: sliding_window_pattern=None without layer_types; expected one of them.")
    fields = _common(keys, lambda layer: (layer + 1) % step != 0) | {"qk_norm": True}
    whole, local = _two_ropes(keys)
    return fields | whole | ({"rope_theta_local": local} if "sliding_window" in fields else {})


def _two_ropes(keys: Keys) -> tuple[Json, float]:
    """Positions of layers without a window, and theta of those with one, in either spelling."""
    newer = by_kind(keys)
    whole = from_rope_json(keys.get("rope_scaling"), newer["full_attention"], beside(keys))
    local = from_rope_json(None, newer["sliding_attention"], beside(keys, "rope_local_base_freq"))
    if local["rope_scaling"].kind != "none":
        raise UserError(f"config.json: {shown(local['rope_scaling'])} in layers with a window; expected none.")
    return whole, local["rope_theta"]


def _gemma3_keys(c: DecoderConfig) -> Json:
    local = c.rope_theta if c.rope_theta_local is None else c.rope_theta_local
    ropes = {"full_attention": to_rope_json(c.rope_theta, c.rope_scaling)}
    ropes |= {"sliding_attention": to_rope_json(local, RopeScaling())}
    older = to_older_json(c.rope_scaling)
    return _common_keys(c) | {
        "rope_parameters": ropes,
        "rope_theta": c.rope_theta,
        "rope_local_base_freq": local,
        "sliding_window_pattern": every(c, shift=1),
        **({} if older is None else {"rope_scaling": older}),
    }


# ---- Gemma 3 with images: its text model alone

_OF_IMAGES = {"vision_config", "mm_tokens_per_image"}
_OF_IMAGES |= {f"{token}_token_{kind}" for token in ("boi", "eoi", "image") for kind in ("id", "index")}


def text_of(values: Json) -> Json:
    """The ``gemma3_text`` in a ``config.json`` of ``gemma3``, which also reads images.

    Raises:
      UserError: there is none, or a key beside it that is not known.

    Example:
      >>> text_of({"model_type": "gemma3", "text_config": {"hidden_size": 8}, "vision_config": {}})
      {'hidden_size': 8, 'model_type': 'gemma3_text'}
    """
    text = values.get("text_config")
    if not isinstance(text, dict):
        raise UserError("config.json: text_config is missing; expected that of a gemma3 with images.")
    known = HARMLESS | _OF_IMAGES | {"model_type", "text_config", "tie_word_embeddings"}
    unknown = [f"{key}={shown(value)}" for key, value in values.items() if key not in known]
    if unknown:
        raise UserError(f"config.json: {some(unknown)} of model_type 'gemma3': not known, and it might matter.")
    tied = {key: values[key] for key in ("tie_word_embeddings",) if key in values}
    return tied | text | {"model_type": "gemma3_text"}


def text_name(name: str) -> str:
    """The name in ``gemma3_text`` of a tensor of ``gemma3``, in either spelling; other names are unchanged.

    Example:
      >>> text_name("language_model.model.norm.weight"), text_name("model.language_model.norm.weight")
      ('model.norm.weight', 'model.norm.weight')
    """
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("language_model.")


OF_IMAGES = (r"(model\.)?vision_tower\..*", r"(model\.)?multi_modal_projector\..*")
"""Tensors that only images use."""


FAMILIES: dict[str, Family] = {
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        sizes=usual.SIZES,
        defaults=usual.DEFAULTS
        | _DEFAULTS
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "max_position_embeddings": 8192},
        options=lambda keys: rotary(keys) | _common(keys, _every_other),
        keys=lambda c: rotary_keys(c) | _common_keys(c),
        expresses=_expresses,
        row=_row,
        ignored=usual.IGNORED,
        prefix=usual.PREFIX,
        copies=usual.COPIES,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        sizes=usual.SIZES,
        defaults=usual.DEFAULTS
        | _DEFAULTS
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "max_position_embeddings": 131_072}
        | {
            "vocab_size": 262_208,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
        },
        options=_gemma3,
        keys=_gemma3_keys,
        expresses=lambda c: (
            c.qk_norm
            and _expresses(c, "qk_norm", "rope_theta_local")
            and (c.rope_theta_local is not None or c.sliding_window is None or c.rope_scaling.kind == "none")
        ),
        row=_row,
        ignored=usual.IGNORED + OF_IMAGES,
        prefix=usual.PREFIX,
        copies=usual.COPIES,
        harmless=frozenset({"_sliding_window_pattern"}),
        rename=text_name,
    ),
}
