"""Checkpoints: Orbax, in this one file.

A checkpoint holds the train state (step, parameters, optimizer) and ``meta``: position in the data, configuration,
fingerprints of teacher, tokenizer and data. The order of a resume:

1. take the lock of the run folder (a second process in it is refused);
2. find the newest complete checkpoint (what a kill left half-written is ignored);
3. compare its ``meta`` with what is asked for now: any difference is refused, with the list of differences;
4. read the state onto the devices; cut ``metrics.jsonl`` back to the checkpoint's step;
5. go on with batch ``meta.next_batch``, which equals the step: batch k is a pure function of k.
"""

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill.config import differences
from distill.shapes import Params


def fingerprint(tree: Any) -> str:
    """Hash of every leaf of a tree: names, shapes, types, bits."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Holds the run folder for this process; the kernel lets go of it when the process ends, however it ends.

    Raises ValueError when another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{run}: another process is running in this folder; wait for it, or use --run.") from None
        yield


class Checkpoints:
    """The checkpoints of one run folder. Use as a context: leaving it waits for what is still being written."""

    def __init__(self, run: Path, keep: int = 2):
        from orbax.checkpoint import v1 as ocp

        self.path = Path(run).absolute() / "checkpoints"
        policy = ocp.training.preservation_policies.LatestN(keep)
        self._orbax = ocp
        self._checkpointer = ocp.training.Checkpointer(self.path, preservation_policy=policy)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._checkpointer.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return None if self._checkpointer.latest is None else self._checkpointer.latest.step

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts to write; returns when the state has been copied, before it is on the disk.

        Raises ValueError, before anything is written, when the disk has no room for it.
        """
        if self.latest == step:
            return
        need = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 2**20
        free = shutil.disk_usage(self.path.parent).free
        if free < need:
            raise ValueError(
                f"{self.path}: {free} bytes free, a checkpoint needs {need}; nothing was lost: free some space and run "
                "the same command again."
            )
        self._checkpointer.save_checkpointables_async(step, {"state": state, "meta": meta}, force=True)

    def meta(self) -> dict[str, Any]:
        """``meta`` of the newest checkpoint."""
        return self._load({"meta": None})["meta"]

    def restore(self, like: Any) -> Any:
        """The newest state, with the shapes, types and shardings of ``like``."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        return self._load({"state": abstract})["state"]

    def params(self, like: Params) -> Params:
        """The newest parameters alone, with the shapes of ``like``, whatever was saved beside them."""
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
        context = self._orbax.Context()
        context.pytree.loading.partial_load = True
        with context:
            return self._load({"state": {"params": abstract}})["state"]["params"]

    def _load(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if self.latest is None:
            raise FileNotFoundError(f"{self.path}: no complete checkpoint; train first (scripts/distill.py --run …).")
        try:
            return self._checkpointer.load_checkpointables(None, wanted)
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(
                f"{self.path}/{self.latest}: unreadable checkpoint ({str(error).splitlines()[0]}); remove that folder "
                "to continue from the one before."
            ) from error


def refuse_changes(run: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises ValueError with the list of differences when a run would go on as something else."""
    lines = differences(old, new)
    if lines:
        changed = "\n  ".join(lines)
        raise ValueError(
            f"{run}: this run was started with other settings; it cannot go on with these. Changed:\n  {changed}\n"
            "Give the old settings, or another folder with --run."
        )
