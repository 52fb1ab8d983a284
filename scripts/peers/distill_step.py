"""The distillation step of distill/benchmarks/step.py by this library."""

import sys
from pathlib import Path

import jax
import numpy as np
from step_worker import TASK, turns

sys.path.insert(0, str(Path(__file__).parents[2]))

from distill import parallel
from distill.batch import Batch
from distill.devices import backend
from distill.models import DecoderConfig, decoder
from distill.objective import ObjectiveConfig, terms_of
from distill.optim import OptimizerConfig, optimizer
from distill.state import init_state
from distill.step import make_train_step


def model(layers, width):
    """A decoder with this many layers and this width."""
    return decoder(DecoderConfig(TASK["vocab"], layers, width, heads=width // 64, feed_forward=3 * width))


def main():
    """Takes two steps in every turn."""
    backend.keep_memory()  # as scripts/distill.py does for texts
    student, teacher = model(*TASK["student"]), model(*TASK["teacher"])
    update = optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=0, schedule="constant"), 1)
    step = make_train_step(student, terms_of(ObjectiveConfig(temperature=2.0)), update, teacher=teacher)
    ids = np.load(TASK["ids"])
    shape = ids.shape[0], ids.shape[1] - 1
    batch = Batch(
        inputs=ids[:, :-1],
        labels=ids[:, 1:],
        mask=np.ones(shape, bool),
        positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        segments=np.ones(shape, np.int32),
    )
    wrapping = parallel.one_device(step)
    batches = wrapping.place_rows(jax.tree.map(lambda x: x[None], batch))
    state = wrapping.place_state(init_state(student.init(jax.random.key(0)), update))
    teacher_params = wrapping.place_params(teacher.init(jax.random.key(1)))
    for _ in turns():
        state, _ = wrapping.steps(state, teacher_params, None, batches)
        jax.block_until_ready(state)


if __name__ == "__main__":
    main()
