"""One process of the pair in ``test_processes.py``: ``python one_process.py FOLDER``, its index in the environment.

With ``ENDLESS`` in the environment it only trains, until it is stopped.
"""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from distill import cli
from distill.devices import processes


def task():
    """A distillation whose rows count unequal numbers of tokens."""
    import jax
    import jax.numpy as jnp
    from builders import random_params, tiny_decoder, uneven_batch

    from distill.objective import ObjectiveConfig, terms_of
    from distill.train import Task

    teacher = tiny_decoder(layers=1, vocab_size=12, width=12, head_dim=4, feed_forward=20)
    student = tiny_decoder(layers=1, vocab_size=12)
    judge = jax.jit(lambda params, tokens: student.logits(params, tokens))
    return Task(
        student,
        terms_of(ObjectiveConfig(temperature=2.0, kd_weight=0.7, task_weight=0.3)),
        uneven_batch(rows=24),
        teacher=teacher,
        teacher_params=jax.device_get(random_params(teacher, seed=1)),
        evaluate=lambda params: {"spread": float(processes.fetch(judge(params, jnp.arange(6)[None])).std())},
        identity={"task": "tiny"},
    )


def train(folder: Path, config, **changes):
    """Unsharded parameters after 20 steps of two micro-batches."""
    from distill.optim import OptimizerConfig
    from distill.train import fit
    from distill.training import LogConfig, TrainingConfig

    learn = OptimizerConfig(learning_rate=0.02, warmup_steps=5, weight_decay=0.1)
    numbers = {"steps": 20, "batch_size": 16, "micro_batches": 2, "steps_per_dispatch": 5, "evaluate_every": 10}
    training = TrainingConfig(**(numbers | {"save_every": 10, "optimizer": learn} | changes))
    return processes.fetch(fit(folder, task(), training, parallel_config=config, log=LogConfig(progress=False)))


def learn_text(folder: Path, config, **changes) -> None:
    """Distils on text into FOLDER/text, from the teacher in FOLDER."""
    from text_builders import text_config

    from distill.experiments.runner import run_experiment
    from distill.training import TrainingConfig

    short = TrainingConfig(steps=2, batch_size=8, steps_per_dispatch=2, evaluate_every=2, save_every=2)
    few = {"arms": (), "heldout_rows": 4, "curve_rows": 4, "prompts": 1} | changes
    run_experiment(text_config(folder, training=short, parallel=config, **few), folder / "text")


def refused(what) -> str:
    """The message of the ValueError that ``what`` raises."""
    try:
        what()
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    cli.set_up_jax()
    import jax
    import numpy as np

    from distill.data import stream
    from distill.experiments import runner
    from distill.parallel import ParallelConfig

    if "ENDLESS" in os.environ:
        far = dict.fromkeys(("steps", "evaluate_every", "save_every"), 10**6)
        train(folder / "run", ParallelConfig(fsdp=2), **far)
    params = train(folder / "run", ParallelConfig(fsdp=2))
    index = processes.index()
    np.savez(folder / f"process{index}.npz", *jax.tree.leaves(params))
    with processes.first_goes_first("a file"):
        if index == 0:
            (folder / "made_by_first").touch()
        found = (folder / "made_by_first").exists()
    seen = {
        "devices": [jax.local_device_count(), jax.device_count()],
        "found": found,
        "made": processes.from_first(lambda: [index, "first"]),
        "failed": refused(lambda: processes.from_first(lambda: int("no number"))),
        "disagreed": refused(lambda: processes.agree("seed", str(index))),
        "pmap": refused(lambda: train(folder / "pmap", ParallelConfig(backend="pmap"))),
    }
    (folder / f"process{index}.json").write_text(json.dumps(seen))
    print("printed by process", index)
    read, batch = [], stream.StreamLoader.batch
    stream.StreamLoader.batch = lambda self, k: read.append(batch(self, k)) or read[-1]
    learn_text(folder, ParallelConfig(fsdp=2), streaming=True)
    rows = [int(one.mask.any(axis=1).sum()) for one in read]
    again = runner.evaluate_folder(folder / "text")
    told = {"summary": again, "answer": runner.answer(folder / "text", ["the cat"])}
    (folder / f"process{index}_again.json").write_text(json.dumps(told))
    (folder / f"process{index}_rows.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    place = Path(sys.argv.pop())
    cli.run_main(lambda _: main(place))
