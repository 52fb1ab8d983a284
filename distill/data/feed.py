"""What the loop hands to the next dispatch, ready before it is asked for.

Two forms, one interface: ``feed(step)`` gives the last two arguments of the compiled steps, on the devices, for the
batches from ``step`` on. ``InMemory`` places all examples once and then rows of indices; ``Ahead`` reads batches and
sends them to the devices in a thread, for data larger than memory, and gives up on a source from which nothing comes.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from distill.batch import Batch
from distill.data.loader import Loader


class DataTimeout(Exception):
    """Nothing came from the source of the data for as long as was allowed."""


class InMemory:
    """Batches as rows of examples that lie on the devices.

    Args:
      loader: which rows.
      count: batches in a dispatch.
      place_examples: puts all examples onto the devices.
      place_rows: puts indices ``[count, B]`` there.
    """

    def __init__(self, loader: Loader, count: int, place_examples: Callable, place_rows: Callable):
        self.examples = place_examples(loader.examples)
        self.length = loader.examples.inputs.shape[1]
        self._rows = lambda step: place_rows(loader.rows(step, count))

    def __call__(self, step: int) -> tuple[Batch, Any]:
        """``(examples, rows)``."""
        return self.examples, self._rows(step)

    def close(self) -> None:
        """Nothing is open."""


class Ahead:
    """Batches read, and sent to the devices, in a thread while these compute.

    Args:
      batch: ``k -> batch k``, a pure function, such as ``StreamLoader.batch``.
      steps: first step of every dispatch; its stride is the number of batches in one.
      place: puts batches, stacked ``[count, B, …]``, onto the devices.
      timeout: seconds after which a batch that does not come is given up.
      stopped: whether the run was asked to stop; then nothing is waited for any more.
      ahead: dispatches kept ready, on the devices.

    Example:
      >>> from distill.batch import shift
      >>> batch = lambda k: shift(np.full((2, 5), k), np.ones((2, 5), bool))
      >>> feed = Ahead(batch, range(0, 6, 3), lambda batches: batches, timeout=9.0)
      >>> _, batches = feed(3)
      Traceback (most recent call last):
      ValueError: feed: step 3 asked for, 0 is next; dispatches come in order.
      >>> _, batches = feed(0)
      >>> batches.inputs.shape
      (3, 2, 4)
      >>> feed.close()
    """

    def __init__(
        self,
        batch: Callable[[int], Batch],
        steps: range,
        place: Callable[[Batch], Batch],
        *,
        timeout: float,
        stopped: Callable[[], bool] = lambda: False,
        ahead: int = 2,
    ):
        self.length: int | None = None
        self._batch, self._steps, self._place, self._timeout, self._stopped = batch, steps, place, timeout, stopped
        self._ready: queue.Queue[tuple[int, Any]] = queue.Queue(ahead)
        self._next, self._reading, self._since, self._closed = steps.start, steps.start, time.monotonic(), False
        threading.Thread(target=self._read, daemon=True).start()  # a daemon: a hung source must not keep the process

    def _read(self) -> None:
        for step in self._steps:
            try:
                found = self._place(self._stacked(range(step, step + self._steps.step)))
            except Exception as error:  # said where the batch is asked for
                found = error
            while not self._closed:
                try:
                    self._ready.put((step, found), timeout=0.1)
                    break
                except queue.Full:
                    pass
            if self._closed or isinstance(found, Exception):
                return

    def _stacked(self, numbers: range) -> Batch:
        batches = []
        for self._reading in numbers:
            self._since = time.monotonic()
            try:
                batches.append(self._batch(self._reading))
            except Exception as error:
                raise ValueError(f"batch {self._reading}: the data cannot be read: {error}") from error
        return jax.tree.map(lambda *fields: np.stack(fields), *batches)

    def __call__(self, step: int) -> tuple[None, Batch] | None:
        """``(None, batches [count, B, …])``, or None if the run was asked to stop while the source gave nothing.

        Raises:
          DataTimeout: the source gives nothing.
          ValueError: the source failed, or another step than the next is asked for.
        """
        if step != self._next:
            raise ValueError(f"feed: step {step} asked for, {self._next} is next; dispatches come in order.")
        asked = time.monotonic()
        while True:
            try:
                _, found = self._ready.get(timeout=min(0.2, self._timeout))
                break
            except queue.Empty:
                if self._stopped():
                    return None
                if time.monotonic() - max(asked, self._since) > self._timeout:
                    raise DataTimeout(f"batch {self._reading}: nothing from the data for {self._timeout:g} s") from None
        if isinstance(found, Exception):
            raise found
        self._next, self.length = step + self._steps.step, found.inputs.shape[-1]
        return None, found

    def close(self) -> None:
        """Ends the thread, once it comes back from the source."""
        self._closed = True
