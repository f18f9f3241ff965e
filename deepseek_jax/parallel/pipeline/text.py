"""Schedules as plain text, to read, compare and bring one's own.

    # everything after a # is a comment
    schedule   my_1f1b
    stages     straight
    ranks      2
    microbatches 3

    rank 0: F0.0 F0.1 BW0.0 F0.2 BW0.1 BW0.2
    rank 1: F0.0 BW0.0 F0.1 B0.1 W0.1 F0.2 BW0.2

Four lines of header in any order (five for `stages interleaved`, which needs `chunks` as well), and one line per rank.
`stages` is a kind of `StageMap`. Blanks separate cells, and `+` joins the ops of one cell, which run together. An op is
its kind (`F` forward, `B` input gradient, `W` weight gradient), the slot, a dot, and the microbatch: `F0.3`. `BW1.10`
is short for `B1.10+W1.10`, a full backward. Slots and microbatches count from 0, microbatches over both directions of a
bidirectional schedule: the first half of them runs in slot 0, the second in slot 1.

Writing what was read gives the same text but for comments, blanks, and the order of the header.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn, get_args

from etils import epath

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.pipeline.check import check
from deepseek_jax.parallel.pipeline.schedule import Cell, Op, Schedule, StageMap, StageMapKind, cell_text
from deepseek_jax.paths import local_path, write_aside

_KINDS = get_args(StageMapKind)
_OP = re.compile(r"(F|BW|B|W)(\d+)\.(\d+)")
_NUMBERS = ("ranks", "chunks", "microbatches")
_HEADER = ("schedule", "stages", *_NUMBERS)


def to_text(schedule: Schedule) -> str:
    """The schedule in the form above."""
    stages = schedule.stages
    header = {"schedule": schedule.name, "stages": stages.kind, "ranks": stages.ranks}
    if stages.kind == "interleaved":
        header["chunks"] = stages.chunks
    header["microbatches"] = schedule.microbatches
    width = max(map(len, header))
    lines = [f"{key:{width}} {value}" for key, value in header.items()]
    lines.append("")
    digits = len(str(schedule.ranks - 1))
    for rank, cells in enumerate(schedule.cells):
        lines.append(f"rank {rank:{digits}}: {' '.join(map(cell_text, cells))}")
    return "\n".join(lines) + "\n"


def from_text(text: str, source: str = "schedule") -> Schedule:
    """The checked schedule that a text in the form above describes.

    Args:
      text: what to read.
      source: names it in errors, such as its path.

    Raises:
      ConfigError: it is not in that form (the message has source, line and word), or cannot run (`check`).
    """
    lines = _Lines(source, text)
    header: dict[str, str] = {}
    cells: dict[int, tuple[Cell, ...]] = {}
    for line in lines:
        key = line.words[0]
        if key == "rank":
            rank, rest = lines.rank(line)
            if rank in cells:
                lines.fail(line.number, line.words[1], f"rank {rank} has a line already")
            cells[rank] = tuple(lines.cell(line.number, word) for word in rest)
        elif key not in _HEADER:
            lines.fail(line.number, key, f"a line begins with one of {', '.join(_HEADER)} or rank")
        elif key in header:
            lines.fail(line.number, key, "it has a line already")
        elif len(line.words) != 2:
            lines.fail(line.number, line.words[-1], f"{key} takes one word")
        else:
            header[key] = lines.header_value(line)
    return _build(source, header, cells)


def read_schedule(path: epath.PathLike) -> Schedule:
    """The schedule that a file describes.

    Raises:
      ConfigError: there is no such file, or what `from_text` says of it.
    """
    file = local_path(path, "the schedule")
    try:
        text = file.read_text()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"there is no schedule file {path}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8") from error
    return from_text(text, str(path))


def write_schedule(schedule: Schedule, path: epath.PathLike) -> None:
    """Writes the schedule's text."""
    write_aside(local_path(path, "the schedule"), to_text(schedule))


class _Line(NamedTuple):
    number: int
    words: list[str]


class _Lines:
    """The lines of a text that say something, and errors that name them."""

    def __init__(self, source: str, text: str):
        self.source = source
        self._text = text

    def __iter__(self) -> Iterator[_Line]:
        for number, line in enumerate(self._text.splitlines(), 1):
            words = line.partition("#")[0].replace(":", ": ").split()
            if words:
                yield _Line(number, words)

    def fail(self, number: int, word: str, what: str) -> NoReturn:
        raise ConfigError(f"{self.source}, line {number}: {word!r}: {what}")

    def header_value(self, line: _Line) -> str:
        key, value = line.words
        if key in _NUMBERS and not value.isdecimal():
            self.fail(line.number, value, f"{key} is a whole number")
        if key == "stages" and value not in _KINDS:
            self.fail(line.number, value, f"stages is one of {', '.join(_KINDS)}")
        return value

    def rank(self, line: _Line) -> tuple[int, list[str]]:
        """`rank 3: …`, also with the colon apart."""
        words = line.words[1:2] if len(line.words) > 1 else []
        rest = line.words[2:]
        if rest and rest[0] == ":":
            words, rest = [f"{words[0]}:"], rest[1:]
        if not words or not re.fullmatch(r"\d+:", words[0]):
            self.fail(
                line.number, " ".join(line.words[:2]), "a rank's line begins with its number and a colon: `rank 0:`"
            )
        return int(words[0][:-1]), rest

    def cell(self, number: int, word: str) -> Cell:
        ops: list[Op] = []
        for part in word.split("+"):
            found = _OP.fullmatch(part)
            if found is None:
                self.fail(number, word, f"{part!r} is no op: write F0.3, B0.3, W0.3 or BW0.3 (slot, dot, microbatch)")
            kinds: Any
            kinds, slot, microbatch = found.groups()
            ops.extend(Op(kind, int(slot), int(microbatch)) for kind in kinds)
        return tuple(ops)


def _build(source: str, header: dict[str, str], cells: dict[int, tuple[Cell, ...]]) -> Schedule:
    needed = [key for key in _HEADER if key != "chunks" or header.get("stages") == "interleaved"]
    for key in needed:
        if key not in header:
            raise ConfigError(f"{source}: there is no line {key!r}")
    ranks = int(header["ranks"])
    for rank in range(ranks):
        if rank not in cells:
            raise ConfigError(f"{source}: there is no line 'rank {rank}:', and ranks is {ranks}")
    beyond = [rank for rank in cells if rank >= ranks]
    if beyond:
        raise ConfigError(f"{source}: there is a line 'rank {beyond[0]}:', but ranks is {ranks}")
    try:
        stages = StageMap(header["stages"], ranks, int(header.get("chunks", 1)))  # type: ignore[arg-type]
        in_order = tuple(cells[rank] for rank in range(ranks))
        return check(Schedule(header["schedule"], stages, int(header["microbatches"]), in_order))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
