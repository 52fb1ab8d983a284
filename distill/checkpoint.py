"""Checkpoints: Orbax, in this one file.

A checkpoint holds the train state (step, parameters, optimizer) and ``meta``: position in the data, configuration,
fingerprints of teacher, tokenizer and data. The order of a resume:

1. take the lock of the run folder (a second process in it is refused);
2. find the newest complete checkpoint (what a kill left half-written is ignored) whose files have the hashes noted
   when it was written. A damaged checkpoint is reported on stderr and renamed ``N.damaged``; the previous one is used;
3. compare its ``meta`` with what is asked for now: any difference is refused, with the list of differences;
4. read the state onto the devices; cut ``metrics.jsonl`` back to the checkpoint's step;
5. go on with batch ``meta.next_batch``, which equals the step: batch k is a pure function of k.

Orbax alone reads most flipped bits of large arrays as other numbers, silently, and notices damage elsewhere only in
what it happens to read. Hence the hashes, ``N/sha256.json``.
"""

import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill.config import differences, write_json
from distill.devices import processes
from distill.errors import MissingFile, UserError, check_fields
from distill.shapes import Params

MAY_CHANGE = frozenset({"keep", "on_nan", "skips_in_a_row", "data_timeout", "remat"})
"""Fields of ``TrainingConfig`` that may differ when a run resumes, as its devices may: the result does not depend on
them. A run that stopped at a NaN may resume with skipping."""

BETTER = {"exact_match": "max", "agreement": "max", "kl": "min", "nll": "min", "perplexity": "min"}
"""Metric of an evaluation → which of its values is the best."""


@dataclasses.dataclass(frozen=True)
class KeepConfig:
    """Which checkpoints stay: those that any of these names.

    Example:
      >>> KeepConfig(best="kl").score({"kl": 0.5}), KeepConfig(best="max:bleu").score({"bleu": 0.5})
      (-0.5, 0.5)
    """

    last: int = 2
    """The newest; with one alone, a damaged checkpoint has none before it."""
    every: int = 0
    """Those of steps that are multiples of it; 0: none."""
    best: str | None = None
    """The best by a metric of the evaluation at its step: one of ``BETTER``, or any as ``max:NAME``, ``min:NAME``."""

    def __post_init__(self):
        check_fields(self, "keep")
        if self.last < 1 or self.every < 0:
            raise UserError(f"keep: last={self.last}, every={self.every}; expected last ≥ 1 and every ≥ 0.")
        if self.best is not None and self.best not in BETTER and self.best.partition(":")[0] not in ("max", "min"):
            near = ", ".join(difflib.get_close_matches(self.best, BETTER) or BETTER)
            raise UserError(f"keep: best={self.best!r}; expected {near}, or max:NAME or min:NAME for another metric.")

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return self.best.partition(":")[2] or self.best

    def score(self, measured: dict[str, float] | None) -> float:
        """The metric, turned so that more is better; −∞ where it was not measured or is no number."""
        value = (measured or {}).get(self.metric, math.nan)
        sign = 1.0 if BETTER.get(self.best, self.best[:3]) == "max" else -1.0
        return sign * value if math.isfinite(value) else -math.inf


HASHES = "sha256.json"
"""In the folder of a checkpoint: file → hash of all others in it."""


def fingerprint(tree: Any) -> str:
    """Hash of every leaf of a tree: names, shapes, types, bits."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(processes.fetch(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Holds the run folder for this process; the kernel lets go of it when the process ends, however it ends.

    Of several processes the first holds it for all, and all have to see the same folder.

    Raises UserError when another run holds it, or a process does not see it.
    """
    with contextlib.ExitStack() as stack:
        mark = processes.from_first(lambda: _take(run, stack))
        if processes.index():
            _look_for(run, mark)
        yield


def _take(run: Path, stack: contextlib.ExitStack) -> str:
    """Takes the lock for as long as ``stack`` is open; returns what it wrote into its file."""
    run.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context((run / ".lock").open("a"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{run}: another process is running in this folder; wait for it, or use --run.") from None
    mark = f"{os.getpid()} {time.time_ns()}"
    file.truncate(0)
    file.write(mark)
    file.flush()
    return mark


def _look_for(run: Path, mark: str, seconds: float = 10.0) -> None:
    """Waits until what the first process wrote is seen here: shared file systems may take a moment."""
    end, file = time.monotonic() + seconds, run / ".lock"
    while not (file.exists() and file.read_text() == mark):
        if time.monotonic() > end:
            raise UserError(
                f"{run}: process {processes.index()} does not see what process 0 wrote there; the run folder has to "
                "lie on a file system that all processes share. Name one with --run."
            )
        time.sleep(0.1)


class Checkpoints:
    """The checkpoints of one run folder. Use as a context: leaving it waits for what is still being written.

    Args:
      run: the run folder.
      keep: which checkpoints stay.

    Example::

      with Checkpoints(run) as checkpoints:
          best = checkpoints.params(like, checkpoints.best("exact_match"))
    """

    def __init__(self, run: Path, keep: KeepConfig = KeepConfig()):
        from orbax.checkpoint import v1 as ocp

        self.path = Path(run).absolute() / "checkpoints"
        self._orbax = ocp
        try:
            self._checkpointer = ocp.training.Checkpointer(self.path, preservation_policy=_policy(keep))
        except ValueError as error:  # metrics that are no JSON
            raise UserError(f"{self.path}: unreadable checkpoint ({error}); {_AGAIN}") from error
        self._worker = ThreadPoolExecutor(1)
        self._sealing: Future[None] | None = None
        self._sound: set[int] = set()
        """Steps whose files were found as they were written; to hash them again costs as much as to read them."""

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self._settle()
        finally:
            self._worker.shutdown()
            self._checkpointer.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return None if self._checkpointer.latest is None else self._checkpointer.latest.step

    def trust_latest(self) -> None:
        """The caller guarantees that the newest checkpoint is sound: it is not hashed again."""
        self._sound |= set() if self.latest is None else {self.latest}

    def best(self, metric: str) -> int:
        """Step of the checkpoint that is best by a metric (``KeepConfig.best``) among those there are.

        Raises UserError where none was measured by it.
        """
        keep = KeepConfig(best=metric)
        scores = {one.step: keep.score(one.metrics) for one in self._checkpointer.checkpoints}
        measured = {step: score for step, score in scores.items() if score > -math.inf}
        if not measured:
            raise UserError(f"{self.path}: no checkpoint measured by {metric!r}; train with keep.best={metric!r}.")
        return max(measured, key=lambda step: (measured[step], step))

    def save(self, step: int, state: Any, meta: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Starts to write; returns when the state has been copied, before it is on the disk.

        Raises UserError, before anything is written, when the disk has no room for it.
        """
        self._settle()
        if self.latest == step:
            return
        processes.from_first(lambda: self._check_room(state))
        written = self._checkpointer.save_checkpointables_async(
            step, {"state": processes.shared(state), "meta": meta}, force=True, metrics=metrics or None
        )
        self._sealing = self._worker.submit(self._seal, step, written)

    def _check_room(self, state: Any) -> None:
        need = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 2**20
        free = shutil.disk_usage(self.path.parent).free
        if free < need:
            raise UserError(
                f"{self.path}: {free} bytes free, a checkpoint needs {need}; nothing was lost: free some space and run "
                "the same command again."
            )

    def _seal(self, step: int, written: Any) -> None:
        """Waits for a checkpoint, then notes the hashes of its files."""
        written.result()
        if processes.index() == 0:
            _note_hashes(self.path / str(step))

    def _settle(self) -> None:
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            sealing.result()

    def meta(self) -> dict[str, Any]:
        """``meta`` of the newest checkpoint."""
        return self._load({"meta": None}, None)["meta"]

    def restore(self, like: Any) -> Any:
        """The newest state, with the shapes, types and shardings of ``like``."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        return self._load({"state": abstract}, None)["state"]

    def params(self, like: Params, step: int | None = None) -> Params:
        """The parameters alone, newest or of a step, with the shapes of ``like``, whatever was saved beside them."""
        here = processes.everywhere()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
        context = self._orbax.Context()
        context.pytree.loading.partial_load = True
        with context:
            return self._load({"state": {"params": abstract}}, step)["state"]["params"]

    def _load(self, wanted: dict[str, Any], step: int | None) -> dict[str, Any]:
        step = self.latest if step is None else step
        if step is None:
            raise MissingFile(f"{self.path}: no complete checkpoint; train first (scripts/distill.py --run …).")
        if step not in self._sound and (damage := _damage(self.path / str(step))):
            raise UserError(f"{self.path}/{step}: unreadable checkpoint ({damage}); {_AGAIN}")
        self._sound.add(step)
        try:
            return self._checkpointer.load_checkpointables(step, wanted)
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.path}/{step}: unreadable checkpoint ({reason}).") from error


_AGAIN = "give the command that made it again: it goes on from the one before."


def resumed(run: Path, keep: KeepConfig = KeepConfig()) -> Checkpoints:
    """The checkpoints of a run that goes on, the newest of them sound (``drop_damaged``)."""
    drop_damaged(run)
    checkpoints = Checkpoints(run, keep)
    checkpoints.trust_latest()
    return checkpoints


def drop_damaged(run: Path) -> None:
    """Rename damaged checkpoints newer than the newest sound one to ``N.damaged`` and report them on stderr.

    Raises UserError, nothing renamed, when there are checkpoints and none is sound.
    """
    path = Path(run).absolute() / "checkpoints"
    usable = processes.from_first(lambda: _drop_damaged(path))  # one looks and renames, all go on from there
    if not usable:
        raise UserError(
            f"{path}: every checkpoint is damaged (the reasons stand above). Restore one from a copy, or remove "
            f"{path.parent} to start anew."
        )


def _drop_damaged(path: Path) -> bool:
    """Whether there is a sound checkpoint, or none at all."""
    found = (folder for folder in path.glob("[0-9]*") if folder.name.isdigit() and folder.is_dir())
    folders = sorted(found, key=lambda folder: int(folder.name), reverse=True)
    sound: Path | None = None
    damaged = []
    for folder in folders:  # of older ones only what is read to choose among them
        if reason := _damage(folder, "" if sound is None else "metrics/"):
            print(f"{folder}: damaged checkpoint: {reason}.", file=sys.stderr)
            damaged.append(folder)
        else:
            sound = sound or folder
    if sound is not None and damaged:
        for folder in damaged:
            folder.rename(_unused(folder.with_name(f"{folder.name}.damaged")))
        print(f"{sound}: used; what is damaged was renamed *.damaged.", file=sys.stderr)
    if sound is not None and not (sound / HASHES).exists():
        _note_hashes(sound)
    return sound is not None or not folders


def _damage(folder: Path, part: str = "") -> str:
    """What is wrong with a checkpoint, in the files whose names begin with ``part``; empty where nothing is."""
    try:
        want = json.loads((folder / HASHES).read_text())
        wrong = [name for name in sorted(want) if name.startswith(part) and _hash(folder / name) != want[name]]
        return f"{wrong[0]} is not as it was written" if wrong else ""
    except FileNotFoundError as error:
        if error.filename != str(folder / HASHES):
            return f"{error.filename} is missing"
        return ""  # killed between the last file and the hashes: Orbax had named it complete
    except (ValueError, AttributeError, TypeError, OSError) as error:
        return f"{HASHES} cannot be read ({error})"


def _policy(keep: KeepConfig) -> Any:
    from orbax.checkpoint import v1 as ocp

    policies = ocp.training.preservation_policies
    any_of = [policies.LatestN(keep.last)]
    if keep.every:
        any_of.append(policies.EveryNSteps(keep.every))
    if keep.best:
        any_of.append(policies.BestN(get_metric_fn=keep.score, n=1, keep_checkpoints_without_metrics=False))
    return policies.AnyPreservationPolicy(any_of)


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != HASHES)
    return sorted(str(path.relative_to(folder)) for path in paths)


def _note_hashes(folder: Path) -> None:
    write_json(folder / HASHES, {name: _hash(folder / name) for name in _files(folder)})


def _hash(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _unused(path: Path) -> Path:
    """``path``, or the first of ``path2``, ``path3`` … that is not there."""
    others = (path.with_name(f"{path.name}{number or ''}") for number in (0, *range(2, 10**6)))
    return next(other for other in others if not other.exists())


class Refused(UserError):
    """What is asked for is not what stands in the run folder."""


def refuse_changes(run: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises Refused with the differences, ``MAY_CHANGE`` aside, when a run would go on as something else."""
    lines = differences(_without(old, MAY_CHANGE), _without(new, MAY_CHANGE))
    if lines:
        changed = "\n  ".join(lines)
        raise Refused(
            f"{run}: this run was started with other settings; it cannot go on with these. Changed:\n  {changed}\n"
            "Give the old settings, or another folder with --run."
        )


def _without(values: Any, keys: frozenset[str]) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: _without(value, keys) for key, value in values.items() if key not in keys}
