"""Kernels as products of two thin factors: low-rank students, and LoRA.

A kernel is a matrix ``W [inputs, outputs]``; ``left [inputs…, r]`` and ``right [r, outputs…]`` replace it by the
product ``left · right``, which is never formed (``layers.Projection``):

    low rank   y = (x · left) · right                                  in place of  y = x · W
    LoRA       y = x · W + α/r · (x · lora_left) · lora_right          W frozen    (arXiv 2106.09685)

Both are made from any model whose layers use ``Projection``; ``Model.merge`` multiplies the factors out again.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill.errors import UserError
from distill.models.model import Model
from distill.models.parameters import KERNELS, normal
from distill.shapes import Array, Params
from distill.trees import Keys, flat, get, nested


class Kernel(NamedTuple):
    """A stacked kernel ``[N, inputs…, outputs…]`` as N matrices."""

    path: Keys
    """Of the projection, without ``"kernel"``."""
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    summed: int

    @property
    def matrix(self) -> tuple[int, int, int]:
        """(N, inputs, outputs)."""
        inside, outside = self.shape[1 : 1 + self.summed], self.shape[1 + self.summed :]
        return self.shape[0], math.prod(inside), math.prod(outside)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of left and right."""
        split = 1 + self.summed
        return (*self.shape[:split], rank), (self.shape[0], rank, *self.shape[split:])

    def factor_axes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Logical axes of left and right."""
        split = 1 + self.summed
        return (*self.axes[:split], "rank"), (self.axes[0], "rank", *self.axes[split:])


def kernels_of(model: Model, names: Sequence[str] = ()) -> list[Kernel]:
    """The kernels of a model's layers that can be factored.

    Args:
      model: with stacked layers and declared axes, such as ``decoder``.
      names: of ``parameters.KERNELS``; empty: all the model has.

    Raises:
      UserError: a name the model has no kernel of, or a model without any.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    found = []
    for path, leaf in flat(shapes).items():
        *where, last = path
        if last == "kernel" and where and where[-1] in KERNELS and model.axes is not None:
            axes = get(model.axes, path)
            if axes[0] == "layers":
                found.append(Kernel(tuple(where), leaf.shape, axes, KERNELS[where[-1]]))
    there = sorted({kernel.path[-1] for kernel in found})
    unknown = sorted(set(names) - set(there))
    if unknown or not found:
        raise UserError(
            f"kernels={tuple(names)}: this model has no {', '.join(unknown) or 'kernel'} to factor; it has "
            f"{', '.join(there) or 'none'} (embedding and head stay whole)."
        )
    return [kernel for kernel in found if not names or kernel.path[-1] in names]


def check_rank(rank: int, kernels: Sequence[Kernel]) -> None:
    """Raises UserError for a rank above the smaller side of one of these kernels."""
    for kernel in kernels:
        most = min(kernel.matrix[1:])
        if not 1 <= rank <= most:
            name, (_, inputs, outputs) = kernel.path[-1], kernel.matrix
            raise UserError(f"rank={rank}: the kernel {name} is {inputs} × {outputs}; expected 1 … {most}.")


# ---- low rank


def factored(model: Model, rank: int, kernels: Sequence[str] = ()) -> Model:
    """The model with kernels as products of two factors of rank r; ``init`` draws these at random.

    Entries of left have deviation 1/√inputs, of right 1/√r: those of the product 1/√inputs, as a kernel's.
    ``parameter_count`` is that of the factors; ``merge`` gives parameters of ``model``.

    Raises:
      UserError: a kernel the model has not, or a rank above its smaller side.
    """
    chosen = kernels_of(model, kernels)
    check_rank(rank, chosen)
    whole = {(*kernel.path, "kernel") for kernel in chosen}
    axes = {path: names for path, names in flat(model.axes).items() if path not in whole}
    for kernel in chosen:
        for name, names in zip(("left", "right"), kernel.factor_axes(), strict=True):
            axes[(*kernel.path, name)] = names

    def init(key: Array) -> Params:
        leaves = {path: leaf for path, leaf in flat(model.init(key)).items() if path not in whole}
        for number, kernel in enumerate(chosen):
            keys = jax.random.split(jax.random.fold_in(key, number))
            deviations = kernel.matrix[1] ** -0.5, rank**-0.5
            parts = zip(("left", "right"), keys, kernel.factor_shapes(rank), deviations, strict=True)
            for name, one, shape, deviation in parts:
                leaves[(*kernel.path, name)] = deviation * normal(one, shape)
        return nested(leaves)

    def merge(params: Params) -> Params:
        leaves = flat(params)
        for kernel in chosen:
            left, right = leaves.pop((*kernel.path, "left")), leaves.pop((*kernel.path, "right"))
            leaves[(*kernel.path, "kernel")] = product(left, right).astype(left.dtype)
        return nested(leaves)

    return dataclasses.replace(model, init=init, axes=nested(axes), merge=merge)


def low_rank(
    model: Model, params: Params, rank: int, *, kernels: Sequence[str] = (), rows: Params | None = None
) -> tuple[Model, Params]:
    """``factored`` with the best factors for these parameters.

        W ≈ left · right,    left = D⁻¹ U √Σ,    right = √Σ Vᵀ,    from the r largest of  D W = U Σ Vᵀ

    Without ``rows`` (D = 1) no other matrix of rank r is nearer: ‖W − left · right‖² is the sum of the squares of the
    singular values that are left out (Eckart and Young 1936).

    Args:
      model: whose layers use ``Projection``.
      params: of it; not changed.
      rank: r, the same for all.
      kernels: names of ``KERNELS``; empty: all there are.
      rows: weights of the rows of each kernel, from ``fisher_rows``: what a wrong row costs (arXiv 2207.00112).

    Returns:
      ``(model, params)``: left and right in place of every chosen kernel.

    Raises:
      UserError: a kernel the model has not, or a rank above its smaller side.

    Example:
      >>> from distill.models import DecoderConfig, decoder
      >>> model = decoder(DecoderConfig(vocab_size=14, layers=2, width=8, heads=2, feed_forward=16))
      >>> small, params = low_rank(model, model.init(jax.random.key(0)), rank=2, kernels=("up", "gate", "down"))
      >>> params["layers"]["mlp"]["up"]["left"].shape, params["layers"]["mlp"]["up"]["right"].shape
      ((2, 8, 2), (2, 2, 16))
      >>> model.parameter_count() - small.parameter_count()
      480
    """
    small, leaves = factored(model, rank, kernels), flat(params)
    for kernel in kernels_of(model, kernels):
        values = leaves.pop((*kernel.path, "kernel"))
        weights = None if rows is None else np.asarray(get(rows, (*kernel.path, "rows")))
        left, right = _factor(np.asarray(values, np.float32).reshape(kernel.matrix), rank, weights)
        for name, value, shape in zip(("left", "right"), (left, right), kernel.factor_shapes(rank), strict=True):
            leaves[(*kernel.path, name)] = jnp.asarray(value.reshape(shape), values.dtype)
    return small, nested(leaves)


def _factor(matrices: np.ndarray, rank: int, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Factors ``[N, inputs, r]`` and ``[N, r, outputs]`` of ``[N, inputs, outputs]``, one layer after the other."""
    lefts, rights = [], []
    for layer, matrix in enumerate(matrices):
        weights = np.ones(len(matrix), np.float32) if rows is None else _above_zero(rows[layer])
        left, singular, right = np.linalg.svd(weights[:, None] * matrix, full_matrices=False)
        root = np.sqrt(singular[:rank])
        lefts.append(left[:, :rank] * root / weights[:, None])
        rights.append(root[:, None] * right[:rank])
    return np.stack(lefts), np.stack(rights)


def _above_zero(weights: np.ndarray) -> np.ndarray:
    """Row weights that can be divided by: 1 on average, none below a thousandth of it."""
    mean = weights.mean()
    if not mean > 0.0:
        return np.ones(len(weights), np.float32)
    return np.maximum(weights / mean, 1e-3).astype(np.float32)


def fisher_rows(model: Model, params: Params, loss: Callable[[Params, Any], Array], batches: Iterable[Any]) -> Params:
    """Cost of an error in each row of a kernel: the root of Σ over the row of E[(∂loss/∂W)²] (arXiv 2207.00112).

    Args:
      model: whose kernels are to be factored.
      params: of it.
      loss: ``(params, batch) -> scalar``.
      batches: at least one; the square is taken of every batch's gradient.

    Returns:
      ``rows`` ``[N, inputs]`` for every kernel, for ``low_rank``.

    Raises:
      UserError: no batches.
    """
    kernels = kernels_of(model)

    @jax.jit
    def squares(batch: Any) -> dict[Keys, Array]:
        gradients = jax.grad(loss)(params, batch)
        found = {kernel.path: get(gradients, (*kernel.path, "kernel")).reshape(kernel.matrix) for kernel in kernels}
        return {path: jnp.sum(jnp.square(gradient), axis=-1) for path, gradient in found.items()}

    total, count = None, 0
    for batch in batches:
        values = squares(batch)
        total = values if total is None else jax.tree.map(jnp.add, total, values)
        count += 1
    if not count:
        raise UserError("fisher_rows: no batches; expected at least one to measure on.")
    return nested({(*path, "rows"): np.sqrt(np.asarray(value) / count) for path, value in total.items()})


def product(left: Array, right: Array) -> Array:
    """``[N, inputs…, r] · [N, r, outputs…]`` in float32."""
    layers, rank = right.shape[:2]
    matrices = left.reshape(layers, -1, rank), right.reshape(layers, rank, -1)
    result = jnp.matmul(*(matrix.astype(jnp.float32) for matrix in matrices), precision="highest")
    return result.reshape(*left.shape[:-1], *right.shape[2:])
