"""Prints, simulates and draws a pipeline schedule. Nothing is run, and no device is needed.

    python -m tools.schedule dualpipe --ranks 8 --microbatches 20 --draw dualpipe.svg
    python -m tools.schedule zb_h1 --ranks 4 --microbatches 12 --costs F=1,B=1.1,W=0.9 --lock-step --trace trace.json
    python -m tools.schedule dualpipe --ranks 8 --microbatches 32 --compare --memory 10
    python -m tools.schedule --file my_schedule.txt

One line per rank: what it does, in the order in which it does it. `F0` is a forward of slot 0, `B0` an input gradient,
`W0` a weight gradient, `BW0` a full backward, `F0+BW1` both at once; `3×(B1 W1 F1)` three times the three. Costs are
those of one stage. With --compare they are of 1/P of the model: a schedule that cuts it finer pays less for each stage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from deepseek_jax.config import ConfigError, require
from deepseek_jax.parallel.pipeline.draw import trace, write_picture
from deepseek_jax.parallel.pipeline.generators import GENERATORS, make_schedule
from deepseek_jax.parallel.pipeline.put_off import with_less_put_off
from deepseek_jax.parallel.pipeline.schedule import Cell, Schedule, cell_text
from deepseek_jax.parallel.pipeline.simulate import Candidate, Costs, Sizes, Timeline, best, simulate
from deepseek_jax.parallel.pipeline.text import read_schedule, write_schedule
from deepseek_jax.paths import local_path, write_aside

_COSTS = {
    "F": "forward",
    "B": "input_gradient",
    "W": "weight_gradient",
    "FB": "overlapped",
    "send": "transfer",
}
"""What each part of --costs sets."""
_LONGEST_PATTERN = 6


def parse_costs(text: str) -> Costs:
    """`F=1,B=1,W=1,FB=2,send=0` as costs; what is left out keeps its default.

    Raises:
      ConfigError: a part is not NAME=NUMBER, or no such cost can be.
    """
    values: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        require(name in _COSTS, f"--costs: {part!r} sets none of {', '.join(_COSTS)}")
        try:
            values[_COSTS[name]] = float(number)
        except ValueError:
            raise ConfigError(f"--costs: {part!r} has no number after the =") from None
    return Costs(**values)


def report(ideal: Timeline, lock_step: Timeline) -> str:
    """The schedule for people: its cells per rank, and what the simulation says of each."""
    schedule = ideal.schedule
    stages = schedule.stages
    parts = [
        f"{schedule.name}: {schedule.ranks} ranks, {schedule.microbatches} microbatches, {stages.kind} stages "
        f"({stages.stages} of them, {stages.slots} on a rank)"
    ]
    parts.append(_rank_table(ideal, lock_step))
    parts.append("\n".join([_line("Each rank as soon as it can", ideal), _line(_ticks(lock_step), lock_step)]))
    return "\n\n".join(parts)


def comparison(candidates: Sequence[Candidate], ranks: int) -> str:
    """The schedules that `best` compared, as a table; those that cannot be used come last, with the reason."""
    head = ("makespan", "bubble", "busy", "activations", "stash", "copies", "memory", "schedule", "")
    lines: list[tuple[str, ...]] = []
    for one in candidates:
        if one.timeline is None:
            lines.append(("–",) * 7 + (one.name, one.refusal or ""))
            continue
        stages = one.timeline.schedule.stages
        share = ranks / stages.stages
        numbers = (
            one.timeline.makespan,
            one.timeline.bubble,
            f"{one.timeline.efficiency:.1%}",
            max(one.timeline.peak_activations) * share,
            max(one.timeline.peak_stash) * share,
            stages.copies,
            one.memory,
        )
        words = (value if isinstance(value, str) else _number(value) for value in numbers)
        lines.append((*words, one.name, one.refusal or ""))
    return _markdown(head, lines, right=7)


def compact(cells: Sequence[Cell]) -> str:
    """Cells without their microbatches, repeated patterns written once: `6×F0 F1 3×(B1 W1 F1)`."""
    return " ".join(_runs([_shape(cell) for cell in cells]))


def _shape(cell: Cell) -> str:
    """A cell's kinds and slots. `BW0` is a full backward, `B0+W0` one microbatch's B and another's W."""
    return "+".join(word.partition(".")[0] for word in cell_text(cell).split("+"))


def _runs(shapes: Sequence[str]) -> Iterator[str]:
    at = 0
    while at < len(shapes):
        length, count = 1, 1
        for tried in range(1, _LONGEST_PATTERN + 1):
            pattern, repeats = shapes[at : at + tried], 1
            while shapes[at + repeats * tried : at + (repeats + 1) * tried] == pattern:
                repeats += 1
            if repeats > 1 and repeats * tried > length * count:
                length, count = tried, repeats
        words = " ".join(shapes[at : at + length])
        yield words if count == 1 else f"{count}×{words if length == 1 else f'({words})'}"
        at += length * count


def _rank_table(ideal: Timeline, lock_step: Timeline) -> str:
    head = ("rank", "work", "idle", "idle in ticks", "activations", "stash", "sends", "cells")
    columns = (ideal.work, ideal.idle, lock_step.idle, ideal.peak_activations, ideal.peak_stash, ideal.sends)
    lines = [
        (str(rank), *map(_number, numbers), compact(ideal.schedule.cells[rank]))
        for rank, numbers in enumerate(zip(*columns, strict=True))
    ]
    return _markdown(head, lines, right=7)


def _line(who: str, timeline: Timeline) -> str:
    return (
        f"{who}: makespan {_number(timeline.makespan)}, bubble {_number(timeline.bubble)} "
        f"({timeline.bubble / (timeline.makespan or 1):.1%}), ranks busy {timeline.efficiency:.1%} of the time."
    )


def _ticks(lock_step: Timeline) -> str:
    return f"In lock step, {lock_step.number_of_ticks} ticks"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]], *, right: int) -> str:
    """A table whose first `right` columns are numbers, in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if i < right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * (w + 1)}:" if i < right else "-" * (w + 2) for i, w in enumerate(widths)]
    return "\n".join([line(head), f"|{'|'.join(rule)}|", *map(line, lines)])


# --- the command ----------------------------------------------------------------------------------------------------


def _schedule(options: argparse.Namespace) -> Schedule:
    """The schedule that the command line names."""
    if options.file is not None:
        given = {"a name": options.name, "--ranks": options.ranks, "--microbatches": options.microbatches}
        given |= {"--chunks": options.chunks, "--put-off": options.put_off}
        for what, value in given.items():
            require(value is None, f"--file says all of a schedule: leave out {what}")
        return read_schedule(options.file)
    require(options.name is not None, f"name a schedule ({', '.join(GENERATORS)}) or give one with --file")
    for what, value in {"--ranks": options.ranks, "--microbatches": options.microbatches}.items():
        require(value is not None, f"schedule {options.name} needs {what}")
    schedule = make_schedule(options.name, options.ranks, options.microbatches, chunks=options.chunks)
    return schedule if options.put_off is None else with_less_put_off(schedule, options.put_off)


def run(options: argparse.Namespace) -> Iterator[str]:
    """What is printed, part by part; files are written on the way.

    Raises:
      ConfigError: the options, the schedule or a file's name is wrong.
    """
    costs = parse_costs(options.costs)
    schedule = _schedule(options)
    ideal, lock_step = simulate(schedule, costs), simulate(schedule, costs, "lock_step")
    shown = lock_step if options.lock_step else ideal
    yield report(ideal, lock_step)
    if options.draw:
        write_picture(shown, options.draw)
    if options.trace:
        write_aside(local_path(options.trace, "the trace"), trace(shown) + "\n")
    if options.text:
        write_schedule(schedule, options.text)
    if options.compare:
        candidates = best(
            schedule.ranks, schedule.microbatches, costs, options.memory, sizes=_sizes(options), mode=shown.mode
        )
        yield comparison(candidates, schedule.ranks)


def _sizes(options: argparse.Namespace) -> Sizes:
    return Sizes(stash=options.stash_size, weights=options.weights_size)


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.schedule", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(GENERATORS)}")
    parser.add_argument("--ranks", type=int, help="pipeline ranks")
    parser.add_argument("--microbatches", type=int, help="of a step, both directions together")
    parser.add_argument("--chunks", type=int, help="stages on a rank, of an interleaved schedule (2)")
    parser.add_argument("--put-off", type=int, metavar="N", help="at most so many weight gradients wait on a rank")
    parser.add_argument("--file", help="a schedule as text instead of a name; `parallel/pipeline/text.py` has the form")
    parser.add_argument("--costs", default="", metavar="F=1,B=1,W=1,FB=3,send=0", help="times in any one unit")
    parser.add_argument("--lock-step", action="store_true", help="draw, trace and compare lock-step ticks")
    parser.add_argument("--draw", metavar="FILE", help="write a picture, .svg or .png")
    parser.add_argument("--trace", metavar="FILE", help="write JSON for ui.perfetto.dev")
    parser.add_argument("--text", metavar="FILE", help="write the schedule as text")
    parser.add_argument("--compare", action="store_true", help="rank all schedules for these ranks and microbatches")
    parser.add_argument("--memory", type=float, help="what a rank may hold, in activations of 1/P of the model")
    parser.add_argument("--stash-size", type=float, default=0.0, help="of a W that is put off, in that unit (0)")
    parser.add_argument("--weights-size", type=float, default=0.0, help="of 1/P of the parameters, in that unit (0)")
    options = parser.parse_args(argv)
    try:
        parts = list(run(options))
    except (ConfigError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
