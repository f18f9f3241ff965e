"""Pictures of a simulated schedule: SVG and PNG, and a trace for Perfetto (ui.perfetto.dev).

One row per rank, time from left to right. Colours tell the kind of op, their depth the direction or slot; a cell with a
forward and a backward together is split, the forward above. What stays grey is idle. Both formats render one `Picture`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Iterator
from xml.sax.saxutils import escape

from etils import epath

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.pipeline.schedule import OP_WORDS, Cell, Op, OpKind, Schedule
from deepseek_jax.parallel.pipeline.simulate import Timeline
from deepseek_jax.paths import local_path, write_aside

# Per kind of op, the colours of the first and of the last slot; those between are mixed.
_COLOURS: dict[OpKind, tuple[str, str]] = {
    "F": ("#3b5bdb", "#a5b8ff"),
    "B": ("#2b8a3e", "#96e2a6"),
    "W": ("#e67700", "#ffd08a"),
}
_INK, _GREY, _IDLE, _PAPER, _GRID = "#212529", "#868e96", "#e9ecef", "#ffffff", "#ced4da"
_ROW, _GAP, _LEFT, _RIGHT, _TOP = 34.0, 7.0, 62.0, 22.0, 58.0
_WIDEST, _BOX = 2400.0, 26.0
"""The most pixels that the timeline takes, and those of one op where there is room for that."""
_GLYPH = 0.64
"""Width of a digit in units of the font size."""


@dataclasses.dataclass(frozen=True)
class Box:
    """A filled rectangle; y grows downwards."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    tip: str = ""
    """What a browser shows where the pointer rests."""


@dataclasses.dataclass(frozen=True)
class Label:
    """A word, centred on y; `anchor` says which part of it stands at x."""

    x: float
    y: float
    text: str
    size: float
    colour: str = _INK
    anchor: str = "middle"
    bold: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """What is drawn, in pixels."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    labels: tuple[Label, ...]


def picture(timeline: Timeline) -> Picture:
    """The timeline as boxes and words."""
    schedule = timeline.schedule
    span = timeline.makespan or 1.0
    scale = min(_BOX / _shortest(timeline), _WIDEST / span)
    width = max(_LEFT + span * scale + _RIGHT, 620.0)
    bottom = _TOP + schedule.ranks * (_ROW + _GAP)
    boxes: list[Box] = []
    labels = [*_heading(timeline)]
    for rank in range(schedule.ranks):
        y = _TOP + rank * (_ROW + _GAP)
        labels.append(Label(_LEFT - 9, y + _ROW / 2, f"rank {rank}", 12, anchor="end"))
        boxes.append(Box(_LEFT, y, span * scale, _ROW, _IDLE, f"rank {rank}: idle"))
        for cell, start, end in timeline.spans(rank):
            for op, at, until, top, height in _lanes(timeline, cell, start, end):
                box = Box(
                    _LEFT + at * scale,
                    y + top * _ROW,
                    (until - at) * scale,
                    height * _ROW,
                    colour(schedule, op),
                    f"rank {rank}: {OP_WORDS[op.kind]} of microbatch {op.microbatch}, slot {op.slot}, "
                    f"{at:g} to {until:g}",
                )
                boxes.append(_inset(box))
                labels.extend(_number(box, op.microbatch))
    boxes_of_axis, labels_of_axis = _axis(span, scale, bottom)
    boxes_of_legend, labels_of_legend, height = _legend(schedule, bottom + 44, width)
    return Picture(
        math.ceil(width),
        math.ceil(height),
        (*boxes_of_axis, *boxes, *boxes_of_legend),
        (*labels, *labels_of_axis, *labels_of_legend),
    )


def colour(schedule: Schedule, op: Op) -> str:
    """Of an op: hue by kind, depth by slot."""
    first, last = _COLOURS[op.kind]
    part = op.slot / max(schedule.stages.slots - 1, 1)
    mixed = (round((1 - part) * a + part * b) for a, b in zip(_rgb(first), _rgb(last), strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


# --- formats ----------------------------------------------------------------------------------------------------------


def svg(timeline: Timeline) -> str:
    """The timeline's picture as an SVG document."""
    return picture_svg(picture(timeline))


def picture_svg(drawn: Picture) -> str:
    """A picture as an SVG document."""
    size = f'width="{drawn.width:g}" height="{drawn.height:g}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {drawn.width:g} {drawn.height:g}" '
        "font-family=\"'DejaVu Sans', Verdana, sans-serif\">",
        f'<rect {size} fill="{_PAPER}"/>',
    ]
    for box in drawn.boxes:
        where = f'x="{_px(box.x)}" y="{_px(box.y)}" width="{_px(box.width)}" height="{_px(box.height)}"'
        tip = f"<title>{escape(box.tip)}</title>" if box.tip else ""
        parts.append(f'<rect {where} fill="{box.fill}">{tip}</rect>')
    for label in drawn.labels:
        weight = ' font-weight="bold"' if label.bold else ""
        parts.append(
            f'<text x="{_px(label.x)}" y="{_px(label.y)}" font-size="{label.size:g}" fill="{label.colour}" '
            f'text-anchor="{label.anchor}" dy="0.35em"{weight} pointer-events="none">{escape(label.text)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def png(timeline: Timeline, *, pixels_per_unit: float = 2.0) -> bytes:
    """The timeline's picture as a PNG file, so many times its nominal size."""
    return picture_png(picture(timeline), pixels_per_unit=pixels_per_unit)


def picture_png(drawn: Picture, *, pixels_per_unit: float = 2.0) -> bytes:
    """A picture as a PNG file, so many times its nominal size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(drawn.width / 72, drawn.height / 72), facecolor=_PAPER)  # 72 points to an inch
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, drawn.width), ylim=(drawn.height, 0))
    axes.axis("off")
    corners = [
        [(b.x, b.y), (b.x + b.width, b.y), (b.x + b.width, b.y + b.height), (b.x, b.y + b.height)] for b in drawn.boxes
    ]
    axes.add_collection(PolyCollection(corners, facecolors=[b.fill for b in drawn.boxes], edgecolors="none"))
    sides = {"start": "left", "middle": "center", "end": "right"}
    for label in drawn.labels:
        axes.text(
            label.x,
            label.y,
            label.text,
            fontsize=label.size,
            color=label.colour,
            ha=sides[label.anchor],
            va="center_baseline",
            fontweight="bold" if label.bold else "normal",
            fontfamily="DejaVu Sans",
        )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=72 * pixels_per_unit, metadata={"Software": None})
    return file.getvalue()


def trace(timeline: Timeline) -> str:
    """The timeline as JSON trace events, for Perfetto: one process per rank, forward and backward as its threads.

    One unit of time is shown as a millisecond. Arrows lead from what is sent to what reads it.
    """
    schedule = timeline.schedule
    events: list[dict] = []
    at: dict[tuple[int, Op], tuple[float, float]] = {}
    for rank in range(schedule.ranks):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}})
        for thread, name in enumerate(("forward", "backward")):
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": name}})
        for cell, start, end in timeline.spans(rank):
            for op, since, until, *_ in _lanes(timeline, cell, start, end):
                at[rank, op] = since, until
                args = {"microbatch": op.microbatch, "slot": op.slot, "stage": schedule.stages.stage(rank, op.slot)}
                args["direction"] = schedule.stages.direction(op.slot)
                common = {"name": str(op), "cat": OP_WORDS[op.kind], "pid": rank, "tid": int(op.kind != "F")}
                events.append({"ph": "X", "ts": _us(since), "dur": _us(until - since), "args": args, **common})
    arrow = 0
    for (rank, op), (since, until) in at.items():
        to = schedule.receiver(rank, op)
        if to is None or to[0] == rank:
            continue
        thread = int(op.kind != "F")
        later = at[to[0], Op(op.kind, to[1], op.microbatch)][0]
        common = {"name": "send", "cat": "send", "id": arrow, "tid": thread}
        events.append({"ph": "s", "ts": (_us(since) + _us(until)) / 2, "pid": rank, **common})
        events.append({"ph": "f", "bp": "e", "ts": _us(later), "pid": to[0], **common})
        arrow += 1
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def write_picture(timeline: Timeline, path: epath.PathLike) -> None:
    """Writes the picture in the format that the path's ending names.

    Raises:
      ConfigError: it ends in neither .svg nor .png.
    """
    file = local_path(path, "the picture")
    if file.suffix == ".svg":
        write_aside(file, svg(timeline))
    elif file.suffix == ".png":
        file.write_bytes(png(timeline))
    else:
        raise ConfigError(f"the picture {path} must end in .svg or .png")


# --- parts of the picture ---------------------------------------------------------------------------------------------


def _lanes(timeline: Timeline, cell: Cell, start: float, end: float) -> Iterator[tuple[Op, float, float, float, float]]:
    """(op, start, end, top, height) of a cell's ops: one after the other, a forward beside a backward above it."""
    together = {"F", "B"} <= {op.kind for op in cell}
    rest = [op for op in cell if not (together and op.kind == "F")]
    if together:
        yield next(op for op in cell if op.kind == "F"), start, end, 0.0, 0.5
    whole = sum(timeline.costs.of((op,)) for op in rest) or 1.0
    stretch = (end - start) / whole
    for op in rest:
        until = start + timeline.costs.of((op,)) * stretch
        yield (op, start, until, 0.5, 0.5) if together else (op, start, until, 0.0, 1.0)
        start = until


def _shortest(timeline: Timeline) -> float:
    """The time of the shortest op that takes any."""
    costs = timeline.costs
    return min((c for c in (costs.forward, costs.input_gradient, costs.weight_gradient) if c > 0), default=1.0)


def _inset(box: Box) -> Box:
    """A little smaller, so that neighbours of one colour stay apart."""
    edge = min(0.75, box.width / 8)
    return dataclasses.replace(
        box, x=box.x + edge, y=box.y + 0.75, width=box.width - 2 * edge, height=max(box.height - 1.5, 0)
    )


def _number(box: Box, microbatch: int) -> Iterator[Label]:
    """The microbatch's number, where it fits and can be read."""
    text = str(microbatch)
    size = min(12.0, 0.72 * box.height, (box.width - 4) / (_GLYPH * len(text)))
    if size >= 6:
        light = sum(weight * value for weight, value in zip((0.299, 0.587, 0.114), _rgb(box.fill), strict=True)) > 140
        yield Label(box.x + box.width / 2, box.y + box.height / 2, text, round(size, 1), _INK if light else _PAPER)


def _heading(timeline: Timeline) -> Iterator[Label]:
    schedule = timeline.schedule
    yield Label(
        _LEFT,
        19,
        f"{schedule.name}, {schedule.ranks} ranks, {schedule.microbatches} microbatches",
        15,
        anchor="start",
        bold=True,
    )
    ticks = f"{timeline.number_of_ticks} lock-step ticks, " if timeline.mode == "lock_step" else ""
    share = timeline.bubble / (timeline.makespan or 1)
    said = f"{ticks}makespan {timeline.makespan:g}, bubble {timeline.bubble:g} ({share:.1%})"
    held = f"a rank keeps at most {max(timeline.peak_activations)} activations"
    put_off = f" and {max(timeline.peak_stash)} put-off weight gradients" if max(timeline.peak_stash) else ""
    yield Label(_LEFT, 40, f"{said}; {held}{put_off}", 12, _GREY, anchor="start")


def _axis(span: float, scale: float, bottom: float) -> tuple[list[Box], list[Label]]:
    """Lines behind the rows, and the time under them, at round numbers some 90 pixels apart."""
    raw = 90 / scale
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    times = [i * step for i in range(int(span / step + 1e-9) + 1)]
    boxes = [Box(_LEFT + t * scale - 0.5, _TOP - 5, 1, bottom - _TOP + 5, _GRID) for t in times]
    labels = [Label(_LEFT + t * scale, bottom + 9, f"{t:g}", 11, _GREY) for t in times]
    return boxes, [*labels, Label(_LEFT - 9, bottom + 9, "time", 11, _GREY, anchor="end")]


def _legend(schedule: Schedule, y: float, width: float) -> tuple[list[Box], list[Label], float]:
    """Boxes, labels, and the height of the whole picture."""
    stages = schedule.stages
    word = "direction" if stages.kind == "bidirectional" else "slot"
    entries = [
        (f"{OP_WORDS[kind]}{f', {word} {slot}' if stages.slots > 1 else ''}", colour(schedule, Op(kind, slot, 0)))
        for kind in OP_WORDS
        for slot in range(stages.slots)
    ]
    boxes, labels, x = [], [], _LEFT
    for text, fill in [*entries, ("idle", _IDLE)]:
        length = 24 + 7.4 * len(text)
        if x + length > width - _RIGHT and x > _LEFT:
            x, y = _LEFT, y + 22
        boxes.append(Box(x, y - 7, 14, 14, fill))
        labels.append(Label(x + 20, y, text, 12, anchor="start"))
        x += length + 14
    return boxes, labels, y + 24


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _px(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _us(time: float) -> float:
    """Microseconds, of which a unit of time has a thousand."""
    return round(time * 1000, 3)
