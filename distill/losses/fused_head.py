"""Any per-position loss from hidden states and heads, with nothing of size ``[tokens, V]`` ever alive.

A loss over words needs the logits of one token at a time. So tokens are taken ``chunk_size`` at a time, and while the
logits ``S, T [chunk, V]`` of a chunk are there, so are the gradients:

    S = h·W,  T = h'·W'                                   logits of student and teacher
    G = ∂ Σ loss(S, T) / ∂S                               autodiff of the per-position loss
    ∂h = G·Wᵀ,  ∂W += hᵀ·G                                accumulated in float32

All of it happens in the forward pass (a custom VJP keeps ∂h and ∂W, both as large as what they are gradients of), so
no logit is computed twice: 6·D + 2·D' operations per token and word, the least there is. Recomputing the logits in the
backward pass (``jax.checkpoint``, chunked losses of other libraries) costs 8·D + 4·D'.

Matrix products want a whole chunk; what lies between them, the loss and its gradient, is a dozen passes over the logits
and wants them in a cache. So on CPU the loss takes a chunk some rows at a time, ``CPU_LOGITS`` of them.

Tokens that do not count are sorted behind those that do, and the loop ends where counting ends: a batch that is half
prompt costs half.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from distill.head import Head, product
from distill.losses.reduce import Pair
from distill.shapes import Array, Float, Mask

PerPosition = Callable[[Any, Any, Any], Any]

CPU_LOGITS = 2**18
"""Logits of each side that are in the loss at a time on CPU: 32 rows of 8 192 words, 8 of 32 000 and more."""


def chunked(
    per_position: PerPosition,
    student_hidden: Float[Array, "*batch D"],
    student_head: Head,
    teacher_hidden: Float[Array, "*batch E"] | None,
    teacher_head: Head | None,
    labels: Any,
    mask: Mask,
    chunk_size: int | None = None,
    *,
    has_aux: bool = False,
    mesh: Mesh | None = None,
    token_axes: tuple[str, ...] = ("dcn", "data", "fsdp"),
) -> Pair | tuple[Pair, Any]:
    """``(Σ per_position(student_logits, teacher_logits, labels) where mask, number of counted positions)``.

    Equal, in value and in gradient, to computing both logits and ``masked_sum``. Gradients are with respect to the
    student's hidden states and head only: the teacher is never differentiated. Reverse mode, once (no second order).

    Args:
      per_position: ``(student_logits [n, V], teacher_logits [n, V], labels [n]) -> nats [n]``, any pure function that
        treats positions independently; it must not close over something that is itself differentiated.
      student_hidden: ``[..., D]``, as the head wants it.
      student_head: its ``Head``.
      teacher_hidden: ``[..., E]``, another width than D if need be; None: ``per_position`` gets None for its logits.
      teacher_head: its ``Head``.
      labels: ``[...]``, or a tree of arrays ``[..., *]`` (stored targets of a teacher), handed on in parts.
      mask: ``[...]``: which positions count. Whatever stands in the others, NaN too, has no part in anything.
      chunk_size: positions at a time; about ``16 · V · chunk_size`` bytes are alive. None: ``default_chunk_size``.
      has_aux: ``per_position`` returns ``(nats, aux)`` with aux a tree of further per-position values that are summed
        but not differentiated (metrics).
      mesh: under ``jit`` on this mesh every device works on its own part of the first axis of ``mask``, sums and
        gradients of the head are added at the end. Other axes stay with the compiler: a kernel sharded over words (the
        axis ``tensor``) gives logits sharded over words, and a loss's sums over words become all-reduces.
      token_axes: of the mesh, over which the first axis of ``mask`` lies; its second axis lies over ``sequence``.

    Returns:
      ``(sum, weight)``, float32 scalars; with ``has_aux`` also the tree of sums of aux.

    Raises:
      ValueError: shapes that do not fit together, words that differ between the two heads, chunk_size < 1.

    Example:
      >>> from distill import losses
      >>> hidden, kernel = jnp.ones((2, 3, 4)), jnp.eye(4, 7)
      >>> student, teacher = Head(kernel), Head(2 * kernel)
      >>> labels, mask = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool)
      >>> loss = lambda s, t, labels: losses.forward_kl(s, t, temperature=2.0)
      >>> total, weight = chunked(loss, hidden, student, hidden, teacher, labels, mask, chunk_size=4)
      >>> float(weight), bool(jnp.allclose(total, 6 * loss(student.logits(hidden), teacher.logits(hidden), 0)[0, 0]))
      (6.0, True)
    """
    student_head = student_head.words()
    teacher_head = None if teacher_head is None else teacher_head.words()
    _check(student_hidden, student_head, teacher_hidden, teacher_head, labels, mask, chunk_size)
    platform = _platform(mesh)
    of_tokens = (*token_axes, "sequence")
    over_words = 1 if mesh is None else math.prod(n for axis, n in mesh.shape.items() if axis not in of_tokens)
    chunk_size = chunk_size or default_chunk_size(student_head.kernel.shape[1] // over_words, platform)

    def loss(student_logits, teacher_logits, labels):
        result = per_position(student_logits, teacher_logits, labels)
        return result if has_aux else (result, ())

    def sums(student_hidden, student_head, rest):
        (teacher_hidden, teacher_head), labels, mask = jax.lax.stop_gradient(rest)
        tokens, batch = math.prod(mask.shape), mask.ndim

        def flat(tree):
            return jax.tree.map(lambda x: x.reshape(tokens, *x.shape[batch:]), tree)

        teacher = None if teacher_hidden is None else (flat(teacher_hidden), teacher_head)
        size = min(chunk_size, max(tokens, 1))
        rows = _rows(size, student_head.kernel.shape[1]) if platform == "cpu" else size
        return _total(loss, (size, rows), flat(student_hidden), student_head, teacher, flat(labels), flat(mask))

    if mesh is not None:
        if platform == "cpu":  # where XLA aborts on a sum of bfloat16 over a mesh, here the head's gradient
            student_head = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), student_head)
        places = [tuple(axis for axis in token_axes if axis in mesh.shape)]
        if mesh.shape.get("sequence", 1) > 1 and mask.ndim > 1:
            places.append(("sequence",))
        sums = _on_mesh(sums, mesh, places)
    total, aux = sums(student_hidden, student_head, ((teacher_hidden, teacher_head), labels, mask))
    pair = total, jnp.sum(mask, dtype=jnp.float32)
    return (pair, aux) if has_aux else pair


def _on_mesh(sums: Callable, mesh: Mesh, places: Sequence[tuple[str, ...]]) -> Callable:
    """``sums`` on every device's own tokens, added up; ``places``: the mesh axes of the first axes of the mask."""
    tokens, everywhere = PartitionSpec(*places), PartitionSpec()
    axes = tuple(axis for several in places for axis in several)

    def local(student_hidden, student_head, rest):
        return jax.lax.psum(sums(student_hidden, student_head, rest), axes)

    specs = (tokens, everywhere, ((tokens, everywhere), tokens, tokens))
    # check_vma: a custom VJP and a loop of its own length on every device are beyond that check
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=everywhere, axis_names=set(axes), check_vma=False)


def _platform(mesh: Mesh | None) -> str:
    """Where it will run: the mesh may be of a machine that is not here (compiling ahead of time)."""
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()


def default_chunk_size(vocab_size: int, platform: str | None = None) -> int:
    """Positions at a time: as many as 512 (GPU), 256 (TPU) or 128 (CPU) MiB of logits hold.

    ``vocab_size`` counts the words that one device has. On an accelerator the gradient of the head, ``[D, V]`` in
    float32, is read and written once per chunk, so that few large chunks are wanted, but never more than 1024
    positions, where the products take longer than that traffic; a CPU takes 256 or 512. On an H100 at V = 128k, 1024
    positions take 15 % less time than 512, and 2048 another 4 % for 1.6 to 2.6 GB more. ``platform``: None is the
    default backend.
    """
    platform = platform or jax.default_backend()
    logits, least, most = {"cpu": (2**25, 256, 512), "tpu": (2**26, 128, 1024)}.get(platform, (2**27, 128, 1024))
    return int(np.clip(2 ** round(math.log2(logits / vocab_size)), least, most))


def _rows(size: int, vocab_size: int) -> int:
    """Of a chunk, how many rows the loss takes at a time on CPU; they divide it, and are eight at least."""
    rows = math.gcd(size, max(8, 2 ** int(math.log2(CPU_LOGITS / vocab_size))))
    return rows if rows >= 8 else size


def _check(student_hidden, student_head, teacher_hidden, teacher_head, labels, mask, chunk_size):
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunked: chunk_size={chunk_size}; expected at least 1, or None.")
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("chunked: teacher_hidden and teacher_head belong together; give both or None for both.")
    sides = [("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head)]
    for name, hidden, head in sides:
        if head is None:
            continue
        if hidden.shape[:-1] != mask.shape or hidden.shape[-1] != head.kernel.shape[0]:
            raise ValueError(
                f"chunked: {name}_hidden {hidden.shape} with a head {head.kernel.shape} and a mask {mask.shape}; "
                "expected hidden [*mask, D] and a kernel [D, V]."
            )
    if teacher_head is not None and teacher_head.kernel.shape[1] != student_head.kernel.shape[1]:
        raise ValueError(
            f"chunked: the student has {student_head.kernel.shape[1]} words, the teacher {teacher_head.kernel.shape[1]}"
            "; set vocab_size of both heads to the words they share (distill/vocab.py)."
        )
    for leaf in jax.tree.leaves(labels):
        if leaf.shape[: mask.ndim] != mask.shape:
            raise ValueError(f"chunked: labels of shape {leaf.shape} with a mask {mask.shape}; expected [*mask, …].")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(loss, sizes, hidden, head, teacher, labels, mask):
    """Σ loss and Σ aux, without gradients; ``sizes``: positions in a chunk, rows in the loss at a time."""
    kernel = head.kernel.astype(hidden.dtype)

    def part(s, t, of_labels, counts):
        return _sums(loss(head.finish(s), t, of_labels), counts)

    def one(total, h, *rest):
        def rows(total, inputs):
            return _add(total, part(*inputs))

        return _by_rows(rows, sizes, total, (product(h, kernel), *rest))

    return _loop(one, lambda h, *rest: part(product(h, kernel), *rest), sizes[0], hidden, teacher, labels, mask)


def _forward(loss, sizes, hidden, head, teacher, labels, mask):
    """The sums, and with them the gradients of Σ loss with respect to hidden and head."""
    kernel = head.kernel.astype(hidden.dtype)

    def part(s, t, of_labels, counts):
        """``(sums, ∂bias), ∂s`` of some rows."""

        def finish(s, bias):
            return _sums(loss(head.replace(bias=bias).finish(s), t, of_labels), counts)

        total, pullback, aux = jax.vjp(finish, s, head.bias, has_aux=True)
        gradient, bias = pullback(jnp.float32(1.0))
        return ((total, aux), bias), gradient

    def one(carry, h, t, of_labels, counts, index):
        sums, by_hidden, by_kernel = carry

        sums, gradient = _in_their_place(part, sizes, sums, product(h, kernel), (t, of_labels, counts))
        gradient = gradient.astype(hidden.dtype)
        by_h = jnp.einsum("nv,dv->nd", gradient, kernel, preferred_element_type=jnp.float32)
        by_hidden = by_hidden.at[index].set(by_h.astype(hidden.dtype), mode="drop", unique_indices=True)
        transposed = jax.lax.optimization_barrier(h.T)  # a copy of h alone: XLA's CPU products are a fifth faster
        by_kernel = by_kernel + jnp.matmul(transposed, gradient, preferred_element_type=jnp.float32)
        return sums, by_hidden, by_kernel

    def like(h, *rest):
        sums, bias = part(product(h, kernel), *rest)[0]
        return (sums, jax.tree.map(lambda b: b.astype(jnp.float32), bias)), hidden, head.kernel.astype(jnp.float32)

    (sums, by_bias), by_hidden, by_kernel = _loop(one, like, sizes[0], hidden, teacher, labels, mask, rows=True)
    gradient = head.replace(kernel=by_kernel, bias=by_bias)
    return sums, (by_hidden, gradient, jax.tree.map(lambda x: x[:0], head))


def _by_rows(function, sizes, carry, inputs):
    """``carry = function(carry, inputs)`` over the rows of a chunk, some at a time."""
    chunk_size, rows = sizes
    if rows == chunk_size:
        return function(carry, inputs)
    parts = jax.tree.map(lambda x: x.reshape(chunk_size // rows, rows, *x.shape[1:]), inputs)
    return jax.lax.scan(lambda carry, part: (function(carry, part), None), carry, parts)[0]


def _in_their_place(part, sizes, total, logits, inputs):
    """``total`` and the gradients of a chunk, which take the place of the student's logits, some rows at a time."""
    chunk_size, rows = sizes
    if rows == chunk_size:
        values, gradient = part(logits, *inputs)
        return _add(total, values), gradient

    def at(i, x):
        return jax.lax.dynamic_slice_in_dim(x, i * rows, rows)

    def some(i, carry):
        """``own``, the rows of turn i, travel apart: read from logits it writes to, XLA would copy all of them."""
        total, logits, own = carry
        values, gradient = part(own, *jax.tree.map(functools.partial(at, i), inputs))
        logits = jax.lax.dynamic_update_slice_in_dim(logits, gradient, i * rows, axis=0)
        return _add(total, values), logits, at(i + 1, logits)

    return jax.lax.fori_loop(0, chunk_size // rows, some, (total, logits, at(0, logits)))[:2]


def _backward(loss, sizes, kept, cotangent):
    by_hidden, by_head, like = kept
    scale = cotangent[0]
    by_head = jax.tree.map(lambda g, x: (g * scale).astype(x.dtype), by_head, like)
    return (by_hidden * scale).astype(by_hidden.dtype), by_head, None, None, None


_total.defvjp(_forward, _backward)


def _sums(values, counts):
    """``(Σ nats, Σ aux)`` over the positions that count."""
    return jax.tree.map(lambda x: jnp.sum(jnp.where(counts, x, 0.0), dtype=jnp.float32), values)


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)


def _zeros(function):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function))


def _loop(one, like, chunk_size, hidden, teacher, labels, mask, rows=False):
    """``carry = one(carry, h, teacher_logits, labels, counts)`` over the chunks of the positions that count.

    The carry starts as zeros of the shapes of ``like(h, teacher_logits, labels, counts)``, which is never computed.
    """
    tokens = mask.shape[0]
    chunks = -(-tokens // chunk_size)
    order = jnp.argsort(~mask, stable=True)
    order = jnp.concatenate([order, jnp.full(chunks * chunk_size - tokens, tokens, order.dtype)])
    counted = jnp.sum(mask, dtype=jnp.int32)
    states, head = (None, None) if teacher is None else teacher
    kernel = None if teacher is None else head.kernel.astype(states.dtype)

    def inputs(i):
        index = jax.lax.dynamic_slice_in_dim(order, i * chunk_size, chunk_size)
        counts = i * chunk_size + jnp.arange(chunk_size) < counted

        def pick(x):
            """Rows of x, zeros where nothing counts: selected before anything is computed."""
            return jnp.where(counts.reshape(-1, *[1] * (x.ndim - 1)), x.at[index].get(mode="clip"), 0)

        logits = None if teacher is None else head.finish(product(pick(states), kernel))
        return pick(hidden), logits, jax.tree.map(pick, labels), counts, *([index] if rows else [])

    def body(i, carry):
        return one(carry, *inputs(i))

    return jax.lax.fori_loop(0, -(-counted // chunk_size), body, _zeros(lambda: like(*inputs(0)[:4])))
