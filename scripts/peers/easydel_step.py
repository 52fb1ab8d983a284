"""The step of distill/benchmarks/step.py by the step function of EasyDeL's trainer, on its Llama: KL and labels."""

import easydel
import jax
import jax.numpy as jnp
import numpy as np
import optax
from easydel.infra.loss_utils import LossConfig
from easydel.trainers.distillation_trainer._fn import distillation_step
from flax import nnx
from jax.sharding import PartitionSpec
from step_worker import TASK, turns


def llama(layers, width, seed):
    """The state of a Llama of this shape, with random weights."""
    config = easydel.LlamaConfig(
        vocab_size=TASK["vocab"],
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
        max_position_embeddings=512,
        use_cache=False,
    )
    f32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    return easydel.LlamaForCausalLM(config, **f32, precision=None, rngs=nnx.Rngs(seed)).to_state()


def main():
    """Takes two steps in every turn."""
    update = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b2=0.99, weight_decay=0.0))
    student, teacher = llama(*TASK["student"], 0).init_tx(update), llama(*TASK["teacher"], 1)
    ids = jnp.asarray(np.load(TASK["ids"]))
    batch = {"input_ids": ids[:, :-1], "attention_mask": jnp.ones_like(ids[:, :-1]), "labels": ids[:, 1:]}
    fixed = (LossConfig(), lambda step: 1e-3, PartitionSpec(), 1, True, 2.0, 0.5)
    program = jax.jit(distillation_step, static_argnums=range(3, 10), donate_argnums=0)
    with student.model.mesh:
        for _ in turns():
            student, _ = jax.block_until_ready(program(student, batch, teacher, *fixed))


if __name__ == "__main__":
    main()
