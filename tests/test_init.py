"""Students cut out of their teachers: kept parts equal the teacher's, and unimportant parts are cut first."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import on_device, random_params, tiny, uneven_batch

from distill import losses
from distill.data import addition
from distill.experiments import runner
from distill.experiments.addition.config import Config, Recipe
from distill.experiments.addition.measure import network
from distill.experiments.addition.run import World, student_arm
from distill.experiments.folder import Trained
from distill.metrics import read_metrics
from distill.models import DecoderConfig, decoder
from distill.parallel import ParallelConfig
from distill.students.config import StartConfig
from distill.students.cut import Importance, importance, like, student_from
from distill.students.layers import spread
from distill.training import LogConfig, TrainingConfig

CONFIG = tiny(
    layers=4, width=16, heads=6, kv_heads=3, head_dim=4, feed_forward=12, qkv_bias=True, mlp_bias=True, qk_norm=True
)
MODEL = decoder(CONFIG)
BATCH = on_device(uneven_batch())


def loss(params, batch):
    logits = MODEL.logits(params, batch.inputs)
    return losses.divide(losses.masked_sum(losses.cross_entropy(logits, batch.labels), batch.mask))


def logits(config, params):
    return decoder(config).logits(params, BATCH.inputs)


def silenced(groups=(), units=()):
    """Parameters whose groups of heads (two query heads each) and feed-forward units output 0 in every layer."""
    params = random_params(MODEL)
    layers = params["layers"]
    for group in groups:
        kernel = layers["attention"]["output"]["kernel"]
        layers["attention"]["output"]["kernel"] = kernel.at[:, 2 * group : 2 * group + 2].set(0.0)
    for unit in units:
        layers["mlp"]["down"]["kernel"] = layers["mlp"]["down"]["kernel"].at[:, unit].set(0.0)
    return params


def test_a_student_without_cuts_is_the_teacher():
    params = random_params(MODEL)
    small, kept = student_from(CONFIG, params, layers=4, kv_heads=3, feed_forward=12, width=16)
    jax.tree.map(np.testing.assert_array_equal, kept, params)
    assert small == CONFIG


def test_silent_heads_and_units_are_cut_first_without_effect():
    """Silent heads and units have importance 0, are cut first, and the student without them computes the same."""
    params = silenced(groups=(1,), units=(0, 5, 11))
    measured = importance(CONFIG, params, loss, [BATCH])
    assert np.all(measured.groups[:, 1] == 0.0) and np.all(measured.groups[:, [0, 2]] > 0.0)
    assert np.all(np.sum(measured.feed_forward == 0.0, axis=1) == 3)
    small, kept = student_from(CONFIG, params, kv_heads=2, feed_forward=9, measured=measured)
    assert (small.heads, small.groups, small.feed_forward) == (4, 2, 9)
    np.testing.assert_allclose(logits(small, kept), logits(CONFIG, params), rtol=1e-4, atol=1e-4)
    wrong = measured._replace(groups=-measured.groups)
    other = logits(*student_from(CONFIG, params, kv_heads=2, feed_forward=9, measured=wrong))
    assert float(jnp.max(jnp.abs(other - logits(CONFIG, params)))) > 0.1


def test_layers_choose_their_own_units():
    params = silenced()
    down = params["layers"]["mlp"]["down"]["kernel"]
    for layer in range(4):
        down = down.at[layer, layer].set(0.0)
    params["layers"]["mlp"]["down"]["kernel"] = down
    measured = importance(CONFIG, params, loss, [BATCH])
    small, kept = student_from(CONFIG, params, feed_forward=11, measured=measured)
    np.testing.assert_allclose(logits(small, kept), logits(CONFIG, params), rtol=1e-4, atol=1e-4)


def test_layers_with_zero_output_can_be_skipped():
    params = random_params(MODEL)
    for branch, name in (("attention", "output"), ("mlp", "down")):
        weights = params["layers"][branch][name]
        params["layers"][branch][name] = jax.tree.map(lambda w: w.at[jnp.array([1, 2])].set(0.0), weights)
    for layers in ((0, 3), 2):
        small, kept = student_from(CONFIG, params, layers=layers)
        assert small.layers == 2
        np.testing.assert_allclose(logits(small, kept), logits(CONFIG, params), rtol=1e-5, atol=1e-5)


def test_options_per_layer_follow_their_layer():
    config = dataclasses.replace(
        CONFIG, rope_layers=(True, True, False, True), sliding_window=2, window_layers=(True, False, False, True)
    )
    small, _ = student_from(config, random_params(decoder(config)), layers=(1, 2, 3))
    assert small.rope_layers == (True, False, True) and small.window_layers == (False, False, True)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_empty_dimensions_are_cut(tied):
    """Dimensions 3 and 7 are always 0. The mean in the norm is then over fewer, which a factor √(14/16) corrects."""
    config = dataclasses.replace(CONFIG, tied=tied, norm_epsilon=1e-12)
    params = random_params(decoder(config))
    empty = jnp.array([3, 7])
    params["embedding"] = params["embedding"].at[:, empty].set(0.0)
    for branch, name in (("attention", "output"), ("mlp", "down")):
        weights = params["layers"][branch][name]
        params["layers"][branch][name] = jax.tree.map(lambda w: w.at[..., empty].set(0.0), weights)

    def of_this(params, batch):
        nats = losses.cross_entropy(decoder(config).logits(params, batch.inputs), batch.labels)
        return losses.divide(losses.masked_sum(nats, batch.mask))

    measured = importance(config, params, of_this, [BATCH])
    assert np.flatnonzero(measured.width == 0.0).tolist() == [3, 7]
    small, kept = student_from(config, params, width=14, measured=measured)
    back = (16 / 14) ** 0.5
    for scale in (kept["layers"]["attention_norm"], kept["layers"]["mlp_norm"], kept["norm"]):
        scale["scale"] = scale["scale"] * back
    np.testing.assert_allclose(logits(small, kept), logits(config, params), rtol=1e-3, atol=1e-3)


def test_importance_is_the_gradient_of_a_gate():
    """Against finite differences with the weights of a unit scaled by 1 ± ε."""
    params = random_params(MODEL)
    measured = importance(CONFIG, params, loss, [BATCH])

    def scaled(path, index, gate):
        def change(where, leaf):
            return leaf.at[index].multiply(gate) if jax.tree_util.keystr(where) == path else leaf

        return float(loss(jax.tree_util.tree_map_with_path(change, params), BATCH))

    cases = {
        "['layers']['attention']['output']['kernel']": ((1, slice(2, 4)), measured.groups[1, 1]),
        "['layers']['mlp']['down']['kernel']": ((2, 5), measured.feed_forward[2, 5]),
    }
    for path, (index, value) in cases.items():
        slope = (scaled(path, index, 1.02) - scaled(path, index, 0.98)) / 0.04
        assert abs(slope) == pytest.approx(value, rel=0.02, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "layer", "norm_plus_one": True, "norm_place": "around", "logit_softcap": 2.0}
        | {"gated": False, "positions": "learned", "max_length": 6, "qk_norm": False, "parallel": True},
        {"norm_place": "after", "qk_norm_joint": True},
    ],
    ids=["around", "after"],
)
def test_every_kind_of_decoder_can_be_measured_and_cut(options):
    """The importance of a dimension is the gradient of a gate where it is read, and the result is a decoder."""
    config = dataclasses.replace(CONFIG, **options)
    model, dimension = decoder(config), 5
    params = random_params(model)

    def of_this(params, batch):
        nats = losses.cross_entropy(model.logits(params, batch.inputs), batch.labels)
        return losses.divide(losses.masked_sum(nats, batch.mask))

    def gated(gate):
        def norm(leaves):
            one = float(config.norm_plus_one)
            scaled = {"scale": lambda x: (x + one) * gate - one, "bias": lambda x: x * gate}
            return {n: leaf.at[..., dimension].set(scaled[n](leaf[..., dimension])) for n, leaf in leaves.items()}

        layers = dict(params["layers"])
        for branch, readers in (("attention", ("query", "key", "value")), ("mlp", ("gate", "up"))):
            if config.norm_place != "after":
                layers[f"{branch}_norm"] = norm(layers[f"{branch}_norm"])
                continue
            layers[branch] = dict(layers[branch])
            for name in readers:
                leaves = layers[branch][name]
                layers[branch][name] = leaves | {"kernel": leaves["kernel"].at[:, dimension].multiply(gate)}
        return params | {"layers": layers, "norm": norm(params["norm"])}

    value = jax.jit(lambda gate: of_this(gated(gate), BATCH))
    slope = float(value(1.01) - value(0.99)) / 0.02
    measured = importance(config, params, of_this, [BATCH])
    assert abs(slope) == pytest.approx(measured.width[dimension], rel=0.05, abs=1e-3)
    small, kept = student_from(config, params, layers=2, kv_heads=2, feed_forward=7, width=10, measured=measured)
    wanted = jax.eval_shape(decoder(small).init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, wanted)


def test_importance_is_a_mean_over_batches():
    params = random_params(MODEL)
    others = [BATCH, on_device(uneven_batch(seed=1))]
    single = [importance(CONFIG, params, loss, [batch]) for batch in others]
    both = importance(CONFIG, params, loss, others)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a, (b + c) / 2, rtol=1e-5, atol=1e-8), both, *single)
    with pytest.raises(ValueError, match="no batches"):
        importance(CONFIG, params, loss, [])


def test_spread_keeps_the_first_and_last_layer():
    assert [spread(n, 6) for n in (1, 2, 3, 6)] == [(0,), (0, 5), (0, 2, 5), (0, 1, 2, 3, 4, 5)]
    for of in range(2, 40):
        for count in range(2, of + 1):
            layers = spread(count, of)
            assert len(set(layers)) == count and (layers[0], layers[-1]) == (0, of - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 17}, "width=17; expected 1 … 16"),
        ({"kv_heads": 0}, "kv_heads=0; expected 1 … 3"),
        ({"feed_forward": 6}, "measured=importance"),
        ({"layers": 5}, "5 layers of 4"),
        ({"layers": (0, 4)}, "some of 0 … 3"),
        ({"layers": ()}, "some of 0 … 3"),
    ],
)
def test_sizes_beyond_the_teacher_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        student_from(CONFIG, random_params(MODEL), **options)


def test_another_head_size_is_refused():
    measured = Importance(np.zeros((4, 3)), np.zeros((4, 12)), np.zeros(16))
    other = dataclasses.replace(CONFIG, layers=2, head_dim=2, rope_theta=5.0)
    with pytest.raises(ValueError, match=r"rope_theta=5\.0 .*head_dim=2 \(the teacher's is 4\)"):
        like(CONFIG, random_params(MODEL), other, lambda: measured)


def experiment(**options):
    training = TrainingConfig(steps=4, batch_size=8, steps_per_dispatch=2, evaluate_every=4, save_every=2)
    teacher = DecoderConfig(vocab_size=14, layers=3, width=16, heads=4, kv_heads=2, feed_forward=16)
    student = DecoderConfig(vocab_size=14, layers=2, width=12, heads=2, kv_heads=1, head_dim=4, feed_forward=8)
    base = Config(
        data=addition.AdditionConfig(digits=1),
        teacher=Recipe(teacher),
        student=Recipe(student, training),
        student_start=StartConfig("teacher"),
        parallel=ParallelConfig(backend="one_device"),
        log=LogConfig(progress=False),
    )
    return dataclasses.replace(base, **options)


def test_an_experiment_starts_from_its_teacher(tmp_path):
    config = experiment()
    teacher = Trained(network(config.teacher.model), random_params(network(config.teacher.model)))
    sides = addition.load(config.data)
    sides |= addition.split_heldout(config.data, sides["test"])

    def distil(config, run):
        return runner.train(student_arm(World(config, tmp_path / run, sides), teacher), config)

    distil(config, "cut")
    distil(dataclasses.replace(config, student_start=StartConfig()), "random")
    first = [next(r["loss"] for r in read_metrics(tmp_path / run) if "loss" in r) for run in ("cut", "random")]
    assert first[0] != first[1]
    looked = [json.loads((tmp_path / run / "preflight.json").read_text()) for run in ("cut", "random")]
    names = {check["name"]: check["verdict"] for check in looked[0]["checks"]}
    assert names["tokenizer"] == names["forward_kl at student = teacher"] == names["weights of the student"] == "ok"
    nats = [one["nats_per_token"] for one in looked]
    assert nats[0]["teacher"] == nats[1]["teacher"] and nats[0]["student"] != nats[1]["student"]
    again = distil(config, "again")
    jax.tree.map(np.testing.assert_array_equal, again.params, distil(config, "cut").params)


def test_a_student_that_cannot_be_cut_out_is_refused_before_anything_is_trained(tmp_path):
    wide = Recipe(DecoderConfig(vocab_size=14, layers=2, width=32, heads=2, head_dim=4, feed_forward=8))
    with pytest.raises(ValueError, match="width=32; expected 1 … 16"):
        runner.run_experiment(experiment(student=wide, data=addition.AdditionConfig()), tmp_path)
    assert not (tmp_path / "teacher").exists()
