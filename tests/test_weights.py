"""Named tensors to parameters and back: stacking, axes, and everything that must be refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import random_params, tiny

from distill.models import decoder
from distill.parallel import ParallelConfig, make_mesh, param_shardings
from distill.weights.assemble import assemble, disassemble
from distill.weights.networks import shapes_of
from distill.weights.place import PIECE, Place
from distill.weights.table import Row, flat, linear, same

SIZES = {"head_dim": 6, "qkv_bias": True, "output_bias": True, "mlp_bias": True}


class Tensors(dict):
    """A source in memory that counts the arrays it has returned."""

    read = 0

    def names(self):
        return set(self)

    def shape(self, name):
        return self[name].shape

    def get(self, name):
        self.read += 1
        return self[name]


def table_of(config):
    rows = {}
    for path in shapes_of(config):
        transform = same
        if path[-1] == "kernel":
            transform = linear(2 if path[-2] == "output" else 1)
        elif path[-1] == "bias" and path[-2] in ("query", "key", "value"):
            transform = flat
        rows[path] = Row(("block.{layer}." if path[0] == "layers" else "") + ".".join(path), transform)
    return rows


@pytest.fixture
def case():
    """``(config, table, params, tensors)`` of a decoder with every bias."""
    config = tiny(**SIZES, vocab_size=12)
    params, table = random_params(decoder(config)), table_of(config)
    return config, table, params, Tensors(disassemble(shapes_of(config), table, params))


def test_a_round_trip_is_bit_identical(case):
    config, table, params, tensors = case
    again = assemble(shapes_of(config), table, tensors)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert tensors.read == len(tensors)  # every tensor once


def test_every_layer_and_axis_matches_pytorch(case):
    config, _, params, tensors = case
    x = np.random.default_rng(0).normal(size=config.width)
    for layer in range(config.layers):
        leaves = jax.tree.map(lambda leaf, n=layer: np.asarray(leaf[n]), params["layers"])
        query, output = leaves["attention"]["query"], leaves["attention"]["output"]
        name = f"block.{layer}.layers.attention"
        by_head = np.stack([[x @ query["kernel"][:, h, k] for k in range(6)] for h in range(config.heads)])
        by_row = tensors[f"{name}.query.kernel"] @ x + tensors[f"{name}.query.bias"]
        np.testing.assert_allclose((by_head + query["bias"]).reshape(-1), by_row, rtol=1e-5)
        mixed = sum(by_head[h, k] * output["kernel"][h, k] for h in range(config.heads) for k in range(6))
        np.testing.assert_allclose(tensors[f"{name}.output.kernel"] @ by_head.reshape(-1), mixed, rtol=1e-5)


@pytest.mark.parametrize("kept", [np.float16, jnp.bfloat16], ids=str)
def test_dtypes_are_kept_or_cast(case, kept):
    config, table, _, tensors = case
    half = Tensors({name: array.astype(kept) for name, array in tensors.items()})
    as_stored, cast = assemble(shapes_of(config), table, half, dtype=None), assemble(shapes_of(config), table, half)
    assert {leaf.dtype for leaf in jax.tree.leaves(as_stored)} == {jnp.dtype(kept)}
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {jnp.dtype(np.float32)}
    again = dict(disassemble(shapes_of(config), table, as_stored))
    assert all(again[name].tobytes() == array.tobytes() for name, array in half.items())
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(np.float32), b), as_stored, cast)


def test_if_dtypes_differ_between_layers_the_first_is_kept(case):
    config, table, params, tensors = case
    name = "block.1.layers.mlp.up.kernel"
    mixed = Tensors(tensors | {name: tensors[name].astype(np.float16)})
    for piece in (1, PIECE):
        kernel = assemble(shapes_of(config), table, mixed, Place(piece=piece), dtype=None)["layers"]["mlp"]["up"][
            "kernel"
        ]
        assert kernel.dtype == np.float32
        np.testing.assert_allclose(kernel, params["layers"]["mlp"]["up"]["kernel"], rtol=1e-3)


def test_loading_in_pieces_is_bit_identical_and_reports_every_element(case):
    config, table, params, tensors = case
    mesh = make_mesh(ParallelConfig(fsdp=2, tensor=2))
    wanted, reported = param_shardings(decoder(config), mesh), []
    pieces = assemble(shapes_of(config), table, tensors, Place(wanted, reported.append, piece=1))  # one layer per piece
    jax.tree.map(np.testing.assert_array_equal, pieces, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, pieces) == wanted
    assert sum(reported) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert len(reported) > len(table) and tensors.read == len(tensors)


@pytest.mark.parametrize("change", ["missing", "left over", "shape", "both"])
def test_tensors_that_do_not_fit_are_named(case, change):
    config, table, _, tensors = case
    name = "block.1.layers.mlp.up.kernel"
    expected = {
        "missing": rf"missing: {name}\.$",
        "left over": r"not understood: block\.2\.extra\.$",
        "shape": rf"{name}: shape \(8, 12\); expected \(12, 8\)",
        "both": r"missing: block.*; not understood: block\.2\.extra",
    }[change]
    if change in ("missing", "both"):
        del tensors[name]
    if change in ("left over", "both"):
        tensors["block.2.extra"] = np.zeros(3)
    if change == "shape":
        tensors[name] = tensors[name].T
    with pytest.raises(ValueError, match=expected):
        assemble(shapes_of(config), table, tensors)
    if change == "left over":
        assemble(shapes_of(config), table, tensors, ignored=[r"block\.\d+\.extra"])
        with pytest.raises(ValueError, match="extra"):
            assemble(shapes_of(config), table, tensors, ignored=[r"block\.\d+"])  # the whole message


def test_long_lists_are_cut(case):
    config, table, _, _ = case
    with pytest.raises(ValueError, match=r"missing: (\S+, ){4}\S+ and \d+ more\.$"):
        assemble(shapes_of(config), table, Tensors())


def test_tables_that_do_not_fit_are_refused(case):
    config, table, params, tensors = case
    norm, scale = ("norm", "scale"), ("layers", "mlp_norm", "scale")
    fewer = {path: row for path, row in table.items() if path != norm}
    with pytest.raises(ValueError, match="norm/scale"):
        assemble(shapes_of(config), fewer, tensors)
    with pytest.raises(ValueError, match="norm/scale"):
        dict(disassemble(shapes_of(config), fewer, params))
    with pytest.raises(ValueError, match="twice"):
        assemble(shapes_of(config), table | {norm: Row("embedding")}, tensors)
    with pytest.raises(ValueError, match=r"\{layer\}"):
        assemble(shapes_of(config), table | {scale: Row("one_for_all")}, tensors)


def test_parameters_of_another_decoder_are_refused(case):
    config, table, params, _ = case
    wider = dataclasses.replace(config, feed_forward=13)
    with pytest.raises(ValueError, match="layers/mlp/down/kernel has shape"):
        dict(disassemble(shapes_of(wider), table, params))
    with pytest.raises(ValueError, match="no parameter head"):
        dict(disassemble(shapes_of(config), table, {name: leaf for name, leaf in params.items() if name != "head"}))


def test_a_tensor_of_another_shape_is_refused_before_it_is_read(case):
    config, table, _, tensors = case
    wrong = Tensors(
        {"embedding": np.zeros((7, 3), np.float32)} | {n: a for n, a in tensors.items() if n != "embedding"}
    )
    with pytest.raises(ValueError, match=r"embedding: shape \(7, 3\); expected"):
        assemble(shapes_of(config), {("embedding",): table["embedding",]} | table, wrong)
    assert wrong.read == 0
