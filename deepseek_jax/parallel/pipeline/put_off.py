"""A schedule with fewer weight gradients waiting: less memory for a longer bubble.

What a B leaves for a W that is put off can be more than what its F left for the B: with full recomputation it is every
input of a weight, once more, and every gradient of an output. In DualPipe P / 2 of them wait on a middle rank.
"""

from __future__ import annotations

import dataclasses

from deepseek_jax.config import require
from deepseek_jax.parallel.pipeline.schedule import Cell, Op, Schedule

PUTS_OFF = ("zb_h1", "dualpipe", "dualpipe_v")
"""The known schedules in which weight gradients wait."""


def with_less_put_off(schedule: Schedule, most: int) -> Schedule:
    """The schedule in which at most so many weight gradients wait on a rank; 0 puts off none.

    A B that finds as many waiting takes its own W along, as in a full backward; all else stays where it is.
    """
    require(most >= 0, f"how many weight gradients may be put off is 0 or more, not {most}")
    cells = tuple(_limited(of_rank, most) for of_rank in schedule.cells)
    if cells == schedule.cells:
        return schedule
    return dataclasses.replace(schedule, name=f"{schedule.name}-put-off-{most}", cells=cells)


def _limited(cells: tuple[Cell, ...], most: int) -> tuple[Cell, ...]:
    waiting: set[Op] = set()
    taken_along: set[Op] = set()
    found: list[Cell] = []
    for cell in cells:
        waiting -= set(cell)
        here = tuple(op for op in cell if op not in taken_along)
        for op in cell:
            w = op._replace(kind="W")
            if op.kind == "B" and w not in cell:
                if len(waiting) < most:
                    waiting.add(w)
                else:
                    taken_along.add(w)
                    here = tuple(one for both in here for one in ((both, w) if both == op else (both,)))
        if here:
            found.append(here)
    return tuple(found)
