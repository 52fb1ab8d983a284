"""Collectives of a compiled program, parsed from its text.

The compiler's cost analysis counts the body of a loop once. Here every collective is multiplied by the trip counts of
the loops around it: layers, micro-batches, chunks.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_TYPES = {"pred": 1, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf"%?\S+ = (.*?) ({_KINDS})(-start)?\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(?:\{([^}]*)\}|%?([\w.-]+))"
)
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")


class Collective(NamedTuple):
    """One collective operation of a compiled program."""

    kind: str
    size: int
    """Bytes of its result on one device; for a reduce-scatter, bytes of its operand."""
    loops: tuple[int | None, ...]
    """Trip count of each loop around it, the outermost first; None where it is known only at run time."""
    devices: int | None
    """Devices in one group; None where the text has no known form of it."""

    def times(self, unknown: int = 1) -> int:
        """Number of executions; a loop of unknown length counts as ``unknown`` iterations."""
        return math.prod(unknown if turns is None else turns for turns in self.loops)

    @property
    def sent(self) -> float:
        """Bytes that a device sends per execution on a ring of n devices.

        An all-gather or reduce-scatter of S bytes sends S(n − 1)/n, an all-reduce twice that.
        """
        others = 1.0 if self.devices is None else 1.0 - 1.0 / self.devices
        if self.kind == "collective-permute":
            return float(self.size)
        return self.size * others * (2.0 if self.kind == "all-reduce" else 1.0)


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program.

    The compiler splits some into stages in order to compute between them. These occur several times in the text with
    the same channel and count once.
    """
    bodies = {name: lines for name, lines in _computations(text)}
    around = _loops(bodies)
    found: dict[tuple, Collective] = {}
    for name, lines in bodies.items():
        for number, line in enumerate(lines):
            if match := _COLLECTIVE.search(line):
                one = _collective(name, line, match, around.get(name, ()))
                channel = re.search(r"channel_id=(\d+)", line)
                key = (channel[1],) if channel else (name, number)
                # Stages of one collective may lie in different loops; the one that runs most often counts.
                if key not in found or found[key].times() < one.times():
                    found[key] = one
    return list(found.values())


def _collective(computation: str, line: str, match: re.Match, loops: tuple[int | None, ...]) -> Collective:
    arrays = [_size(*array) for array in re.findall(r"(\w+)\[([\d,]*)\]", match[1])]
    both = match[3] and match[2] in ("all-gather", "collective-permute")  # operand and result in a tuple
    size, devices, kind = max(arrays) if both else sum(arrays), _devices(line), match[2]
    if kind == "reduce-scatter":
        size *= devices or 1
    if computation.startswith("all-reduce-scatter"):  # fused by XLA: every device keeps its part of the sum
        kind = "reduce-scatter"
    return Collective(kind, size, loops, devices)


def _loops(bodies: dict[str, list[str]]) -> dict[str, tuple[int | None, ...]]:
    """Computation → trip counts of the loops around it, the outermost first."""
    called: dict[str, list[tuple[str, bool, int | None]]] = {}
    inner = set()
    for name, lines in bodies.items():
        for line in lines:
            loop = _WHILE.search(line)
            for callee in _names(line):
                turns = _turns(line, bodies.get(loop[1], [])) if loop else None
                called.setdefault(name, []).append((callee, bool(loop), turns))
                inner.add(callee)
    # From the entry computation down; a computation called from several places keeps its deepest nesting.
    around: dict[str, tuple[int | None, ...]] = {name: () for name in bodies if name not in inner}
    queue = list(around)
    while queue:
        name = queue.pop()
        for callee, loop, turns in called.get(name, ()):
            loops = (*around[name], turns) if loop else around[name]
            if callee not in around or len(loops) > len(around[callee]):
                around[callee] = loops
                queue.append(callee)
    return around


def _turns(line: str, condition: list[str]) -> int | None:
    """Trip count of a loop: as noted by the compiler, or the constant that its counter is compared with."""
    if noted := re.search(r'known_trip_count[":{]+n[":]+(\d+)', line):
        return int(noted[1])
    bounds = [int(n) for line in condition for n in re.findall(r" = [su]32\[\]\S* constant\((\d+)\)", line)]
    return max(bounds) if bounds else None


def _devices(line: str) -> int | None:
    """Size of a group, here 2 in every form: ``replica_groups=[4,2]<=[8]``, ``{{0,1},{2,3}}`` and
    ``mesh['x'=4,'y'=2] … {'y'}``."""
    if short := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(short[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    long = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return long and len(long[1].split(","))


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Name and lines of every computation in the text of a program."""
    name, lines = "", []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name, lines = line.removeprefix("ENTRY ").split()[0].lstrip("%"), []
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


def _names(line: str) -> list[str]:
    return [name.strip(" %") for several, one in _CALLED.findall(line) for name in (several or one).split(",")]


def _size(kind: str, dimensions: str) -> int:
    return _TYPES.get(kind, 4) * math.prod(int(n) for n in dimensions.split(",") if n)
