"""Benchmark of a published pair at its real size on this device, beside a plain PyTorch loop, with random weights.

Time and memory depend on shapes alone, so no weights are fetched. Each case runs in a separate process, one after the
other, because two would not fit into the memory of one device. Memory is the compiler's figure for our program, and the
peak of PyTorch's allocator.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from distill.benchmarks.rounds import spread
from distill.errors import UserError

CASES = (
    ("live teacher in bfloat16", {"remat": "dots"}),
    ("layers computed twice", {"remat": "full"}),
    ("teacher in int8", {"remat": "dots", "teacher_dtype": "int8"}),
    ("cross-entropy alone, no teacher", {"remat": "dots", "teacher": None}),
)
"""Cases of this library: name and options."""


def pair(name: str, batch: int, length: int, peer: Path, steps: int = 8) -> list[str]:
    """Lines: seconds, tokens/s, FLOP/s and memory of every case and of PyTorch.

    Args:
      name: a configuration whose models are published ones, such as ``qwen3_8b_to_0p6b``.
      batch: rows of a batch.
      length: tokens of a row.
      peer: path of scripts/peers/torch_pair.py.
      steps: measured steps, after two of warm-up.

    Raises:
      UserError: a configuration of another kind, or sizes below 1.
    """
    from distill.config import load_config
    from distill.experiments.text.config import TextConfig

    config = load_config(name)
    if not isinstance(config, TextConfig) or config.student.source is None:
        raise UserError(f"pair: {name} names no two published models; expected one such as qwen3_8b_to_0p6b.")
    if min(batch, length, steps) < 1:
        raise UserError(f"pair: --shape {batch} {length}: at least 1 of each is needed.")
    task = {"teacher": config.teacher, "student": config.student.source, "batch": batch, "length": length}
    task |= {"steps": steps} | {f"{side}_config": _hub(task[side]) for side in ("teacher", "student")}
    own = [sys.executable, "-c", "import sys; from distill.benchmarks import pair; pair.main(sys.argv[1])"]
    return [
        f"{config.teacher} → {config.student.source}, {batch} x {length} tokens, activations in bfloat16",
        *(_line(case, own, task | options) for case, options in CASES),
        _line("PyTorch", [sys.executable, str(peer)], task),
    ]


def _hub(name: str) -> dict[str, Any]:
    """``config.json`` of a model."""
    from distill.planning.architectures import ARCHITECTURES

    return ARCHITECTURES[name][0] if name in ARCHITECTURES else json.loads((Path(name) / "config.json").read_text())


def _line(case: str, command: list[str], task: dict[str, Any]) -> str:
    """Formats the result of a case; where its process failed, the last line of its stderr."""
    from distill.devices import speed

    ended = subprocess.run([*command, json.dumps(task)], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if ended.returncode:
        return f"{case}: {(ended.stderr.strip().splitlines() or ['ended without a message'])[-1][:160]}"
    seconds, gigabytes, kind = json.loads(ended.stdout.splitlines()[-1])
    tokens = task["batch"] * task["length"] / statistics.median(seconds)
    flops = tokens * speed.flops_per_token(*_models(task), task["length"])
    peak = speed.peak(kind)
    share = f", {flops / peak:.0%} of its peak" if peak else ""
    rates = f"{tokens:,.0f} tokens/s, {flops / 1e12:.2f} TFLOP/s{share}"
    return f"{case}: {spread(seconds)} s, {rates}, {gigabytes:.1f} GB, {kind}"


def _models(task: dict[str, Any]) -> tuple[Any, Any]:
    """Student and teacher; the teacher is None for a case without one."""
    from distill.models.decoder import decoder
    from distill.planning.architectures import architecture

    names = (task["student"], task["teacher"])
    return tuple(name and decoder(architecture(name, "bfloat16")[0]) for name in names)


def main(argument: str) -> None:
    """Runs one case of ours and prints JSON: seconds of every step, GB, the device."""
    import jax
    import jax.numpy as jnp

    from distill.batch import Batch
    from distill.models.int8 import held
    from distill.objective import ObjectiveConfig, terms_of
    from distill.optim import OptimizerConfig, optimizer
    from distill.state import init_state
    from distill.step import make_train_step

    def drawn(like):
        """Deterministic numbers of the magnitude of a kernel, computed on the device."""
        size = jnp.sin(jax.lax.iota(jnp.float32, math.prod(like.shape))) * (64.0 if like.dtype == jnp.int8 else 0.02)
        return size.astype(like.dtype).reshape(like.shape)

    task = json.loads(argument)
    student, teacher = _models(task)
    frozen = None
    if teacher:  # drawn leaf by leaf: float32 initial values of the whole teacher would not fit
        teacher, shapes = held(teacher, task.get("teacher_dtype", "bfloat16"))
        frozen = jax.tree.map(lambda like: jax.jit(lambda: drawn(like))(), shapes)
    update = optimizer(OptimizerConfig(learning_rate=1e-5, warmup_steps=0, schedule="constant"), 1)
    soft = 0.9 if teacher else 0.0
    terms = terms_of(ObjectiveConfig(divergence="forward_kl", kd_weight=soft, task_weight=1.0 - soft))
    step = make_train_step(student, terms, update, teacher=teacher, remat=task["remat"])
    ids = np.random.default_rng(0).integers(0, student.vocab_size, (task["batch"], task["length"] + 1))
    shape, ids = (task["batch"], task["length"]), jnp.asarray(ids, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    batch = Batch(ids[:, :-1], ids[:, 1:], jnp.ones(shape, bool), positions, jnp.ones(shape, jnp.int32))
    state = jax.jit(lambda: init_state(student.init(jax.random.key(0)), update))()
    program = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()
    seconds = []
    for _ in range(task["steps"] + 2):
        start = time.perf_counter()
        state, _ = program(state, frozen, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
    held_bytes = program.memory_analysis()
    total = held_bytes.argument_size_in_bytes + held_bytes.temp_size_in_bytes
    print(json.dumps([seconds[2:], total / 1e9, jax.devices()[0].device_kind]))
