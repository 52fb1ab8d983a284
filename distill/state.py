"""``TrainState``: all that changes while a student learns; ``Frozen``: what a step reads and never changes."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax

from distill.batch import Batch
from distill.losses.reduce import Pair
from distill.shapes import Array, Int, Params

Metrics = dict[str, Pair]
"""Name → (sum, weight)."""


class TrainState(NamedTuple):
    """All that changes while the student learns."""

    step: Int[Array, ""]
    """Optimizer steps done: the one counter from which schedules and the position in the data derive."""
    params: Params
    opt_state: optax.OptState


class Frozen(NamedTuple):
    """What a step reads and never changes, for a student that learns only a part of its parameters (``Model.base``)."""

    teacher: Params | None
    student: Params
    """The part that is not learnt; it may hold the teacher's own arrays."""


TrainStep = Callable[[TrainState, Params | Frozen | None, Batch], tuple[TrainState, Metrics]]
"""``train_step(state, teacher_params, batch) -> (state, metrics)``, pure."""


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), params, optimizer.init(params))
