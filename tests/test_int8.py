"""Kernels in int8: their error, the computation with them, and their sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import on_device, random_params, tiny, tiny_decoder, uneven_batch
from jax.sharding import PartitionSpec

import distill
from distill.models import EncoderConfig, decoder, encoder
from distill.models.int8 import held, int8, quantizer
from distill.parallel import ParallelConfig, make_mesh, param_shardings
from distill.students.factors import factored

BIASES = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
KINDS = {"dense": tiny(**BIASES, vocab_size=12), "experts": tiny(experts=4, experts_per_token=2, vocab_size=12)}


def quantized(model, params):
    return jax.tree_util.tree_map_with_path(quantizer(model), params)


def test_each_output_has_its_own_scale():
    """In float64: integers from −127 to 127, within half a step of the kernel; an output of zeros stays zero."""
    model = tiny_decoder()
    params = random_params(model)
    plain = np.array(params["layers"]["attention"]["output"]["kernel"], np.float64)  # [N, H, K, D], sums over H and K
    plain[1, :, :, 3] = 0.0
    plain[0, :, :, 2] *= 1000.0  # a large output does not affect the others
    params["layers"]["attention"]["output"]["kernel"] = jnp.asarray(plain, jnp.float32)
    got = quantized(model, params)["layers"]["attention"]["output"]["kernel"]
    scale = np.abs(plain).max(axis=(1, 2)) / 127.0
    np.testing.assert_allclose(got["scale"], np.where(scale > 0, scale, 1.0), rtol=1e-6)
    assert got["int8"].dtype == jnp.int8 and np.abs(got["int8"]).max() == 127
    back = np.asarray(got["int8"], np.float64) * np.asarray(got["scale"])[:, None, None]
    assert np.all(np.abs(back - plain) <= 0.5001 * scale[:, None, None])
    assert quantized(model, params)["embedding"] is params["embedding"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_computes_with_the_rounded_kernels(kind):
    """Equal to the plain network with dequantised kernels, and close to it with the original ones."""
    model, batch = decoder(KINDS[kind]), on_device(uneven_batch())
    params = model.init(jax.random.key(1))
    small, rounded = int8(model), quantized(model, params)
    assert jax.tree.structure(rounded) == jax.tree.structure(jax.eval_shape(small.init, jax.random.key(0)))
    got, exact, far = jax.jit(
        lambda: (
            small.logits(rounded, batch.inputs),
            model.logits(small.merge(rounded), batch.inputs),
            model.logits(params, batch.inputs),
        )
    )()
    np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-5)
    error = np.linalg.norm(got - far) / np.linalg.norm(far)
    assert 1e-4 < error < 0.03


def test_shapes_and_bytes_of_the_kernels():
    model = decoder(KINDS["dense"])
    small, shapes = held(model, "int8")
    want = jax.eval_shape(small.init, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, want)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"int8", "bfloat16", "float32"}
    assert held(model, "bfloat16")[0] is model
    assert {leaf.dtype.name for leaf in jax.tree.leaves(held(model, "bfloat16")[1])} == {"bfloat16"}


def test_kernels_are_loaded_in_int8_and_sharded(tmp_path):
    model = decoder(KINDS["dense"])
    params = random_params(model)
    distill.save(tmp_path, model, params)
    mesh = make_mesh(ParallelConfig(fsdp=2, tensor=2))
    small, loaded = distill.load(tmp_path, dtype="int8", sharding=lambda model: param_shardings(model, mesh))
    bfloat16 = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    jax.tree.map(np.testing.assert_array_equal, loaded, quantized(model, bfloat16))
    shardings = param_shardings(small, mesh)
    assert shardings["layers"]["attention"]["query"]["kernel"]["scale"].spec == PartitionSpec(None, ("tensor",), None)
    up = jax.device_put(loaded, shardings)["layers"]["mlp"]["up"]["kernel"]
    assert up["int8"].addressable_shards[0].data.shape == (2, 4, 6)
    assert loaded["layers"]["mlp"]["up"]["kernel"]["int8"].sharding.shard_shape((2, 8, 12)) == (2, 4, 6)


def test_models_without_int8_form_are_refused():
    for model in (factored(tiny_decoder(), 1), encoder(EncoderConfig(vocab_size=8, layers=1, width=8, heads=2))):
        with pytest.raises(ValueError, match="int8: expected a decoder"):
            int8(model)
