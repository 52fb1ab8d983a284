"""Any per-position loss from hidden states and heads, with nothing of size ``[tokens, V]`` ever alive.

A loss over tokens needs the logits of one token at a time. So tokens are taken ``chunk_size`` at a time, and while the
logits ``S, T [chunk, V]`` of a chunk are there, so are the gradients:

    S = h·W,  T = h'·W'                                   logits of student and teacher
    G = ∂ Σ loss(S, T) / ∂S                               autodiff of the per-position loss
    ∂h = G·Wᵀ,  ∂W += hᵀ·G                                accumulated in float32

All of it happens in the forward pass (a custom VJP keeps ∂h and ∂W, both as large as what they are gradients of), so
no logit is computed twice: 6·D + 2·D' operations per token and token, the least there is. Recomputing the logits in the
backward pass (``jax.checkpoint``, chunked losses of other libraries) costs 8·D + 4·D'.

Matrix products want a whole chunk; what lies between them, the loss and its gradient, is a dozen passes over the logits
and wants them in a cache. So on CPU the loss takes a chunk some rows at a time (``backend.loss_rows``).

Tokens that do not count are sorted behind those that do, and the loop ends where counting ends: a batch that is half
prompt costs half.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from distill.devices import backend
from distill.errors import UserError
from distill.head import Head, product
from distill.losses.reduce import Pair
from distill.shapes import Array, Float, Mask

PerPosition = Callable[[Any, Any, Any], Any]
Side = tuple[Float[Array, "*batch _"], Head]
"""Hidden states and the head that makes logits of them."""


def chunked(
    per_position: PerPosition,
    student: Side,
    teacher: Side | Sequence[Side] | None,
    inputs: Any,
    mask: Mask,
    chunk_size: int | None = None,
    *,
    has_aux: bool = False,
    mesh: Mesh | None = None,
    token_axes: tuple[str, ...] = ("dcn", "data", "fsdp"),
) -> Pair | tuple[Pair, Any]:
    """Σ per_position(student_logits, teacher_logits, inputs) over the mask, and the number of counted positions.

    Equal, in value and in gradient, to computing both logits and ``masked_sum``. Gradients are with respect to the
    student's hidden states and head only: the teacher is never differentiated. Reverse mode, once (no second order).

    Args:
      per_position: ``(student_logits [n, V], teacher_logits [n, V], inputs [n, …]) -> nats [n]``, any pure function
        that treats positions independently; it must not close over something that is itself differentiated.
      student: hidden states ``[..., D]``, as the head wants them, and their ``Head``.
      teacher: the same of the teacher, of another width if need be; several pairs: ``per_position`` gets a tuple of
        logits; None: it gets None.
      inputs: labels ``[...]``, or any tree of arrays ``[..., *]`` (stored targets of a teacher), handed on in parts.
      mask: ``[...]``: which positions count. Whatever stands in the others, NaN too, has no part in anything.
      chunk_size: positions at a time; about ``16 · V · chunk_size`` bytes are alive. None: ``backend.chunk_size``.
      has_aux: ``per_position`` returns ``(nats, aux)`` with aux a tree of further per-position values that are summed
        but not differentiated (metrics).
      mesh: under ``jit`` on this mesh every device works on its own part of the first axis of ``mask``; sums and
        gradients of the head are added at the end. Other axes stay with the compiler: a kernel sharded over the
        vocabulary (the axis ``tensor``) gives logits sharded over it, and a loss's sums over it become all-reduces.
      token_axes: axes of the mesh over which the first axis of ``mask`` lies; its second axis lies over ``sequence``.

    Returns:
      ``(sum, weight)``, float32 scalars; with ``has_aux`` also the tree of sums of aux.

    Raises:
      UserError: shapes that do not fit together, vocabularies that differ between two heads, chunk_size < 1.

    Example:
      >>> from distill import losses
      >>> hidden, kernel = jnp.ones((2, 3, 4)), jnp.eye(4, 7)
      >>> student, teacher = (hidden, Head(kernel)), (hidden, Head(2 * kernel))
      >>> labels, mask = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool)
      >>> loss = lambda s, t, labels: losses.forward_kl(s, t, temperature=2.0)
      >>> total, weight = chunked(loss, student, teacher, labels, mask, chunk_size=4)
      >>> logits = [head.logits(hidden) for hidden, head in (student, teacher)]
      >>> float(weight), bool(jnp.allclose(total, 6 * loss(*logits, 0)[0, 0]))
      (6.0, True)
    """
    hidden, head = student[0], student[1].unpadded()
    teachers = tuple((states, head.unpadded()) for states, head in _pairs(teacher))
    _check(student, _pairs(teacher), inputs, mask, chunk_size)
    platform = backend.platform_of(mesh)
    of_tokens = (*token_axes, "sequence")
    over_vocabulary = 1 if mesh is None else math.prod(n for axis, n in mesh.shape.items() if axis not in of_tokens)
    size = chunk_size or backend.chunk_size(head.kernel.shape[1] // over_vocabulary, platform)
    how = _How(per_position, has_aux, _shown(teacher), size, platform)
    if mesh is None:
        total, aux = _total(how.of(head, mask), *_flat(hidden, head, teachers, inputs, mask))
    else:
        if backend.sum_in_float32(platform):  # of the head's gradient over the mesh
            head = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), head)
        places = [tuple(axis for axis in token_axes if axis in mesh.shape)]
        if mesh.shape.get("sequence", 1) > 1 and mask.ndim > 1:
            places.append(("sequence",))
        total, aux = _on_mesh(how, mesh, places, len(teachers))(hidden, head, teachers, inputs, mask)
    pair = total, jnp.sum(mask, dtype=jnp.float32)
    return (pair, aux) if has_aux else pair


@dataclasses.dataclass(frozen=True, eq=False)
class _How:
    """What does not change from chunk to chunk."""

    per_position: PerPosition
    has_aux: bool
    shown: Callable[[tuple], Any]
    """What ``per_position`` gets of the teachers' logits."""
    size: int
    """Positions in a chunk."""
    platform: str
    rows: int = 0
    """Rows that are in the loss at a time; they divide ``size``."""

    def of(self, head: Head, mask: Mask) -> "_How":
        """For the positions of a device: no chunk is larger than they are."""
        size = min(self.size, max(mask.size, 1))
        return dataclasses.replace(self, size=size, rows=backend.loss_rows(size, head.kernel.shape[1], self.platform))


def _pairs(teacher: Side | Sequence[Side] | None) -> tuple[Side, ...]:
    if teacher is None:
        return ()
    return (teacher,) if isinstance(teacher[1], Head) else tuple(teacher)


def _shown(teacher: Side | Sequence[Side] | None) -> Callable[[tuple], Any]:
    if teacher is None:
        return lambda logits: None
    return operator.itemgetter(0) if isinstance(teacher[1], Head) else tuple


def _flat(hidden: Array, head: Head, teachers: tuple, inputs: Any, mask: Mask) -> tuple:
    """Positions on one axis; nothing but the student is differentiated."""
    teachers, inputs, mask = jax.lax.stop_gradient((teachers, inputs, mask))

    def flat(x: Array) -> Array:
        return x.reshape(mask.size, *x.shape[mask.ndim :])

    teachers = tuple((flat(states), head) for states, head in teachers)
    return flat(hidden), head, teachers, jax.tree.map(flat, inputs), flat(mask)


def _on_mesh(how: _How, mesh: Mesh, places: Sequence[tuple[str, ...]], teachers: int) -> Callable:
    """The sums over every device's own positions, added up; ``places``: mesh axes of the first axes of the mask."""
    tokens, everywhere = PartitionSpec(*places), PartitionSpec()
    axes = tuple(axis for several in places for axis in several)

    def local(hidden, head, teachers, inputs, mask):
        own = _total(how.of(head, mask), *_flat(hidden, head, teachers, inputs, mask))
        return jax.lax.psum(own, axes)

    specs = (tokens, everywhere, ((tokens, everywhere),) * teachers, tokens, tokens)
    # check_vma does not know a custom VJP, or a loop whose length differs between devices
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=everywhere, axis_names=set(axes), check_vma=False)


def _check(student: Side, teachers: Sequence[Side], inputs: Any, mask: Mask, chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise UserError(f"chunked: chunk_size={chunk_size}; expected at least 1, or None.")
    vocabulary = student[1].unpadded().kernel.shape[1]
    for name, (hidden, head) in (("student", student), *(("teacher", teacher) for teacher in teachers)):
        if hidden.shape[:-1] != mask.shape or hidden.shape[-1] != head.kernel.shape[0]:
            raise UserError(
                f"chunked: hidden states {hidden.shape} of the {name} with a head {head.kernel.shape} and a mask "
                f"{mask.shape}; expected hidden [*mask, D] and a kernel [D, V]."
            )
        if head.unpadded().kernel.shape[1] != vocabulary:
            raise UserError(
                f"chunked: the student's vocabulary has {vocabulary} tokens, the teacher's "
                f"{head.unpadded().kernel.shape[1]}; set vocab_size of both heads to the ids they share "
                "(distill/vocab.py)."
            )
    for leaf in jax.tree.leaves(inputs):
        if leaf.shape[: mask.ndim] != mask.shape:
            raise UserError(f"chunked: inputs of shape {leaf.shape} with a mask {mask.shape}; expected [*mask, …].")


# ---- the loop over chunks


class _Chunks(NamedTuple):
    """The positions that count, ``how.size`` at a time: they are sorted before those that do not."""

    how: _How
    order: Array
    counted: Array
    hidden: Array
    teachers: tuple
    inputs: Any

    @classmethod
    def of(cls, how: _How, hidden: Array, teachers: tuple, inputs: Any, mask: Array) -> "_Chunks":
        """All chunks of ``mask [tokens]``; places beyond the last token point behind it."""
        tokens = mask.shape[0]
        chunks = -(-tokens // how.size)
        order = jnp.argsort(~mask, stable=True)
        order = jnp.concatenate([order, jnp.arange(tokens, chunks * how.size, dtype=order.dtype)])
        kernels = tuple((states, head, head.kernel.astype(states.dtype)) for states, head in teachers)
        return cls(how, order, jnp.sum(mask, dtype=jnp.int32), hidden, kernels, inputs)

    @property
    def number(self) -> Array:
        """Chunks in which anything counts."""
        return -(-self.counted // self.how.size)

    def at(self, i: Array | int) -> tuple:
        """Chunk i: the student's states, the teachers' logits, inputs, which rows count, and where they stand."""
        index = jax.lax.dynamic_slice_in_dim(self.order, i * self.how.size, self.how.size)
        counts = i * self.how.size + jnp.arange(self.how.size) < self.counted

        def pick(x: Array) -> Array:
            """Rows of x, zeros where nothing counts: selected before anything is computed."""
            return jnp.where(counts.reshape(-1, *[1] * (x.ndim - 1)), x.at[index].get(mode="clip"), 0)

        logits = tuple(head.finish(product(pick(states), kernel)) for states, head, kernel in self.teachers)
        return pick(self.hidden), self.how.shown(logits), jax.tree.map(pick, self.inputs), counts, index


def _sums(how: _How, head: Head, teacher_logits: Any, inputs: Any, counts: Array) -> Callable:
    """``(s, bias) -> (Σ nats, Σ aux)`` of some rows, from the student's product ``s = hidden · kernel``."""

    def sums(s, bias):
        result = how.per_position(head.replace(bias=bias).finish(s), teacher_logits, inputs)
        nats_and_aux = result if how.has_aux else (result, ())
        for value in jax.tree.leaves(nats_and_aux):
            if value.shape != counts.shape:
                raise UserError(
                    f"chunked: per_position gave an array {value.shape} for {counts.shape[0]} positions; expected one "
                    "value a position. A number of the whole batch needs all logits at once: chunk_size=0."
                )
        return jax.tree.map(lambda x: jnp.sum(jnp.where(counts, x, 0.0), dtype=jnp.float32), nats_and_aux)

    return sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(how: _How, hidden: Array, head: Head, teachers: tuple, inputs: Any, mask: Array):
    """Σ loss and Σ aux, without gradients."""
    kernel, chunks = head.kernel.astype(hidden.dtype), _Chunks.of(how, hidden, teachers, inputs, mask)

    def rows(total, row):
        s, *rest = row
        return _add(total, _sums(how, head, *rest)(s, head.bias)), None

    def chunk(i, total):
        h, *rest, _ = chunks.at(i)
        parts = product(h, kernel), *rest
        if how.rows == how.size:
            return rows(total, parts)[0]
        parts = jax.tree.map(lambda x: x.reshape(how.size // how.rows, how.rows, *x.shape[1:]), parts)
        return jax.lax.scan(rows, total, parts)[0]

    def zero():
        h, *rest, _ = chunks.at(0)
        return _sums(how, head, *rest)(product(h, kernel), head.bias)

    return jax.lax.fori_loop(0, chunks.number, chunk, _zeros(jax.eval_shape(zero)))


def _forward(how: _How, hidden: Array, head: Head, teachers: tuple, inputs: Any, mask: Array):
    """The sums, and with them the gradients of Σ loss with respect to hidden and head."""
    kernel, chunks = head.kernel.astype(hidden.dtype), _Chunks.of(how, hidden, teachers, inputs, mask)

    def chunk(i, carry):
        total, by_hidden, by_kernel = carry
        h, *rest, index = chunks.at(i)
        logits = product(h, kernel)

        def rows(j, carry):
            """Rows of turn j: their gradients take the place of their logits."""
            total, logits, row_block = carry  # carried apart: XLA would copy logits that it reads and writes
            own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, j * how.rows, how.rows), rest)
            nats, pullback, aux = jax.vjp(_sums(how, head, *own), row_block, head.bias, has_aux=True)
            gradient, by_bias = pullback(jnp.float32(1.0))
            logits = jax.lax.dynamic_update_slice_in_dim(logits, gradient, j * how.rows, axis=0)
            next_block = jax.lax.dynamic_slice_in_dim(logits, (j + 1) * how.rows, how.rows)
            return _add(total, ((nats, aux), by_bias)), logits, next_block

        if how.rows < how.size:
            turns, first = how.size // how.rows, jax.lax.dynamic_slice_in_dim(logits, 0, how.rows)
            total, gradient, _ = jax.lax.fori_loop(0, turns, rows, (total, logits, first))
        else:
            nats, pullback, aux = jax.vjp(_sums(how, head, *rest), logits, head.bias, has_aux=True)
            gradient, by_bias = pullback(jnp.float32(1.0))
            total = _add(total, ((nats, aux), by_bias))
        gradient = gradient.astype(hidden.dtype)
        by_h = jnp.einsum("nv,dv->nd", gradient, kernel, preferred_element_type=jnp.float32)
        by_hidden = by_hidden.at[index].set(by_h.astype(hidden.dtype), mode="drop", unique_indices=True)
        transposed = jax.lax.optimization_barrier(h.T)  # a copy of h alone: XLA's CPU products are a fifth faster
        by_kernel = by_kernel + jnp.matmul(transposed, gradient, preferred_element_type=jnp.float32)
        return total, by_hidden, by_kernel

    def zero():
        h, *rest, _ = chunks.at(0)
        bias = jax.tree.map(lambda b: b.astype(jnp.float32), head.bias)
        total = _sums(how, head, *rest)(product(h, kernel), head.bias), bias
        return total, hidden, head.kernel.astype(jnp.float32)

    carry = jax.lax.fori_loop(0, chunks.number, chunk, _zeros(jax.eval_shape(zero)))
    (sums, by_bias), by_hidden, by_kernel = carry
    gradient = head.replace(kernel=by_kernel, bias=by_bias)
    return sums, (by_hidden, gradient, jax.tree.map(lambda x: x[:0], head))


def _backward(how: _How, kept, cotangent):
    by_hidden, by_head, like = kept
    scale = cotangent[0]
    by_head = jax.tree.map(lambda g, x: (g * scale).astype(x.dtype), by_head, like)
    return (by_hidden * scale).astype(by_hidden.dtype), by_head, None, None, None


_total.defvjp(_forward, _backward)


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)


def _zeros(shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
