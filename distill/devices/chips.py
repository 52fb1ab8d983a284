"""Chips, and slices of them by name: ``v5e:4x4``, ``v5p:4x4x4``, ``gpu:8``."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from distill.errors import UserError


class Chip(NamedTuple):
    """A chip by its data sheet; nothing here is measured."""

    name: str
    flops: float
    """Matrix products of bfloat16, FLOP/s, dense."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Of the memory, in bytes/s."""
    links: float
    """Bytes/s to its neighbours over all links together."""
    dollars: float
    """Price of an hour, on demand."""
    dimensions: int
    """Dimensions of the torus of its slices; 0: several chips in one machine."""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 16e9, 819e9, 200e9, 1.20, 2),
        Chip("v5p", 459e12, 95e9, 2765e9, 600e9, 4.20, 3),
        Chip("v6e", 918e12, 32e9, 1638e9, 400e9, 2.70, 2),
        Chip("h100", 989e12, 80e9, 3350e9, 450e9, 11.06, 0),
        Chip("a100", 312e12, 80e9, 2039e9, 300e9, 5.07, 0),
    )
}
"""``gpu`` is an h100. Sources: Cloud TPU's pages on v5e, v5p and v6e; NVIDIA's data sheets (SXM, 80 GB, NVLink)."""

PRICED = "2025-06"
"""When the dollars were Google Cloud's list prices on demand in the United States, as far as known. They change: give
your own."""


class Topology(NamedTuple):
    """A slice of chips."""

    name: str
    chip: Chip
    devices: int

    @property
    def tpu(self) -> bool:
        """Whether the compiler for TPUs knows it."""
        return self.chip.dimensions > 0


def parse_topology(name: str) -> Topology:
    """The chips of a slice.

    Args:
      name: ``v5e:4x4``, ``v5p:2x2x4``, ``v6e:4x4``; of GPUs their number, ``h100:8``, ``a100:8``, ``gpu:8`` (h100).

    Raises:
      UserError: another form, another chip, or dimensions such a chip has not.

    Example:
      >>> topology = parse_topology("v5p:2x2x4")
      >>> topology.devices, topology.chip.memory
      (16, 95000000000.0)
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match:
        raise UserError(f"topology {name!r}; expected such as v5e:4x4, v5p:2x2x4, v6e:4x4 or gpu:8.")
    chip = CHIPS.get("h100" if match[1] == "gpu" else match[1])
    if chip is None:
        raise UserError(f"topology {name!r}: no chip {match[1]!r}; expected one of {', '.join(CHIPS)}, gpu.")
    sizes = [int(size) for size in match[2].split("x")]
    if len(sizes) != max(chip.dimensions, 1) or min(sizes) < 1:
        wanted = "x".join("4" * chip.dimensions) or "8"
        raise UserError(f"topology {name!r}: expected {max(chip.dimensions, 1)} sizes, such as {chip.name}:{wanted}.")
    return Topology(name, chip, math.prod(sizes))


def prepare_jax(topology: Topology) -> None:
    """Sets JAX up to compile for a slice without an accelerator; call it before JAX computes anything."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    if not topology.tpu:
        jax.config.update("jax_num_cpu_devices", topology.devices)


def devices_of(topology: Topology) -> Sequence[Any]:
    """Devices to lower a program for; none of them need to be attached.

    For a TPU they are those that the TPU compiler describes, for GPUs the same number of CPU devices.

    Raises:
      UserError: that compiler is missing, knows no such slice, or JAX has been started with fewer CPU devices.
    """
    import jax

    if not topology.tpu:
        if (there := len(jax.devices("cpu"))) < topology.devices:
            raise UserError(
                f"{topology.name}: JAX was started with {there} CPU devices; set jax_num_cpu_devices to "
                f"{topology.devices} before anything is computed."
            )
        return jax.devices("cpu")[: topology.devices]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the compiler for TPUs (libtpu) is not installed; pip install -e '.[tpu]'. No TPU is needed.")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to ask
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")  # of this machine; has no part in what is described
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several plans at a time: no chip is touched
    try:
        return topologies.get_topology_desc(topology.name, "tpu").devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology {topology.name!r}: {str(error).partition(': ')[2] or error}") from error
