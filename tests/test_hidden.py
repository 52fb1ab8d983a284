"""Losses between hidden states, attention maps and relations of two models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from distill import losses

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]])


# ---- float64 twins


def hidden_mse(student, teacher):
    return sum((student[..., d] - teacher[..., d]) ** 2 for d in range(student.shape[-1])) / student.shape[-1]


def hidden_cosine(student, teacher):
    product = np.sum(student * teacher, axis=-1)
    return 1.0 - product / np.linalg.norm(student, axis=-1) / np.linalg.norm(teacher, axis=-1)


def projected_mse(student, teacher, projector):
    return hidden_mse(np.einsum("...s,st->...t", student, projector), teacher)


def attention_kl(student, teacher, segments=None, average_heads=False):
    if average_heads:
        student, teacher = student.mean(axis=-3, keepdims=True), teacher.mean(axis=-3, keepdims=True)
    *batch, heads, length, _ = student.shape
    nats = np.zeros((*batch, length))
    for at in np.ndindex(*batch, length):
        *b, t = at
        row = np.arange(student.shape[-1]) if segments is None else same_segment(segments[tuple(b)], t)
        if len(row):
            for h in range(heads):
                p, q = (maps[(*b, h, t)][row] / maps[(*b, h, t)][row].sum() for maps in (teacher, student))
                nats[at] += sum(p[s] * np.log(p[s] / q[s]) for s in range(len(row)) if p[s] > 0) / heads
    return nats


def same_segment(segments, t):
    return np.array([s for s in range(len(segments)) if segments[s] == segments[t] > 0], int)


def relation_kl(student, teacher, relation_heads, segments=None, causal=True):
    *batch, _, length, _ = student.shape
    nats = np.zeros((*batch, length))
    for at in np.ndindex(*batch, length):
        *b, t = at
        row = np.arange(length) if segments is None else same_segment(segments[tuple(b)], t)
        row = row[row <= t] if causal else row
        for r in range(relation_heads if len(row) else 0):
            log_rows = []
            for x in (teacher, student):
                joined = np.concatenate(list(x[tuple(b)]), axis=-1)  # heads side by side: [L, H·K]
                part = np.split(joined, relation_heads, axis=-1)[r]
                log_rows.append(reference.log_softmax(part[row] @ part[t] / np.sqrt(part.shape[-1])))
            nats[at] += reference.kl_of_log_probs(*log_rows) / relation_heads
    return nats


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def maps_of(heads, seed, causal=True):
    scores = normal(2, heads, 6, 6, seed=seed)
    visible = np.tril(np.ones((6, 6), bool)) & (SEGMENTS[:, None, :, None] == SEGMENTS[:, None, None, :])
    return reference.softmax(np.where(visible, scores, -np.inf)) if causal else reference.softmax(scores)


CASES = {
    "hidden_mse": (losses.hidden_mse, hidden_mse, (normal(2, 6, 5), normal(2, 6, 5, seed=1)), {}),
    "hidden_cosine": (losses.hidden_cosine, hidden_cosine, (normal(2, 6, 5), normal(2, 6, 5, seed=1)), {}),
    "projected_mse": (
        losses.projected_mse,
        projected_mse,
        (normal(2, 6, 3), normal(2, 6, 5, seed=1), normal(3, 5, seed=2)),
        {},
    ),
    "attention": (losses.attention_kl, attention_kl, (maps_of(3, 0, causal=False), maps_of(3, 1, causal=False)), {}),
    "attention_causal": (losses.attention_kl, attention_kl, (maps_of(2, 0), maps_of(2, 1)), {}),
    "attention_segments": (
        losses.attention_kl,
        attention_kl,
        (maps_of(2, 0, causal=False), maps_of(2, 1, causal=False)),
        {"segments": SEGMENTS},
    ),
    "attention_averaged": (losses.attention_kl, attention_kl, (maps_of(2, 0), maps_of(3, 1)), {"average_heads": True}),
    "relation": (
        losses.relation_kl,
        relation_kl,
        (normal(2, 2, 6, 6), normal(2, 4, 6, 9, seed=1)),
        {"relation_heads": 3},
    ),
    "relation_segments": (
        losses.relation_kl,
        relation_kl,
        (normal(2, 4, 6, 2), normal(2, 2, 6, 4, seed=1)),
        {"relation_heads": 2, "segments": SEGMENTS},
    ),
    "relation_both_ways": (
        losses.relation_kl,
        relation_kl,
        (normal(2, 1, 6, 4), normal(2, 3, 6, 4, seed=1)),
        {"relation_heads": 4, "segments": SEGMENTS, "causal": False},
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    """Our loss, its twin, inputs, options, and the compiled function of the inputs."""
    ours, twin, inputs, options = CASES[request.param]
    arrays = {name: jnp.asarray(x) if name == "segments" else x for name, x in options.items()}
    return jax.jit(functools.partial(ours, **arrays)), functools.partial(twin, **options), inputs


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_equal_float64(case, dtype):
    ours, twin, inputs = case
    rounded = [jnp.asarray(x, dtype) for x in inputs]
    nats = ours(*rounded)
    want = twin(*(np.asarray(x.astype(jnp.float32), np.float64) for x in rounded))
    assert nats.shape == (2, 6) and nats.dtype == jnp.float32 and np.max(want) > 0.1
    np.testing.assert_allclose(nats, want, rtol=2e-5, atol=2e-6)


# Fault: right value, wrong gradient.
def test_gradients_are_finite_differences_of_float64(case):
    ours, twin, inputs = case
    weights = normal(2, 6, seed=9)  # of positions
    every = tuple(range(len(inputs)))
    value = jax.jit(jax.grad(lambda *x: jnp.sum(ours(*x) * jnp.asarray(weights, jnp.float32)), argnums=every))
    got, step = value(*(jnp.asarray(x, jnp.float32) for x in inputs)), 1e-6
    for number, x in enumerate(inputs):
        slopes = np.zeros_like(x)
        for at in np.ndindex(x.shape):
            if x.ndim == 4 and x[at] == 0.0:
                continue  # a probability of 0 cannot become less
            move = np.zeros_like(x)
            move[at] = step
            ahead, behind = ([*inputs[:number], x + sign * move, *inputs[number + 1 :]] for sign in (1, -1))
            slopes[at] = np.sum(weights * (twin(*ahead) - twin(*behind))) / (2 * step)
        mask = (x != 0.0) if x.ndim == 4 else np.ones_like(x, bool)
        np.testing.assert_allclose(np.asarray(got[number])[mask], slopes[mask], rtol=2e-3, atol=2e-5)


def test_equal_inputs_score_0(case):
    ours, _, (x, _, *projector) = case
    x = jnp.asarray(x, jnp.float32)
    if projector:
        np.testing.assert_allclose(ours(x, x[..., :2], jnp.eye(3, 2)), 0.0, atol=1e-6)
    else:
        np.testing.assert_allclose(ours(x, x), 0.0, atol=1e-6)


def test_values_by_hand_show_the_direction():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.1, 0.6, 0.3])
    student, teacher = (jnp.asarray(x, jnp.float32)[None, None] for x in (q, p))
    want = 0.5 * np.log(0.5 / 0.1) + 0.25 * np.log(0.25 / 0.6) + 0.25 * np.log(0.25 / 0.3)
    np.testing.assert_allclose(losses.attention_kl(student, teacher), [want], rtol=1e-5)
    assert abs(want - losses.attention_kl(teacher, student)[0]) > 0.05
    # two tokens: the second relates to (first, itself) by softmax(0, 9 / √4) and softmax(0, 1 / √4)
    vectors = [jnp.zeros((1, 2, 4)).at[0, 0, 0].set(length).at[0, 1, 1].set(length) for length in (1.0, 3.0)]
    log_q, log_p = (reference.log_softmax([0.0, x]) for x in (0.5, 4.5))
    want = [0.0, reference.kl_of_log_probs(log_p, log_q)]
    np.testing.assert_allclose(losses.relation_kl(*vectors, relation_heads=1), want, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(losses.hidden_mse(jnp.array([1.0, 2.0]), jnp.array([3.0, 5.0])), 6.5)


def test_cosine_of_tiny_huge_and_zero_vectors():
    s, t = normal(3, 5), normal(3, 5, seed=1)
    want = hidden_cosine(s, t)
    run = jax.jit(jax.value_and_grad(lambda x: jnp.sum(losses.hidden_cosine(x, jnp.asarray(t, jnp.float32)))))
    for scale in (1e-30, 1e30):
        got, slope = run(jnp.asarray(s * scale, jnp.float32))
        np.testing.assert_allclose(got, np.sum(want), rtol=1e-5)
        assert np.all(np.isfinite(slope)) and np.any(slope != 0.0)
    got, slope = run(jnp.zeros((3, 5)))
    assert got == 3.0 and np.all(np.isfinite(slope))


# A key to which the student gives no attention.
def test_attention_that_underflows_is_finite():
    student, teacher = jnp.array([[[1.0, 0.0]]]), jnp.array([[[0.5, 0.5]]])
    value, slope = jax.value_and_grad(lambda s: losses.attention_kl(s, teacher)[0])(student)
    assert 40 < value < 45 and np.all(np.isfinite(slope))


# ---- padding, and the mean over D


def counted(function, mask):
    """Value and gradient of the average over counted positions."""
    return jax.jit(jax.value_and_grad(lambda args: losses.divide(losses.masked_sum(function(*args), mask))))


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("name", ["hidden_mse", "hidden_cosine", "projected_mse"])
def test_padding_carries_no_hidden_loss(name, garbage):
    """Fault: hidden losses over padding, or times the width."""
    ours, _, (student, teacher, *rest), _ = CASES[name]
    student, teacher, *rest = (jnp.asarray(x, jnp.float32) for x in (student, teacher, *rest))
    mask = jnp.asarray(SEGMENTS > 0)
    run = counted(lambda s, t, *rest: ours(losses.select(s, mask), losses.select(t, mask), *rest), mask)
    value, slopes = run((student, teacher, *rest))
    padded = [jnp.where(mask[..., None], x, garbage) for x in (student, teacher)]
    again, same = run((*padded, *rest))
    np.testing.assert_array_equal(value, again)
    jax.tree.map(np.testing.assert_array_equal, slopes, same)
    np.testing.assert_array_equal(slopes[0][~mask], 0.0)
    want = np.asarray(ours(student, teacher, *rest))[np.asarray(mask)]  # the mask is slicing
    np.testing.assert_allclose(value, np.mean(want), rtol=1e-5)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 0.3])
@pytest.mark.parametrize("name", ["attention_segments", "relation_segments", "relation_both_ways"])
def test_padding_is_neither_query_nor_key(name, garbage):
    ours, _, inputs, options = CASES[name]
    student, teacher = (jnp.asarray(x, jnp.float32) for x in inputs)
    exists = SEGMENTS > 0
    options = options | {"segments": jnp.asarray(SEGMENTS)}
    real = exists[:, None, :, None]
    if name == "attention_segments":
        real = real & exists[:, None, None, :]
    run = counted(functools.partial(ours, **options), jnp.asarray(exists))
    value, slopes = run((student, teacher))
    again, same = run(tuple(jnp.where(real, x, garbage) for x in (student, teacher)))
    np.testing.assert_array_equal(value, again)
    jax.tree.map(np.testing.assert_array_equal, slopes, same)
    for slope in same:
        assert np.all(np.isfinite(slope))
        np.testing.assert_array_equal(np.asarray(slope)[~np.broadcast_to(real, slope.shape)], 0.0)
    np.testing.assert_array_equal(ours(student, teacher, **options)[1, 4:], 0.0)


def test_a_segment_is_independent_of_others():
    student, teacher = (jnp.asarray(x, jnp.float32) for x in (normal(2, 6, 4), normal(3, 6, 2, seed=1)))
    for causal in (True, False):
        run = jax.jit(functools.partial(losses.relation_kl, relation_heads=2, causal=causal))
        packed = run(student, teacher, segments=jnp.asarray(SEGMENTS[0]))
        alone = [run(student[:, part], teacher[:, part]) for part in (slice(0, 3), slice(3, 6))]
        np.testing.assert_allclose(packed, jnp.concatenate(alone), rtol=1e-5, atol=1e-6)
        assert np.max(np.abs(run(student, teacher)[3:] - packed[3:])) > 0.01


def test_causal_relations_do_not_see_the_future():
    student, teacher = (jnp.asarray(x, jnp.float32) for x in (normal(2, 6, 4), normal(2, 6, 4, seed=1)))
    for causal, reaches in ((True, False), (False, True)):
        slope = jax.jit(jax.jacobian(lambda s, c=causal: losses.relation_kl(s, teacher, relation_heads=2, causal=c)))(
            student
        )
        future = np.triu(np.max(np.abs(slope), axis=(1, 3)), 1)  # query position, position of the vector
        assert np.any(future != 0.0) == reaches


def test_the_mask_does_not_multiply_by_the_width():
    """Fault: hidden losses over padding, or times the width."""
    for width in (4, 400):
        student, teacher = normal(2, 6, width), normal(2, 6, width, seed=1)
        mask = SEGMENTS > 0
        arrays = (jnp.asarray(x, jnp.float32) for x in (student, teacher))
        total, weight = losses.masked_sum(losses.hidden_mse(*arrays), jnp.asarray(mask))
        assert weight == np.sum(mask)
        np.testing.assert_allclose(total / weight, np.mean((student - teacher)[mask] ** 2), rtol=1e-5)


def test_a_projector_learns_with_the_student():
    teacher, student = normal(64, 5), normal(64, 3, seed=1)
    best, *_ = np.linalg.lstsq(student, teacher, rcond=None)
    params = {"student": jnp.asarray(student, jnp.float32), "projector": jnp.zeros((3, 5))}

    def loss(projector):
        return jnp.mean(losses.projected_mse(params["student"], jnp.asarray(teacher, jnp.float32), projector))

    slope = jax.jit(jax.grad(loss))
    projector = params["projector"]
    for _ in range(200):
        projector = projector - 1.0 * slope(projector)
    np.testing.assert_allclose(projector, best, atol=1e-4)


# ---- which layer learns from which


@pytest.mark.parametrize(
    ("sizes", "strategy", "teachers"),
    [
        ((4, 12), "uniform", (3, 6, 9, 12)),  # TinyBERT's: g(m) = 3 m
        ((6, 12), "uniform", (2, 4, 6, 8, 10, 12)),
        ((3, 4), "uniform", (2, 3, 4)),
        ((2, 5), "uniform", (3, 5)),
        ((4, 2), "uniform", (1, 1, 2, 2)),
        ((4, 12), "last", (9, 10, 11, 12)),
        ((4, 12), "first", (1, 2, 3, 4)),
        ((3, 3), "last", (1, 2, 3)),
    ],
)
def test_layer_maps_match_numbers_by_hand(sizes, strategy, teachers):
    assert losses.layer_map(*sizes, strategy) == tuple(enumerate(teachers, start=1))


# ---- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.hidden_mse(jnp.zeros((2, 3)), jnp.zeros((2, 1))), r"hidden_mse.*\(2, 3\).*\(2, 1\).*projected"),
        (lambda: losses.hidden_cosine(jnp.zeros(3), jnp.zeros(4)), "hidden_cosine.*equal widths"),
        (lambda: losses.projected_mse(jnp.zeros(3), jnp.zeros(4), jnp.zeros((4, 3))), r"\(4, 3\).*\(3, 4\)"),
        (lambda: losses.attention_kl(jnp.zeros((2, 3, 3)), jnp.zeros((4, 3, 3))), "2 heads, teacher 4.*average_heads"),
        (
            lambda: losses.attention_kl(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 4)), segments=jnp.ones((3,), jnp.int32)),
            "3 queries, 4 keys",
        ),
        (
            lambda: losses.relation_kl(jnp.zeros((2, 3, 4)), jnp.zeros((3, 3, 4)), relation_heads=8),
            "relation_heads=8.*teacher's 3 heads × 4 = 12",
        ),
        (lambda: losses.relation_kl(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 4)), relation_heads=0), "student's 2 heads"),
        (lambda: losses.layer_map(2, 4, "middle"), "'middle'.*'uniform', 'last' or 'first'"),
        (lambda: losses.layer_map(4, 2, "last"), "4 student layers, 2 teacher layers"),
        (lambda: losses.layer_map(0, 2), "student_layers=0"),
    ],
)
def test_incompatible_shapes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
