"""Conversion between ``RopeScaling`` and the rotary keys of ``config.json``, in either spelling."""

from typing import Any

from distill.errors import UserError
from distill.models.config import RopeScaling

Json = dict[str, Any]

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


def from_rope_json(
    older: Json | None,
    newer: Json | None,
    theta: float,
    length: int,
    original: int | None,
    fraction: float | None = None,
) -> Json:
    """``rope_theta`` and ``rope_scaling`` of a decoder, and ``rope_fraction`` where a family has it.

    Args:
      older: ``rope_scaling``, beside ``rope_theta``.
      newer: ``rope_parameters``, which holds theta too; used if there is no older one.
      theta: the key ``rope_theta``.
      length: ``max_position_embeddings``.
      original: ``original_max_position_embeddings``; None: as in the parameters, or ``length``.
      fraction: the rotated part of a head if the parameters do not have it; None: the family always rotates all of it.

    Example:
      >>> from_rope_json({"type": "linear", "factor": 2.0}, None, 1e4, 2048, None)["rope_scaling"].factor
      2.0

    Raises:
      UserError: a kind or a key that is not known, or one that is missing.
    """
    given = {key: value for key, value in (older or newer or {}).items() if value is not None}
    theta = float(given.pop("rope_theta", theta))
    older_kind = given.pop("type", "default")
    kind = given.pop("rope_type", older_kind)
    kind = "longrope" if kind == "su" else kind  # its older name
    if kind not in _KEYS:
        raise UserError(f"config.json: rope_type={kind!r} is not supported; expected one of {', '.join(_KEYS)}.")
    if fraction is not None or given.get("partial_rotary_factor") == 1.0:
        fraction = given.pop("partial_rotary_factor", fraction)
    unknown = [f"{key}={value!r}" for key, value in given.items() if key not in _KEYS[kind]]
    if unknown:
        raise UserError(f"config.json: {', '.join(unknown)} of rope_type {kind!r}: not known, and it might matter.")
    fields = {"rope_theta": theta, "rope_scaling": _scaling(kind, given, length, original)}
    return fields if fraction is None else fields | {"rope_fraction": float(fraction)}


def _scaling(kind: str, given: Json, length: int, original: int | None) -> RopeScaling:
    if kind == "default":
        return RopeScaling()
    original = int(original or given.get("original_max_position_embeddings") or length)
    if kind in ("yarn", "longrope"):
        given.setdefault("factor", length / original)
    needed = _KEYS[kind] & {"factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"}
    missing = sorted(needed - given.keys())
    if missing:
        raise UserError(f"config.json: rope_type {kind!r} without {', '.join(missing)}.")
    factor = float(given["factor"])
    if kind == "linear":
        return RopeScaling(kind, factor)
    if kind == "dynamic":
        return RopeScaling(kind, factor, length)
    if kind == "llama3":
        low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
        return RopeScaling(kind, factor, original, low_frequency=low, high_frequency=high)
    if kind == "longrope":
        short, long = (tuple(float(f) for f in given[name]) for name in ("short_factor", "long_factor"))
        factor, kept = max(factor, 1.0), given.get("attention_factor")
        return RopeScaling(kind, factor, original, attention_factor=kept, short_factors=short, long_factors=long)
    return RopeScaling(
        kind,
        factor,
        original,
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        truncate=bool(given.get("truncate", True)),
        attention_factor=_attention_factor(factor, given),
    )


def _attention_factor(factor: float, given: Json) -> float | None:
    """The given factor, or the quotient of two magnitudes (DeepSeek's spelling); None: YaRN's default."""
    if "attention_factor" in given:
        return float(given["attention_factor"])
    mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    if not (mscale and all_dim):
        return None
    grown = RopeScaling("yarn", factor, 1).magnitude - 1.0
    return (mscale * grown + 1.0) / (all_dim * grown + 1.0)


def to_rope_json(theta: float, scaling: RopeScaling) -> Json:
    """``rope_parameters``; the length of ``dynamic`` is the key ``max_position_embeddings``."""
    if scaling.kind == "none":
        return {"rope_theta": theta, "rope_type": "default"}
    rope = {"rope_theta": theta, "rope_type": scaling.kind, "factor": scaling.factor}
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
    return rope
