"""Processes: one program on several machines, or several times on one, with one global mesh (``jax.distributed``).

Every process runs the same command. Which one it is comes from the environment:

==============================  =====================================================================================
Cloud TPU                       nothing to set: JAX asks the machine
Slurm (``srun``)                nothing to set: JAX reads Slurm's variables
anything else                   ``JAX_COORDINATOR_ADDRESS=HOST:PORT`` (process 0 listens there),
                                ``JAX_NUM_PROCESSES``, ``JAX_PROCESS_ID``
==============================  =====================================================================================

``JAX_NUM_PROCESSES=1`` means one process on any machine. Process 0 writes; the others only compute. A process that dies
ends the others: they miss its heartbeat (``HEARTBEAT_SECONDS``), report it, and exit with an error.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import UserError

HEARTBEAT_SECONDS = 30
"""Time without a heartbeat after which a process is lost."""
START_SECONDS = 300
"""Time that processes wait for each other at the start; ``JAX_START_SECONDS`` overrides it."""
MEETING_SECONDS = 1800
"""Time that processes wait for each other later; the heartbeat reports a lost one long before."""

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_numbers = itertools.count()
_dispatches = itertools.count()


class Start(NamedTuple):
    """Arguments of ``jax.distributed.initialize``; JAX finds those that are None."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None


def settings(environment: Mapping[str, str], on_tpu: bool = False) -> Start | None:
    """How this process joins the others; None for a single process.

    Args:
      environment: its variables.
      on_tpu: whether this machine has TPU chips.

    Raises:
      UserError: variables that are missing or contradict each other.

    Example:
      >>> settings({}) is None
      True
      >>> plain = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
      >>> settings(plain).process_id
      1
    """
    given = {name: environment[name] for name in _VARIABLES if environment.get(name)}
    numbers = {name: _number(name, given[name]) for name in _VARIABLES[1:] if name in given}
    count, index = (numbers.get(name) for name in _VARIABLES[1:])
    if count == 1 and not index:
        return None
    slurm = all(environment.get(name) for name in _SLURM) and environment["SLURM_NTASKS"] != "1"
    missing = [name for name in _VARIABLES if name not in given]
    if given and missing and not (slurm or on_tpu):
        raise UserError(
            f"{', '.join(f'{name}={value}' for name, value in given.items())} is set, {', '.join(missing)} is not; "
            "expected all three (HOST:PORT of process 0, the number of processes, the number of this one from 0 on) or "
            "none of them."
        )
    address = given.get("JAX_COORDINATOR_ADDRESS")
    if address is not None and not address.rpartition(":")[2].isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: expected HOST:PORT, such as 10.0.0.2:1234.")
    if count is not None and index is not None and not 0 <= index < count:
        raise UserError(f"JAX_PROCESS_ID={index}, JAX_NUM_PROCESSES={count}; expected ids 0 … {count - 1}.")
    if not missing or slurm or on_tpu:
        return Start(address, count, index, _devices(environment) if slurm else None)
    return None


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise UserError(f"{name}={text}: expected a whole number from 0 on.")
    return int(text)


def _devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """All GPUs of a node for its one task; by default JAX gives a Slurm task one device."""
    one_task = environment["SLURM_NTASKS"] == environment.get("SLURM_NNODES")
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    if not one_task or not gpus.isdigit() or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    return tuple(range(int(gpus)))


def start() -> None:
    """Joins this process with the others; call it before any array is made. A no-op for a single process.

    Afterwards processes other than 0 print nothing on stdout. The process exits with a message and code 1 if the others
    do not come within ``START_SECONDS``.

    Raises:
      UserError: as ``settings``.
    """
    found = settings(os.environ, _has_tpu())
    if found is None:
        return
    import jax

    if jax.distributed.is_initialized():
        return
    seconds = _number("JAX_START_SECONDS", os.environ.get("JAX_START_SECONDS") or str(START_SECONDS))
    watch = threading.Timer(seconds, _nobody_came, (found, seconds))
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            *found[:3],
            local_device_ids=found.local_device_ids,
            cluster_detection_method=None if None in found[:3] else "deactivate",
            initialization_timeout=seconds + 60,  # ours comes first: its message is the clearer one
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=60,
        )
    finally:
        watch.cancel()
    if index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives


def _has_tpu() -> bool:
    """Whether this machine has TPU chips, so that JAX can ask about their slice."""
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    places = (*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*"))
    return "tpu" in wanted and bool(places) and bool(os.environ.get("TPU_WORKER_HOSTNAMES") or _has_libtpu())


def _has_libtpu() -> bool:
    import importlib.util

    return importlib.util.find_spec("libtpu") is not None


def _nobody_came(found: Start, seconds: int) -> None:
    where = found.coordinator_address or "the coordinator that JAX found"
    many = "the other processes" if found.num_processes is None else f"all {found.num_processes} processes"
    who = "a process" if found.process_id is None else f"process {found.process_id}"
    print(
        f"error: {who} waited {seconds} s at {where} for {many}. Is process 0 running there, can this machine reach "
        f"it, does every process have the same {_VARIABLES[0]} and {_VARIABLES[1]}, and each its own {_VARIABLES[2]}?",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def abort(code: int, message: str) -> None:
    """Exits immediately. An orderly exit would wait for processes that wait for this one."""
    print(message, file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    if not index():
        time.sleep(2)  # the others hear from process 0 why it ends (``from_first``) before they miss it
    os._exit(code)


def count() -> int:
    """Number of processes."""
    import jax

    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Index of this process; process 0 writes."""
    import jax

    return jax.process_index() if jax.distributed.is_initialized() else 0


def from_first(make: Callable[[], Any], *, seconds: float = MEETING_SECONDS) -> Any:
    """Runs ``make`` on process 0 and returns its value, which JSON can hold, on every process.

    Raises:
      UserError: on every process, what ``make`` raised on process 0 (there, with its own class).
      TimeoutError: process 0 sent nothing for ``seconds``.
    """
    if count() == 1:
        return make()
    from jax._src.distributed import global_state  # the key-value store has no public name

    client, key = global_state.client, f"distill/from_first/{next(_numbers)}"
    if index():
        try:
            sent = json.loads(client.blocking_key_value_get(key, round(seconds * 1000)))
        except Exception as error:
            raise TimeoutError(f"process 0 sent nothing for {seconds:.0f} s ({error}); see its log.") from error
        if "error" in sent:
            raise UserError(sent["error"])
        return sent["value"]
    try:
        value = make()
    except Exception as error:
        client.key_value_set(key, json.dumps({"error": f"process 0: {error}"}))
        raise
    client.key_value_set(key, json.dumps({"value": value}))
    return value


def meet(what: str, *, seconds: float = MEETING_SECONDS) -> None:
    """Barrier: waits until every process has called it.

    Raises:
      TimeoutError: a process did not come within ``seconds``.
    """
    if count() == 1:
        return
    from jax._src.distributed import global_state

    try:
        global_state.client.wait_at_barrier(f"distill/meet/{next(_numbers)}/{what}", round(seconds * 1000))
    except Exception as error:
        raise TimeoutError(f"not all {count()} processes came to: {what}, in {seconds:.0f} s ({error}).") from error


def agree(what: str, value: str) -> None:
    """Raises UserError on the processes where ``value`` differs from that of process 0."""
    if from_first(lambda: value) != value:
        raise UserError(f"process {index()} has another {what} than process 0; give all the same command and files.")


@contextlib.contextmanager
def first_goes_first(what: str) -> Iterator[None]:
    """Runs the block on process 0 first, then on the others, which find its files in a shared folder."""
    if index():
        meet(what)
    yield
    if not index():
        meet(what)


def asked_to_stop() -> bool:
    """Whether a process got SIGTERM; True at the same call on all, so all must call it equally often."""
    if count() == 1:
        return False
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(_dispatches))


def fetch(tree: Any) -> Any:
    """Whole arrays in numpy on every process; gathers shards of other processes."""
    import jax
    import numpy as np

    if count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def whole(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def spread(tree: Any, shardings: Any) -> Any:
    """``jax.device_put`` for shardings over the devices of all processes; each process places its shards.

    Args:
      tree: arrays whose values are equal on all processes, or which already lie on all devices.
      shardings: one, or a tree of them.
    """
    import jax
    import numpy as np

    if count() == 1:
        return jax.device_put(tree, shardings)

    def one(leaf: Any, sharding: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda where: values[where])

    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: one(leaf, shardings), tree)
    return jax.tree.map(one, tree, shardings)


def everywhere() -> Any:
    """The sharding of a replicated array: on all devices, or on the first one of a single process."""
    import jax
    import numpy as np

    if count() == 1:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def shared(tree: Any) -> Any:
    """Turns arrays that are equal on all processes into replicated global arrays; global ones are unchanged."""
    import jax

    if count() == 1:
        return tree

    def of_all(leaf: Any) -> bool:
        return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable

    return jax.tree.map(lambda leaf: leaf if of_all(leaf) else spread(leaf, everywhere()), tree)
