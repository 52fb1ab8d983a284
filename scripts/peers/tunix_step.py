"""The step of distill/benchmarks/step.py by Tunix's DistillationTrainer, its own loop (Llama 3): KL and labels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from step_worker import TASK, turns
from tunix.distillation import distillation_trainer
from tunix.distillation.strategies.logit import LogitStrategy
from tunix.models.llama3 import model as llama3
from tunix.sft import utils


def llama(layers, width, seed):
    """A Llama of this shape, with random weights."""
    config = llama3.ModelConfig(
        num_layers=layers,
        vocab_size=TASK["vocab"],
        embed_dim=width,
        hidden_dim=3 * width,
        num_heads=width // 64,
        head_dim=64,
        num_kv_heads=width // 64,
        rope_theta=10_000,
        norm_eps=1e-6,
    )
    return llama3.Llama3(config, rngs=nnx.Rngs(seed))


def logits(model, input_tokens, input_mask):
    """Logits of a model."""
    positions = utils.build_positions_from_mask(input_mask)
    return model(input_tokens, positions, None, utils.make_causal_attn_mask(input_mask))[0]


def labels(input_tokens, input_mask):
    """The next tokens, one-hot as the strategy expects."""
    return jax.nn.one_hot(jnp.roll(input_tokens, -1, axis=1), TASK["vocab"])


def main():
    """Takes two steps in every turn."""
    student, teacher = llama(*TASK["student"], 0), llama(*TASK["teacher"], 1)
    update = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b2=0.99, weight_decay=0.0))
    strategy = LogitStrategy(logits, logits, labels, temperature=2.0, alpha=0.5)
    config = distillation_trainer.TrainingConfig(eval_every_n_steps=10**9)
    trainer = distillation_trainer.DistillationTrainer(student, teacher, strategy, update, config)
    inputs = np.load(TASK["ids"])[:, :-1]
    batch = distillation_trainer.TrainingInput(input_tokens=inputs, input_mask=np.ones(inputs.shape, bool))
    computed = turns(lambda: jax.block_until_ready((nnx.state(trainer.model), nnx.state(trainer.optimizer))))
    trainer.train(batch for _ in computed)


if __name__ == "__main__":
    main()
