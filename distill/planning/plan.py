"""What a run will need, before a machine is paid for: the real step, lowered on shapes alone, compiled for the chips.

No weight, no text, no accelerator. For a slice of TPUs the step is compiled by the TPUs' compiler, so that bytes are
its own; for GPUs it is compiled for as many CPU devices, which is an estimate and says so. Seconds and dollars are
bounds from a roofline (``roofline.py``), never measured.
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
    """What the distilled student learns (``experiments.text.run.distillation``), as shapes.

    The examples are those of one dispatch.

    Raises:
      FileNotFoundError: the shapes of a model are not known.
      ValueError: an encoder, a student larger than its teacher, or one of factors.
    """
    if config.signal.kind != "live":
        raise ValueError("plan: stored targets cannot be planned yet; leave out --signal.kind, for a live teacher.")
    if not config.student.start.plain:
        raise ValueError("plan: a student in factors, or with its teacher's embeddings, cannot be planned yet.")
    teacher, words = _decoder_of(config.teacher, config)
    if config.student.source is None:
        asked = config.student
        sizes = {name: getattr(asked, name) for name in ("kv_heads", "feed_forward", "width")}
        student = part_of(teacher, layers=asked.start.layers or asked.layers, **sizes)
    else:
        student, of_student = _decoder_of(config.student.source, config)
        words = min(words, of_student)
    if config.vocabulary is not None:  # both are cut to as many words
        words = min(words, config.vocabulary)
        teacher, student = (dataclasses.replace(one, vocab_size=words) for one in (teacher, student))
    of_teacher, of_student = (decoder(one).with_vocabulary(words) for one in (teacher, student))
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
        raise ValueError(f"{name}: an encoder; expected a model that writes text.")
    return shape, tokens


def check(config: Any, dollars_per_hour: str | None = None, tries: str = "0") -> tuple[float | None, int]:
    """The numbers of a command line, once a plan can be made at all.

    Raises:
      ValueError: a configuration of another kind, one that uses no mesh, or no number where there should be one.
    """
    if not isinstance(config, TextConfig):
        raise ValueError(
            f"plan: configuration {config.name} is of kind {config.kind}, which runs on one machine; expected one of "
            "kind text, such as qwen3_8b_to_0p6b."
        )
    if config.parallel.backend in ("one_device", "pmap"):
        raise ValueError(
            f"plan: parallel.backend={config.parallel.backend}; expected mesh, with fsdp and tensor, to plan a slice."
        )
    try:
        dollars = None if dollars_per_hour is None else float(dollars_per_hour)
        number = int(tries)
    except ValueError as error:
        raise ValueError(f"plan: --dollars-per-hour and --try are numbers; {error}.") from error
    if number < 0 or (dollars is not None and not dollars >= 0.0):
        raise ValueError(f"plan: dollars-per-hour={dollars}, try={number}; expected at least 0.")
    return dollars, number


class Program(NamedTuple):
    """A step, compiled."""

    bytes: dict[str, int]
    """On one device: what is placed there, and of the program ``temporary`` and ``total``."""
    exchanged: list[Collective]
    flops_once: float
    """Of XLA's cost analysis, which counts the body of a loop once."""
    seconds: dict[str, float]
    """``lower`` and ``compile`` on this machine, and ``cpu``: CPU-seconds of both."""
    fits: bool


def compile_step(config: TextConfig, topology: Topology, task: Task | None = None) -> Program:
    """The step of a configuration on a slice.

    Raises:
      ValueError: a mesh that does not divide the devices or the models, a batch that cannot be divided.
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
    """Bytes on one device of the teacher's states on the held-out rows, which are kept (``evaluation/heldout.py``).

    Where the configuration does not say how many rows there are, those of the learning curve.
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
        raise ValueError(
            f"training: batch_size={training.batch_size} in micro_batches={training.micro_batches} gives {part} "
            f"examples at a time, which cannot be divided over {rows} devices."
        )


def _needed(error: Exception, placed: int) -> dict[str, int]:
    """``temporary`` and ``total`` of a program that the compiler found too large; any other error is raised again."""
    match = re.search(r"Used ([\d.]+)([KMGT]) of", str(error))
    if not str(error).startswith("RESOURCE_EXHAUSTED") or match is None:
        raise error
    total = int(float(match[1]) * 2 ** (10 * (" KMGT".index(match[2]))))
    return {"temporary": max(total - placed, 0), "total": total}


# ---- the plan


def plan(
    config: TextConfig, topology: Topology, *, dollars_per_hour: float | None = None, tries: int = 0
) -> dict[str, Any]:
    """Bytes, FLOPs, traffic, seconds and dollars of a step, as JSON can hold them.

    Args:
      config: the run.
      topology: the slice.
      dollars_per_hour: for one chip; None: the list price (``chips.PRICED``).
      tries: where the step does not fit, so many of the changes that are proposed are compiled, the cheapest first,
        until one fits.

    Returns:
      ``config``, ``topology``, ``devices``, ``chip``, ``mesh``, ``batch``, ``layers`` (of the student), ``chunk``
      (positions of the head at a time),
      ``compiled_for`` (``TPU``, or ``CPU`` in the
      place of GPUs: an estimate), ``fits``, ``bytes`` (of one device), ``flops`` (of a step), ``collectives`` (of one
      device and step, by kind), ``seconds``, ``tokens_per_second``, ``mfu``, ``dollars_per_hour``,
      ``dollars_per_billion_tokens``, ``compile_seconds`` and ``advice``. Of a step that does not fit, what its program
      would say is None.

    Raises:
      ValueError, FileNotFoundError: as ``compile_step``, ``abstract_task``.
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
    words = task.student.vocab_size // mesh["tensor"]
    chunk = config.training.chunk_size
    if chunk is None:
        platform = "tpu" if topology.tpu else "gpu"
        chunk = backend.chunk_size(words, platform) if task.student.vocab_size >= CHUNKED_FROM else 0
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
    """Those of the program, and what its temporary ones are for, by arithmetic: ``gradients`` (as large as the
    parameters), ``head`` (logits of a chunk with their gradients, the gathered kernels, the gradient of the student's),
    ``activations`` (the rest: what the layers keep, gathered kernels)."""
    words = task.student.vocab_size // split.tensor
    widths = task.student.config.width, task.teacher.config.width
    chunk = 16 * words * split.chunk
    head = chunk + words * (2 * sum(widths) + 4 * widths[0])
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
    """``collectives``, ``traffic``, ``seconds`` and what follows from them."""
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
    """Of one device and one step, for each kind of collective: ``count``, ``bytes`` of results, ``sent``.

    Args:
      found: of a program of several steps.
      chunks: turns of a loop whose length is known only when it runs, that over the chunks of the head: all tokens
        count.
      steps: of the program.
    """
    kinds: dict[str, dict[str, float]] = {}
    for one in found:
        kind, times = kinds.setdefault(one.kind, {"count": 0.0, "bytes": 0.0, "sent": 0.0}), one.times(chunks) / steps
        for name, amount in (("count", 1.0), ("bytes", float(one.size)), ("sent", one.sent)):
            kind[name] += times * amount
    return dict(sorted(kinds.items()))


# ---- what to change


class Change(NamedTuple):
    """Something that makes a step smaller."""

    what: str
    saves: int
    """Bytes on each device, by arithmetic from those of the step as it is."""
    apply: Callable[[TextConfig], TextConfig]


def changes(config: TextConfig, values: dict[str, Any]) -> list[Change]:
    """What a step that does not fit could change, what costs least time first."""
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
        layers = values["layers"]  # of which one is then there at a time
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
    """``changes``, and what was found of those compiled: each on top of those before it, until the step fits."""
    said = []
    for number, change in enumerate(changes(config, values)):
        one: dict[str, Any] = {"change": change.what, "saves": change.saves, "total": None, "fits": None}
        if number < tries:
            config = change.apply(config)
            program = compile_step(config, topology)
            one |= {"total": program.bytes["total"], "fits": program.fits}
        said.append(one)
        if one["fits"]:
            break
    return said


# ---- for people


def print_plan(values: dict[str, Any]) -> None:
    """The tables."""
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
"""Lines of the table."""


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
