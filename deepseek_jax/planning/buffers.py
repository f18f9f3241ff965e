"""What the temporary memory of a compiled program holds, from the compiler's own plan of it.

XLA gives every temporary a place in one piece of memory, and places are used again. Here the piece is explained by the
largest arrays that ever lie in each part of it: `largest_buffers`. The plan is text that XLA writes while it compiles,
into the folder that its flag `--xla_dump_to` names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

PLAN = "*-buffer-assignment.txt"
"""Files with plans, one for each program."""


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
_VALUE = re.compile(r"^ value: <\d+ ([\w.\-]+)[^>]*> \(size=(\d+),offset=(\d+)\): (\w+\[[\d,<=]*\])")


def largest_buffers(plan: str, count: int | None = None) -> list[Buffer]:
    """The arrays that explain a program's temporary memory, the largest first.

    Of arrays that lie in the same bytes at different times only the largest is among them, so their sizes add up to no
    more than the memory.

    Args:
      plan: The text of a buffer assignment.
      count: How many; None: all.
    """
    pieces: list[tuple[int, list[Buffer]]] = []
    for line in plan.splitlines():
        if piece := _PIECE.match(line):
            pieces.append((int(piece[1]) if "preallocated-temp" in piece[2] else 0, []))
        elif pieces and (value := _VALUE.match(line)):
            pieces[-1][1].append(Buffer(value[1], value[4], int(value[3]), int(value[2])))
    _, values = max(pieces, key=lambda piece: piece[0], default=(0, []))
    chosen: list[Buffer] = []
    for one in sorted(values, key=lambda one: (-one.size, one.offset, one.name)):
        if all(one.end <= other.offset or other.end <= one.offset for other in chosen):
            chosen.append(one)
        if len(chosen) == count:
            break
    return chosen


def read_plan(folder: Path) -> str:
    """The longest plan of a folder that XLA wrote to; empty if there is none."""
    return max((file.read_text("utf-8") for file in folder.glob(PLAN)), key=len, default="")
