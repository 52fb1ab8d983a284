"""A run folder: the configuration of its experiment, and the models trained in it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from distill.checkpoint import Checkpoints, Refused
from distill.config import from_dict, to_dict, write_json
from distill.errors import MissingFile, UserError
from distill.models.model import Model
from distill.shapes import Params


class Trained(NamedTuple):
    """A model and its parameters."""

    model: Model
    params: Params


def restore(model: Model, run: Path, best: str | None = None) -> Trained:
    """A trained model from its run folder: the newest, or the best by a metric of the evaluation (``KeepConfig.best``).

    Raises:
      MissingFile: no checkpoint there.
      UserError: the checkpoint holds a model of another shape, or none was measured by ``best``.
    """
    if not (run / "checkpoints").is_dir():
        raise MissingFile(f"{run}: no checkpoints; expected a run folder, made by scripts/distill.py or train.py.")
    with Checkpoints(run) as checkpoints:
        step = None if best is None else checkpoints.best(best)
        params = checkpoints.params(jax.eval_shape(model.init, jax.random.key(0)), step)
    return Trained(model, params)


def identity(config: Any, *parts: str, **more: Any) -> dict[str, Any]:
    """Parts of the configuration and fingerprints that may not change when a training goes on."""
    everything = to_dict(config)
    return {part: everything[part] for part in parts} | more


@contextlib.contextmanager
def configured(run: Path, config: Any) -> Iterator[None]:
    """Writes RUN/config.json for the block; puts the old one back if the block fails before it saves anything.

    The scripts that read it must find the configuration that the run was made with.
    """
    file, before, saved = run / "config.json", None, _checkpoints(run)
    with contextlib.suppress(OSError, ValueError):  # none yet, or a damaged one
        before = json.loads(file.read_text())
    write_config(run, config)
    try:
        yield
    except BaseException as error:  # Ctrl-C too
        if before is not None and (isinstance(error, Refused) or _checkpoints(run) == saved):
            write_json(file, before)
        raise


def _checkpoints(run: Path) -> set[Path]:
    """Checkpoints of all arms of a run."""
    return set(run.glob("checkpoints/[0-9]*")) | set(run.glob("*/checkpoints/[0-9]*"))


def write_config(run: Path, config: Any) -> None:
    """Writes RUN/config.json: the configuration of an experiment, and its kind.

    Raises:
      UserError: the folder holds an experiment of another kind, whose configuration stays.
    """
    file = run / "config.json"
    if (there := _kind_of(file)) not in (None, config.kind):
        raise UserError(f"{run}: holds an experiment of kind {there!r}; this one is {config.kind!r}: another --run.")
    write_json(file, {"kind": config.kind} | to_dict(config))


def _kind_of(file: Path) -> str | None:
    """The kind of experiment of a config.json; None where none can be read."""
    try:
        return json.loads(file.read_text()).get("kind")
    except (OSError, ValueError, AttributeError):
        return None


def read_config(run: Path, expected: type) -> Any:
    """The configuration, of the class ``expected``, that a run folder was made with.

    Raises:
      MissingFile: no run folder.
      UserError: its config.json cannot be read.
    """
    file = run / "config.json"
    if not file.is_file():
        raise MissingFile(f"{run}: no config.json; expected a run folder, made by scripts/distill.py.")
    try:
        values = json.loads(file.read_text())
        if (kind := values.pop("kind", None)) != expected.kind:
            raise UserError(f"{file}: an experiment of kind {kind!r}; expected {expected.kind!r}.")
        return from_dict(expected, values)
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); expected the configuration of a run.") from error
