"""distill: knowledge distillation of language models in JAX and Flax.

A large teacher hands its knowledge to a small student. Losses, models and the train step are pure functions; start at
``distill/step.py`` (what one update is), then ``distill/train.py`` (the loop around it).
"""

__version__ = "0.1.0"
