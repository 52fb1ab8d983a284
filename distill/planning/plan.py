"""Plans a run before a machine is paid for: the real train step is lowered on shapes and compiled for the chips.

A plan needs no weights, no text and no accelerator. For a slice of TPUs the compiler for TPUs compiles the step, so the
bytes are those of the real program. For GPUs the step is compiled for as many CPU devices, and the plan marks the bytes
as an estimate.
Seconds and dollars are bounds of a roofline model (``roofline.py``), never measured.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill.batch import Batch
from distill.devices import backend
from distill.devices.backend import fuse_attention as fused_on
from distill.devices.chips import Topology, devices_of
from distill.errors import UserError
from distill.evaluation.heldout import rows_at_a_time
from distill.experiments.learner import learner
from distill.experiments.preflight import placed_bytes
from distill.experiments.text.config import TextConfig
from distill.models.config import DecoderConfig
from distill.models.decoder import decoder
from distill.models.int8 import held
from distill.models.placement import ROW_AXES
from distill.parallel import batch_axes, make_mesh
from distill.planning import roofline
from distill.planning.architectures import architecture
from distill.planning.hlo import Collective, collectives
from distill.reports.table import print_rows
from distill.step import CHUNKED_FROM
from distill.students.cut import part_of
from distill.train import Task, lower


def abstract_task(config: TextConfig) -> Task:
    """The distillation task (``experiments.text.run.distillation``) as shapes.

    The examples are those of one dispatch.

    Raises:
      MissingFile: the shapes of a model are not known.
      UserError: an encoder, a student larger than its teacher, or a factorised student.
    """
    if config.signal.kind != "live":
        raise UserError("plan: stored targets cannot be planned yet; leave out --signal.kind, for a live teacher.")
    if not config.student.start.plain:
        raise UserError("plan: a student in factors, or with its teacher's embeddings, cannot be planned yet.")
    teacher, vocab_size = _decoder_of(config.teacher, config)
    if config.student.source is None:
        asked = config.student
        sizes = {name: getattr(asked, name) for name in ("kv_heads", "feed_forward", "width")}
        student = part_of(teacher, layers=asked.start.layers or asked.layers, **sizes)
    else:
        student, of_student = _decoder_of(config.student.source, config)
        vocab_size = min(vocab_size, of_student)
    if config.vocabulary is not None:  # teacher and student are cut to the same vocabulary
        vocab_size = min(vocab_size, config.vocabulary)
        teacher, student = (dataclasses.replace(one, vocab_size=vocab_size) for one in (teacher, student))
    of_teacher, of_student = (decoder(one).with_vocabulary(vocab_size) for one in (teacher, student))
    of_student, terms = learner(config.objective, of_student, of_teacher)
    of_teacher, params = held(of_teacher, config.teacher_dtype)
    shape = config.training.dispatch * config.training.batch_size, config.data.length
    ids, mask = (jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, jnp.bool_))
    return Task(
        student=of_student,
        terms=terms,
        reduction=config.objective.reduction,
        examples=Batch(ids, ids, mask, ids, ids),
        teacher=of_teacher,
        teacher_params=params,
    )


def _decoder_of(name: str, config: TextConfig) -> tuple[DecoderConfig, int]:
    shape, tokens = architecture(name, config.activations)
    if not isinstance(shape, DecoderConfig):
        raise UserError(f"{name}: an encoder; expected a model that writes text.")
    return shape, tokens


def check(config: Any, dollars_per_hour: str | None = None, tries: str = "0") -> tuple[float | None, int]:
    """Checks that a plan can be made and parses the numbers of the command line: dollars and tries.

    Raises:
      UserError: a configuration of another kind or without a mesh, or an argument that is not a number.
    """
    if not isinstance(config, TextConfig):
        raise UserError(
            f"plan: configuration {config.name} is of kind {config.kind}, which runs on one machine; expected one of "
            "kind text, such as qwen3_8b_to_0p6b."
        )
    if config.parallel.backend in ("one_device", "pmap"):
        raise UserError(
            f"plan: parallel.backend={config.parallel.backend}; expected mesh, with fsdp and tensor, to plan a slice."
        )
    try:
        dollars = None if dollars_per_hour is None else float(dollars_per_hour)
        number = int(tries)
    except ValueError as error:
        raise UserError(f"plan: --dollars-per-hour and --try are numbers; {error}.") from error
    if number < 0 or (dollars is not None and not dollars >= 0.0):
        raise UserError(f"plan: dollars-per-hour={dollars}, try={number}; expected at least 0.")
    return dollars, number


class Program(NamedTuple):
    """A compiled step."""

    bytes: dict[str, int]
    """Bytes on one device: of each array placed there, and ``temporary`` and ``total`` of the program."""
    exchanged: list[Collective]
    flops_once: float
    """FLOPs by XLA's cost analysis, which counts the body of a loop once."""
    seconds: dict[str, float]
    """Seconds of ``lower`` and ``compile`` on this machine, and ``cpu``, the CPU-seconds of both."""
    fits: bool


def compile_step(config: TextConfig, topology: Topology, task: Task | None = None) -> Program:
    """Compiles the train step of a configuration for a slice.

    Raises:
      UserError: a mesh that does not divide the devices or the models, a batch that cannot be divided.
    """
    check(config)
    task = abstract_task(config) if task is None else task
    devices = devices_of(topology)
    parallel = dataclasses.replace(config.parallel, backend="mesh")
    _check_batch(config, parallel, devices)
    start, cpu = time.perf_counter(), time.process_time()
    lowered, state, frozen = lower(task, config.training, parallel, devices)
    seconds = {"lower": time.perf_counter() - start}
    placed = {name: placed_bytes(tree) for name, tree in (("parameters", state.params), ("optimizer", state.opt_state))}
    placed |= {"teacher": placed_bytes(frozen), "data": placed_bytes(task.examples)}
    kept = heldout_bytes(config, task, make_mesh(parallel, devices))
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # The TPU compiler refuses a program that exceeds the memory; its message still states the bytes.
        needed = _needed(error, sum(placed.values()))
        needed = needed | {"evaluation": kept, "total": needed["total"] + kept}
        seconds |= {"compile": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        return Program(placed | needed, [], math.nan, seconds, False)
    seconds |= {"compile": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    memory = compiled.memory_analysis()
    names = {"arguments": "argument", "outputs": "output", "shared": "alias", "temporary": "temp"}
    placed |= {name: int(getattr(memory, f"{of}_size_in_bytes")) for name, of in names.items()}
    program = placed["arguments"] + placed["outputs"] - placed["shared"] + placed["temporary"]
    placed |= {"evaluation": kept, "total": program + kept}
    flops = float((compiled.cost_analysis() or {}).get("flops", math.nan))
    return Program(placed, collectives(compiled.as_text()), flops, seconds, placed["total"] <= topology.chip.memory)


def heldout_bytes(config: TextConfig, task: Task, mesh: Any) -> int:
    """Bytes on one device of the teacher's hidden states on the held-out rows (``evaluation/heldout.py``).

    Evaluation keeps them. Without ``heldout_rows`` in the configuration, the rows of the learning curve count.
    """
    parts = math.prod(mesh.shape[axis] for axis in batch_axes(mesh))
    rows = rows_at_a_time(parts)
    count = -(-(config.heldout_rows or config.curve_rows) // rows) * rows
    teacher = task.teacher.config
    return count // parts * config.data.length * teacher.width * jnp.dtype(teacher.dtype).itemsize


def _check_batch(config: TextConfig, parallel: Any, devices: Any) -> None:
    mesh, training = make_mesh(parallel, devices), config.training
    rows = math.prod(mesh.shape[axis] for axis in batch_axes(mesh))
    part = training.batch_size // training.micro_batches
    if part % rows:
        raise UserError(
            f"training: batch_size={training.batch_size} in micro_batches={training.micro_batches} gives {part} "
            f"examples at a time, which cannot be divided over {rows} devices."
        )


def _needed(error: Exception, placed: int) -> dict[str, int]:
    """``temporary`` and ``total`` of a program that is too large for the compiler; re-raises any other error."""
    match = re.search(r"Used ([\d.]+)([KMGT]) of", str(error))
    if not str(error).startswith("RESOURCE_EXHAUSTED") or match is None:
        raise error
    total = int(float(match[1]) * 2 ** (10 * (" KMGT".index(match[2]))))
    return {"temporary": max(total - placed, 0), "total": total}


# ---- the plan


def plan(
    config: TextConfig, topology: Topology, *, dollars_per_hour: float | None = None, tries: int = 0
) -> dict[str, Any]:
    """Bytes, FLOPs, traffic, seconds and dollars of a step, as JSON values.

    Args:
      config: the run.
      topology: the slice.
      dollars_per_hour: for one chip; None: the list price (``chips.PRICED``).
      tries: number of proposed changes that are compiled where the step does not fit, the cheapest first, until one
        fits.

    Returns:
      ``config``, ``topology``, ``devices``, ``chip``, ``mesh``, ``batch``, ``layers`` (of the student), ``chunk``
      (positions of the head at a time), ``compiled_for`` (``TPU``, or ``CPU`` as an estimate for GPUs), ``fits``,
      ``bytes`` (of one device), ``flops`` (of a step), ``collectives`` (of one device and step, by kind), ``seconds``,
      ``tokens_per_second``, ``mfu``, ``dollars_per_hour``, ``dollars_per_billion_tokens``, ``compile_seconds`` and
      ``advice``. Values that need the compiled program are None where the step does not fit.

    Raises:
      UserError: as ``compile_step``, ``abstract_task``.
    """
    task = abstract_task(config)
    program = compile_step(config, topology, task)
    mesh = {axis: int(size) for axis, size in make_mesh(config.parallel, devices_of(topology)).shape.items()}
    dollars = topology.chip.dollars if dollars_per_hour is None else dollars_per_hour
    values = {
        "config": config.name,
        "topology": topology.name,
        "devices": topology.devices,
        "chip": topology.chip._asdict(),
        "mesh": mesh,
        "batch": {
            "tokens": config.training.batch_size * config.data.length,
            "examples": config.training.batch_size,
            "length": config.data.length,
            "micro_batches": config.training.micro_batches,
            "steps_per_dispatch": config.training.dispatch,
        },
        "compiled_for": "TPU" if topology.tpu else "CPU",
        "fits": program.fits,
        "compile_seconds": program.seconds,
        "dollars_per_hour": dollars,
    }
    work, split = _work(config, task), _split(config, task, mesh, topology)
    values |= {"layers": task.student.config.layers, "chunk": split.chunk, "bytes": _bytes(program, task, split)}
    values["flops"] = roofline.flops(work) | {"compiled_once": program.flops_once if program.fits else None}
    values |= _speed(values, program, work, split, task, topology)
    values["advice"] = [] if program.fits else advice(config, topology, values, tries)
    return values


def _work(config: TextConfig, task: Task) -> roofline.Work:
    tokens = config.training.batch_size * config.data.length
    shapes = task.student.config, task.teacher.config
    return roofline.Work(*shapes, tokens, config.data.length, remat=config.training.remat == "full")


def _split(config: TextConfig, task: Task, mesh: dict[str, int], topology: Topology) -> roofline.Split:
    vocab_size = task.student.vocab_size // mesh["tensor"]
    chunk = config.training.chunk_size
    if chunk is None:
        platform = "tpu" if topology.tpu else "gpu"
        chunk = backend.chunk_size(vocab_size, platform) if task.student.vocab_size >= CHUNKED_FROM else 0
    rows = topology.devices // mesh["tensor"]
    tokens = config.training.batch_size * config.data.length // config.training.micro_batches // rows
    return roofline.Split(
        rows=rows,
        tensor=mesh["tensor"],
        student=mesh["fsdp"] * mesh["tensor"],
        micro_batches=config.training.micro_batches,
        chunk=min(chunk or tokens, tokens),
        fused=not topology.tpu and fused_on("cuda", *_attention(task.student.config, config.data.length)),
    )


def _attention(config: DecoderConfig, length: int) -> tuple[str, int, int, float | None]:
    return config.dtype, length, config.key_size, config.attention_softcap


def _bytes(program: Program, task: Task, split: roofline.Split) -> dict[str, int]:
    """Bytes of the program, with its temporary ones divided by arithmetic.

    ``gradients`` are as large as the parameters. ``head`` holds the logits of a chunk with their gradients, the
    gathered kernels and the gradient of the student's kernel. ``activations`` are the rest: residuals of the layers and
    their gathered kernels.
    """
    vocab_size = task.student.vocab_size // split.tensor
    widths = task.student.config.width, task.teacher.config.width
    chunk = 16 * vocab_size * split.chunk  # four float32 arrays
    head = chunk + vocab_size * (2 * sum(widths) + 4 * widths[0])  # bfloat16 kernels, a float32 gradient
    gradients = program.bytes["parameters"]
    rest = max(program.bytes["temporary"] - gradients - head, 0)
    return program.bytes | {"gradients": gradients, "head": head, "head_chunk": chunk, "activations": rest}


def _speed(
    values: dict[str, Any],
    program: Program,
    work: roofline.Work,
    split: roofline.Split,
    task: Task,
    topology: Topology,
) -> dict[str, Any]:
    """``collectives``, ``traffic``, ``seconds`` and the values derived from them; None where the step does not fit."""
    names = ("collectives", "traffic", "seconds", "tokens_per_second", "mfu", "dollars_per_billion_tokens")
    if not program.fits:
        return dict.fromkeys(names)
    chunks = math.ceil(work.tokens / split.rows / split.micro_batches / split.chunk)
    exchanged = by_kind(program.exchanged, chunks, values["batch"]["steps_per_dispatch"])
    traffic = roofline.traffic(work, split, task.student.parameter_count())
    sent = sum(kind["sent"] for kind in exchanged.values())
    flops = values["flops"]
    seconds = roofline.times(topology.chip, topology.devices, flops["hardware"], sum(traffic.values()), sent)
    step = float(seconds["step"])
    peak = topology.devices * topology.chip.flops
    dollars = roofline.price(work.tokens, step, topology.devices, values["dollars_per_hour"])
    return dict(
        zip(
            names, (exchanged, traffic, seconds, work.tokens / step, flops["model"] / step / peak, dollars), strict=True
        )
    )


def by_kind(found: list[Collective], chunks: int, steps: int) -> dict[str, dict[str, float]]:
    """``count``, ``bytes`` of results and ``sent`` of one device and one step, for each kind of collective.

    Args:
      found: collectives of a program of several steps.
      chunks: chunks of the head, the one loop whose length is known only at run time (if every token counts).
      steps: steps of the program.
    """
    kinds: dict[str, dict[str, float]] = {}
    for one in found:
        kind, times = kinds.setdefault(one.kind, {"count": 0.0, "bytes": 0.0, "sent": 0.0}), one.times(chunks) / steps
        for name, amount in (("count", 1.0), ("bytes", float(one.size)), ("sent", one.sent)):
            kind[name] += times * amount
    return dict(sorted(kinds.items()))


# ---- what to change


class Change(NamedTuple):
    """A change of the configuration that saves memory."""

    what: str
    saves: int
    """Bytes saved on each device, by arithmetic from the bytes of the current step."""
    apply: Callable[[TextConfig], TextConfig]


def changes(config: TextConfig, values: dict[str, Any]) -> list[Change]:
    """Changes for a step that does not fit, the one that costs the least time first."""
    there, mesh, training = values["bytes"], values["mesh"], config.training
    found = []

    def add(name: str, value: Any, saves: float) -> None:
        part, _, field = name.rpartition(".")
        flag = f"--{name.replace('_', '-')} {value}"
        found.append(Change(flag, int(saves), lambda config: _with(config, part, field, value)))

    rows = math.prod(mesh[axis] for axis in ROW_AXES)
    if training.batch_size // training.micro_batches % (2 * rows) == 0:
        add("training.micro_batches", 2 * training.micro_batches, there["activations"] / 2)
    if training.remat == "none":
        layers = values["layers"]  # rematerialised, one of them is in memory at a time
        add("training.remat", "full", there["activations"] * (layers - 1) / layers)
    if mesh["data"] % 2 == 0:
        lying = sum(there[name] for name in ("parameters", "optimizer", "teacher", "gradients"))
        add("parallel.fsdp", 2 * mesh["fsdp"], lying / 2)
    if values["chunk"] >= 256:
        add("training.chunk_size", values["chunk"] // 2, there["head_chunk"] / 2)
    if config.teacher_dtype != "int8":
        add("teacher_dtype", "int8", there["teacher"] * (1 - 1 / jnp.dtype(config.teacher_dtype).itemsize))
    return found


def _with(config: TextConfig, part: str, field: str, value: Any) -> TextConfig:
    if not part:
        return dataclasses.replace(config, **{field: value})
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{field: value})})


def advice(config: TextConfig, topology: Topology, values: dict[str, Any], tries: int) -> list[dict[str, Any]]:
    """``changes`` with the result of those that were compiled, each on top of the previous, until the step fits."""
    tried = []
    for number, change in enumerate(changes(config, values)):
        one: dict[str, Any] = {"change": change.what, "saves": change.saves, "total": None, "fits": None}
        if number < tries:
            config = change.apply(config)
            program = compile_step(config, topology)
            one |= {"total": program.bytes["total"], "fits": program.fits}
        tried.append(one)
        if one["fits"]:
            break
    return tried


# ---- printing


def print_plan(values: dict[str, Any]) -> None:
    """Prints the tables of a plan."""
    batch, mesh = values["batch"], ", ".join(f"{axis} {n}" for axis, n in values["mesh"].items() if n > 1)
    title = f"{values['config']} on {values['topology']}: {values['devices']} {values['chip']['name']} ({mesh}), "
    title += f"{batch['examples']} x {batch['length']:,} tokens a step in {batch['micro_batches']} micro-batches"
    there, memory = values["bytes"], values["chip"]["memory"]
    rows = [(label, f"{there[name] / 1e9:.2f}") for name, label in BYTES.items()]
    verdict = "fits" if values["fits"] else "does NOT fit"
    how = "compiled for it" if values["compiled_for"] == "TPU" else "ESTIMATED: compiled for CPU devices in its place"
    rows.append((f"total of {memory / 1e9:.0f}: {verdict} ({how})", f"{there['total'] / 1e9:.2f}"))
    print_rows(title, ("bytes on each chip", "GB"), rows)
    print_rows("", ("a step", ""), list(_rows_of_a_step(values)))
    for one in values["advice"]:
        tried = (
            "not tried"
            if one["fits"] is None
            else f"{one['total'] / 1e9:.2f} GB, " + ("fits" if one["fits"] else "does not fit yet")
        )
        print(f"{one['change']}  saves about {one['saves'] / 1e9:.2f} GB; {tried}")


BYTES = {
    "parameters": "parameters of the student, float32",
    "optimizer": "optimizer",
    "teacher": "teacher",
    "data": "data of one dispatch",
    "evaluation": "evaluation: teacher's states of the held-out rows (by arithmetic)",
    "gradients": "gradients",
    "head": "head: logits of a chunk, kernels, their gradient (by arithmetic)",
    "activations": "activations and the rest",
}
"""Entry of ``bytes`` → its line in the table."""


def _rows_of_a_step(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    flops, built = values["flops"], values["compile_seconds"]
    yield "FLOPs of the models", f"{flops['model']:.3e}"
    yield "  the teacher's share", f"{flops['teacher_share']:.1%}"
    yield "FLOPs with what is computed twice", f"{flops['hardware']:.3e}"
    yield "lowered + compiled here, seconds", f"{built['lower']:.0f} + {built['compile']:.0f}"
    yield "  CPU-seconds of both", f"{built['cpu']:.0f}"
    if values["seconds"] is None:
        return
    yield "FLOPs of one chip as XLA counts them (loop bodies once)", f"{flops['compiled_once']:.3e}"
    for kind, amount in values["collectives"].items():
        yield f"{kind}: times, GB sent by each chip", f"{amount['count']:,.0f}, {amount['sent'] / 1e9:.2f}"
    seconds = values["seconds"]
    for part in ("compute", "memory", "interconnect"):
        mark = " <- bound" if seconds["bound"] == part else ""
        yield f"seconds at least: {part}{mark}", f"{seconds[part]:.3g}"
    yield "tokens/s at most", f"{values['tokens_per_second']:,.0f}"
    yield "MFU at most, the teacher counted as forward only", f"{values['mfu']:.0%}"
    yield (
        f"$ for 10^9 tokens at least, at {values['dollars_per_hour']:.2f} per chip-hour",
        (f"{values['dollars_per_billion_tokens']:,.0f}"),
    )
