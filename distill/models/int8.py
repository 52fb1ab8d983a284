"""Weight-only int8, for teachers: every kernel of the layers as integers and one scale for each output.

    s = max |W| / 127 over the inputs of an output,    q = round(W / s),    y = (x · q) · s        (arXiv 2208.07339, 2)

The scales multiply the product, so that a kernel is never stored in a wider type: integers up to 127 are exact in
bfloat16. Embedding, head, norms, biases and routers are not quantised, because logits feed the loss.

``qwix`` quantises Linen modules from outside, but its arrays refuse the casts with which layers here choose their type
(0.1.8), and shardings, checkpoints and fingerprints need plain trees of arrays.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill.errors import UserError
from distill.models.config import DecoderConfig
from distill.models.model import Model
from distill.models.parameters import KERNELS
from distill.shapes import Array, Params


def int8(model: Model) -> Model:
    """The model whose kernels are ``{"int8": q, "scale": s}``: ``init`` draws and quantises, ``merge`` dequantises.

    Raises:
      UserError: not a decoder with whole kernels.

    Example:
      >>> from distill.models import DecoderConfig, decoder
      >>> small = int8(decoder(DecoderConfig(vocab_size=14, layers=3, width=8, heads=2, feed_forward=16)))
      >>> kernel = small.init(jax.random.key(0))["layers"]["mlp"]["up"]["kernel"]
      >>> kernel["int8"].dtype.name, kernel["int8"].shape, kernel["scale"].shape
      ('int8', (3, 8, 16), (3, 16))
    """
    if not isinstance(model.config, DecoderConfig) or model.merge is not None:
        raise UserError("int8: expected a decoder whose kernels are whole; load it in another type.")

    def axes_of(path: Any, names: tuple[str, ...]) -> Any:
        summed = _summed(path, names)
        if summed is None:
            return names
        return {"int8": names, "scale": tuple(name for n, name in enumerate(names) if n not in summed)}

    quantize = quantizer(model)
    axes = jax.tree_util.tree_map_with_path(axes_of, model.axes, is_leaf=lambda node: isinstance(node, tuple))
    return dataclasses.replace(
        model,
        init=lambda key: jax.tree_util.tree_map_with_path(quantize, model.init(key)),
        axes=axes,
        merge=lambda params: _merged(model, params),
    )


def quantizer(model: Model) -> Callable[[Any, Array], Any]:
    """``(path, parameter) -> parameter``, quantised where it is a kernel of the layers."""
    names = {}
    for path, axes in jax.tree_util.tree_leaves_with_path(model.axes, is_leaf=lambda node: isinstance(node, tuple)):
        names[_names(path)] = axes

    def quantize(path: Any, leaf: Array) -> Any:
        summed = _summed(path, names[_names(path)])
        return leaf if summed is None else _quantized(leaf, summed)

    return quantize


def held(model: Model, dtype: str) -> tuple[Model, Params]:
    """The model with parameters in float32, bfloat16, or int8 with the rest in bfloat16; and the parameters' shapes."""

    def shapes(key: Array) -> Params:
        wide = jax.tree.map(lambda leaf: leaf.astype("bfloat16" if dtype == "int8" else dtype), model.init(key))
        return jax.tree_util.tree_map_with_path(quantizer(model), wide) if dtype == "int8" else wide

    return int8(model) if dtype == "int8" else model, jax.eval_shape(shapes, jax.random.key(0))


def _names(path: Any) -> tuple[str, ...]:
    return tuple(part if isinstance(part, str) else part.key for part in path)


def _summed(path: Any, names: tuple[str, ...]) -> tuple[int, ...] | None:
    """The input axes of a kernel of the layers; None for other parameters."""
    keys = _names(path)
    if keys[0] != "layers" or keys[-1] != "kernel" or keys[-2] not in KERNELS:
        return None
    lead = sum(name in ("layers", "experts") for name in names)
    return tuple(range(lead, lead + KERNELS[keys[-2]]))


@functools.partial(jax.jit, static_argnums=1)
def _quantized(kernel: Array, summed: tuple[int, ...]) -> dict[str, Array]:
    values = kernel.astype(jnp.float32)
    peak = jnp.max(jnp.abs(values), axis=summed, keepdims=True)
    scale = jnp.where(peak > 0.0, peak / 127.0, 1.0)
    return {"int8": jnp.round(values / scale).astype(jnp.int8), "scale": jnp.squeeze(scale, summed)}


def _merged(model: Model, params: Params) -> Params:
    """Dequantised parameters, the kernels in float32."""

    def one(path: Any, names: tuple[str, ...], leaf: Any) -> Array:
        summed = _summed(path, names)
        return leaf if summed is None else leaf["int8"] * jnp.expand_dims(leaf["scale"], summed)

    return jax.tree_util.tree_map_with_path(one, model.axes, params, is_leaf=lambda node: isinstance(node, tuple))
