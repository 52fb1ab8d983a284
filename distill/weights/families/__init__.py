"""Families of language models: ``config.json`` to a decoder and a name table, and back.

A key of ``config.json`` is used, or known not to matter, or an error with its value: nothing is passed over silently.
"""

from typing import Any

from distill.models import DecoderConfig
from distill.weights.assemble import Table, shapes_of
from distill.weights.families import gemma, gpt, llama, moe, relatives
from distill.weights.families.encoders import ENCODERS
from distill.weights.families.family import HARMLESS, NEUTRAL, Family, Json, Keys, chosen

FAMILIES: dict[str, Family] = llama.FAMILIES | relatives.FAMILIES | moe.FAMILIES | gemma.FAMILIES | gpt.FAMILIES
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
        known = ", ".join([*FAMILIES, *ENCODERS])
        raise ValueError(f"config.json: model_type={name!r} is not supported; expected one of {known}.")
    family = FAMILIES[name]
    keys = Keys(values, family.defaults)
    options = family.options(keys)
    for key, allowed in NEUTRAL.items():
        if key not in keys.seen:
            keys.neutral(key, *allowed)
    sizes = {field: keys.get(key) for field, key in family.sizes.items()}
    config = DecoderConfig(**(sizes | {"tied": bool(sizes["tied"])} | options))
    understood = keys.seen | HARMLESS | family.harmless
    unknown = [f"{key}={value!r}" for key, value in values.items() if key not in understood]
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
    options = {"width": config.width, "heads": config.heads} | chosen(config)
    text = ", ".join(f"{name}={value!r}" for name, value in options.items())
    raise ValueError(f"no family among {', '.join(FAMILIES)} has a decoder with {text}.")


def to_json(config: DecoderConfig, family: str | None = None, dtype: str = "float32") -> Json:
    """The ``config.json`` of a decoder, as transformers reads it: ``from_json`` of it describes the same decoder.

    Args:
      config: the decoder.
      family: its ``model_type``; None: ``family_of(config)``.
      dtype: of the tensors beside it.

    Raises:
      ValueError: a family that is not known or has not all of this decoder's options.
    """
    name = _named(config, family)
    values: dict[str, Any] = {field: getattr(config, field) for field in FAMILIES[name].sizes}
    values |= {"kv_heads": config.groups, "head_dim": config.key_size, "max_length": _length(config)}
    return {
        "architectures": [FAMILIES[name].architecture],
        "model_type": name,
        "dtype": dtype,
        **{key: values[field] for field, key in FAMILIES[name].sizes.items()},
        "use_cache": True,
        **FAMILIES[name].keys(config),
    }


def _named(config: DecoderConfig, family: str | None) -> str:
    name = family or family_of(config)
    if name not in FAMILIES:
        raise ValueError(f"family {name!r} is not known; expected one of {', '.join(FAMILIES)}.")
    if not FAMILIES[name].expresses(config):
        raise ValueError(f"family {name!r} has not all options of this decoder; {family_of(config)!r} has.")
    return name


def _length(config: DecoderConfig) -> int:
    """Dynamic scaling reads the original length from here; the others read nothing."""
    scaling = config.rope_scaling
    if scaling.kind == "dynamic":
        return scaling.original_length
    return config.max_length or max(2048, int(scaling.factor * scaling.original_length))


# ---- names


def table_of(config: DecoderConfig, family: str | None = None) -> Table:
    """The names of a decoder's tensors in files of a family, for transformers.

    Args:
      config: the decoder.
      family: the ``model_type``; None: ``family_of(config)``.

    Raises:
      ValueError: a family that is not known or has not all of this decoder's options.
    """
    row = FAMILIES[_named(config, family)].row
    return {path: row(config, path) for path in shapes_of(config)}
