"""Benchmark of the loss head compiled ahead of time for a TPU slice: memory and collectives. No TPU is needed.

Tokens are divided over the axes data and fsdp. Heads are placed as in the train step: widths over fsdp, the vocabulary
over tensor.
"""

import functools
import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distill import parallel
from distill.benchmarks.head import chunked_head, head_shapes, plain_head
from distill.devices import backend
from distill.errors import UserError
from distill.planning.hlo import Collective, collectives

SLICES = (("4x4", (2, 2, 4)), ("2x2", (1, 2, 2)), ("2x2", (4, 1, 1)))
"""Topology of v5e chips, and the sizes of the axes data, fsdp and tensor."""
HEADS = ((2048, 4096, 128_256), (1024, 4096, 151_936))
"""Widths of student and teacher, vocabulary size."""
TOKENS = 8192
"""Tokens on every device of data and fsdp."""


def tpu() -> list[str]:
    """Lines of the TPU benchmark.

    Raises UserError without the compiler for TPUs.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the compiler for TPUs (libtpu) is not installed; pip install -e '.[tpu]'. No TPU is needed.")
    jax.config.update("jax_platforms", "cpu")  # a backend for TPUs would wait for one
    lines = []
    for topology, shape in SLICES:
        mesh = tpu_mesh(topology, shape)
        placed = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        for width, teacher_width, vocab in HEADS:
            tokens = TOKENS * shape[0] * shape[1]
            chunk = backend.chunk_size(vocab // shape[2], "tpu")  # the columns of one device
            sizes = f"{tokens} tokens in chunks of {chunk}, V={vocab}, D={width}/{teacher_width}, bfloat16"
            lines.append(f"v5e {topology} ({placed}), {sizes}; on each device:")
            lines += [
                f"  {line}" for line in head_on(mesh, head_shapes(tokens, width, teacher_width, vocab, jnp.bfloat16))
            ]
    return lines


def tpu_mesh(topology: str, shape: tuple[int, int, int]) -> Mesh:
    """A mesh of axes (data, fsdp, tensor) over chips that are not attached."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # outside of Google Cloud there is no metadata server
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    devices = topologies.get_topology_desc(f"v5e:{topology}", "tpu").devices
    return Mesh(np.array(devices).reshape(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def head_on(mesh: Mesh, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> list[str]:
    """Lines for each of the two heads: memory, then collectives."""
    lines = []
    for name, function in (("chunked", functools.partial(chunked_head, mesh=mesh)), ("plain", plain_head)):
        start = time.perf_counter()
        try:
            program = compiled_on(mesh, function, shapes)
        except jax.errors.JaxRuntimeError as error:
            lines.append(f"{name}: {_too_large(error)}")
            continue
        seconds, memory = time.perf_counter() - start, program.memory_analysis()
        sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes)
        mib = "arguments {:.0f} MiB, temporary {:.0f} MiB, results {:.0f} MiB".format(*(n / 2**20 for n in sizes))
        lines.append(f"{name}: {mib}; compiled in {seconds:.0f} s")
        lines += [f"{name}: {line}" for line in summary(collectives(program.as_text()))]
    return lines


def compiled_on(mesh: Mesh, function: Callable, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    """Compiles value and gradients of ``function``, by the student's hidden states and head, for a mesh."""
    kernel = PartitionSpec(parallel.MESH_AXES["embed"], parallel.MESH_AXES["vocab"])
    rows = PartitionSpec(parallel.batch_axes(mesh))
    value, rows, heads = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), rows, kernel))
    places = (rows, heads, rows, heads, rows, rows)
    arguments = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p) for s, p in zip(shapes, places, strict=True)]
    both = jax.value_and_grad(function, argnums=(0, 1))
    return jax.jit(both, out_shardings=(value, (rows, heads))).lower(*arguments).compile()


def _too_large(error: Exception) -> str:
    """Compiler message of a program that does not fit; re-raises any other error."""
    code, _, message = str(error).partition(": ")
    if code != "RESOURCE_EXHAUSTED":
        raise error
    return message.splitlines()[0]


def summary(found: list[Collective]) -> list[str]:
    """Lines: collectives inside the loop over chunks, and those outside."""
    lines = []
    for inside, place in ((True, "for each chunk"), (False, "once")):
        kinds: dict[str, list[int]] = {}
        for one in found:
            if bool(one.loops) == inside:
                kinds.setdefault(one.kind, []).append(one.size)
        parts = [f"{len(sizes)} {kind} ({sum(sizes) / 2**20:.2f} MiB)" for kind, sizes in sorted(kinds.items())]
        if parts:
            lines.append(f"exchanged {place}: {', '.join(parts)}")
    return lines
