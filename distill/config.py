"""Configuration: nested frozen dataclasses, built by ``distill/configs/*.py``, overridden on the command line."""

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import json
import math
import os
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from distill.devices import processes
from distill.errors import MissingFile, UserError


def to_json(value: Any, **options: Any) -> str:
    """JSON that every reader takes: NaN and infinity, which JSON cannot write, are null.

    Example:
      >>> to_json({"loss": float("nan"), "steps": (1, float("inf"))})
      '{"loss": null, "steps": [1, null]}'
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """The dataclass ``kind`` from what ``to_dict`` gave; an unknown key is a TypeError."""
    hints = _hints(kind)
    fields = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints.get(key)):
            value = from_dict(hints[key], value)
        fields[key] = tuple(value) if isinstance(value, list) else value
    return kind(**fields)


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all, NaN and infinity as null; of several processes, the first one does."""
    if processes.index():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(to_json(value, indent=2) + "\n")
    os.replace(partial, file)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    """Is a value of the type a field is declared with? Whole numbers are numbers; booleans are neither."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == choice and isinstance(value, type(choice)) for choice in inner)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, inner[0]) for one in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _expected(hint: Any) -> str:
    """What a field is declared as, in words: its choices, or its type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_expected, inner))
    if origin is tuple:
        return f"a tuple, each {_expected(inner[0])}"
    names = {float: "a finite number", int: "a whole number", str: "a text", bool: "True or False", type(None): "None"}
    return names.get(hint) or f"a {hint.__name__}"


Read = Callable[[], Mapping[str, tuple[bool, str]]]
"""Field → (whether anything reads it, beside which other fields)."""


def check_fields(config: Any, name: str, read: Read = dict) -> None:
    """Refuses a value of another type than its field is declared with, and one that nothing would read.

    Args:
      config: a dataclass; ``__post_init__`` calls this first.
      name: of the configuration in messages.
      read: called once the types are right; a field that nothing reads must have its default.

    Raises:
      UserError: the field, its value, and what was expected: of a ``Literal``, its choices.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Pool:
      ...     kind: Literal["mean", "power"] = "mean"
      ...     exponent: float = 2.0
      ...
      ...     def __post_init__(self):
      ...         check_fields(self, "pool", lambda: {"exponent": (self.kind == "power", f"kind={self.kind!r}")})
      >>> for given in ({"kind": "max"}, {"exponent": 3.0}):
      ...     try:
      ...         Pool(**given)
      ...     except UserError as error:
      ...         print(error)
      pool: kind='max'; expected one of mean, power.
      pool: exponent=3.0 is not read with kind='mean'; leave it out (default: 2.0).
    """
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if not _fits(value, hint):
            near = difflib.get_close_matches(str(value), map(str, typing.get_args(hint)), 1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{name}: {field.name}={value!r}; expected {_expected(hint)}.{meant}")
    known, defaults = read(), {field.name: field.default for field in dataclasses.fields(config)}
    for field, (used, beside) in known.items():
        value, default = getattr(config, field), defaults[field]
        if not used and value != default:
            raise UserError(
                f"{name}: {field}={value!r} is not read with {beside}; leave it out (default: {default!r})."
            )


def load_config(name: str) -> Any:
    """``get_config()`` of ``distill/configs/NAME.py``, or of a Python file given by its path.

    Raises:
      UserError: no such configuration (names the nearest), or a file without ``get_config``.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise MissingFile(f"--config {name}: no such file; give a Python file with get_config().")
        spec = importlib.util.spec_from_file_location("distill_user_config", name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        import distill.configs

        known = sorted(module.name for module in pkgutil.iter_modules(distill.configs.__path__))
        if name not in known:
            near = difflib.get_close_matches(name, known) or known
            raise UserError(
                f"--config {name}: unknown; did you mean {', '.join(near)}? Or give the path of a .py file."
            )
        module = importlib.import_module(f"distill.configs.{name}")
    if not hasattr(module, "get_config"):
        raise UserError(f"--config {name}: the file has no get_config(); expected a function that returns a Config.")
    return module.get_config()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines ``key: old → new`` for all that differs between two nested dicts."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            lines += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return lines
    return [] if old == new else [f"{path}: {old} → {new}"]
