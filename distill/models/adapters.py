"""A ``Model`` from a Linen or an NNX module."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from distill.errors import UserError
from distill.models.model import Model
from distill.models.output import Collect, Output
from distill.models.parameters import REMAT, Parameter, normal
from distill.shapes import Array, Params

TOKENS = (1, 2)
"""Shape of the tokens on which a module is tried, on shapes alone."""


def from_linen(module: nn.Module, vocab_size: int, **fields: Any) -> Model:
    """A ``Model`` from a Linen module with ``__call__(tokens, positions, segments, …)`` and ``unembed(hidden)``.

    ``__call__`` returns hidden states ``[B, L, D]`` or an ``Output``, ``unembed`` logits ``[B, L, V]``. ``apply`` takes
    ``collect`` if the module's ``__call__`` does, ``remat`` if the module has such a field.

    All of the module's parameters are learnt, drawn by its own initialisers. Those declared with ``parameter`` are
    drawn from one stream of normals that is cut into leaves, and have logical axes; others are replicated on a mesh.

    Raises:
      UserError: variables beside the parameters (running statistics, a cache), random numbers in the forward pass
        (dropout that is not deterministic), a ``__call__`` without positions and segments, no ``unembed``, or another
        vocabulary.

    Example:
      >>> class Bigram(nn.Module):
      ...     def setup(self):
      ...         self.table, self.norm = nn.Embed(14, 8), nn.LayerNorm()
      ...     def __call__(self, tokens, positions=None, segments=None):
      ...         return self.norm(self.table(tokens))
      ...     def unembed(self, hidden):
      ...         return self.table.attend(hidden)
      >>> model = from_linen(Bigram(), vocab_size=14)
      >>> model.logits(model.init(jax.random.key(0)), jnp.array([[1, 2]])).shape
      (1, 2, 14)
    """
    tokens, others = _inputs()
    taken = {name: value for name, value in others.items() if _takes(type(module), name)}
    specification = jax.eval_shape(lambda key: module.init(key, tokens, **taken), jax.random.key(0)).get("params", {})
    boxes = jax.tree.leaves(specification, is_leaf=lambda leaf: isinstance(leaf, Parameter))
    if boxes and all(isinstance(box, Parameter) for box in boxes):
        init, axes = _declared(specification)
    else:
        init, axes = _ordinary(module, vocab_size), None
    policies = REMAT if "remat" in {field.name for field in dataclasses.fields(module)} else {"none": None}
    collects = "collect" in inspect.signature(type(module).__call__).parameters

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
        return _as_output(network.apply({"params": params}, tokens, **_filled(type(module), tokens, inputs)))

    def unembed(params: Params, hidden: Array) -> Array:
        return jnp.asarray(module.apply({"params": params}, hidden, method="unembed"), jnp.float32)

    return Model(init, apply, unembed, vocab_size, axes=axes, **fields)


def _declared(specification: Params) -> tuple[Callable[[Array], Params], Params]:
    """``init`` and the logical axes of parameters that are all declared with ``parameter``."""
    boxes, structure = jax.tree.flatten(specification, is_leaf=lambda leaf: isinstance(leaf, Parameter))

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

    return init, jax.tree.unflatten(structure, [box.names for box in boxes])


def _ordinary(module: nn.Module, vocab_size: int) -> Callable[[Array], Params]:
    """``init`` of a module with initialisers of its own, after a trial on shapes."""
    name, (tokens, further) = type(module).__name__, _inputs()
    _check_signature("from_linen", type(module))

    def logits(module: nn.Module) -> Array:
        return module.unembed(_as_output(module(tokens, **further)).hidden)

    shape, variables = jax.eval_shape(lambda key: module.init_with_output(key, method=logits), jax.random.key(0))
    others = sorted(variables.keys() - {"params"})
    if others:
        raise UserError(
            f"from_linen: {name} has variables in {', '.join(others)}; expected parameters alone, since only they are "
            "learnt and kept."
        )
    _check_vocabulary("from_linen", name, shape, vocab_size)
    params = nn.meta.unbox(variables["params"])
    try:
        jax.eval_shape(lambda params: module.apply({"params": params}, method=logits), params)
    except flax.errors.InvalidRngError as error:
        raise _draws("from_linen", name) from error

    @jax.jit
    def init(key: Array) -> Params:
        return nn.meta.unbox(module.init(key, method=logits)["params"])

    return init


def _inputs() -> tuple[Array, dict[str, Array]]:
    """What a module is tried on, as every batch has it: tokens, positions and segments."""
    zeros = jnp.zeros(TOKENS, jnp.int32)
    return zeros, {"positions": zeros, "segments": zeros}


def _filled(kind: type, tokens: Array, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, with positions and segments of rows of one text where a module has no default for them."""
    usual = {
        "positions": lambda: jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        "segments": lambda: jnp.ones_like(tokens),
    }
    taken = inspect.signature(kind.__call__).parameters
    needed = [n for n in usual if n in taken and taken[n].default is inspect.Parameter.empty and inputs.get(n) is None]
    return inputs | {name: usual[name]() for name in needed}


def _takes(kind: type, name: str) -> bool:
    inputs = inspect.signature(kind.__call__).parameters
    return name in inputs or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in inputs.values())


def _check_signature(adapter: str, kind: type) -> None:
    """Raises UserError for a module that takes no positions and segments, or has no head."""
    inputs = inspect.signature(kind.__call__).parameters
    if not (_takes(kind, "positions") and _takes(kind, "segments")):
        raise UserError(
            f"{adapter}: {kind.__name__}.__call__ takes {', '.join(list(inputs)[1:])}; expected tokens, positions and "
            "segments, so that packed documents do not see each other."
        )
    if not callable(getattr(kind, "unembed", None)):
        raise UserError(f"{adapter}: {kind.__name__} has no unembed; expected unembed(hidden) -> logits.")


def _as_output(result: Any) -> Output:
    return result if isinstance(result, Output) else Output(result)


def _check_vocabulary(adapter: str, name: str, logits: Any, vocab_size: int) -> None:
    if logits.shape[-1] != vocab_size:
        raise UserError(f"{adapter}: {name} gives {logits.shape[-1]} logits; expected vocab_size={vocab_size}.")


def _draws(adapter: str, name: str) -> UserError:
    return UserError(
        f"{adapter}: {name} draws random numbers or changes its state in its forward pass (Dropout), but apply(params, "
        "tokens) is a function of parameters and tokens alone; set deterministic=True, or a rate of 0."
    )


def _cannot_collect(name: str) -> UserError:
    return UserError(
        f"collect: {name} gives only its last hidden states; hidden-state, attention and relation losses need a model "
        "whose apply takes collect, such as models.decoder."
    )


def from_nnx(construct: Callable[..., nnx.Module], vocab_size: int) -> Model:
    """A ``Model`` from an NNX module class: the same pure functions, its ``nnx.Param`` as a plain nested dict.

    Only ``nnx.Param`` is learnt and kept. Keys of random numbers are no parameters; a module may hold them if its
    forward pass does not draw.

    Args:
      construct: called as ``construct(rngs=nnx.Rngs(key))``. The module must offer
        ``__call__(tokens, positions=None, segments=None) -> hidden [B, L, D]`` and ``unembed(hidden) -> logits``.
      vocab_size: V.

    Raises:
      UserError: state beside the parameters (``BatchStat``, ``Cache``, …), random numbers in the forward pass (dropout
        that is not deterministic), a ``__call__`` without positions and segments, no ``unembed``, or another
        vocabulary.

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
    name = type(abstract_module).__name__
    _check_signature("from_nnx", type(abstract_module))
    graph, abstract, keys = _parts(abstract_module)

    def rebuild(params: Params) -> nnx.Module:
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state, keys)

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(construct(rngs=nnx.Rngs(key)), nnx.Param))

    def apply(params: Params, tokens: Array, *, collect: Collect | None = None, **inputs: Any) -> Output:
        if collect is not None:
            raise _cannot_collect(name)
        return Output(rebuild(params)(tokens, **_filled(type(abstract_module), tokens, inputs)))

    def unembed(params: Params, hidden: Array) -> Array:
        return rebuild(params).unembed(hidden).astype(jnp.float32)

    try:
        logits = jax.eval_shape(lambda *state: _tried(name, graph, *state), abstract, keys)
    except flax.errors.TraceContextError as error:
        raise _draws("from_nnx", name) from error
    _check_vocabulary("from_nnx", name, logits, vocab_size)
    return Model(init, apply, unembed, vocab_size)


def _parts(module: nnx.Module) -> tuple[Any, Any, Any]:
    """Graph, parameters and random state of a module that has nothing else."""
    graph, params, keys, others = nnx.split(module, nnx.Param, nnx.RngState, ...)
    found = sorted(
        {f"{type(value).__name__} ({'.'.join(map(str, path))})" for path, value in nnx.to_flat_state(others)}
    )
    if found:
        raise UserError(
            f"from_nnx: {type(module).__name__} has state beside its parameters: {', '.join(found[:5])}; expected "
            "nnx.Param alone, since only parameters are learnt and kept (LayerNorm in place of BatchNorm)."
        )
    return graph, params, keys


def _tried(name: str, graph: Any, params: Any, keys: Any) -> Array:
    """The logits of a module, after which its random state must be as before."""
    module = nnx.merge(graph, params, keys)

    def random_state() -> dict:
        return {path: value.get_value() for path, value in nnx.to_flat_state(nnx.state(module, nnx.RngState))}

    before = random_state()
    tokens, others = _inputs()
    logits = module.unembed(module(tokens, **others))
    if any(value is not before[path] for path, value in random_state().items()):
        raise _draws("from_nnx", name)
    return logits
