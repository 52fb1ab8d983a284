"""What a family of models is, and the keys of ``config.json`` that mean the same in all of them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from distill.models import DecoderConfig
from distill.weights.assemble import Path, Row, Transform, flat, linear, same
from distill.weights.families.rope_json import from_rope_json, to_rope_json

Json = dict[str, Any]

_ABSENT = object()


class Keys:
    """A ``config.json`` that remembers which keys were looked at."""

    def __init__(self, values: Json, defaults: Json):
        self.values, self.defaults, self.seen = values, defaults, {"model_type"}

    def get(self, key: str) -> Any:
        """The value of a key, or its default; ValueError if there is neither."""
        self.seen.add(key)
        value = self.values.get(key, _ABSENT)
        if value is _ABSENT:
            value = self.defaults.get(key, _ABSENT)
        if value is _ABSENT:
            raise ValueError(f"config.json: {key} is missing.")
        return value

    def neutral(self, key: str, *values: Any) -> None:
        """A key that must have one of these values if it is there; ValueError otherwise."""
        self.seen.add(key)
        value = self.values.get(key, values[0])
        if value not in values:
            raise ValueError(f"config.json: {key}={value!r} is not supported; expected {values[0]!r}.")


class Family(NamedTuple):
    """What is particular to one ``model_type``."""

    architecture: str
    """Name of the class in transformers."""
    sizes: dict[str, str]
    """Field of ``DecoderConfig`` → key, for what is the same number in both."""
    defaults: Json
    """Values of keys that a ``config.json`` leaves out, where the decoder depends on them."""
    options: Callable[[Keys], Json]
    """The other fields of ``DecoderConfig``."""
    keys: Callable[[DecoderConfig], Json]
    """The inverse of ``options``."""
    expresses: Callable[[DecoderConfig], bool]
    """Whether this family has all of a decoder's options."""
    row: Callable[[DecoderConfig, Path], Row]
    """Where a parameter of a decoder stands in a file."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of tensors that are computed, not learned."""
    harmless: frozenset[str] = frozenset()
    """Keys of this family alone that change no logit."""
    prefix: str = ""
    """Of all names; files may leave it out."""
    rename: Callable[[str], str] | None = None
    """Another name in files → the name in the table."""


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


UNIVERSAL = ("vocab_size", "layers", "width", "heads", "kv_heads", "head_dim", "feed_forward", "tied", "rope_theta")
UNIVERSAL += ("rope_scaling", "max_length", "norm_epsilon", "dtype")
"""Fields of a decoder that nearly every family has; the others are options."""


def chosen(config: DecoderConfig) -> Json:
    """The options of a decoder that differ from the default.

    Example:
      >>> chosen(DecoderConfig(width=32, qk_norm=True))
      {'qk_norm': True}
    """
    options = [field for field in dataclasses.fields(config) if field.name not in UNIVERSAL]
    return {o.name: getattr(config, o.name) for o in options if getattr(config, o.name) != o.default}


def only(config: DecoderConfig, *options: str) -> bool:
    """Whether a decoder has none of the options that few families have, but those named."""
    return not chosen(config).keys() - set(options)


def row(path: Path, names: dict[str, str], layer: str, matrix: Callable[[int], Transform] = linear) -> Row:
    """Where a parameter stands in a file.

    Args:
      path: of the parameter.
      names: the module a parameter belongs to → the module in the file.
      layer: what stands before the names of a layer.
      matrix: ``inputs -> Transform``, how matrices lie.

    Example:
      >>> row(("layers", "mlp", "down", "kernel"), {"layers/mlp/down": "mlp.down_proj"}, "model.layers.{layer}.").name
      'model.layers.{layer}.mlp.down_proj.weight'
    """
    if len(path) == 1:
        return Row(f"{names[path[0]]}.weight", linear() if path[0] == "head" else same)
    name = (layer if path[0] == "layers" else "") + names["/".join(path[:-1])]
    if path[-1] == "kernel":
        return Row(f"{name}.weight", matrix(2 if path[-2] == "output" else 1))
    return Row(f"{name}.{'weight' if path[-1] == 'scale' else 'bias'}", flat)


# ---- groups of keys


ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""Their names → ours."""


def activation(key: str, given: str) -> str:
    """The activation by our name; ValueError if there is none."""
    if given not in ACTIVATIONS:
        raise ValueError(f"config.json: {key}={given!r} is not supported; expected {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[given]


def activation_key(c: DecoderConfig) -> str:
    """The inverse of ``activation``."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == c.activation)


ROTARY = {"rope_theta": 10_000.0, "rope_scaling": None, "rope_parameters": None}
ROTARY |= {"original_max_position_embeddings": None, "max_position_embeddings": 2048}
"""Defaults of what ``rotary`` reads."""


def rotary(keys: Keys, fraction: float | None = None, theta: str = "rope_theta") -> Json:
    """``rope_theta`` (of the key ``theta``) and ``rope_scaling``; and ``rope_fraction``, if a default is given."""
    names = ("rope_scaling", "rope_parameters", theta, "max_position_embeddings", "original_max_position_embeddings")
    return from_rope_json(*(keys.get(key) for key in names), fraction)


def rotary_keys(c: DecoderConfig, *, fraction: bool = False) -> Json:
    """The inverse of ``rotary``."""
    rope = to_rope_json(c.rope_theta, c.rope_scaling)
    return {"rope_parameters": rope | ({"partial_rotary_factor": c.rope_fraction} if fraction else {})}


def biases(keys: Keys) -> Json:
    """One key for the biases of queries, keys, values and the output."""
    bias = bool(keys.get("attention_bias"))
    return {"qkv_bias": bias, "output_bias": bias}


def windows(keys: Keys, used: Any, by_default: Callable[[int], bool]) -> Json:
    """The windows of ``layer_types``, or those layers have by default.

    Args:
      keys: among them ``sliding_window``.
      used: whether there are windows at all.
      by_default: whether a layer, counted from 0, has a window if ``layer_types`` is not given.
    """
    layers, window, kinds = keys.get("num_hidden_layers"), keys.get("sliding_window"), keys.get("layer_types")
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
            f"use_sliding_window={keys.values.get('use_sliding_window')!r}; expected a window that is used."
        )
    return {"sliding_window": window, "window_layers": () if all(windowed) else windowed}


def layer_types(c: DecoderConfig) -> list[str]:
    """The key ``layer_types``."""
    windowed = c.window_layers or (c.sliding_window is not None,) * c.layers
    return ["sliding_attention" if there else "full_attention" for there in windowed]
