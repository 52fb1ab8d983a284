"""Preflight: checks before the first step, as one function and one table.

Errors stop the run; warnings are printed loudly. The memory plan is XLA's own, of the step that will run, compiled and
not executed.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill import losses
from distill.batch import Batch
from distill.config import write_json
from distill.devices import backend
from distill.errors import UserError
from distill.models.model import Model
from distill.objective import evaluate, terms_at
from distill.shapes import Params
from distill.term import Terms, View
from distill.vocab import align, token_ids

SAME = 1e-4
"""Nats above which student = teacher counts as another loss than 0: a few roundings of float32."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    verdict: str
    """``ok``, ``warning`` or ``error``."""
    found: str


@dataclasses.dataclass(frozen=True)
class Side:
    """A model with all its parameters (``Start.whole``) and its tokenizer, or a token → id map, or None."""

    model: Model
    params: Params
    tokenizer: Any = None


def preflight(
    student: Side,
    teacher: Side,
    heldout: Batch | None,
    terms: Terms,
    *,
    plan: dict[str, int] | None = None,
    run: Path | None = None,
) -> list[Check]:
    """Makes all checks, in order.

    Args:
      student: before its first step.
      teacher: of the same vocabulary.
      heldout: text on which both are measured; a few rows are enough. None: models without logits, such as sentence
        encoders, of which only weights and memory are checked.
      terms: of the objective; those that compare logits are held to 0 at student = teacher.
      plan: of ``memory_plan``; None: memory is not checked.
      run: where preflight.json goes; None: nowhere.

    Raises:
      UserError: a check failed; all that failed are named. preflight.json is written before.
    """
    sides = {"student": student, "teacher": teacher}
    checks = [*_tokenizers(student.tokenizer, teacher.tokenizer, student.model, teacher.model)]
    checks += [_finite(f"weights of the {name}", jax.tree.leaves(side.params)) for name, side in sides.items()]
    nats: dict[str, float] = {}
    if heldout is not None:
        logits = {name: _logits(side, heldout) for name, side in sides.items()}
        checks += [_finite(f"logits of the {name}", [x], heldout.mask) for name, x in logits.items()]
        nats = {name: _nats(x, heldout) for name, x in logits.items()}
        checks += [_worse(nats), *_zero_at_teacher(terms, logits["teacher"], heldout)]
    checks += [] if plan is None else [_fits(plan)]
    if run is not None:
        values = {"checks": [dataclasses.asdict(check) for check in checks], "memory": plan, "nats_per_token": nats}
        write_json(run / "preflight.json", values)
    wrong = [f"{check.name}: {check.found}" for check in checks if check.verdict == "error"]
    if wrong:
        raise UserError("preflight: " + "\n  ".join(wrong))
    return checks


def _worse(nats: dict[str, float]) -> Check:
    found = f"teacher {nats['teacher']:.4f}, student before its first step {nats['student']:.4f} nats per token"
    if nats["teacher"] > nats["student"]:
        return Check("held-out loss", "warning", f"{found}: the teacher is WORSE than its student on this text")
    return Check("held-out loss", "ok", found)


def _tokenizers(student: Any, teacher: Any, of_student: Model, of_teacher: Model) -> list[Check]:
    if student is None or teacher is None:
        return []
    maps = [x if isinstance(x, dict) else x.ids() if hasattr(x, "ids") else token_ids(x) for x in (student, teacher)]
    try:
        align(*maps, max(of_student.vocab_size, _rows(of_student)), max(of_teacher.vocab_size, _rows(of_teacher)))
        checks = [Check("tokenizer", "ok", f"{len(maps[0])} tokens, the same ids")]
    except ValueError as error:
        checks = [Check("tokenizer", "error", str(error))]
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "eos_id", "pad_id", "chat_template")
    for name in names:
        values = [getattr(tokenizer, name, None) for tokenizer in (student, teacher)]
        if values[0] != values[1]:
            found = "differs" if name == "chat_template" else f"{values[0]} and {values[1]}"
            checks.append(Check(name, "warning", f"{found} (student's and teacher's)"))
    return checks


def _rows(model: Model) -> int:
    return getattr(model.config, "vocab_size", model.vocab_size)


def _logits(side: Side, batch: Batch) -> jax.Array:
    return jax.jit(side.model.logits)(side.params, batch.inputs, positions=batch.positions, segments=batch.segments)


def _nats(logits: jax.Array, batch: Batch) -> float:
    pair = losses.masked_sum(losses.cross_entropy(logits, jnp.where(batch.mask, batch.labels, 0)), batch.mask)
    return float(losses.divide(pair))


def _finite(name: str, leaves: list[Any], mask: Any = None) -> Check:
    bad = 0
    for leaf in leaves:
        wrong = ~jnp.isfinite(leaf)
        bad += int(jnp.sum(wrong if mask is None else jnp.any(wrong, axis=-1) & mask))
    return Check(name, "error" if bad else "ok", f"{bad} are not finite" if bad else "finite")


def _zero_at_teacher(terms: Terms, logits: jax.Array, batch: Batch) -> list[Check]:
    """Student = teacher: every term that compares their logits is 0."""
    compared = [term for term in terms_at(terms, jnp.int32(0)) if term.needs.teacher_logits or term.needs.signal]
    compared = [term for term in compared if not term.needs.layers]
    logits, checks = losses.select(logits, batch.mask), []
    _, values = evaluate(compared, logits, logits, View(labels=jnp.where(batch.mask, batch.labels, 0)))
    for name in (term.name for term in compared):
        value = float(losses.divide(losses.masked_sum(values[name], batch.mask)))
        verdict = "ok" if abs(value) <= SAME else "warning"
        checks.append(Check(f"{name} at student = teacher", verdict, f"{value:.2e} nats per token"))
    return checks


# ---- memory


def memory_plan(lowered: Any, state: Any, frozen: Any) -> dict[str, int]:
    """Bytes of a step on one device: XLA's ``memory_analysis`` of the compiled program, and the trees by name.

    Args:
      lowered: ``jax.jit(step, …).lower(…)`` of arrays or of ``jax.ShapeDtypeStruct``; nothing is executed.
      state: ``TrainState`` of the step, or its shapes.
      frozen: the teacher's parameters, or a ``Frozen``, or None.

    Returns:
      ``teacher``, ``student``, ``gradients``, ``optimizer``, as they lie on their mesh; of the program: ``arguments``,
      ``outputs``, ``shared`` (outputs in the place of arguments), ``temporary`` (activations, gradients); ``total`` =
      arguments + outputs − shared + temporary; ``device``: what there is, 0 if unknown.
    """
    analysis = lowered.compile().memory_analysis()
    student = placed_bytes(state.params)
    plan = {"teacher": placed_bytes(frozen), "student": student, "gradients": student}
    plan["optimizer"] = placed_bytes(state.opt_state)
    names = {"arguments": "argument", "outputs": "output", "shared": "alias", "temporary": "temp"}
    plan |= {name: int(getattr(analysis, f"{of}_size_in_bytes")) for name, of in names.items()}
    plan["total"] = plan["arguments"] + plan["outputs"] - plan["shared"] + plan["temporary"]
    return plan | {"device": backend.device_bytes()}


def placed_bytes(tree: Any) -> int:
    """Bytes of a tree on one device: of every leaf its shard, or all of it where it has no sharding."""

    def one(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * np.dtype(leaf.dtype).itemsize

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))


def _fits(plan: dict[str, int]) -> Check:
    total, there = (plan[name] / 2**30 for name in ("total", "device"))
    found = f"{total:.2f} GiB of {there:.2f} GiB, {plan['temporary'] / 2**30:.2f} GiB of it temporary"
    if not plan["device"] or plan["total"] <= plan["device"]:
        return Check("memory", "ok", found)
    return Check(
        "memory", "error", f"{found}; use more micro_batches, a smaller chunk_size, or shard over more devices (fsdp)."
    )


def print_checks(checks: list[Check]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table, colours = Table(title="preflight"), {"ok": "green", "warning": "bold yellow", "error": "bold red"}
    for column in ("check", "", "found"):
        table.add_column(column)
    for check in checks:
        table.add_row(check.name, f"[{colours[check.verdict]}]{check.verdict}[/]", check.found)
    Console().print(table)
