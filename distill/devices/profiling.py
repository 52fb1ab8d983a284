"""Profiling of a training: a trace that XProf and TensorBoard open, and a table of its parts.

The trace covers a few dispatches after the first, which compiles. Every operation of a device counts with its self
time, and its name in the compiled program assigns it to a part of the step.
"""

import collections
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

DISPATCHES = 3
"""Dispatches that are traced; fewer if an evaluation comes before."""

PARTS = {
    "optimizer": r"\boptimizer\b",
    "head and losses": r"\bhead\b",
    "teacher": r"\bteacher\b",
    "student, backward": r"transpose\(",
    "student, forward": r"jvp\(|student",
}
"""Part → pattern of the names of its operations; the first match counts."""


class Event(NamedTuple):
    """An operation on a device, in nanoseconds."""

    name: str
    start: float
    end: float


class Profile:
    """Traces a few dispatches of a loop.

    Args:
      folder: of the trace; None: nothing is traced.

    Example::

      profile = Profile(run / "profile")
      ...
      profile.before(steps, arguments)      # of every dispatch
      metrics = steps(*arguments)
      profile.after(metrics, last, batches)  # of every dispatch; prints the table once there is one
    """

    def __init__(self, folder: Path | None):
        self.folder, self._seen, self._tracing, self._text = folder, 0, False, ""

    def before(self, steps: Any, arguments: tuple) -> None:
        """Starts the trace at the second dispatch."""
        if self.folder is not None and self._seen == 1:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arguments)
            self._text = steps.lower(*shapes).compile().as_text()  # from the cache of compiled programs
            jax.profiler.start_trace(str(self.folder))
            self._tracing = True

    def after(self, results: Any, last: bool, batches: int) -> None:
        """Prints the table when the trace is complete.

        Args:
          results: of the dispatch.
          last: whether something else than a dispatch comes next.
          batches: number of batches in a dispatch.
        """
        self._seen += 1
        if not self._tracing or not (last or self._seen == DISPATCHES + 1):
            return
        jax.block_until_ready(results)
        self.close()
        traces = sorted(self.folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        steps = (self._seen - 1) * batches
        print(*table(events_of(traces[-1]), names_of(self._text), steps, self.folder), sep="\n")

    def close(self) -> None:
        """Stops a running trace."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


def names_of(program: str) -> dict[str, str]:
    """Instruction → its name in the source, from the text of a compiled program.

    Example:
      >>> names_of('  %dot.1 = f32[2]{0} dot(%a, %b), metadata={op_name="jit(f)/teacher/dot_general"}')
      {'dot.1': 'jit(f)/teacher/dot_general'}
    """
    found = re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', program, re.M)
    return dict(found)


def part_of(name: str) -> str:
    """The part of ``PARTS`` of an operation, or ``"rest"``.

    Example:
      >>> part_of("jit(f)/while/body/transpose(jvp(student))/dot_general"), part_of("jit(f)/while/body/gather")
      ('student, backward', 'rest')
    """
    return next((part for part, mark in PARTS.items() if re.search(mark, name)), "rest")


def events_of(trace: Path) -> list[list[Event]]:
    """The operations of a trace, one list for each stream of a device (on CPUs, for each thread)."""
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")] or planes
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # jaxlib's types, on Python 3.13
        streams = [_operations(line) for plane in devices for line in plane.lines]
    return [events for events in streams if events]


def _operations(line: Any) -> list[Event]:
    events = []
    for event in line.events:
        operation = dict(event.stats).get("hlo_op") or (event.name if line.name == "XLA Ops" else None)
        if operation:
            name = str(operation).partition(" = ")[0].lstrip("%")
            events.append(Event(name, event.start_ns, event.start_ns + event.duration_ns))
    return events


def own_times(events: Iterable[Event]) -> dict[str, float]:
    """Name → self time in nanoseconds, without that of nested events (a loop contains its body).

    Example:
      >>> own_times([Event("while", 0, 10), Event("dot", 1, 4), Event("dot", 5, 9)])
      {'while': 3.0, 'dot': 7.0}
    """
    own: dict[str, float] = collections.defaultdict(float)
    around: list[Event] = []
    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        while around and around[-1].end <= event.start:
            around.pop()
        own[event.name] += event.end - event.start
        if around:
            own[around[-1].name] -= min(event.end, around[-1].end) - event.start
        around.append(event)
    return {name: float(value) for name, value in own.items()}


def table(streams: list[list[Event]], names: dict[str, str], steps: int, folder: Path) -> list[str]:
    """Lines: milliseconds of a step in each part, in gaps, and in the five longest operations.

    Times are of the busiest stream, so that they add up; other threads of a CPU work beside it.
    """
    if not streams:
        return [f"{folder}: no operation of a device in the trace; open it with XProf."]
    own, events = max(((own_times(events), events) for events in streams), key=lambda both: sum(both[0].values()))
    whole = max(event.end for event in events) - min(event.start for event in events)
    parts: dict[str, float] = collections.defaultdict(float)
    for name, time in own.items():
        parts[part_of(names.get(name, ""))] += time
    parts["nothing: gaps, host"] = whole - sum(own.values())

    def line(title: str, time: float) -> str:
        return f"{title:<48} {time / 1e6 / steps:>10.3f} {time / whole:>7.1%}"

    longest = sorted(own, key=own.get, reverse=True)[:5]
    return [
        f"{'where the time of a step goes':<48} {'ms':>10} {'share':>7}",
        *(line(part, time) for part, time in sorted(parts.items(), key=lambda item: -item[1])),
        "longest operations",
        *(line(f"  {name} {names.get(name, '').rpartition('/')[2]}"[:48], own[name]) for name in longest),
        f"trace: {folder}, for XProf or TensorBoard",
    ]
