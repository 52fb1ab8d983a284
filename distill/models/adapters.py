"""A ``Model`` from a Linen or an NNX module."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from distill.errors import UserError
from distill.models.model import Model
from distill.models.output import Collect, Output
from distill.models.parameters import REMAT, Parameter, normal
from distill.shapes import Array, Params


def from_linen(module: nn.Module, vocab_size: int, **fields: Any) -> Model:
    """A ``Model`` from a Linen module with ``__call__(tokens, …) -> Output`` and ``unembed(hidden)``.

    ``apply`` takes ``collect`` if the module's ``__call__`` does, ``remat`` if the module has such a field.

    Parameters declared with ``parameter`` are drawn from one stream of normals that is cut into leaves.
    """
    specification = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    boxes, structure = jax.tree.flatten(specification, is_leaf=lambda leaf: isinstance(leaf, Parameter))
    axes = jax.tree.unflatten(structure, [box.names for box in boxes])
    policies = REMAT if "remat" in {field.name for field in dataclasses.fields(module)} else {"none": None}
    collects = "collect" in inspect.signature(type(module).__call__).parameters

    @jax.jit
    def init(key: Array) -> Params:
        # One draw for all leaves is one small program at any depth; a draw for each leaf compiles for seconds.
        sizes = [math.prod(box.value.shape) for box in boxes]
        stream = normal(key, (sum(sizes),))
        leaves, start = [], 0
        for box, size in zip(boxes, sizes, strict=True):
            leaves.append(box.mean + box.std * stream[start : start + size].reshape(box.value.shape))
            start += size
        return jax.tree.unflatten(structure, leaves)

    def apply(
        params: Params, tokens: Array, *, collect: Collect | None = None, remat: str = "none", **inputs: Any
    ) -> Output:
        if remat not in policies:
            raise UserError(f"remat={remat!r}; expected one of {', '.join(policies)} for {type(module).__name__}.")
        network = module if remat == "none" else module.clone(remat=remat)
        if collect is not None:
            if not collects:
                raise _cannot_collect(type(module).__name__)
            inputs["collect"] = collect
        return network.apply({"params": params}, tokens, **inputs)

    def unembed(params: Params, hidden: Array) -> Array:
        return jnp.asarray(module.apply({"params": params}, hidden, method="unembed"))

    return Model(init, apply, unembed, vocab_size, axes=axes, **fields)


def _cannot_collect(name: str) -> ValueError:
    return ValueError(
        f"collect: {name} gives only its last hidden states; hidden-state, attention and relation losses need a model "
        "whose apply takes collect, such as models.decoder."
    )


def from_nnx(construct: Callable[..., nnx.Module], vocab_size: int) -> Model:
    """A ``Model`` from an NNX module class: the same pure functions, its state as a plain nested dict.

    Args:
      construct: called as ``construct(rngs=nnx.Rngs(key))``. The module must offer
        ``__call__(tokens, positions=None, segments=None) -> hidden [B, L, D]`` and ``unembed(hidden) -> logits``.
      vocab_size: V.

    Example:
      >>> class Bigram(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.table = nnx.Embed(14, 8, rngs=rngs)
      ...     def __call__(self, tokens, positions=None, segments=None):
      ...         return self.table(tokens)
      ...     def unembed(self, hidden):
      ...         return self.table.attend(hidden)
      >>> model = from_nnx(Bigram, vocab_size=14)
      >>> model.logits(model.init(jax.random.key(0)), jnp.array([[1, 2]])).shape
      (1, 2, 14)
    """
    abstract_module = nnx.eval_shape(lambda: construct(rngs=nnx.Rngs(0)))
    graph, abstract = nnx.split(abstract_module)

    def rebuild(params: Params) -> nnx.Module:
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.split(construct(rngs=nnx.Rngs(key)))[1])

    def apply(params: Params, tokens: Array, *, collect: Collect | None = None, **inputs: Any) -> Output:
        if collect is not None:
            raise _cannot_collect(type(abstract_module).__name__)
        return Output(rebuild(params)(tokens, **inputs))

    def unembed(params: Params, hidden: Array) -> Array:
        return rebuild(params).unembed(hidden).astype(jnp.float32)

    return Model(init, apply, unembed, vocab_size)
