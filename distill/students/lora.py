"""Students with frozen parameters: LoRA, and frozen embeddings or heads."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill.errors import UserError
from distill.models.model import Model
from distill.models.parameters import normal
from distill.shapes import Array, Params
from distill.students.factors import check_rank, kernels_of, product
from distill.trees import flat, nested

# ---- LoRA


def lora(model: Model, rank: int, *, alpha: float | None = None, kernels: Sequence[str] = ()) -> Model:
    """A model that learns only a correction of rank r; everything else is frozen (arXiv 2106.09685).

        y = x · W + α/r · (x · A) · B        A [inputs, r] normal with deviation 1/√inputs,  B [r, outputs] zero

    ``init`` returns A and B alone (``lora_left`` and ``lora_right`` beside each kernel): a ``TrainState`` holds only
    them. ``apply``, ``unembed`` and ``head`` take them joined with the parameters of ``model``
    (``joined(base_params, params)``), as the train step does with ``Frozen``. A teacher that is the base shares its
    arrays. At the start B = 0, and the model is bit-identical to its base.

    Args:
      model: the base, whose layers use ``Projection``.
      rank: r.
      alpha: α; None: r, a factor of 1.
      kernels: names of ``KERNELS``; empty: all there are.

    Raises:
      UserError: a kernel the model has not, a rank above its smaller side, or an α that is not above 0.

    Example:
      >>> from distill.models import DecoderConfig, decoder
      >>> from distill.trees import joined
      >>> base = decoder(DecoderConfig(vocab_size=14, layers=2, width=8, heads=2, feed_forward=16))
      >>> model = lora(base, rank=2, kernels=("query", "value"))
      >>> learnt, frozen = model.init(jax.random.key(1)), base.init(jax.random.key(0))
      >>> learnt["layers"]["attention"]["query"]["lora_right"].shape, model.parameter_count()
      ((2, 2, 2, 4), 128)
      >>> tokens = jnp.array([[1, 2]])
      >>> bool(jnp.all(model.logits(joined(frozen, learnt), tokens) == base.logits(frozen, tokens)))
      True
    """
    chosen = kernels_of(model, kernels)
    check_rank(rank, chosen)
    alpha = float(rank) if alpha is None else alpha
    if not alpha > 0.0:
        raise UserError(f"lora: alpha={alpha}; expected a number above 0.")
    factor, axes = alpha / rank, {}
    for kernel in chosen:
        for name, names in zip(("lora_left", "lora_right"), kernel.factor_axes(), strict=True):
            axes[(*kernel.path, name)] = names

    def init(key: Array) -> Params:
        leaves = {}
        for number, kernel in enumerate(chosen):
            left, right = kernel.factor_shapes(rank)
            draw = normal(jax.random.fold_in(key, number), left)
            leaves[(*kernel.path, "lora_left")] = draw * kernel.matrix[1] ** -0.5
            leaves[(*kernel.path, "lora_right")] = jnp.zeros(right, jnp.float32)
        return nested(leaves)

    def scaled(params: Params) -> Params:
        leaves = flat(params)
        for kernel in chosen:
            leaves[(*kernel.path, "lora_right")] = leaves[(*kernel.path, "lora_right")] * factor
        return nested(leaves)

    def merge(params: Params) -> Params:
        leaves = flat(scaled(params))
        for kernel in chosen:
            correction = product(leaves.pop((*kernel.path, "lora_left")), leaves.pop((*kernel.path, "lora_right")))
            whole = leaves[(*kernel.path, "kernel")]
            leaves[(*kernel.path, "kernel")] = (whole.astype(jnp.float32) + correction).astype(whole.dtype)
        return nested(leaves) if model.merge is None else model.merge(nested(leaves))

    def apply(params: Params, *inputs: Any, **options: Any):
        return model.apply(scaled(params), *inputs, **options)

    return dataclasses.replace(model, init=init, apply=apply, axes=nested(axes), merge=merge, base=model)


def freeze(model: Model, names: Sequence[str]) -> Model:
    """The model with some top-level parameters frozen: ``init`` gives the others, ``apply`` takes all, joined.

    With ``("embedding", "head")`` a student shares these arrays with a teacher of its width: they are not learnt, and
    memory holds them once.

    Raises:
      UserError: names the model has no parameters of, or nothing that would be left to learn.

    Example:
      >>> from distill.models import DecoderConfig, decoder
      >>> model = decoder(DecoderConfig(vocab_size=14, layers=1, width=8, heads=2, feed_forward=16))
      >>> sorted(freeze(model, ("embedding", "head")).init(jax.random.key(0)))
      ['layers', 'norm']
    """
    there = jax.eval_shape(model.init, jax.random.key(0))
    unknown = sorted(set(names) - there.keys())
    if unknown or not there.keys() - set(names):
        raise UserError(f"freeze: {tuple(names)}; expected some, not all, of {', '.join(sorted(there))}.")

    def part(tree: Params, frozen: bool) -> Params:
        return {name: value for name, value in tree.items() if (name in names) == frozen}

    def half(frozen: bool) -> dict[str, Any]:
        axes = None if model.axes is None else part(model.axes, frozen)
        return {"init": lambda key: part(model.init(key), frozen), "axes": axes}

    return dataclasses.replace(model, **half(False), base=dataclasses.replace(model, **half(True)))
