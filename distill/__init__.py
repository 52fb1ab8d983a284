"""distill: knowledge distillation of language models in JAX and Flax.

A large teacher hands its knowledge to a small student. Losses, models and the train step are pure functions. Start at
``distill/step.py`` (one update), then ``distill/train.py`` (the loop around it).

``import distill`` is fast: ``distill.losses`` and every other submodule are imported when they are asked for.
"""

import pkgutil
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "Batch": "batch",
    "Task": "train",
    "TrainingConfig": "training",
    "fit": "train",
    "load": "weights.folder",
    "save": "weights.folder",
    "shift": "batch",
}
"""Public name → the module it is in."""
_MODULES = frozenset(module.name for module in pkgutil.iter_modules(__path__))


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(f"distill.{_NAMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"distill.{name}")
    raise AttributeError(f"module 'distill' has no attribute {name!r}; it has {', '.join(__dir__())}.")


def __dir__() -> list[str]:
    return sorted(_NAMES.keys() | _MODULES)
