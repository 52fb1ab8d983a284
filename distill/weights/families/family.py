"""``Family``: what is particular to a ``model_type``, and keys of ``config.json`` that families share."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill.errors import UserError, shown, some
from distill.models.config import DecoderConfig, NetworkConfig, changed
from distill.weights.families.keys import OBJECT, Json, Keys
from distill.weights.families.rope_json import Beside, from_rope_json, to_older_json, to_rope_json
from distill.weights.table import ParameterPath, Part, Row, Transform, flat, linear, same


def lengths(config: Any) -> Json:
    """Sizes of a decoder that a ``config.json`` always has. Dynamic scaling reads the original length from its key."""
    scaling = config.rope_scaling
    length = config.max_length or max(2048, int(scaling.factor * scaling.original_length))
    length = scaling.original_length if scaling.kind == "dynamic" else length
    return {"kv_heads": config.groups, "head_dim": config.key_size, "max_length": length}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One ``model_type``: its ``config.json`` and the names of its tensors. The defaults are a decoder's."""

    config: type[NetworkConfig] = DecoderConfig
    """Type of the configuration."""
    architecture: str
    """Name of the class in transformers, unless ``keys`` has another."""
    sizes: Mapping[str, str]
    """Field of the configuration → key, for what is the same number in both."""
    defaults: Json
    """Values of keys that a ``config.json`` leaves out, where the network depends on them."""
    options: Callable[[Keys], Json]
    """The other fields of the configuration."""
    keys: Callable[[Any], Json]
    """The inverse of ``options``."""
    expresses: Callable[[Any], bool]
    """Whether this family has all options of a configuration."""
    row: Callable[[Any, ParameterPath], Row]
    """Where a parameter stands in a file."""
    by_tensors: Callable[[set[str]], Json] | None = None
    """Fields of the configuration that only the names of the tensors tell."""
    derived: Callable[[Any], Json] = lengths
    """Values of ``sizes`` that are no field, or not the field's."""
    constant: Json = dataclasses.field(default_factory=lambda: {"use_cache": True})
    """Keys that are always written."""
    neutral: Mapping[str, tuple] = dataclasses.field(default_factory=lambda: NEUTRAL)
    """Keys that change nothing at these values and something at any other, unless the family reads them."""
    harmless: frozenset[str] = frozenset()
    """Keys of this family that change no output."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of tensors, without the prefix, that are computed, not learned."""
    ignored_by: Callable[[Any], tuple[str, ...]] = lambda config: ()
    """The same, for tensors that depend on the configuration."""
    prefix: str
    """Prefix of tensor names, which files may leave out."""
    copies: Mapping[str, str]
    """Tensor of a tied head that a file may hold too → the tensor it is a copy of; names with the prefix."""
    rename: Callable[[str], str] = lambda name: name
    """Another name in files → the name in the table."""
    absent: Callable[[Any], dict[str, np.ndarray]] = lambda config: {}
    """Tensors, without the prefix, that the stacked parameters have and no file holds."""


HARMLESS = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_name_or_path",
    "_num_labels",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "compression_config",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "max_sequence_length",
    "max_window_layers",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "quantization",
    "quantization_config",
    "return_dict",
    "sentence_transformers",
    "task_specific_params",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}
"""Keys that change no logit: of training, of sampling, or of the program that wrote the file; or null, where quantised
weights are refused."""
HARMLESS |= {
    *("bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample"),
    *("early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task"),
    *("forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length", "num_beam_groups"),
    *("no_repeat_ngram_size", "num_beams", "num_return_sequences", "output_scores", "prefix", "remove_invalid_values"),
    *("repetition_penalty", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "temperature"),
    *("tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16"),
}
"""What transformers 4 and older write for every model: of writing, of tokenizers, of the program."""

NEUTRAL = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "cross_attention_hidden_size": (None,),
    "hidden_act": ("silu",),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0, None),
    "pruned_heads": ({}, None),
    "rope_interleaved": (False,),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}
"""Keys that change nothing at these values and something at any other, unless a family reads them."""


UNIVERSAL = ("vocab_size", "layers", "width", "heads", "kv_heads", "head_dim", "feed_forward", "tied", "rope_theta")
UNIVERSAL += ("rope_scaling", "max_length", "norm_epsilon", "dtype")
"""Fields of a decoder that nearly every family has; the others are options."""


def chosen(config: DecoderConfig) -> Json:
    """The options of a decoder that differ from the default.

    Example:
      >>> chosen(DecoderConfig(width=32, qk_norm=True))
      {'qk_norm': True}
    """
    return {name: value for name, value in changed(config).items() if name not in UNIVERSAL}


def only(config: DecoderConfig, *options: str) -> bool:
    """Whether a decoder has none of the options that few families have, except those named."""
    return not chosen(config).keys() - set(options)


def has(config: NetworkConfig, values: Json) -> bool:
    """Whether fields of a configuration have these values."""
    fields = vars(config)
    return all(fields[name] == value for name, value in values.items())


def row(
    path: ParameterPath,
    names: Mapping[str, str],
    layer: str,
    *,
    matrix: Callable[[int], Transform] = linear,
    parts: Mapping[str, Part] | None = None,
) -> Row:
    """Where a parameter stands in a file.

    Args:
      path: of the parameter.
      names: the module a parameter belongs to → the module in the file.
      layer: what stands before the names of a layer.
      matrix: ``inputs -> Transform``, how matrices lie.
      parts: module, such as ``query`` → its part of a tensor that holds several.

    Example:
      >>> row(("layers", "mlp", "down", "kernel"), {"layers/mlp/down": "mlp.down_proj"}, "model.layers.{layer}.").name
      'model.layers.{layer}.mlp.down_proj.weight'
    """
    if len(path) == 1:
        kind = "bias" if path[0].endswith("bias") else "weight"
        return Row(f"{names[path[0]]}.{kind}", linear() if path[0] == "head" else same)
    name = (layer if path[0] == "layers" else "") + names["/".join(path[:-1])]
    part = (parts or {}).get(path[-2])
    if path[-1] == "kernel":
        return Row(f"{name}.weight", matrix(2 if path[-2] == "output" else 1), part)
    return Row(f"{name}.{'weight' if path[-1] == 'scale' else 'bias'}", flat, part)


# ---- groups of keys


ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""Name in ``config.json`` → name in a configuration."""


def activation(key: str, given: str, known: Sequence[str] = tuple(ACTIVATIONS)) -> str:
    """The activation by the name of our configurations.

    Args:
      key: the key, for the message.
      given: its value.
      known: the values that the network has.

    Raises:
      UserError: another value.
    """
    if given not in known:
        raise UserError(f"config.json: {key}={shown(given)} is not supported; expected one of {', '.join(known)}.")
    return ACTIVATIONS[given]


def activation_key(c: NetworkConfig) -> str:
    """The inverse of ``activation``."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == c.activation)


def beside(keys: Keys, theta: str = "rope_theta", fraction: str = "", usual: float | None = None) -> Beside:
    """What ``config.json`` holds beside its rotary objects.

    Args:
      keys: of the file.
      theta: the key of theta.
      fraction: the key of the rotated part of a head; empty: the family always rotates whole heads.
      usual: the rotated part where no key has it.
    """
    length, original = keys.get("max_position_embeddings"), keys.get("original_max_position_embeddings")
    own = keys.given(fraction) if fraction else None
    usual_theta = None if theta in keys.values else keys.defaults[theta]
    return Beside(keys.given(theta), usual_theta, length, original, own, usual)


def rotary(keys: Keys, theta: str = "rope_theta", fraction: str = "", usual: float | None = None) -> Json:
    """``rope_theta`` and ``rope_scaling``; and ``rope_fraction``, if the family has its key."""
    return from_rope_json(keys.get("rope_scaling"), keys.get("rope_parameters"), beside(keys, theta, fraction, usual))


def by_kind(keys: Keys) -> dict[str, Json | None]:
    """``rope_parameters`` with an object for layers without a window and one for those with one.

    Raises:
      UserError: another key, such as the theta of families that have one object for all layers.
    """
    kinds = ("full_attention", "sliding_attention")
    given = keys.get("rope_parameters") or {}
    if strange := sorted(given.keys() - set(kinds)):
        raise UserError(f"config.json: rope_parameters has {some(strange)}; expected {' and '.join(kinds)}.")
    return {kind: OBJECT.read(f"rope_parameters.{kind}", given.get(kind)) for kind in kinds}


def rotary_keys(c: DecoderConfig, theta: str = "rope_theta", fraction: str = "") -> Json:
    """The inverse of ``rotary``, in both spellings."""
    part = {"partial_rotary_factor": c.rope_fraction} if fraction else {}
    older = to_older_json(c.rope_scaling)
    return {
        "rope_parameters": to_rope_json(c.rope_theta, c.rope_scaling) | part,
        theta: c.rope_theta,
        **({fraction: c.rope_fraction} if fraction else {}),
        **({} if older is None else {"rope_scaling": older}),
    }


def biases(keys: Keys) -> Json:
    """Biases of queries, keys, values and the output, which share one key."""
    bias = keys.get("attention_bias")
    return {"qkv_bias": bias, "output_bias": bias}


def windows(keys: Keys, used: Any, by_default: Callable[[int], bool]) -> Json:
    """Windows by the key ``layer_types``, or by default.

    Args:
      keys: among them ``sliding_window``.
      used: whether there are windows at all.
      by_default: whether a layer, counted from 0, has a window if ``layer_types`` is not given.
    """
    layers, window, kinds = keys.get("num_hidden_layers"), keys.get("sliding_window"), keys.get("layer_types")
    windowed = windowed_layers(layers, kinds, lambda n: bool(used) and by_default(n))
    if not any(windowed):
        return {}
    if not used:
        raise UserError(
            f"config.json: layer_types={shown(kinds)} with sliding_window={window!r} and "
            f"use_sliding_window={keys.values.get('use_sliding_window')!r}; expected a window that is used."
        )
    return {"sliding_window": window, "window_layers": () if all(windowed) else windowed}


def windowed_layers(layers: int, kinds: Sequence[str] | None, by_default: Callable[[int], bool]) -> tuple[bool, ...]:
    """For each layer, whether it has a window by the key ``layer_types``; without that key by default.

    Raises:
      UserError: a kind that is not known, or another number of layers.
    """
    if kinds is None:
        return tuple(by_default(n) for n in range(layers))
    if set(kinds) - {"sliding_attention", "full_attention"} or len(kinds) != layers:
        raise UserError(
            f"config.json: layer_types={shown(kinds)}; expected sliding_attention or full_attention for {layers} "
            "layers."
        )
    return tuple(kind == "sliding_attention" for kind in kinds)


def layer_types(c: NetworkConfig) -> list[str]:
    """The key ``layer_types``."""
    windowed = c.window_layers or (c.sliding_window is not None,) * c.layers
    return ["sliding_attention" if there else "full_attention" for there in windowed]


def every(c: NetworkConfig, shift: int) -> int | None:
    """The step of a pattern of windows: layer n has none where n + shift is a multiple of it; None: no such pattern.

    Older readers know the pattern alone. null, which they cannot use, keeps them from taking another one.

    Example:
      >>> every(DecoderConfig(layers=3, sliding_window=4, window_layers=(True, True, False)), shift=1)
      3
    """
    whole = [kind == "full_attention" for kind in layer_types(c)]
    steps = (step for step in range(1, c.layers + 2) if whole == [(n + shift) % step == 0 for n in range(c.layers)])
    return next(steps, None)
