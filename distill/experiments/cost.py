"""What experiments share: a trained model, its way back from a run folder, and what every stage cost."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from distill.checkpoint import Checkpoints
from distill.config import write_json
from distill.models import Model
from distill.shapes import Params

WATTS_PER_CORE = 10.0
"""Assumed draw of one busy CPU core, in watts; energy here is modelled from CPU time, ± 40 %, not measured."""


class Trained(NamedTuple):
    """A model and its parameters."""

    model: Model
    params: Params


def restore(model: Model, run: Path, best: str | None = None) -> Trained:
    """A trained model from its run folder: the newest, or the best by a metric of the evaluation (``KeepConfig.best``).

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: the checkpoint holds a model of another shape, or none was measured by ``best``.
    """
    if not (run / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"{run}: no checkpoints; expected a run folder, made by scripts/distill.py or train.py."
        )
    with Checkpoints(run) as checkpoints:
        step = None if best is None else checkpoints.best(best)
        params = checkpoints.params(jax.eval_shape(model.init, jax.random.key(0)), step)
    return Trained(model, params)


@contextlib.contextmanager
def cost(folder: Path, flops: float | None) -> Iterator[None]:
    """Adds the time of a stage to FOLDER/cost.json (a stage killed midway loses that session's seconds)."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "cost.json"
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        before = json.loads(file.read_text()) if file.exists() and flops is not None else {}
        spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        write_json(file, {"flops": flops} | {key: value + before.get(key, 0.0) for key, value in spent.items()})


def ledger(stages: dict[str, Path]) -> dict[str, Any]:
    """FLOPs, seconds, CPU seconds and modelled joules of every stage that has a cost, name → folder."""
    rows = []
    for what, folder in stages.items():
        if (folder / "cost.json").exists():
            spent = json.loads((folder / "cost.json").read_text())
            rows.append({"what": what} | spent | {"joules": spent["cpu_seconds"] * WATTS_PER_CORE})
    return {"rows": rows, "watts_per_core": WATTS_PER_CORE, "uncertainty": 0.4}
