"""What passes between devices in a compiled program, and what is computed meanwhile.

A collective stands in the text of a program in one of three forms: as one operation, which nothing runs beside; as a
start and a done, with what stands between them; or as a row of fusions that each compute something of their own and
carry the collective on, the first of them its start and the last its done. The pieces of such a row all hold the same
collective, by its channel.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
# A line whose operation is a computation of its own, which is not counted apart.
FUSED = r"\b(?:fusion|async-start)\(.*calls=%?([\w.\-]+)"


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind and size in a program.

    Attributes:
      kind: one of KINDS.
      shape: of what each device ends with, as in bf16[64,4096], or several of them.
      bytes: of that.
      devices: how many take part in each.
      beside: cycles that the compiler expects of what is computed while one of them runs.
      count: how often it is done, loops multiplied out.
    """

    kind: str
    shape: str
    bytes: int
    devices: int
    beside: int
    count: int


def collectives_of(lines: Sequence[str], computations: Mapping[str, Sequence[str]]) -> Iterator[Collective]:
    """Yields the collectives of a computation, each with a count of 1.

    Args:
      lines: of the computation, in the order in which they run.
      computations: lines of all computations, to look into what is fused.
    """
    passed, begun, rows = 0, {}, {}
    for line in lines:
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        cycles, called = int(cycles[1]) if cycles else 0, re.search(FUSED, line)
        within = computations.get(called[1], ()) if called else ()
        for own in (line, *within):
            if not (one := _described(own, line)):
                continue
            channel = re.search(r"channel_id=(\d+)|$", own)[1]
            if re.search(r"-start\(", line):
                begun[re.search(r"%?([\w.\-]+) = ", line)[1]] = (one, passed)
            elif any("AsyncCollectiveStart" in other for other in within):
                rows[channel] = [one, 0]
            elif channel in rows:
                rows[channel][1] += cycles
            else:
                yield one
        done = re.search(r"-done\(.*?%?([\w.\-]+)\)", line)
        if done and done[1] in begun:
            one, before = begun.pop(done[1])
            yield dataclasses.replace(one, beside=passed - before)
        passed += cycles
    yield from (dataclasses.replace(one, beside=beside) for one, beside in rows.values())
    yield from (one for one, _ in begun.values())  # whose end is not told


def _described(line: str, caller: str) -> Collective | None:
    """Returns the collective that a line holds; `caller` is the line that runs it."""
    made = re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
    if not made:
        return None
    shape = _result(made[1], started=bool(made[3]))
    size, group, kind = _size(shape), _group(line), made[2]
    if kind == "all-reduce" and line is not caller and "reduce-scatter" in caller:
        kind, size = "reduce-scatter", size // group  # each device cuts its part of the sum at once
    return Collective(kind, shape, size, group, beside=0, count=1)


def _result(types: str, *, started: bool) -> str:
    """Returns the shapes that a collective leaves; one that is only started lists its operands first."""
    shapes = re.findall(r"[a-z]+\d*\[[\d,]*\]", types)
    return ", ".join(shapes[len(shapes) // 2 :][:1] if started and len(shapes) > 1 else shapes)


def _size(shapes: str) -> int:
    return sum(
        _BYTES.get(kind, 4) * math.prod(int(side) for side in sides.split(",") if side)
        for kind, sides in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)
    )


def _group(line: str) -> int:
    """Returns how many devices a collective runs among."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(tiled[2])
    if meshed := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", meshed[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", meshed[2]))
    return 2 if "source_target_pairs" in line else 1
