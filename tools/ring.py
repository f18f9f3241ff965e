"""A block of the Hopper matmul in time: its producer, the ring in shared memory, the tensor cores, its consumers.

    python -m tools.ring --draw docs/kernels/ring.svg
    python -m tools.ring --stages

Nothing runs on a GPU. The simulation takes tiles, stages and steps at once from the kernel's config, and cycles from
the assumptions named there and here: it shows what waits for what, and how long that would take if they held.

    producer      waits until all consumers are done with a stage, asks for its copies, `ISSUE_CYCLES` each
    L2            `LATENCY` after that the bytes begin to come, one step after another, `L2_BYTES` a cycle
    consumer      waits until a step has come; loses `WAIT_CYCLES` once a turn; asks for the products of the turn's
                  steps, gives each stage back when its product is there, scales it; after a tile's last step it takes
                  `WRITE_CYCLES` to write the tile out
    tensor cores  make one consumer's product of a step after another, in the order asked for, at full rate

The other block of a cluster does the same at the same time: each gets half of a from the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import math
import sys
from collections import defaultdict
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from deepseek_jax.parallel.pipeline.draw import Box, Label, Picture, picture_png, picture_svg
from pallas_kernels.block_scaled_matmul.config import (
    BLOCK,
    ISSUE_CYCLES,
    WAIT_CYCLES,
    MatmulConfig,
    default_config,
    step_cycles,
)
from tools.kernels_aot import SMS

LATENCY = 700
"""Cycles from asking for a copy until its first byte comes from the L2 cache: our assumption."""
WRITE_CYCLES = 1000
"""Of a consumer for its part of a tile to go from registers to shared memory, and on its way: our assumption."""
M, N, K = 4096, 7168, 2048
"""The product that is drawn: one of V3's layers, whose tiles have few enough steps to see."""

Kind = Literal["ask", "come", "on its way", "full", "read", "multiply", "latency", "wait", "scale", "write"]


@dataclasses.dataclass(frozen=True)
class Span:
    """What something does from one cycle to another."""

    what: str
    """A row of the picture: "producer", "L2", "stage 0", "tensor cores", "consumer 0"."""
    kind: Kind
    start: float
    end: float
    step: int
    """Counted through all tiles."""
    consumer: int = 0
    """Whose product it is."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A block's work on some tiles."""

    config: MatmulConfig
    steps: int
    """Of a tile."""
    spans: tuple[Span, ...]

    @property
    def end(self) -> float:
        """When the last tile is on its way out, in cycles."""
        return max(span.end for span in self.spans)


class _Clock:
    """Runs processes: generators that yield the time until which they sleep, or the event that they wait for."""

    def __init__(self):
        self.now = 0.0
        self._due: list[tuple[float, int, Generator]] = []
        self._happened: set[tuple] = set()
        self._waiting: dict[tuple, list[Generator]] = defaultdict(list)
        self._count = 0

    def start(self, process: Generator, time: float = 0.0) -> None:
        """Lets a process go on at a time; of several at one time, in the order of the calls."""
        self._count += 1
        heapq.heappush(self._due, (time, self._count, process))

    def happen(self, event: tuple) -> None:
        """Wakes those who wait for an event, now and in future."""
        self._happened.add(event)
        for process in self._waiting.pop(event, []):
            self.start(process, self.now)

    def run(self) -> None:
        """Until nothing is left to do."""
        while self._due:
            self.now, _, process = heapq.heappop(self._due)
            for wanted in process:
                if isinstance(wanted, tuple) and wanted not in self._happened:
                    self._waiting[wanted].append(process)
                    break
                if not isinstance(wanted, tuple) and wanted > self.now:
                    self.start(process, wanted)
                    break
        if self._waiting:
            raise RuntimeError(f"the ring stands still: nobody gives {sorted(self._waiting)}")


def simulate(config: MatmulConfig, m: int, steps: int, tiles: int) -> Run:
    """A block's work on `tiles` tiles of `steps` steps, of a product with m rows."""
    clock, spans = _Clock(), []
    cycles = step_cycles(config, m)
    product = cycles["multiply"] / config.consumers
    scale = config.tile_n / 2 * (2 if config.column_scales else 1)
    free = {"L2": 0.0, "tensor cores": 0.0}
    full: dict[int, float] = {}
    begun: dict[int, float] = {}
    done: dict[int, float] = {}

    def produce():
        for step in range(steps * tiles):
            for w in range(config.consumers):
                if step >= config.stages:
                    yield ("empty", w, step - config.stages)
            start = clock.now
            yield start + 4 * ISSUE_CYCLES
            begin = max(clock.now + LATENCY, free["L2"])
            free["L2"] = begin + cycles["L2"]
            full[step] = free["L2"]
            spans.append(Span("producer", "ask", start, clock.now, step))
            spans.append(Span("L2", "come", begin, full[step], step))
            spans.append(Span(f"stage {step % config.stages}", "on its way", start, full[step], step))
            clock.start(come(step), full[step])

    def come(step):
        clock.happen(("full", step))
        yield from ()

    def consume(w):
        name = f"consumer {w}"
        for first in range(0, steps * tiles, steps):
            for at in range(first, first + steps, config.steps_at_once):
                turn = range(at, min(at + config.steps_at_once, first + steps))
                ends = []
                for step in turn:
                    yield ("full", step)
                    if step == at:
                        spans.append(Span(name, "latency", clock.now, clock.now + WAIT_CYCLES, step))
                        yield clock.now + WAIT_CYCLES
                    begin = max(clock.now, free["tensor cores"])
                    ends.append(begin + product)
                    free["tensor cores"] = ends[-1]
                    begun.setdefault(step, begin)
                    spans.append(Span("tensor cores", "multiply", begin, ends[-1], step, w))
                for step, end in zip(turn, ends, strict=True):
                    if end > clock.now:
                        spans.append(Span(name, "wait", clock.now, end, step))
                    yield end
                    clock.happen(("empty", w, step))
                    done[step] = clock.now  # The last consumer's counts.
                    spans.append(Span(name, "scale", clock.now, clock.now + scale, step))
                    yield clock.now + scale
            spans.append(Span(name, "write", clock.now, clock.now + WRITE_CYCLES, turn[-1]))
            yield clock.now + WRITE_CYCLES

    clock.start(produce())
    for w in range(config.consumers):
        clock.start(consume(w))
    clock.run()
    for step in range(steps * tiles):
        stage = f"stage {step % config.stages}"
        spans.append(Span(stage, "full", full[step], begun[step], step))
        spans.append(Span(stage, "read", begun[step], done[step], step))
    return Run(config, steps, tuple(spans))


def cycles_per_step(config: MatmulConfig, m: int, steps: int) -> float:
    """What a step takes in a long run of tiles of `steps` steps, writing them out included."""
    few, many = (simulate(config, m, steps, tiles).end for tiles in (10, 20))
    return (many - few) / (10 * steps)


# --- the picture ------------------------------------------------------------------------------------------------------

_LEFT, _TOP, _ROW, _GAP, _WIDTH = 112.0, 62.0, 24.0, 5.0, 1180.0
_INK, _GREY, _IDLE, _PAPER, _GRID = "#212529", "#868e96", "#e9ecef", "#ffffff", "#ced4da"
_COLOURS: dict[Kind, tuple[str, str]] = {
    "ask": ("#3b5bdb", "asking for copies"),
    "come": ("#1c7ed6", "bytes come"),
    "on its way": ("#d0ebff", "stage asked for"),
    "full": ("#74c0fc", "full"),
    "read": ("#f08c00", "being multiplied"),
    "latency": ("#868e96", "latencies of a turn"),
    "wait": ("#fff3bf", "waits for its product"),
    "scale": ("#2b8a3e", "scales and adds"),
    "write": ("#c2255c", "writes the tile out"),
}
"""Of what is not the tensor cores', with words for the legend."""
_CONSUMERS = ("#f08c00", "#ffc078", "#ffe8cc")
"""Of the tensor cores' time, by whose product it is."""
_WHITE_INK = {"ask", "come", "write", "scale"}


def picture(run: Run, until: float) -> Picture:
    """The first `until` cycles, one row for each that does something; a number is a step, counted through all tiles."""
    config = run.config
    consumers = [f"consumer {w}" for w in range(config.consumers)]
    rows = ["producer", "L2", *(f"stage {s}" for s in range(config.stages)), "tensor cores", *consumers]
    scale = _WIDTH / until
    top = {what: _TOP + (_ROW + _GAP) * i + 10 * (i > 1) + 10 * (i > 1 + config.stages) for i, what in enumerate(rows)}
    bottom = top[rows[-1]] + _ROW
    boxes = [Box(_LEFT + t * scale - 0.5, _TOP - 4, 1, bottom - _TOP + 8, _GRID) for t in range(0, int(until), 1000)]
    labels = [Label(_LEFT + t * scale, bottom + 14, f"{t:,}", 10, _GREY) for t in range(0, int(until), 1000)]
    labels += [
        Label(_LEFT - 8, bottom + 14, "cycles", 10, _GREY, "end"),
        Label(_LEFT, 18, _title(run), 14, anchor="start", bold=True),
        Label(_LEFT, 39, f"simulated, not measured; the second tile begins with step {run.steps}", 11, _GREY, "start"),
    ]
    for what in rows:
        words = "L2 to shared" if what == "L2" else what
        labels.append(Label(_LEFT - 8, top[what] + _ROW / 2, words, 11, anchor="end"))
        boxes.append(Box(_LEFT, top[what], _WIDTH, _ROW, _IDLE, f"{what}: idle"))
    for span in sorted(run.spans, key=lambda span: (rows.index(span.what), span.start)):
        if span.start < until and span.end > span.start:
            box, label = _box(span, top[span.what], scale, until)
            boxes.append(box)
            labels += label
    key, words = _legend(config, bottom + 42)
    return Picture(_LEFT + _WIDTH + 20, bottom + 86, (*boxes, *key), (*labels, *words))


def _title(run):
    config = run.config
    return (
        f"A block that makes tiles of {config.tile_m}×{config.tile_n} in {run.steps} steps of {BLOCK}: "
        f"{config.stages} stages, {config.consumers} consumers, {config.steps_at_once} steps at once"
    )


def _box(span, y, scale, until):
    """The box of a span that begins before `until`, and its number where it fits."""
    start, end = span.start, min(span.end, until)
    multiply = span.kind == "multiply"
    fill = _CONSUMERS[span.consumer] if multiply else _COLOURS[span.kind][0]
    said = f"product for consumer {span.consumer}" if multiply else _COLOURS[span.kind][1]
    tip = f"{span.what}, step {span.step}: {said}, cycles {span.start:.0f} to {span.end:.0f}"
    width = (end - start) * scale
    box = Box(_LEFT + start * scale + 0.3, y + 1, max(width - 0.6, 0.2), _ROW - 2, fill, tip)
    numbered = span.kind in ("ask", "come", "read", "multiply") and width >= 8 * len(str(span.step))
    if not numbered:
        return box, []
    colour = _PAPER if span.kind in _WHITE_INK else _INK
    return box, [Label(box.x + box.width / 2, y + _ROW / 2, str(span.step), 10, colour)]


def _legend(config, y):
    entries = [(fill, words) for fill, words in _COLOURS.values()]
    entries += [(_CONSUMERS[w], f"product for consumer {w}") for w in range(config.consumers)]
    boxes, labels, x = [], [], _LEFT
    for fill, words in [*entries, (_IDLE, "idle: waits for a stage or a product")]:
        width = 24 + 6.6 * len(words)
        if x + width > _LEFT + _WIDTH:
            x, y = _LEFT, y + 22
        boxes.append(Box(x, y - 6, 12, 12, fill))
        labels.append(Label(x + 17, y, words, 11, anchor="start"))
        x += width + 12
    return boxes, labels


# --- the command ------------------------------------------------------------------------------------------------------


def drawn() -> Picture:
    """The picture of docs/kernels.md: a tile of `M`×`N`×`K` and the beginning of the next."""
    config = default_config(M, N, jnp.dtype(jnp.bfloat16), SMS)
    steps = -(-K // BLOCK)
    run = simulate(config, M, steps, 2)
    written = min(span.end for span in run.spans if span.kind == "write")
    return picture(run, math.ceil(written / 1000) * 1000 + 2000)


def stages_table(depths: Sequence[int] = (2048, 16384)) -> list[str]:
    """The lines of a table: what a step takes with so many stages of the config that is drawn, which fit or not."""
    bfloat16 = jnp.dtype(jnp.bfloat16)
    config = default_config(M, N, bfloat16, SMS)
    lines = ["| stages | steps at once | shared memory | " + " | ".join(f"K = {k}" for k in depths) + " |"]
    lines.append("|---" * (3 + len(depths)) + "|")
    for stages in range(2, config.stages + 3):
        tried = dataclasses.replace(config, stages=stages)
        cells = [str(stages), str(tried.steps_at_once), f"{tried.shared_memory(bfloat16) / 1024:.0f} KB"]
        cells[2] += "" if stages <= config.most_stages(bfloat16) else ", too much"
        cells += [f"{cycles_per_step(tried, M, k // BLOCK):.0f}" for k in depths]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(argv: Sequence[str]) -> int:
    """Draws, or prints the table; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.ring")
    parser.add_argument("--draw", metavar="FILE", help="write the picture, .svg or .png")
    parser.add_argument("--stages", action="store_true", help="print what a step takes by the number of stages")
    options = parser.parse_args(argv)
    if options.draw and not options.draw.endswith((".svg", ".png")):
        print(f"error: the picture {options.draw} must end in .svg or .png", file=sys.stderr)
        return 2
    if options.draw:
        svg = options.draw.endswith(".svg")
        data = picture_svg(drawn()).encode() if svg else picture_png(drawn())
        Path(options.draw).write_bytes(data)
    if options.stages:
        print("\n".join(stages_table()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
