"""Families of networks: ``config.json`` to a configuration and a name table, and back.

A key of ``config.json`` is used, or known not to matter, or an error with its value: none is skipped silently.
"""

from collections.abc import Callable

from distill.errors import UserError
from distill.models.config import DecoderConfig, EncoderConfig, NetworkConfig, changed
from distill.weights.families import encoders, gemma, gpt, llama, moe, relatives
from distill.weights.families.family import HARMLESS, Family, Json, Keys, chosen

FAMILIES: dict[str, Family] = llama.FAMILIES | relatives.FAMILIES | moe.FAMILIES | gemma.FAMILIES | gpt.FAMILIES
FAMILIES |= encoders.FAMILIES
"""``model_type`` → family, the most common first: a network is saved as the first that has all its options."""


def from_json(values: Json, tensors: Callable[[], set[str]] = set) -> NetworkConfig:
    """The network a ``config.json`` describes.

    Args:
      values: of the file.
      tensors: the names of the tensors beside it, which tell whether an encoder has a head or a pooler. It is called
        for families that need it.

    Example:
      >>> sizes = {"vocab_size": 14, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 16}
      >>> heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6}
      >>> from_json({"model_type": "qwen3", **sizes, **heads}).qk_norm
      True

    Raises:
      UserError: a family that is not known, a key that is missing, not known, or has a value not supported here.
    """
    name = values.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"config.json: model_type={name!r} is not supported; expected one of {', '.join(FAMILIES)}.")
    family = FAMILIES[name]
    keys = Keys(values, family.defaults)
    options = family.options(keys)
    for key, allowed in family.neutral.items():
        if key not in keys.seen:
            keys.neutral(key, *allowed)
    sizes = {field: keys.get(key) for field, key in family.sizes.items()}
    sizes |= {"tied": bool(sizes["tied"])} if "tied" in sizes else {}
    understood = keys.seen | HARMLESS | family.harmless
    unknown = [f"{key}={value!r}" for key, value in values.items() if key not in understood]
    found = family.by_tensors({canonical(family, tensor) for tensor in tensors()}) if family.by_tensors else {}
    config = family.config(**(sizes | options | found))
    if unknown:
        raise UserError(f"config.json: {', '.join(unknown)} of model_type {name!r}: not known, and it might matter.")
    return config


def canonical(family: Family, tensor: str) -> str:
    """The name of a tensor in a table without the family's prefix, from its name in a file."""
    return family.rename(tensor).removeprefix(family.prefix)


def family_of(config: NetworkConfig, family: str | None = None) -> str:
    """The ``model_type`` a network is saved as.

    Args:
      config: the network.
      family: the one asked for; None: the first that has all options of the network.

    Raises:
      UserError: none has them, or not the one asked for.
    """
    kind = "encoder" if isinstance(config, EncoderConfig) else "decoder"
    known = {name: one for name, one in FAMILIES.items() if isinstance(config, one.config)}
    if family is not None and family not in known:
        raise UserError(f"family {family!r} is not known; expected one of {', '.join(known)} for this {kind}.")
    able = [name for name, one in known.items() if one.expresses(config)]
    if not able:
        options = chosen(config) if isinstance(config, DecoderConfig) else changed(config)
        options = {"width": config.width, "heads": config.heads} | options
        text = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise UserError(f"no family among {', '.join(known)} has all options of this {kind}: {text}.")
    if family is not None and family not in able:
        raise UserError(f"family {family!r} has not all options of this {kind}; {able[0]!r} has.")
    return family or able[0]


def to_json(config: NetworkConfig, family: str | None = None, dtype: str = "float32") -> Json:
    """The ``config.json`` of a network, as transformers reads it: ``from_json`` of it describes the same network.

    Args:
      config: the network.
      family: its ``model_type``; None: ``family_of(config)``.
      dtype: of the tensors beside it.

    Raises:
      UserError: a family that is not known or does not have all options of this network.
    """
    name = family_of(config, family)
    spec = FAMILIES[name]
    values = vars(config) | spec.derived(config)
    return {
        "architectures": [spec.architecture],
        "model_type": name,
        "dtype": dtype,
        **{key: values[field] for field, key in spec.sizes.items()},
        **spec.constant,
        **spec.keys(config),
    }
