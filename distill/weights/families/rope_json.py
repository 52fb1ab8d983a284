"""Conversion between ``RopeScaling`` and the rotary keys of ``config.json``, in either spelling.

``rope_parameters`` (transformers 5) holds theta and the scaling. transformers 4, mlx-lm and llama.cpp's converter read
``rope_theta`` and ``rope_scaling`` beside it, and take a default in silence where these are missing: both are written.
"""

import dataclasses
import math
from typing import Any

from distill.errors import UserError, shown, some
from distill.models.config import RopeScaling
from distill.weights.families.keys import FACTOR, FLAG, LENGTH, POSITIVE, TEXT, Json, Kind

_FACTORS = Kind("list", most=2.0**16, of=POSITIVE)
_SCALE = Kind("number", -1e6, 1e6)
_KINDS = {
    "rope_theta": POSITIVE,
    "type": TEXT,
    "rope_type": TEXT,
    "partial_rotary_factor": Kind("number", 0.0, 1.0),
    "factor": FACTOR,
    "original_max_position_embeddings": LENGTH,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "beta_fast": POSITIVE,
    "beta_slow": POSITIVE,
    "mscale": _SCALE,
    "mscale_all_dim": _SCALE,
    "attention_factor": POSITIVE,
    "truncate": FLAG,
    "short_factor": _FACTORS,
    "long_factor": _FACTORS,
}
"""Key of a rotary object → its kind."""

_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "longrope": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    },
}
"""``rope_type`` → keys that it may have."""


@dataclasses.dataclass(frozen=True)
class Beside:
    """Keys of ``config.json`` beside the rotary objects."""

    theta: float | None = None
    """The key ``rope_theta``, or what the family calls it; None: absent."""
    usual_theta: float | None = 10_000.0
    """Theta where no key has it; None: a key must."""
    length: int = 2048
    """``max_position_embeddings``."""
    original: int | None = None
    """``original_max_position_embeddings``; None: as in the object, or ``length``."""
    fraction: float | None = None
    """The rotated part of a head by a key of its own; None: absent."""
    usual_fraction: float | None = None
    """The rotated part where no key has it; None: the family always rotates whole heads."""


def from_rope_json(older: Json | None, newer: Json | None, beside: Beside) -> Json:
    """``rope_theta`` and ``rope_scaling`` of a decoder, and ``rope_fraction`` where a family has it.

    Args:
      older: ``rope_scaling``.
      newer: ``rope_parameters``, which holds theta too.
      beside: the other keys.

    Example:
      >>> from_rope_json({"type": "linear", "factor": 2.0}, None, Beside())["rope_scaling"].factor
      2.0

    Raises:
      UserError: a kind or a key that is not known, one that is missing, a value of another kind or outside its range,
        or two spellings that say different things.
    """
    given = {"rope_scaling": older, "rope_parameters": newer}
    read = {name: _read(name, value, beside) for name, value in given.items() if value}
    if len(read) == 2 and not _agree(read["rope_scaling"], read["rope_parameters"]):
        one, other = (", ".join(f"{key}={shown(value)}" for key, value in fields.items()) for fields in read.values())
        raise UserError(f"config.json: rope_scaling gives {one}; rope_parameters gives {other}; expected the same.")
    return read.get("rope_parameters") or read.get("rope_scaling") or _read("rope_parameters", {}, beside)


def _read(name: str, values: Json, beside: Beside) -> Json:
    given = {key: value for key, value in values.items() if value is not None}
    given = {key: _KINDS[key].read(f"{name}.{key}", v) if key in _KINDS else v for key, v in given.items()}
    kind = _kind(given)
    theta = _one("rope_theta", given.pop("rope_theta", None), beside.theta, beside.usual_theta)
    fraction = beside.usual_fraction
    if fraction is not None or given.get("partial_rotary_factor") == 1.0:
        fraction = _one("partial_rotary_factor", given.pop("partial_rotary_factor", None), beside.fraction, fraction)
    unknown = [f"{key}={shown(value)}" for key, value in given.items() if key not in _KEYS[kind]]
    if unknown:
        raise UserError(f"config.json: {some(unknown)} of rope_type {kind!r}: not known, and it might matter.")
    fields = {"rope_theta": theta, "rope_scaling": _scaling(kind, given, beside)}
    return fields if beside.usual_fraction is None else fields | {"rope_fraction": fraction}


def _kind(given: Json) -> str:
    """Takes ``type`` and ``rope_type`` out of a rotary object."""
    renamed = {"su": "longrope"}  # its older name
    kinds = [renamed.get(given[key], given[key]) for key in ("rope_type", "type") if key in given]
    for key in ("rope_type", "type"):
        given.pop(key, None)
    if len(set(kinds)) > 1:
        raise UserError(f"config.json: rope_type={kinds[0]!r} and type={kinds[1]!r}; expected the same.")
    kind = kinds[0] if kinds else "default"
    if kind not in _KEYS:
        raise UserError(f"config.json: rope_type={shown(kind)} is not supported; expected one of {', '.join(_KEYS)}.")
    return kind


def _one(key: str, inside: float | None, beside: float | None, usual: float | None) -> float:
    """The value inside a rotary object or beside it, which must agree, or the usual one."""
    if inside is not None and beside is not None and inside != beside:
        raise UserError(f"config.json: {key} is {inside} in the rotary object and {beside} beside it; expected one.")
    value = next((value for value in (inside, beside, usual) if value is not None), None)
    if value is None:
        raise UserError(f"config.json: {key}=None; expected {_KINDS[key]}.")
    return value


def _agree(one: Json, other: Json) -> bool:
    """Whether two readings turn queries and keys alike; LongRoPE's factor has no effect beside its magnitude."""

    def numbers(fields: Json) -> list[Any]:
        scaling = fields["rope_scaling"]
        factor = 1.0 if scaling.kind == "longrope" else scaling.factor
        plain = vars(scaling) | {"factor": factor, "attention_factor": scaling.magnitude}
        return [fields["rope_theta"], fields.get("rope_fraction"), *plain.values()]

    return all(_close(a, b) for a, b in zip(numbers(one), numbers(other), strict=True))


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _scaling(kind: str, given: Json, beside: Beside) -> RopeScaling:
    if kind == "default":
        return RopeScaling()
    length = beside.length
    original = beside.original or given.get("original_max_position_embeddings") or length
    if kind in ("yarn", "longrope"):
        given.setdefault("factor", length / original)
    needed = _KEYS[kind] & {"factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"}
    missing = sorted(needed - given.keys())
    if missing:
        raise UserError(f"config.json: rope_type {kind!r} without {', '.join(missing)}.")
    factor = given["factor"]
    if kind == "linear":
        return RopeScaling(kind, factor)
    if kind == "dynamic":
        return RopeScaling(kind, factor, length)
    if kind == "llama3":
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        return RopeScaling(kind, factor, original, low_frequency=low, high_frequency=high)
    if kind == "longrope":
        short, long = tuple(given["short_factor"]), tuple(given["long_factor"])
        factor, kept = max(factor, 1.0), given.get("attention_factor")
        return RopeScaling(kind, factor, original, attention_factor=kept, short_factors=short, long_factors=long)
    return RopeScaling(
        kind,
        factor,
        original,
        beta_fast=given.get("beta_fast", 32.0),
        beta_slow=given.get("beta_slow", 1.0),
        truncate=given.get("truncate", True),
        attention_factor=_attention_factor(factor, given),
    )


def _attention_factor(factor: float, given: Json) -> float | None:
    """The given factor, or the quotient of two magnitudes (DeepSeek's spelling); None: YaRN's default."""
    if "attention_factor" in given:
        return given["attention_factor"]
    mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    if not (mscale and all_dim):
        return None
    grown = RopeScaling("yarn", factor, 1).magnitude - 1.0
    return (mscale * grown + 1.0) / (all_dim * grown + 1.0)


def to_rope_json(theta: float, scaling: RopeScaling) -> Json:
    """``rope_parameters``; the length of ``dynamic`` is the key ``max_position_embeddings``.

    Example:
      >>> to_rope_json(10_000, RopeScaling("linear", 2))
      {'rope_theta': 10000.0, 'rope_type': 'linear', 'factor': 2.0}
    """
    rope = {"rope_theta": theta, "rope_type": "default" if scaling.kind == "none" else scaling.kind}
    if scaling.kind != "none":
        rope["factor"] = scaling.factor
    if scaling.kind in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_frequency, "high_freq_factor": scaling.high_frequency}
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
    if scaling.kind == "longrope":
        rope |= {"short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)}
    if scaling.kind in ("yarn", "longrope"):
        rope["attention_factor"] = scaling.magnitude
    return {key: _KINDS[key].read(key, value) for key, value in rope.items()}


def to_older_json(scaling: RopeScaling) -> Json | None:
    """``rope_scaling``, with both names of the kind; None where positions are not scaled.

    mlx-lm reads YaRN's ``mscale`` in place of ``attention_factor``.

    Example:
      >>> to_older_json(RopeScaling("linear", 2.0))
      {'type': 'linear', 'rope_type': 'linear', 'factor': 2.0}
    """
    if scaling.kind == "none":
        return None
    rope = to_rope_json(1.0, scaling)
    del rope["rope_theta"]
    usual = dataclasses.replace(scaling, attention_factor=None).magnitude
    if scaling.kind == "yarn" and scaling.factor > 1.0 and scaling.magnitude != usual:
        rope |= {"mscale": (scaling.magnitude - 1.0) / (usual - 1.0), "mscale_all_dim": 0.0}
    return {"type": scaling.kind, **rope}


def to_phi3_json(scaling: RopeScaling, length: int) -> Json | None:
    """``rope_scaling`` of Phi-3 for transformers 4, which takes three keys and refuses more.

    It computes LongRoPE's magnitude from the two lengths. Where another one is meant, the longer form is written:
    transformers 4 then refuses the file, and computes nothing wrong.
    """
    rope = to_older_json(scaling)
    if rope is None:
        return None
    implied = dataclasses.replace(scaling, factor=max(length / scaling.original_length, 1.0), attention_factor=None)
    if math.isclose(implied.magnitude, scaling.magnitude, rel_tol=1e-6):
        return {key: rope[key] for key in ("type", "short_factor", "long_factor")}
    return rope
