"""Configurations for machines that are not here: initialisation, sharding and step lowered with the real shapes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from distill.config import load_config
from distill.data.loader import Batch
from distill.models import decoder
from distill.objective import terms_of
from distill.optim import optimizer
from distill.parallel import param_shardings
from distill.step import init_state, make_train_step
from distill.weights.families import from_json

QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "max_position_embeddings": 40960, "hidden_act": "silu", "attention_bias": False,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "max_position_embeddings": 32768, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip
GEMMA = {
    "model_type": "gemma3_text", "vocab_size": 262144, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6, "max_position_embeddings": 131072,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip


def sizes(layers, width, heads, feed_forward, **more):
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    return dict(zip(names, (layers, width, heads, feed_forward), strict=True)) | more


PAIRS = {
    "qwen3_8b_to_0p6b": (
        QWEN3 | sizes(36, 4096, 32, 12288, tie_word_embeddings=False),
        QWEN3 | sizes(28, 1024, 16, 3072, tie_word_embeddings=True),
    ),
    "qwen_coder": (QWEN2 | sizes(28, 1536, 12, 8960), QWEN2 | sizes(24, 896, 14, 4864)),
    "llama3_70b_to_8b": (LLAMA | sizes(80, 8192, 64, 28672), LLAMA | sizes(32, 4096, 32, 14336)),
    "gemma3_27b_to_1b": (
        GEMMA | sizes(
            62, 5376, 32, 21504, num_key_value_heads=16, head_dim=128, vocab_size=262208, sliding_window=1024,
            query_pre_attn_scalar=168,
        ),
        GEMMA | sizes(
            26, 1152, 4, 6912, num_key_value_heads=1, head_dim=256, sliding_window=512, query_pre_attn_scalar=256,
        ),
    ),
}  # fmt: skip
PARAMETERS = {  # as published, in units of 10⁹, tied heads counted once
    "qwen3_8b_to_0p6b": (8.19, 0.596),
    "qwen_coder": (1.54, 0.494),
    "llama3_70b_to_8b": (70.55, 8.03),
    "gemma3_27b_to_1b": (27.0, 1.0),
}


@pytest.mark.parametrize("name", PAIRS)
def test_step_and_shardings_fit(name):
    config = load_config(name)
    teacher, student = (decoder(from_json(values)) for values in PAIRS[name])
    counts = [model.parameter_count() / 1e9 for model in (teacher, student)]
    assert counts == pytest.approx(PARAMETERS[name], rel=0.02)
    words = min(teacher.vocab_size, student.vocab_size)
    teacher, student = teacher.with_vocabulary(words), student.with_vocabulary(words)
    parallel, training = config.parallel, config.training
    mesh = AbstractMesh((2, parallel.fsdp, parallel.tensor), ("data", "fsdp", "tensor"))
    assert all(param_shardings(model, mesh) for model in (teacher, student))  # or it says what does not divide
    update = optimizer(training.optimizer, training.steps)
    step = make_train_step(
        student, terms_of(config.objective), update, teacher=teacher, micro_batches=training.micro_batches
    )
    params = jax.eval_shape(teacher.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    state = jax.eval_shape(lambda key: init_state(student.init(key), update), jax.random.key(0))
    shape = training.batch_size, config.data.length
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = Batch(ids, ids, jax.ShapeDtypeStruct(shape, jnp.bool_), ids, ids)
    after, metrics = jax.eval_shape(step, state, params, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {"loss", "forward_kl", "agreement"} <= set(metrics)
