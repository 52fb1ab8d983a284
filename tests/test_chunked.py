"""The chunked head has the value and gradients of the plain head and never holds an array [tokens, V]."""

import functools
import itertools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill import losses
from distill.benchmarks.head import chunked_head, head_shapes
from distill.benchmarks.tpu import compiled_on
from distill.devices import backend
from distill.losses import Head
from distill.parallel import ParallelConfig, make_mesh
from distill.planning.hlo import collectives


def chunked(per_position, hidden, head, teacher_hidden, teacher_head, labels, mask, *chunk_size, **options):
    teacher = None if teacher_hidden is None else (teacher_hidden, teacher_head)
    return losses.chunked(per_position, (hidden, head), teacher, labels, mask, *chunk_size, **options)


TOKENS, D, E, V = (4, 6), 8, 12, 19


@pytest.fixture(autouse=True)
def few_logits_at_a_time(monkeypatch):
    """As with a large vocabulary: on a CPU the loss reads eight rows of a chunk at a time, where eight divide it."""
    monkeypatch.setattr(backend, "CPU_LOGITS", 1)


def task_and_kl(s, t, labels):
    return 2.0 * losses.forward_kl(s, t, temperature=2.0) + 0.5 * losses.cross_entropy(s, labels, z_loss=1e-3)


def written_by_a_user(s, t, labels):
    return jnp.sum(jnp.abs(jax.nn.softmax(s) - jax.nn.softmax(t)) ** 1.5, axis=-1)


PER_POSITION = {
    "task and KL": task_and_kl,
    "reverse KL": lambda s, t, labels: losses.reverse_kl(s, t),
    "JSD": lambda s, t, labels: losses.generalized_jsd(s, t, beta=0.3),
    "a user's own": written_by_a_user,
}
HEADS = {
    "plain": ({}, {}),
    "bias": ({"bias": True}, {"bias": True}),
    "scale": ({"scale": 0.25}, {"scale": 3.0}),
    "softcap": ({"softcap": 2.0}, {"softcap": 5.0, "bias": True}),
    "padded": ({"vocab_size": V, "padded": 5, "bias": True}, {"vocab_size": V, "padded": 2}),
}


def head(width, seed, bias=False, padded=0, dtype=jnp.float32, **options):
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.normal(size=(width, V + padded)), dtype)
    return Head(kernel, jnp.asarray(rng.normal(size=V + padded), dtype) if bias else None, **options)


def problem(kind="plain", dtype=jnp.float32, tokens=TOKENS, keep=0.6):
    """(student_hidden, student_head, teacher_hidden, teacher_head, labels, mask)."""
    rng = np.random.default_rng(0)
    student, teacher = HEADS[kind]
    hidden = [jnp.asarray(rng.normal(size=(*tokens, width)), dtype) for width in (D, E)]
    labels, mask = jnp.asarray(rng.integers(0, V, tokens)), jnp.asarray(rng.random(tokens) < keep)
    heads = head(D, 1, dtype=dtype, **student), head(E, 2, dtype=dtype, **teacher)
    return hidden[0], heads[0], hidden[1], heads[1], labels, mask


def plain(per_position, hidden, head, teacher_hidden, teacher_head, labels, mask):
    """The definition, with all logits of both models."""
    return losses.masked_sum(per_position(head.logits(hidden), teacher_head.logits(teacher_hidden), labels), mask)


def mean_and_gradients(function, per_position, arguments, **options):
    """Value and gradients of ``3 · sum / weight`` by hidden states and head; the factor must reach the gradients."""

    def mean(hidden, head):
        total, weight = function(per_position, hidden, head, *arguments[2:], **options)
        return 3.0 * total / weight

    return jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(*arguments[:2])


def assert_close(got, want, rtol=2e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.float32(a), np.float32(b), rtol=rtol, atol=rtol * float(jnp.max(jnp.abs(jnp.float32(b)))) + 1e-30
        ),
        got,
        want,
    )


# ---- the same numbers


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", PER_POSITION)
def test_value_and_gradients_are_those_of_the_plain_computation(name, kind):
    """Fault: a head's bias, scale or softcap forgotten."""
    arguments = problem(kind)
    want = mean_and_gradients(plain, PER_POSITION[name], arguments)
    assert float(jnp.max(jnp.abs(want[1][1].kernel))) > 1e-3
    for chunk_size in (1, 5, 24, 100):
        assert_close(mean_and_gradients(chunked, PER_POSITION[name], arguments, chunk_size=chunk_size), want)


# The handwritten backward pass against finite differences of the value.
def test_gradients_are_finite_differences():
    hidden, head, *rest = problem("softcap")

    def total(hidden, kernel, bias):
        return chunked(task_and_kl, hidden, head.replace(kernel=kernel, bias=bias), *rest, chunk_size=5)[0]

    point = (hidden, head.kernel, jnp.zeros(V))
    gradients = jax.grad(total, argnums=(0, 1, 2))(*point)
    rng = np.random.default_rng(5)
    for _ in range(4):
        move = [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in point]
        ahead, behind = (total(*(x + sign * 1e-2 * m for x, m in zip(point, move, strict=True))) for sign in (1, -1))
        slope = sum(jnp.vdot(g, m) for g, m in zip(gradients, move, strict=True))
        np.testing.assert_allclose((ahead - behind) / 2e-2, slope, rtol=2e-3, atol=1e-2)


# bfloat16: hidden states and heads; everything between the products in float32.
@pytest.mark.parametrize("name", PER_POSITION)
def test_bfloat16_inputs_are_close_to_float32(name):
    arguments = problem("bias", jnp.bfloat16)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arguments)
    value, gradients = mean_and_gradients(chunked, PER_POSITION[name], arguments, chunk_size=5)
    want, exact_gradients = mean_and_gradients(plain, PER_POSITION[name], exact)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.bfloat16)}
    for got, exact in zip(jax.tree.leaves(gradients), jax.tree.leaves(exact_gradients), strict=True):
        norm = float(jnp.linalg.norm(exact))
        assert float(jnp.linalg.norm(got.astype(jnp.float32) - exact)) < 2.0**-7 * norm


def test_a_tied_head_passes_its_gradient_to_the_embedding():
    hidden, head, *rest = problem()
    embedding = head.kernel.T

    def total(function, embedding, **options):
        states = hidden + embedding[rest[2]]  # hidden states also depend on the embedding
        return function(task_and_kl, states, Head(embedding.T), *rest, **options)[0]

    got = jax.grad(lambda e: total(chunked, e, chunk_size=7))(embedding)
    assert_close(got, jax.grad(lambda e: total(plain, e))(embedding))


def test_a_temperature_may_be_traced_and_a_batch_mapped():
    arguments = problem()

    def total(function, scale, hidden, **options):
        loss = lambda s, t, labels: losses.forward_kl(s * scale, t * scale)  # noqa: E731
        return function(loss, hidden, *arguments[1:], **options)[0]

    for function in (jax.jit, lambda f: jax.vmap(f, in_axes=(0, None))):
        scale = jnp.float32(0.5) if function is jax.jit else jnp.array([0.5, 2.0])
        got = function(jax.value_and_grad(functools.partial(total, chunked, chunk_size=5), argnums=1))
        want = function(jax.value_and_grad(functools.partial(total, plain), argnums=1))
        assert_close(got(scale, arguments[0]), want(scale, arguments[0]))


def test_metrics_are_returned_and_not_differentiated():
    arguments = problem()

    def with_aux(s, t, labels):
        same = (jnp.argmax(s, -1) == jnp.argmax(t, -1)).astype(jnp.float32)
        return task_and_kl(s, t, labels), {"agreement": same, "squares": jnp.sum(s**2, -1)}

    def total(hidden):
        pair, aux = chunked(with_aux, hidden, *arguments[1:], chunk_size=5, has_aux=True)
        return pair[0] + aux["squares"], aux  # used in a metric, which contributes no gradient

    (_, aux), gradient = jax.value_and_grad(total, has_aux=True)(arguments[0])
    s, t = arguments[1].logits(arguments[0]), arguments[3].logits(arguments[2])
    want = losses.masked_sum(with_aux(s, t, arguments[4])[1]["agreement"], arguments[5])[0]
    assert float(aux["agreement"]) == float(want)
    assert_close(gradient, jax.grad(lambda h: plain(task_and_kl, h, *arguments[1:])[0])(arguments[0]))


def test_stored_targets_replace_labels_and_teacher():
    hidden, head, teacher_hidden, teacher_head, labels, mask = problem()
    stored = {"labels": labels, "logits": teacher_head.logits(teacher_hidden)}
    loss = lambda s, t, kept: task_and_kl(s, kept["logits"], kept["labels"])  # noqa: E731
    got = chunked(loss, hidden, head, None, None, stored, mask, chunk_size=5)
    assert_close(got, plain(task_and_kl, hidden, head, teacher_hidden, teacher_head, labels, mask))


# ---- positions that do not count


# Results are bit-identical whatever stands at positions that do not count.
def test_garbage_in_padding_changes_no_bit():
    hidden, head, teacher_hidden, teacher_head, labels, mask = problem()
    clean = mean_and_gradients(chunked, task_and_kl, (hidden, head, teacher_hidden, teacher_head, labels, mask))
    outside = ~mask[..., None]
    for garbage in (jnp.nan, jnp.inf, 1e30):
        dirty = [jnp.where(outside, garbage, x) for x in (hidden, teacher_hidden)]
        arguments = (dirty[0], head, dirty[1], teacher_head, jnp.where(mask, labels, -7), mask)
        jax.tree.map(np.testing.assert_array_equal, mean_and_gradients(chunked, task_and_kl, arguments), clean)
    assert np.all(np.where(mask[..., None], 0.0, clean[1][0]) == 0.0)


# No counted position: zero loss, zero gradient, no NaN.
def test_no_counted_position_gives_zero_loss_and_gradient():
    arguments = problem(keep=0.0)
    total = lambda h, head: chunked(task_and_kl, h, head, *arguments[2:])[0]  # noqa: E731
    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(*arguments[:2])
    assert float(value) == 0.0
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0.0), gradients)


# Padded rows have no probability on either side and get no gradient.
def test_padded_rows_of_the_head_are_as_if_absent():
    hidden, student, *_, labels, mask = problem()
    padded = Head(jnp.pad(student.kernel, ((0, 0), (0, 64))), vocab_size=V)
    same = lambda s, t, labels: losses.forward_kl(s, t)  # noqa: E731
    arguments = (hidden, student, hidden, padded, labels, mask)
    assert float(chunked(same, *arguments)[0]) < 1e-6
    at_zero = padded.replace(vocab_size=None).logits(hidden)  # the fault: padded rows with logit 0
    there = jnp.pad(student.logits(hidden), ((0, 0), (0, 0), (0, 64)), constant_values=-jnp.inf)
    assert float(jnp.mean(losses.reverse_kl(there, at_zero))) > 0.1
    gradient = jax.grad(lambda h: chunked(task_and_kl, hidden, h, hidden, student, labels, mask)[0])(padded)
    np.testing.assert_array_equal(gradient.kernel[:, V:], 0.0)


# The teacher is never differentiated.
def test_the_teacher_gets_no_gradient():
    hidden, head, teacher_hidden, teacher_head, labels, mask = problem()
    total = lambda t, h: chunked(task_and_kl, hidden, head, t, h, labels, mask)[0]  # noqa: E731
    gradients = jax.grad(total, argnums=(0, 1))(teacher_hidden, teacher_head)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0.0), gradients)


# ---- cost


def equations(jaxpr):
    """All equations of a jaxpr, including inner jaxprs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def traced(tokens, chunk_size):
    arguments = problem(tokens=tokens, keep=1.0)
    total = lambda h, head: chunked(task_and_kl, h, head, *arguments[2:], chunk_size=chunk_size)[0]  # noqa: E731
    return jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(*arguments[:2]).jaxpr


def test_no_array_has_size_tokens_times_vocabulary():
    tokens, chunk_size = (40, 25), 10
    sizes = [math.prod(v.aval.shape) for e in equations(traced(tokens, chunk_size)) for v in e.outvars]
    assert max(sizes) <= max(1000 * E, E * V) < 1000 * V


def test_products_are_computed_once():
    """6·D + 2·D' operations per logit and no more."""
    chunk_size = 10
    flops = 0
    for equation in equations(traced((40, 25), chunk_size)):
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            flops += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contract)
    assert flops == (6 * D + 2 * E) * chunk_size * V  # the body of the loop; one iteration per chunk


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", PER_POSITION)
def test_gradients_overwrite_logits_and_no_chunk_is_copied(name, kind):
    """On a CPU a chunk has one array of student logits, whatever the loss reads of them."""
    arguments, chunk_size = problem(kind, tokens=(4, 24), keep=1.0), 32
    total = lambda h, head: chunked(PER_POSITION[name], h, head, *arguments[2:], chunk_size=chunk_size)[0]  # noqa: E731
    program = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*arguments[:2]).compile().as_text()
    whole = [line for line in program.splitlines() if f" = f32[{chunk_size},{V}]" in line]
    assert whole
    assert not [line for line in whole if " copy(" in line]


def test_positions_that_do_not_count_cost_nothing():
    """The loop runs over the counted tokens only."""
    hidden, head, teacher_hidden, teacher_head, labels, _ = problem(tokens=(10, 10))
    calls = []

    def counting(s, t, labels):
        jax.debug.callback(lambda: calls.append(1))
        return losses.forward_kl(s, t)

    for counted in (0, 7, 25, 100):
        calls.clear()
        mask = (jnp.arange(100) * 37 % 100 < counted).reshape(10, 10)
        jax.block_until_ready(chunked(counting, hidden, head, teacher_hidden, teacher_head, labels, mask, 10))
        jax.effects_barrier()
        assert len(calls) == -(-counted // 10)


# ---- on several devices


MESHES = [{"fsdp": 1, "tensor": 1}, {"fsdp": 2, "tensor": 2}, {"fsdp": 1, "tensor": 4}]


def on_a_mesh(shape, dtype):
    """Value and gradients on the mesh, and those of the plain computation in float32."""
    mesh = make_mesh(ParallelConfig(**shape))
    hidden, head, teacher_hidden, teacher_head, labels, mask = problem(tokens=(8, 6), dtype=dtype)
    cut = lambda head: head.replace(kernel=jnp.pad(head.kernel, ((0, 0), (0, 1))))  # noqa: E731  vocabulary 20 = 4 · 5
    arguments = (hidden, cut(head), teacher_hidden, cut(teacher_head), labels, mask)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arguments)
    tokens, vocab = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((("data", "fsdp"),), (None, "tensor")))
    places = (tokens, vocab, tokens, vocab, tokens, tokens)
    placed = tuple(jax.tree.map(lambda x, p=p: jax.device_put(x, p), a) for a, p in zip(arguments, places, strict=True))
    got = mean_and_gradients(functools.partial(chunked, mesh=mesh), task_and_kl, placed, chunk_size=2)
    return jax.device_get(got), mean_and_gradients(plain, task_and_kl, exact)


@pytest.mark.parametrize("shape", MESHES)
def test_values_and_gradients_on_a_mesh_are_those_of_one_device(shape):
    """Tokens over data and fsdp, the student's vocabulary over tensor: same sums, same gradients."""
    assert_close(*on_a_mesh(shape, jnp.float32))


@pytest.mark.parametrize("shape", MESHES)
def test_bfloat16_on_a_mesh_is_close_to_float32(shape):
    (value, got), (want, exact) = on_a_mesh(shape, jnp.bfloat16)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
        assert one.dtype == jnp.bfloat16
        assert np.linalg.norm(np.float32(one) - other) < 2.0**-6 * np.linalg.norm(other)


@pytest.mark.parametrize("shape", MESHES)
def test_each_chunk_exchanges_only_sums_over_the_vocabulary(shape):
    """Where the vocabulary is sharded, a chunk exchanges sums per position and gradients, but no logits and no head.

    Heads whose width lies over fsdp are gathered once before the loop. The student's gradient is reduced once after it.
    """
    mesh = make_mesh(ParallelConfig(**shape))
    tokens, width, teacher_width, vocab, chunk_size = 1024, 8, 16, 640, 64
    function = functools.partial(chunked_head, mesh=mesh, chunk_size=chunk_size)
    for dtype in (jnp.float32, jnp.bfloat16):
        text = compiled_on(mesh, function, head_shapes(tokens, width, teacher_width, vocab, dtype)).as_text()
        found = collectives(text)
        inside, outside = ([one for one in found if bool(one.loops) == where] for where in (True, False))
        assert bool(inside) == (shape["tensor"] > 1)
        assert {one.kind for one in inside} <= {"all-reduce"}
        assert all(one.devices == shape["tensor"] for one in inside)  # or loops would wait for each other
        assert max((one.size for one in inside), default=0) <= chunk_size * width * 4
        assert sum(one.size for one in inside) <= chunk_size * (width + 16) * 4
        assert len([one for one in outside if one.kind == "all-gather"]) <= 2
        assert max(one.size for one in outside) <= teacher_width * vocab * 4


# ---- invalid arguments


def test_invalid_arguments_are_named():
    hidden, head, teacher_hidden, teacher_head, labels, mask = problem()
    other = Head(jnp.ones((E, V + 1)))
    wrong = {
        "has 19 tokens, the teacher's 20": (hidden, head, teacher_hidden, other, labels, mask),
        "chunk_size=0": (hidden, head, teacher_hidden, teacher_head, labels, mask, 0),
        r"hidden states \(4, 6, 12\) of the student": (
            teacher_hidden,
            head,
            teacher_hidden,
            teacher_head,
            labels,
            mask,
        ),
        "inputs of shape": (hidden, head, teacher_hidden, teacher_head, labels[:2], mask),
        "vocab_size=99": (hidden, head.replace(vocab_size=99), teacher_hidden, teacher_head, labels, mask),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            chunked(task_and_kl, *arguments)


def test_every_option_of_a_head_follows_its_definition():
    """Fault: a head's bias, scale or softcap forgotten."""
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(3, D))
    for bias, scale, softcap in itertools.product((False, True), (1.0, 0.5), (None, 4.0)):
        one = head(D, 4, bias=bias, scale=scale, softcap=softcap)
        want = hidden @ np.asarray(one.kernel, np.float64) + (0.0 if one.bias is None else np.asarray(one.bias)[None])
        want = want * scale
        want = want if softcap is None else softcap * np.tanh(want / softcap)
        np.testing.assert_allclose(one.logits(jnp.asarray(hidden, jnp.float32)), want, rtol=1e-5, atol=1e-5)


def test_rows_per_pass_of_the_loss_on_a_cpu(monkeypatch):
    assert [backend.loss_rows(size, V, "cpu") for size in (512, 24, 20, 5)] == [8, 8, 20, 5]
    monkeypatch.setattr(backend, "CPU_LOGITS", 2**18)
    assert [backend.loss_rows(512, vocab, "cpu") for vocab in (49_152, 10**7, 32_000, 8_192, 512)] == [8, 8, 8, 32, 512]
    assert backend.loss_rows(48, 8_192, "cpu") == 16


def test_positions_per_chunk():
    """As many as 512 MiB of logits hold on a GPU, 256 MiB on a TPU, from 128 to 1024; on a CPU 256 or 512."""
    size = backend.chunk_size
    assert size(128_256, "cpu") == size(10**7, "cpu") == 256 and size(512, "cpu") == size(49_152, "cpu") == 512
    assert size(128_256, "gpu") == 1024 and size(128_256, "tpu") == 512
    assert size(512, "gpu") == size(512, "tpu") == 1024
    assert size(10**7, "gpu") == size(10**7, "tpu") == 128
