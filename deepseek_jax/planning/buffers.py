"""What the temporary memory of a compiled program holds, from the compiler's own plan of it.

XLA gives every temporary a place in one piece of memory, and places are used again. Here the piece is explained by the
largest arrays that ever lie in each part of it: `largest_buffers`. What arrays never fill, even where they are most, is
`lost_between` them. Both read text that XLA writes while it compiles, into the folder that its flag `--xla_dump_to`
names.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

PLAN, RANGES = "buffer-assignment", "live-range"
"""What names of files end in, besides ".txt", that have a program's plan, and that say when its arrays are alive."""


class Buffer(NamedTuple):
    """An array in a piece of memory."""

    name: str
    """Of the instruction that makes it."""
    shape: str
    """Its dtype and dimensions, as `f32[8,128]`."""
    offset: int
    """Bytes from the piece's beginning."""
    size: int
    """Bytes."""

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.size


_PIECE = re.compile(r"^allocation \d+: size (\d+), (.*)")
_VALUE = re.compile(r"^ value: <\d+ ([\w.\-]+)(\{[\d,]*\})?[^>]*> \(size=(\d+),offset=(\d+)\): (\w+\[[\d,<=]*\])")
_ALIVE = re.compile(r"^    ([\w.\-]+)(\{[\d,]*\}):(\d+)-(\d+)$", re.MULTILINE)


def _temporaries(plan: str) -> tuple[int, list[tuple[Buffer, str]]]:
    """Bytes of the piece of temporaries, and each array in it with its place in what its instruction makes."""
    pieces: list[tuple[int, list[tuple[Buffer, str]]]] = []
    for line in plan.splitlines():
        if piece := _PIECE.match(line):
            pieces.append((int(piece[1]) if "preallocated-temp" in piece[2] else 0, []))
        elif pieces and (value := _VALUE.match(line)):
            pieces[-1][1].append((Buffer(value[1], value[5], int(value[4]), int(value[3])), value[2] or "{}"))
    return max(pieces, key=lambda piece: piece[0], default=(0, []))


def largest_buffers(plan: str, count: int | None = None) -> list[Buffer]:
    """The arrays that explain a program's temporary memory, the largest first.

    Of arrays that lie in the same bytes at different times only the largest is among them, so their sizes add up to no
    more than the memory.

    Args:
      plan: The text of a buffer assignment.
      count: How many; None: all.
    """
    values = [one for one, _ in _temporaries(plan)[1]]
    chosen: list[Buffer] = []
    for one in sorted(values, key=lambda one: (-one.size, one.offset, one.name)):
        if all(one.end <= other.offset or other.end <= one.offset for other in chosen):
            chosen.append(one)
        if len(chosen) == count:
            break
    return chosen


def lost_between(plan: str, ranges: str) -> int | None:
    """Bytes of the temporary memory that no array has even when they have most of it; None: it is not said.

    Args:
      plan: The text of a buffer assignment.
      ranges: The text of live ranges, of the same program.
    """
    size, values = _temporaries(plan)
    alive = {(one[1], one[2]): (int(one[3]), int(one[4])) for one in _ALIVE.finditer(ranges)}
    if not alive:
        return None
    changes: list[tuple[int, int, tuple[int, int]]] = []
    for one, index in values:
        if (one.name, index) in alive:
            first, last = alive[one.name, index]
            changes += [(first, 1, (one.offset, one.size)), (last + 1, -1, (one.offset, one.size))]
    most = used = 0
    names: Counter[tuple[int, int]] = Counter()  # of each place: several names of one array are one
    for _, change, place in sorted(changes):
        before = names[place]
        names[place] += change
        used += place[1] * ((names[place] > 0) - (before > 0))
        most = max(most, used)
    return size - most


def read_plan(folder: Path) -> tuple[str, str]:
    """(plan, live ranges) of the largest program of a folder that XLA wrote to; empty where there is none."""
    plan = max(folder.glob(f"*-{PLAN}.txt"), key=lambda file: file.stat().st_size, default=None)
    if plan is None:
        return "", ""
    ranges = plan.with_name(plan.name.replace(PLAN, RANGES))
    return plan.read_text("utf-8"), ranges.read_text("utf-8") if ranges.exists() else ""
