"""Schedule, decay mask, and the update against AdamW in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from builders import nnx_model, on_device, tiny_decoder, uneven_batch

from distill.objective import task_term
from distill.optim import OptimizerConfig, decay_mask, optimizer, schedule
from distill.state import init_state
from distill.step import make_train_step


@pytest.mark.parametrize(
    ("kind", "fall"),
    [
        ("cosine", lambda done: 0.5 * (1 + np.cos(np.pi * done))),
        ("linear", lambda done: 1 - done),
        ("constant", lambda done: 1.0),
    ],
)
@pytest.mark.parametrize(("warmup", "steps"), [(4, 20), (0, 10), (1, 5)])
def test_the_schedule_matches_numbers_by_hand(kind, fall, warmup, steps):
    rate = schedule(OptimizerConfig(learning_rate=0.5, schedule=kind, warmup_steps=warmup), steps)
    for step in range(steps):
        done = step + 1  # the rate is that at the end of an update: the first update has an effect, the last hardly any
        want = 0.5 * (done / warmup if done <= warmup else fall((done - warmup) / (steps - warmup)))
        np.testing.assert_allclose(rate(step), want, rtol=1e-5, atol=1e-7)


def test_a_warmup_longer_than_the_run_only_rises():
    rates = [float(schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10), 5)(step)) for step in range(5)]
    np.testing.assert_allclose(rates, [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)


def test_decay_is_for_matrices_only():
    model = tiny_decoder(qkv_bias=True, output_bias=True, mlp_bias=True)
    mask = decay_mask(jax.eval_shape(model.init, jax.random.key(0)))
    flags = {jax.tree_util.keystr(path): flag for path, flag in jax.tree_util.tree_leaves_with_path(mask)}
    assert len(flags) == 19
    for path, decays in flags.items():
        assert decays == (not path.endswith(("['scale']", "['bias']"))), path
    assert decay_mask(jax.eval_shape(nnx_model().init, jax.random.key(0)))["head"] == {"kernel": True, "bias": False}


def parameters():
    rng = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=4), jnp.float32),
    }


@pytest.mark.parametrize("clip_norm", [0.0, 0.7])
def test_the_update_is_adamw_in_float64(clip_norm):
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=2, weight_decay=0.3, beta1=0.8, beta2=0.95, clip_norm=clip_norm
    )
    steps, rng = 6, np.random.default_rng(1)
    gradients = [{"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)} for _ in range(steps)]
    update = optimizer(config, steps)
    params = parameters()
    state = update.init(params)
    for gradient in gradients:
        gradient = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradient)
        updates, state = update.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    if clip_norm:
        norms = [np.sqrt(sum(np.sum(g**2) for g in gradient.values())) for gradient in gradients]
        assert min(norms) > clip_norm
        gradients = [
            {n: g * clip_norm / norm for n, g in gradient.items()}
            for gradient, norm in zip(gradients, norms, strict=True)
        ]
    rates = [0.05, 0.1, *(0.05 * (1 + np.cos(np.pi * done / 4)) for done in (1, 2, 3, 4))]
    want = reference.adamw(parameters(), gradients, rates, beta1=0.8, beta2=0.95, weight_decay=0.3, decayed={"kernel"})
    for name in want:
        np.testing.assert_allclose(params[name], want[name], rtol=1e-4, atol=1e-6)


def test_small_gradients_are_not_clipped():
    gradient = {"kernel": jnp.full((3, 4), 1e-3), "bias": jnp.full(4, 1e-3)}
    updates = []
    for clip_norm in (0.0, 1.0):
        update = optimizer(OptimizerConfig(clip_norm=clip_norm), 10)
        updates.append(update.update(gradient, update.init(parameters()), parameters())[0])
    jax.tree.map(np.testing.assert_array_equal, *updates)


def test_given_rates_replace_those_of_the_configuration():
    gradient = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    in_config = optimizer(OptimizerConfig(learning_rate=0.02, weight_decay=0.4), 10)
    given = optimizer(OptimizerConfig(), 10, learning_rate=0.02, weight_decay=0.4)
    first, second = (
        update.update(gradient, update.init(parameters()), parameters())[0] for update in (in_config, given)
    )
    for name in gradient:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-6)


# Fault: a schedule that advances with every micro-batch.
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_schedule_counts_updates_not_micro_batches(micro_batches):
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=4, clip_norm=0.0)
    model, update = tiny_decoder(layers=1), optimizer(config, 10)
    step = jax.jit(make_train_step(model, [task_term()], update, micro_batches=micro_batches))
    state, batch = init_state(model.init(jax.random.key(0)), update), on_device(uneven_batch())
    first = state.params["head"]
    for done in (1, 2, 3):
        state, _ = step(state, None, batch)
        assert int(state.step) == done and counts(state) == [done, done]
        if done == 1:  # Adam's first update is ± the rate for every weight with a gradient: 0.1 · 1/4
            np.testing.assert_allclose(np.median(np.abs(state.params["head"] - first)), 0.1 / 4, rtol=1e-3)


def counts(state):
    """The counters in an optimizer state: Adam's and the schedule's."""
    return [int(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.int32]


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
        {"clip_norm": -1.0},
        {"learning_rate": float("inf")},
        {"weight_decay": float("nan")},
        {"clip_norm": float("inf")},
        {"beta1": 1.0},
        {"beta2": -0.1},
    ],
)
def test_invalid_optimizers_are_refused(options):
    with pytest.raises(ValueError, match=f"optimizer: .*{next(iter(options))}"):
        OptimizerConfig(**options)


def test_parameters_may_be_any_tree():
    """Of lists and bare arrays too: a ``Model`` is what its author makes of it."""
    tree = {"blocks": [jnp.ones((2, 2)), {"kernel": jnp.ones(2), "scale": jnp.ones(2)}]}
    assert decay_mask(tree) == {"blocks": [True, {"kernel": True, "scale": False}]}
    assert decay_mask(jnp.ones(2)) is True
