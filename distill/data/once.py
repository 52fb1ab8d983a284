"""Data prepared by one process at a time: TFDS fails where a second one prepares the same data meanwhile."""

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distill.devices import processes


def prepared(make: Callable[[], Any]) -> Any:
    """The TFDS builder that ``make`` gives, its data written; where another process writes them, it is waited for.

    Of the processes of one run the first goes first.
    """
    with processes.first_goes_first("data"):
        builder = make()
        if not builder.info.splits:  # nothing was there when it was made
            with _alone(str(builder.data_dir)):
                if builder.is_prepared():  # written since: a builder made before the data were there has no splits
                    builder = make()
                else:
                    builder.download_and_prepare()
    return builder


@contextlib.contextmanager
def _alone(folder: str) -> Iterator[None]:
    """One process at a time; a bucket knows no locks."""
    if "://" in folder:
        yield
        return
    parent = Path(folder).parent
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
