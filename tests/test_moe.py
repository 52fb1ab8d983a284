"""Mixtures of experts: against all experts on all tokens, and the load-balancing loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import VOCAB, on_device, random_params, tiny, tiny_decoder, uneven_batch

from distill import losses
from distill.models import DecoderConfig, decoder
from distill.models.moe import mixture, route
from distill.models.products import _by_blocks
from distill.objective import ObjectiveConfig, router_terms, task_term
from distill.parallel import ParallelConfig, make_mesh, param_shardings
from distill.state import init_state
from distill.step import make_train_step
from distill.weights.families import from_json

OPTIONS = {"experts": 5, "experts_per_token": 2, "router_loss_weight": 0.3}
MODEL = tiny_decoder(**OPTIONS)
SGD = optax.sgd(0.1)


def test_a_mixture_and_its_gradients_are_weighted_sums_of_experts():
    rng = np.random.default_rng(0)
    x, router, kernels = (rng.normal(size=shape) for shape in ((150, 4), (4, 6), (6, 4, 4)))
    router[:, 2] = 0.0
    router[:, 3] = -9.0 * np.abs(router[:, 3])  # rarely chosen

    def ours(x, router, kernels):
        chosen = route(x, router, 3, normalize=True)
        return mixture(chosen, x, lambda rows, multiply: jnp.sin(multiply(rows, kernels)))

    def all_of_all(x, router, kernels):
        p = jax.nn.softmax(x @ router)
        kept = p >= jnp.sort(p, axis=-1)[:, -3:-2]
        weights = jnp.where(kept, p, 0.0) / jnp.sum(jnp.where(kept, p, 0.0), axis=-1, keepdims=True)
        return jnp.einsum("te,ted->td", weights, jnp.sin(jnp.einsum("td,edf->tef", x, kernels)))

    arrays = [jnp.asarray(array, jnp.float32) for array in (x, router, kernels)]
    np.testing.assert_allclose(ours(*arrays), all_of_all(*arrays), atol=2e-6)
    gradients = [jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), (0, 1, 2))(*arrays) for f in (ours, all_of_all)]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * float(jnp.max(jnp.abs(other))))


@pytest.mark.parametrize("sizes", [[70, 0, 64, 1, 0, 15], [0, 0, 150, 0, 0, 0], [0, 150, 0, 0, 0, 0]], ids=str)
def test_blocks_of_rows_equal_the_grouped_product(sizes):
    rng = np.random.default_rng(1)
    x, kernels, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((150, 4), (6, 4, 3), (150, 3)))
    sizes = jnp.array(sizes, jnp.int32)
    y, back = jax.vjp(lambda x, kernels: _by_blocks(x, kernels, sizes), x, kernels)
    dx, dk = back(dy)
    x, kernels, dy, groups = *map(np.asarray, (x, kernels, dy)), np.repeat(np.arange(6), sizes)
    np.testing.assert_allclose(y, np.einsum("ra,rab->rb", x, kernels[groups]), atol=1e-5)
    np.testing.assert_allclose(dx, np.einsum("rb,rab->ra", dy, kernels[groups]), atol=1e-5)
    want = [x[groups == e].T @ dy[groups == e] for e in range(6)]
    np.testing.assert_allclose(dk, want, atol=1e-4)


def test_equally_probable_experts_are_chosen_by_index():
    chosen = route(jnp.ones((3, 2)), jnp.zeros((2, 4)), 2, normalize=False)
    np.testing.assert_array_equal(chosen.experts_TK, [[0, 1]] * 3)
    np.testing.assert_allclose(chosen.weights_TK, 0.25)


def test_experts_under_vmap_and_on_a_mesh_give_equal_results():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (4, 6)))
    model = decoder(tiny(vocab_size=12, **OPTIONS))
    params = random_params(model)
    gradient = jax.grad(lambda params: jnp.sum(jnp.sin(model.logits(params, tokens))))
    plain = jax.jit(gradient)(params)
    two = jax.jit(jax.vmap(gradient))(jax.tree.map(lambda leaf: jnp.stack([0.5 * leaf, leaf]), params))
    mesh = make_mesh(ParallelConfig(fsdp=2, tensor=2))
    sharded = jax.jit(gradient)(jax.device_put(params, param_shardings(model, mesh)))
    for other in (jax.tree.map(lambda leaf: leaf[1], two), sharded):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), plain, other)


def test_load_balancing_is_its_equation_and_ignores_padding():
    params = random_params(MODEL)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, VOCAB, (2, 7)))
    padded = jnp.concatenate([jnp.zeros((2, 3), jnp.int32), tokens], axis=1)
    segments = jnp.broadcast_to(jnp.arange(10) >= 3, (2, 10)).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.maximum(jnp.arange(10) - 3, 0), (2, 10))
    routing = MODEL.apply(params, tokens).routing
    np.testing.assert_allclose(np.sum(routing.counts, axis=-1), 2 * 14)
    counts, probabilities = (np.asarray(x, np.float64).sum(axis=0) / 28 for x in routing)
    want = 5 * np.sum(counts * probabilities)
    np.testing.assert_allclose(losses.load_balancing(*routing), want, rtol=1e-6)
    again = MODEL.apply(params, padded, positions=positions, segments=segments).routing
    np.testing.assert_allclose(losses.load_balancing(*again), want, rtol=1e-5)
    assert losses.load_balancing(jnp.zeros(3), jnp.zeros(3)) == 0.0
    assert (
        MODEL.apply(params, tokens).routing is not None
        and tiny_decoder().apply(random_params(tiny_decoder()), tokens).routing is None
    )


def test_the_step_adds_the_weighted_loss_also_without_labels():
    params, batch = random_params(MODEL), on_device(uneven_batch())
    terms = [task_term(), *router_terms(MODEL)]
    assert (terms[1].name, terms[1].weight) == ("load_balancing", 0.3)
    assert router_terms(MODEL, 0.0) == router_terms(tiny_decoder()) == ()
    state, metrics = jax.jit(make_train_step(MODEL, terms, SGD))(init_state(params, SGD), None, batch)

    def loss(params):
        output = MODEL.apply(params, batch.inputs, positions=batch.positions, segments=batch.segments)
        nats = losses.cross_entropy(MODEL.unembed(params, output.hidden), batch.labels)
        balance = losses.load_balancing(*output.routing)
        return losses.divide(losses.masked_sum(nats, batch.mask)) + 0.3 * balance, balance

    (value, balance), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(losses.divide(metrics["loss"]), value, rtol=1e-5)
    np.testing.assert_allclose(losses.divide(metrics["load_balancing"]), balance, rtol=1e-5)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, moved)
    alone, _ = jax.jit(make_train_step(MODEL, router_terms(MODEL, 1.0), SGD))(init_state(params, SGD), None, batch)
    assert np.max(
        np.abs(alone.params["layers"]["mlp"]["router"]["kernel"] - params["layers"]["mlp"]["router"]["kernel"])
    )


def test_the_loss_over_devices_is_that_of_all_tokens():
    params, batch = random_params(MODEL), on_device(uneven_batch())
    terms = [task_term(), *router_terms(MODEL, 0.5)]
    whole, metrics = jax.jit(make_train_step(MODEL, terms, SGD))(init_state(params, SGD), None, batch)
    parts = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), batch)
    step = make_train_step(MODEL, terms, SGD, axis_name="data")
    state = init_state(params, SGD)
    apart, of_parts = jax.pmap(step, in_axes=(None, None, 0), axis_name="data")(state, None, parts)
    first = jax.tree.map(lambda leaf: leaf[0], (apart.params, of_parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), first[0], whole.params)
    pair = first[1]["load_balancing"]
    np.testing.assert_allclose(losses.divide(pair), losses.divide(metrics["load_balancing"]), rtol=1e-5)


def test_flops_count_the_chosen_experts_and_parameters_all():
    config = tiny(experts=4, experts_per_token=2)
    one = tiny(feed_forward=2 * config.feed_forward)
    router = 2 * config.layers * config.width * config.experts
    assert config.flops_per_token(6) == one.flops_per_token(6) + router
    active = decoder(config).parameter_count() - config.idle_parameters
    assert active == decoder(one).parameter_count() + router // 2 and one.idle_parameters == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecoderConfig(experts=2, experts_per_token=3), "experts_per_token=3; expected 1 … 2"),
        (lambda: DecoderConfig(experts=-1), "experts=-1"),
        (lambda: DecoderConfig(experts=2, mlp_bias=True), "without biases"),
        (lambda: ObjectiveConfig(router_weight=-1.0), "router_weight=-1.0"),
        (lambda: make_train_step(tiny_decoder(), router_terms(MODEL, 1.0), SGD), "the student has none"),
    ],
)
def test_invalid_mixtures_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_layers_with_and_without_experts_are_refused():
    values = {"model_type": "qwen3_moe", "vocab_size": 14, "hidden_size": 8, "num_hidden_layers": 4}
    values |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16, "moe_intermediate_size": 6}
    assert from_json(values | {"num_experts": 3, "num_experts_per_tok": 2}).feed_forward == 6
    dense = from_json(values | {"num_experts": 3, "num_experts_per_tok": 2, "mlp_only_layers": [0, 1, 2, 3]})
    assert (dense.experts, dense.feed_forward) == (0, 16)
    for mixed in ({"decoder_sparse_step": 2}, {"mlp_only_layers": [2]}):
        with pytest.raises(ValueError, match="expected all layers, or none"):
            from_json(values | {"num_experts": 3, "num_experts_per_tok": 2} | mixed)
    with pytest.raises(ValueError, match="expected one number"):
        from_json(values | {"num_experts": 3, "num_local_experts": 4, "num_experts_per_tok": 2})
