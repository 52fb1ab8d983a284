"""Losses between what happens inside student and teacher: hidden states, attention maps, relations of tokens.

Conventions, the same for every function here:

* Student first, teacher second; one value per position, in float32, to be averaged like any other loss.
* A mean over D (or over heads) is taken per position, so that a value does not grow with the width; no mean over
  positions.
* A position that does not count is left out by ``masked_sum``. If it may hold NaN or infinity, select before: a
  gradient through it would be 0·NaN (``losses.select``, for states as for logits). Where positions meet each
  other, in attention and relations, ``segments`` does so: 0 is padding, which is then no key either.
* Layers are counted as in ``models.Collect``: hidden state 0 is the embedding, and the last one is taken before the
  final norm. ``Output.hidden`` is after it.
"""

import jax
import jax.numpy as jnp

from distill.errors import UserError
from distill.losses.divergences import forward_kl
from distill.shapes import Array, Bool, Float, Int, Nats

Segments = Int[Array, "*batch L"]
Pairs = Bool[Array, "*batch L L"]


def hidden_mse(student: Float[Array, "*batch Ds"], teacher: Float[Array, "*batch Dt"]) -> Nats:
    """Mean squared error of hidden states, (1/D) Σ_d (s_d − t_d)²: the mean over D, per position.

    The hidden loss of TinyBERT (arXiv 1909.10351, eq. 8) for equal widths; ``projected_mse`` is for others.

    Args:
      student: ``[..., D]``.
      teacher: ``[..., D]``.

    Returns:
      ``[...]`` squared units of the states, float32.

    Raises:
      UserError: the widths differ.

    Example:
      >>> float(hidden_mse(jnp.array([1.0, 2.0]), jnp.array([1.0, 5.0])))  # (0 + 9) / 2
      4.5
    """
    _same_width("hidden_mse", student, teacher)
    return jnp.mean(jnp.square(student.astype(jnp.float32) - teacher.astype(jnp.float32)), axis=-1)


def hidden_cosine(student: Float[Array, "*batch Ds"], teacher: Float[Array, "*batch Dt"]) -> Nats:
    """One minus the cosine of hidden states, 1 − s·t / (|s|·|t|): blind to their lengths, unlike ``hidden_mse``.

    The cosine loss of DistilBERT (arXiv 1910.01108). A vector of zeros has the cosine 0 with everything.

    Args:
      student: ``[..., D]``.
      teacher: ``[..., D]``.

    Returns:
      ``[...]`` in [0, 2], float32.

    Raises:
      UserError: the widths differ.

    Example:
      >>> float(hidden_cosine(jnp.array([3.0, 0.0]), jnp.array([0.0, 2.0])))
      1.0
    """
    _same_width("hidden_cosine", student, teacher)
    return 1.0 - jnp.sum(_unit(student) * _unit(teacher), axis=-1)


def projected_mse(
    student: Float[Array, "*batch Ds"], teacher: Float[Array, "*batch Dt"], projector: Float[Array, "Ds_in Dt_out"]
) -> Nats:
    """Mean squared error after a learned map into the teacher's space: (1/Dt) Σ_d ((s W)_d − t_d)².

    TinyBERT (arXiv 1909.10351, eq. 8). W is an array like any other weight: it lives in the student's trainable tree,
    beside the model, learns by the same gradient and is left behind when training ends.

    Args:
      student: ``[..., Ds]``.
      teacher: ``[..., Dt]``.
      projector: W, ``[Ds, Dt]``; the product is accumulated in float32.

    Returns:
      ``[...]`` squared units of the teacher's states, float32.

    Raises:
      UserError: the projector is not ``[Ds, Dt]``.

    Example:
      >>> student, teacher, projector = jnp.array([2.0]), jnp.array([2.0, 0.0]), jnp.array([[1.0, 1.0]])
      >>> float(projected_mse(student, teacher, projector))  # (0 + 4) / 2
      2.0
    """
    if projector.shape != (student.shape[-1], teacher.shape[-1]):
        raise UserError(
            f"projected_mse: projector {projector.shape}; expected (student's width, teacher's width) = "
            f"({student.shape[-1]}, {teacher.shape[-1]})."
        )
    mapped = jnp.matmul(student, projector.astype(student.dtype), preferred_element_type=jnp.float32)
    return hidden_mse(mapped, teacher)


def attention_kl(
    student_map: Float[Array, "*batch Hs L S"],
    teacher_map: Float[Array, "*batch Ht L S"],
    *,
    segments: Segments | None = None,
    average_heads: bool = False,
) -> Float[Array, "*batch L"]:
    """KL of attention maps, teacher first, mean over heads: (1/H) Σ_h KL(A^teacher_h ‖ A^student_h) per query.

    The attention transfer of MiniLM (arXiv 2002.10957, eq. 3). ``relation_kl`` compares queries, keys and values
    instead, and needs no equal number of heads. Rows are normalised again; a probability below 1.2e-38, where float32
    ends, counts as that.

    Args:
      student_map: ``[..., H, L, S]`` probabilities over keys, of L queries.
      teacher_map: ``[..., H, L, S]``.
      segments: ``[..., L]`` with L = S; a query then looks only at keys of its own segment, and 0, padding, neither
        looks nor is looked at (its value is 0). None: every key counts.
      average_heads: average the maps over heads before comparing them; the numbers of heads may then differ.

    Returns:
      ``[..., L]`` nats, float32.

    Raises:
      UserError: numbers of heads differ without ``average_heads``, or segments without L = S.

    Example:
      >>> student, teacher = jnp.array([[[0.5, 0.5]]]), jnp.array([[[0.75, 0.25]]])  # one head, one query, two keys
      >>> attention_kl(student, teacher).round(4)
      Array([0.1308], dtype=float32)
    """
    *_, heads, length, keys = student_map.shape
    if not average_heads and heads != teacher_map.shape[-3]:
        raise UserError(
            f"attention_kl: student has {heads} heads, teacher {teacher_map.shape[-3]}; set average_heads=True to "
            "compare their averages, or use relation_kl."
        )
    if segments is not None and length != keys:
        raise UserError(f"attention_kl: {length} queries, {keys} keys; segments are for maps of equally many.")

    def log_of(attention: Array) -> Array:
        attention = attention.astype(jnp.float32)
        if segments is not None:  # selected before anything is computed
            attention = jnp.where(_same_segment(segments)[..., None, :, :], attention, 0.0)
        if average_heads:
            attention = jnp.mean(attention, axis=-3, keepdims=True)
        return jnp.log(jnp.maximum(attention, jnp.finfo(jnp.float32).tiny))

    return jnp.mean(forward_kl(log_of(student_map), log_of(teacher_map)), axis=-2)


def relation_kl(
    student: Float[Array, "*batch Hs L Ks"],
    teacher: Float[Array, "*batch Ht L Kt"],
    *,
    relation_heads: int,
    segments: Segments | None = None,
    causal: bool = True,
) -> Float[Array, "*batch L"]:
    """KL of how tokens relate to each other, teacher first, mean over relation heads (MiniLM v2, arXiv 2012.15828).

    The vectors of all heads (queries, keys or values) are joined and cut again into R relation heads of size d:

        A_r = softmax(X_r X_rᵀ / √d)        (1/R) Σ_r KL(A^teacher_r ‖ A^student_r) per query position

    R is that of both sides while d is each side's own, so widths and numbers of heads may differ. The paper adds the
    losses of queries, keys and values (its eq. 5), with R above the student's number of heads as a rule.

    Args:
      student: ``[..., H, L, K]`` queries, keys or values of one layer.
      teacher: the same kind, with the teacher's H and K.
      relation_heads: R; divides H·K of both sides.
      segments: ``[..., L]``; tokens relate within their segment only, and 0, padding, to nothing (its value is 0).
        None: one segment.
      causal: a token relates to itself and earlier ones only, as in a decoder.

    Returns:
      ``[..., L]`` nats, float32.

    Raises:
      UserError: relation_heads below 1, or no divisor of H·K on either side.

    Example:
      >>> student = jnp.array([[[1.0, 0.0], [1.0, 0.0]]])  # one head, two tokens alike
      >>> teacher = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])  # two tokens at right angles
      >>> relation_kl(student, teacher, relation_heads=1).round(4)  # the first sees but itself
      Array([0.    , 0.0588], dtype=float32)
    """
    length = student.shape[-2]
    visible = jnp.ones((*student.shape[:-3], length, length), bool) if segments is None else _same_segment(segments)
    if causal:
        visible &= jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), visible.shape)
    exists = jnp.any(visible, axis=-1, keepdims=True)  # rows of padding: all equal on both sides, so their KL is 0

    def relations(name: str, x: Array) -> Array:
        *batch, heads, length, size = x.shape
        if relation_heads < 1 or heads * size % relation_heads:
            raise UserError(
                f"relation_kl: relation_heads={relation_heads} is no divisor of the {name}'s {heads} heads × {size} = "
                f"{heads * size}."
            )
        joined = jnp.swapaxes(x, -3, -2).reshape(*batch, length, relation_heads, heads * size // relation_heads)
        joined = jnp.where(exists[..., None], joined, 0.0)
        scores = jnp.einsum("...lrd,...srd->...rls", joined, joined, preferred_element_type=jnp.float32)
        scores = scores * joined.shape[-1] ** -0.5
        return jnp.where(visible[..., None, :, :], scores, jnp.where(exists, -jnp.inf, 0.0)[..., None, :, :])

    return jnp.mean(forward_kl(relations("student", student), relations("teacher", teacher)), axis=-2)


def similarity_mse(student: Float[Array, "B Ds"], teacher: Float[Array, "B Dt"]) -> Float[Array, " B"]:
    """How differently the vectors of a batch resemble each other: 1/(B−1) Σ_{j≠i} (cos(s_i, s_j) − cos(t_i, t_j))².

    Only relations within the batch count (arXiv 1904.05068; the matrices are those of arXiv 1907.09682, of cosines):
    widths may differ, and a rotation of the student changes nothing, unlike ``hidden_cosine``. A part of a batch, on a
    device of its own or a micro-batch, knows only itself.

    Args:
      student: ``[B, Ds]``, such as sentence embeddings.
      teacher: ``[B, Dt]``.

    Returns:
      ``[B]`` in [0, 4], float32; 0 for a batch of one.

    Example:
      >>> student, teacher = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0], [2.0]])
      >>> similarity_mse(student, teacher)  # at right angles; alike
      Array([1., 1.], dtype=float32)
    """

    def cosines(x: Array) -> Array:
        x = _unit(x)
        return jnp.matmul(x, x.T, preferred_element_type=jnp.float32)

    others = ~jnp.eye(student.shape[0], dtype=bool)
    square = jnp.where(others, jnp.square(cosines(student) - cosines(teacher)), 0.0)
    return jnp.sum(square, axis=-1) / max(student.shape[0] - 1, 1)


def layer_map(student_layers: int, teacher_layers: int, strategy: str = "uniform") -> tuple[tuple[int, int], ...]:
    """Which layer of the teacher each layer of the student learns from: pairs (student's m, teacher's g(m)).

    The three of TinyBERT (arXiv 1909.10351, sections 3.1 and 4.6), for M student and N teacher layers:

    * ``uniform``: g(m) = ⌈m·N/M⌉, the end of the m-th of M equal parts; last to last.
    * ``last``: g(m) = m + N − M, the top of the teacher.
    * ``first``: g(m) = m, its bottom.

    The embeddings are no layer: add ``(0, 0)`` to compare them as well.

    Args:
      student_layers: M.
      teacher_layers: N; at least M unless uniform.
      strategy: one of the three.

    Returns:
      M pairs, layers counted from 1 as in ``models.Collect``.

    Raises:
      UserError: an unknown strategy, no layers, or more layers in the student than a strategy can serve.

    Example:
      >>> layer_map(4, 12), layer_map(2, 12, "last")
      (((1, 3), (2, 6), (3, 9), (4, 12)), ((1, 11), (2, 12)))
    """
    m, n = student_layers, teacher_layers
    if m < 1 or n < 1:
        raise UserError(f"layer_map: student_layers={m}, teacher_layers={n}; expected at least 1 of each.")
    if strategy == "uniform":
        return tuple((i, -(-i * n // m)) for i in range(1, m + 1))
    if strategy not in ("last", "first"):
        raise UserError(f"layer_map: strategy={strategy!r}; expected 'uniform', 'last' or 'first'.")
    if m > n:
        raise UserError(f"layer_map: {m} student layers, {n} teacher layers; {strategy!r} needs as many: use uniform.")
    skipped = n - m if strategy == "last" else 0
    return tuple((i, i + skipped) for i in range(1, m + 1))


def _same_width(name: str, student: Array, teacher: Array) -> None:
    if student.shape[-1] != teacher.shape[-1]:
        raise UserError(
            f"{name}: student {student.shape}, teacher {teacher.shape}; expected equal widths: map the student's with "
            "projected_mse."
        )


def _unit(x: Array) -> Array:
    """x / |x| without overflow or underflow; 0 for a vector of zeros, with a finite gradient."""
    x = x.astype(jnp.float32)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    x = x / jnp.where(largest == 0.0, 1.0, largest)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square == 0.0, 1.0, square))


def _same_segment(segments: Segments) -> Pairs:
    """``[..., L, L]``: both tokens exist and lie in one segment."""
    return (segments[..., :, None] == segments[..., None, :]) & (segments > 0)[..., None]
