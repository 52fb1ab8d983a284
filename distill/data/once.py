"""Locks the preparation of data: TFDS fails if two processes prepare the same data at the same time."""

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distill.devices import processes


def prepared(make: Callable[[], Any]) -> Any:
    """Returns the TFDS builder of ``make``, its data prepared; waits where another process prepares them.

    Within one run, process 0 prepares and the others wait for it.
    """
    with processes.first_goes_first("data"):
        builder = make()
        if not builder.info.splits:  # no data existed when the builder was made
            with _alone(str(builder.data_dir)):
                if builder.is_prepared():  # written in the meantime; a builder made before the data exist has no splits
                    builder = make()
                else:
                    builder.download_and_prepare()
    return builder


@contextlib.contextmanager
def _alone(folder: str) -> Iterator[None]:
    """Lets one process at a time into the block. Buckets have no locks, so there it does nothing."""
    if "://" in folder:
        yield
        return
    parent = Path(folder).parent
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
