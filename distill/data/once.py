"""Data prepared by one process at a time: TFDS fails where a second one prepares the same data meanwhile."""

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill import processes


def prepared(make: Callable[[], Any]) -> Any:
    """The TFDS builder that ``make`` gives, its data written; where another process writes them, it is waited for.

    Of the processes of one run the first goes first. A builder made before the data are there does not find them.
    """
    with processes.first_goes_first("data"):
        builder = make()
        if builder.is_prepared():
            return builder
        if "://" in str(builder.data_dir):  # a bucket knows no locks
            builder.download_and_prepare()
            return builder
        folder = Path(builder.data_dir).parent
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            builder = make()
            builder.download_and_prepare()
        return builder
