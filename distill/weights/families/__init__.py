"""Families of networks: ``config.json`` to a configuration and a name table, and back.

A key of ``config.json`` is used, or known not to matter, or an error with its value: none is skipped silently.
"""

import re
from collections.abc import Callable

from distill.errors import UserError, shown, some
from distill.models.config import DecoderConfig, EncoderConfig, NetworkConfig, changed
from distill.weights.families import encoders, gemma, gpt, llama, moe, relatives
from distill.weights.families.family import HARMLESS, Family, chosen
from distill.weights.families.keys import Json, Keys, written
from distill.weights.table import Table

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
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"config.json: model_type={shown(name)} is not supported; expected one of {known}.")
    _refuse_quantized(values)
    family = FAMILIES[name]
    keys = Keys(values, family.defaults)
    options = family.options(keys)
    for key, allowed in family.neutral.items():
        if key not in keys.seen:
            keys.neutral(key, *allowed)
    sizes = {field: keys.get(key) for field, key in family.sizes.items()}
    understood = keys.seen | HARMLESS | family.harmless
    unknown = [f"{key}={shown(value)}" for key, value in values.items() if key not in understood]
    found = family.by_tensors({canonical(family, tensor) for tensor in tensors()}) if family.by_tensors else {}
    config = family.config(**(sizes | options | found))
    if unknown:
        raise UserError(f"config.json: {some(unknown)} of model_type {name!r}: not known, and it might matter.")
    return config


_QUANTIZED = ("quantization_config", "quantization", "compression_config")
"""Keys of quantised weights: of transformers, mlx-lm and compressed-tensors."""

_WRAPPERS = re.compile(r"^((_orig_mod|_forward_module|module)\.)+|(?<=\.)_orig_mod\.")
"""What ``torch.compile`` and the wrappers of data parallel training put into names."""


def _refuse_quantized(values: Json) -> None:
    for key in _QUANTIZED:
        if (given := values.get(key)) is not None:
            fields = given if isinstance(given, dict) else {}
            how = {name: fields[name] for name in ("quant_method", "bits") if name in fields}
            raise UserError(
                f"config.json: {key}={shown(how or given)}: the weights are quantised; expected floats of 16 bits or "
                "more: take the release that is not quantised."
            )


def canonical(family: Family, tensor: str) -> str:
    """The name of a tensor in a table without the family's prefix, from its name in a file."""
    return family.rename(_WRAPPERS.sub("", tensor)).removeprefix(family.prefix)


def name_in(family: Family, table: Table) -> Callable[[str], str]:
    """The name of a tensor in a table from its name in a file, which may lack the family's prefix, as in transformers.

    Example:
      >>> config = DecoderConfig(layers=1)
      >>> table = {("norm", "scale"): FAMILIES["llama"].row(config, ("norm", "scale"))}
      >>> name_in(FAMILIES["llama"], table)("norm.weight"), name_in(FAMILIES["llama"], table)("lm_head.weight")
      ('model.norm.weight', 'lm_head.weight')
    """
    rows = [row.name for row in table.values() if row.name.startswith(family.prefix)]
    modules = {name.removeprefix(family.prefix).split(".")[0] for name in rows}

    def name(tensor: str) -> str:
        bare = canonical(family, tensor)
        return family.prefix + bare if bare.split(".")[0] in modules else bare

    return name


def left_out(family: Family, config: NetworkConfig) -> tuple[str, ...]:
    """Regular expressions of tensors that are not needed: computed ones, and copies of a tied head."""
    patterns = family.ignored + family.ignored_by(config)
    tied = config.tied if isinstance(config, DecoderConfig) else config.mlm_head
    copies = tuple(map(re.escape, family.copies)) if tied else ()
    return tuple(f"({re.escape(family.prefix)})?(?:{pattern})" for pattern in patterns) + copies


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
    keys = {key: values[field] for field, key in spec.sizes.items()} | spec.constant | spec.keys(config)
    of_file = {"architectures": [spec.architecture], "model_type": name, "dtype": dtype, "torch_dtype": dtype}
    return written(of_file | keys)
