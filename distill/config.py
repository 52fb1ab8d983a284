"""Configuration: nested frozen dataclasses, built by ``distill/configs/*.py``, overridden on the command line."""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import json
import math
import os
import pkgutil
import traceback
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    hints = typing.get_type_hints(kind)
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
        with _own_file(name):
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
    with _own_file(name) if name.endswith(".py") else contextlib.nullcontext():
        return module.get_config()


@contextlib.contextmanager
def _own_file(name: str) -> Iterator[None]:
    """Turns what the user's configuration file raises into a ``UserError`` that names its line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frames, own = traceback.extract_tb(error.__traceback__), Path(name).resolve()
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == own]
        place = f", line {lines[-1]}" if lines else ""
        raise UserError(f"--config {name}{place}: {type(error).__name__}: {error}") from error


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines ``key: old → new`` for all that differs between two nested dicts."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            lines += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return lines
    return [] if old == new else [f"{path}: {old} → {new}"]
