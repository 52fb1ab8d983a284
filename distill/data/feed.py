"""Feeds: the batches of the next dispatch, prepared in advance.

Both feeds have one interface: ``feed(step)`` returns the last two arguments of the compiled steps, on the devices, for
the batches from ``step`` on. ``InMemory`` places all examples once and then only rows of indices. ``Ahead`` is for data
larger than memory: a thread reads batches and sends them to the devices. It raises ``DataTimeout`` if the source hangs.
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
from distill.errors import UserError


class DataTimeout(Exception):
    """The data source gave no batch within the timeout."""


class InMemory:
    """Batches as indices into examples that lie on the devices.

    Args:
      loader: chooses the rows of a batch.
      count: batches in a dispatch.
      place_examples: puts all examples onto the devices.
      place_rows: puts indices ``[count, B]`` onto the devices.
    """

    def __init__(self, loader: Loader, count: int, place_examples: Callable, place_rows: Callable):
        self.examples = place_examples(loader.examples)
        self.length = loader.examples.inputs.shape[1]
        self._rows = lambda step: place_rows(loader.rows(step, count))

    def __call__(self, step: int) -> tuple[Batch, Any]:
        """Returns ``(examples, rows)``."""
        return self.examples, self._rows(step)

    def close(self) -> None:
        """Does nothing: no resource is open."""


class Ahead:
    """Batches that a thread reads and sends to the devices while these compute.

    Args:
      batch: ``k -> batch k``, a pure function, such as ``StreamLoader.batch``.
      steps: first step of every dispatch; its stride is the number of batches in one.
      place: puts batches, stacked ``[count, B, …]``, onto the devices.
      timeout: seconds to wait for a batch before ``DataTimeout`` is raised.
      stopped: whether the run was asked to stop, which ends any waiting.
      ahead: dispatches kept ready, on the devices.

    Example:
      >>> from distill.batch import shift
      >>> batch = lambda k: shift(np.full((2, 5), k), np.ones((2, 5), bool))
      >>> feed = Ahead(batch, range(0, 6, 3), lambda batches: batches, timeout=9.0)
      >>> _, batches = feed(3)
      Traceback (most recent call last):
      distill.errors.UserError: feed: step 3 asked for, 0 is next; dispatches come in order.
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
        threading.Thread(target=self._read, daemon=True).start()  # a hung source must not keep the process alive

    def _read(self) -> None:
        for step in self._steps:
            try:
                found = self._place(self._stacked(range(step, step + self._steps.step)))
            except Exception as error:  # raised in the thread that asks for the batch
                found = error
            while not self._closed:  # a put without a timeout would never notice ``close``
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
                raise UserError(f"batch {self._reading}: the data cannot be read: {error}") from error
        return jax.tree.map(lambda *fields: np.stack(fields), *batches)

    def __call__(self, step: int) -> tuple[None, Batch] | None:
        """Returns ``(None, batches [count, B, …])``, or None if the run is stopped while it waits for the source.

        Raises:
          DataTimeout: no batch within the timeout.
          UserError: the source failed, or ``step`` is not the next one.
        """
        if step != self._next:
            raise UserError(f"feed: step {step} asked for, {self._next} is next; dispatches come in order.")
        asked = time.monotonic()
        while True:
            try:
                _, found = self._ready.get(timeout=min(0.2, self._timeout))
                break
            except queue.Empty:
                if self._stopped():
                    return None
                # Measured from the start of the current read: a slow source that still delivers batches is not hung.
                if time.monotonic() - max(asked, self._since) > self._timeout:
                    raise DataTimeout(f"batch {self._reading}: nothing from the data for {self._timeout:g} s") from None
        if isinstance(found, Exception):
            raise found
        self._next, self.length = step + self._steps.step, found.inputs.shape[-1]
        return None, found

    def close(self) -> None:
        """Ends the thread when the current read returns."""
        self._closed = True
