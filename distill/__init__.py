"""distill: knowledge distillation of language models in JAX and Flax.

A large teacher hands its knowledge to a small student. Losses, models and the train step are pure functions; start at
``distill/step.py`` (what one update is), then ``distill/train.py`` (the loop around it).
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["load", "save"]


def __getattr__(name: str):
    """``distill.load`` and ``distill.save``, imported when they are asked for: ``import distill`` stays fast."""
    if name in __all__:
        return getattr(import_module("distill.weights"), name)
    raise AttributeError(f"module 'distill' has no attribute {name!r}")
