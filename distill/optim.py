"""Schedule, optimizer, decay mask. Schedules count optimizer steps, never micro-batches."""

import dataclasses
import math
from typing import Literal

import jax
import optax

from distill.errors import UserError, check_fields
from distill.shapes import Array, Params


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, a decaying schedule and a bound on the gradient's norm."""

    learning_rate: float = 3e-3
    """At its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls to 0 after the warm-up."""
    warmup_steps: int = 50
    """Optimizer steps from 0 to the peak."""
    weight_decay: float = 0.0
    """Decoupled; on matrices only, not on norms and biases."""
    beta1: float = 0.9
    beta2: float = 0.99
    clip_norm: float = 1.0
    """Bound on the global norm of the gradient; 0: none."""

    def __post_init__(self):
        check_fields(self, "optimizer")
        if not 0.0 < self.learning_rate < math.inf:
            raise UserError(f"optimizer: learning_rate={self.learning_rate}; expected a finite number above 0.")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            if not 0.0 <= vars(self)[name] < math.inf:
                raise UserError(f"optimizer: {name}={vars(self)[name]}; expected a finite number of at least 0.")
        for name in ("beta1", "beta2"):
            if not 0.0 <= vars(self)[name] < 1.0:
                raise UserError(f"optimizer: {name}={vars(self)[name]}; expected a number in [0, 1).")


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by optimizer step, from 0 … steps."""
    falls = {
        "cosine": optax.cosine_decay_schedule(1.0, max(steps - config.warmup_steps, 1)),
        "linear": optax.linear_schedule(1.0, 0.0, max(steps - config.warmup_steps, 1)),
        "constant": optax.constant_schedule(1.0),
    }
    rise = optax.linear_schedule(0.0, 1.0, config.warmup_steps) if config.warmup_steps else optax.constant_schedule(1.0)
    shape = optax.join_schedules([rise, falls[config.schedule]], [config.warmup_steps])
    return lambda step: config.learning_rate * shape(step + 1)  # the first update moves too


def decay_mask(params: Params) -> Params:
    """True where weight decay applies: kernels and tables, not norm scales and biases."""

    def name(path: tuple) -> object:  # of dicts, of dataclasses; places in lists have none
        return getattr(path[-1], "key", getattr(path[-1], "name", None)) if path else None

    return jax.tree_util.tree_map_with_path(lambda path, _: name(path) not in ("scale", "bias"), params)


def optimizer(
    config: OptimizerConfig,
    steps: int,
    *,
    learning_rate: float | Array | None = None,
    weight_decay: float | Array | None = None,
) -> optax.GradientTransformation:
    """Clip, Adam, decoupled decay, schedule (arXiv 1711.05101).

    ``learning_rate`` and ``weight_decay`` stand in for the configuration's, and may be traced: under ``vmap`` a sweep
    over them is one program.
    """
    peak = config.learning_rate if learning_rate is None else learning_rate
    decay = config.weight_decay if weight_decay is None else weight_decay
    shape = schedule(dataclasses.replace(config, learning_rate=1.0), steps)
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(
        *clip,
        optax.scale_by_adam(config.beta1, config.beta2),
        optax.add_decayed_weights(decay, mask=decay_mask),
        optax.scale_by_learning_rate(lambda step: peak * shape(step)),
    )
