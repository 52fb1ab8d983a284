"""Shared by the contestants of distill/benchmarks/step.py: the task, and turns over stdin and stdout."""

import json
import os
import resource
import sys
import time

TASK = json.loads(sys.argv[1])
"""``vocab``, ``ids`` (a file of int32 token ids [batch, length + 1]), ``student`` and ``teacher``: layers and width."""

_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # output of libraries must not mix with the answers


def turns(wait=lambda: None):
    """Yields twice for every line of stdin; prints the seconds of the second and the peak of resident memory in MB.

    The first is a warm-up: during the turns of others the system may have reclaimed free memory, while a training does
    not pause for seconds between two steps. ``wait`` blocks until all dispatched work is computed.
    """
    for _ in sys.stdin:
        yield
        wait()
        start = time.perf_counter()
        yield
        wait()
        seconds = time.perf_counter() - start
        print(
            json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]), file=_answers, flush=True
        )
