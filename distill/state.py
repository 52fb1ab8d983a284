"""``TrainState``: all that changes while a student learns; ``Frozen``: what a step reads and never changes."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from distill.batch import Batch
from distill.errors import UserError
from distill.losses.reduce import Pair
from distill.shapes import Array, Int, Params

Metrics = dict[str, Pair]
"""Name → (sum, weight)."""


class TrainState(NamedTuple):
    """All that changes while the student learns."""

    step: Int[Array, ""]
    """Optimizer steps done: the one counter from which schedules and the position in the data derive."""
    params: Params
    """float32."""
    opt_state: optax.OptState


class Frozen(NamedTuple):
    """What a step reads and never changes, for a student that learns only a part of its parameters (``Model.base``)."""

    teacher: Params | None
    student: Params
    """The part that is not learnt; it may hold the teacher's own arrays."""


TrainStep = Callable[[TrainState, Params | Frozen | None, Batch], tuple[TrainState, Metrics]]
"""``train_step(state, teacher_params, batch) -> (state, metrics)``, pure."""


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. Parameters of a narrower type are copied to float32.

    A bfloat16 has 8 bits: adding 2e-5 to a weight of 0.3 leaves it as it was. The copies hold the same values, and the
    network may compute in bfloat16 all the same (``DecoderConfig.dtype``). Frozen parameters keep their type.

    Raises:
      UserError: a parameter that has no gradient, such as integers or a key.

    Example:
      >>> init_state({"scale": jnp.ones(2, jnp.bfloat16)}, optax.sgd(0.1)).params["scale"].dtype
      dtype('float32')
    """
    params = in_float32(params)
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def in_float32(params: Params) -> Params:
    """Parameters to learn: those of a narrower type as float32, the others as they are.

    Raises:
      UserError: a parameter that has no gradient, such as integers or a key.
    """

    def one(path: tuple, leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise UserError(
                f"init_state: the parameter {_named(path)} is {leaf.dtype}, which cannot be learnt; expected floats. "
                "Keep it among the frozen parameters (students.lora, students.freeze)."
            )
        return leaf.astype(jnp.float32) if leaf.dtype.itemsize < 4 else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def check_float32(params: Params) -> None:
    """Raises UserError for parameters too narrow to learn in, or without a gradient."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype.itemsize < 4:
            raise UserError(
                f"train_step: the parameter {_named(path)} is {leaf.dtype}, in which small updates are lost; expected "
                "float32. Make the state with init_state, or load the student with dtype float32."
            )


def _named(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
