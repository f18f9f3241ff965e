"""Pictures of schedules: every op once at its time and in its colour, and files that browsers and Perfetto read."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from xml.etree import ElementTree

import matplotlib.image
import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.pipeline.draw import colour, picture, png, svg, trace, write_picture
from deepseek_jax.parallel.pipeline.generators import GENERATORS, dualpipe, make_schedule, one_f_one_b
from deepseek_jax.parallel.pipeline.schedule import OP_WORDS, Op
from deepseek_jax.parallel.pipeline.simulate import Costs, simulate


@pytest.fixture(scope="module")
def timeline():
    """The paper's figure: P = 8, M = 20."""
    return simulate(dualpipe(8, 20))


def ops_of(schedule) -> Counter:
    return Counter(op for rank in range(schedule.ranks) for _, op in schedule.ops(rank))


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("mode", ["ideal", "lock_step"])
def test_every_op_is_drawn_once_in_its_colour(name, mode):
    """A box per op, of the colour of its kind and slot; colours differ between kinds and slots."""
    schedule = make_schedule(name, 4, 8)
    boxes = picture(simulate(schedule, mode=mode)).boxes
    drawn = Counter(box.fill for box in boxes if " of microbatch " in box.tip)
    expected: Counter = Counter()
    for op, count in ops_of(schedule).items():
        expected[colour(schedule, op)] += count
    assert drawn == expected
    assert len(drawn) == 3 * schedule.stages.slots


def test_boxes_stand_at_their_times(timeline):
    """Boxes of one rank do not overlap, stay within the makespan, and are as wide as their time."""
    drawn = picture(timeline)
    rows = [box for box in drawn.boxes if box.tip.endswith(": idle")]
    assert len(rows) == 8
    scale = rows[0].width / timeline.makespan
    for row in rows:
        inside = [b for b in drawn.boxes if row.y <= b.y < row.y + row.height and " of microbatch " in b.tip]
        assert all(row.x <= b.x and b.x + b.width <= row.x + row.width + 1e-6 for b in inside)
        for i, a in enumerate(inside):
            for b in inside[i + 1 :]:
                apart = a.x + a.width <= b.x or b.x + b.width <= a.x
                assert apart or a.y + a.height <= b.y or b.y + b.height <= a.y
        rank = rows.index(row)
        area = sum(b.width for b in inside if b.y + b.height > row.y + row.height - 2)  # the lower lane, or the whole
        work = timeline.work[rank]
        assert area == pytest.approx(work * scale, rel=0.08)  # less the small gaps between boxes


def test_numbers_are_in_every_box_of_the_papers_figure(timeline):
    """P = 8, M = 20 is legible: each box has its microbatch's number, of a size that can be read, inside it."""
    drawn = picture(timeline)
    boxes = [box for box in drawn.boxes if " of microbatch " in box.tip]
    numbers = {(label.x, label.y): label for label in drawn.labels if label.text.isdecimal()}
    for box in boxes:
        label = numbers[box.x + box.width / 2, box.y + box.height / 2]
        assert f"microbatch {label.text}," in box.tip
        assert label.size >= 9
        assert label.size * 0.64 * len(label.text) <= box.width
        assert label.size <= box.height


def test_a_long_schedule_keeps_its_width_and_leaves_numbers_out():
    """P = 16, M = 128 is as wide as a screen or two; numbers that could not be read are not there."""
    drawn = picture(simulate(dualpipe(16, 128)))
    assert drawn.width < 2600
    sizes = {label.size for label in drawn.labels if label.text.isdecimal()}
    assert 6 <= min(sizes) < 9


def test_bubbles_stay_visible(timeline):
    """What no box covers is the idle colour of the row: 6 of 66 on the first rank."""
    drawn = picture(timeline)
    row = next(box for box in drawn.boxes if box.tip == "rank 0: idle")
    inside = [b for b in drawn.boxes if row.y <= b.y < row.y + row.height and " of microbatch " in b.tip]
    covered = sorted((b.x, b.x + b.width) for b in inside)
    gaps, end = 0.0, row.x
    for left, right in covered:
        gaps += left - end - 1.5 if left - end > 3 else 0.0  # boxes leave 0.75 on either side
        end = max(end, right)
    assert gaps == pytest.approx(6 * row.width / 66, rel=0.01)


def test_the_legend_names_every_colour(timeline):
    """Kinds and directions in words, next to their colour, and what grey means."""
    drawn = picture(timeline)
    words = [label.text for label in drawn.labels]
    for kind, word in OP_WORDS.items():
        for direction in (0, 1):
            label = drawn.labels[words.index(f"{word}, direction {direction}")]
            swatch = next(b for b in drawn.boxes if b.x == label.x - 20 and b.y == label.y - 7)
            assert swatch.fill == colour(timeline.schedule, Op(kind, direction, 0))
    assert "idle" in words
    assert "makespan 66, bubble 6 (9.1%)" in " ".join(words)


def test_the_svg_is_well_formed_and_whole(timeline):
    root = ElementTree.fromstring(svg(timeline))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    drawn = picture(timeline)
    assert len(root.findall("{*}rect")) == len(drawn.boxes) + 1  # and the paper
    assert len(root.findall("{*}text")) == len(drawn.labels)
    assert svg(timeline) == svg(timeline)


def test_the_png_is_an_image_of_the_same_picture():
    timeline = simulate(one_f_one_b(2, 3))
    drawn = picture(timeline)
    image = matplotlib.image.imread(io.BytesIO(png(timeline, pixels_per_unit=1)))
    assert image.shape[:2] == (drawn.height, drawn.width)
    for box in drawn.boxes:
        if "forward of microbatch" in box.tip:  # a corner, away from the number
            pixel = image[round(box.y + 3), round(box.x + 3), :3]
            assert "#" + "".join(f"{round(v * 255):02x}" for v in pixel) == box.fill


def test_the_trace_has_every_op_and_an_arrow_for_every_message(timeline):
    """JSON trace events: times in microseconds, a process per rank, flows from F to F and from B to B."""
    document = json.loads(trace(timeline))
    events = document["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert Counter(event["name"] for event in complete) == Counter(
        {str(op): count for op, count in ops_of(timeline.schedule).items()}
    )
    assert max(event["ts"] + event["dur"] for event in complete) == timeline.makespan * 1000
    assert {event["pid"] for event in complete} == set(range(8))
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    finishes = {event["id"]: event for event in events if event["ph"] == "f"}
    assert len(starts) == len(finishes) == sum(timeline.sends)
    for key, start in starts.items():
        assert abs(finishes[key]["pid"] - start["pid"]) == 1
        assert finishes[key]["ts"] > start["ts"]
    by_thread: dict[tuple, list] = {}
    for event in complete:
        by_thread.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in by_thread.values():
        spans.sort()
        assert all(a[1] <= b[0] + 1e-6 for a, b in itertools.pairwise(spans))


def test_ops_that_take_no_time_can_be_drawn():
    """Costs of nothing at all: no division by the makespan or by a cell's cost."""
    timeline = simulate(one_f_one_b(2, 2), Costs(forward=0, input_gradient=0, weight_gradient=0))
    assert timeline.makespan == 0
    ElementTree.fromstring(svg(timeline))
    timeline = simulate(dualpipe(2, 4), Costs(weight_gradient=0))
    ElementTree.fromstring(svg(timeline))


def test_the_path_chooses_the_format(tmp_path):
    timeline = simulate(one_f_one_b(2, 2))
    write_picture(timeline, tmp_path / "a.svg")
    write_picture(timeline, tmp_path / "a.png")
    assert (tmp_path / "a.svg").read_text().startswith("<svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"must end in \.svg or \.png"):
        write_picture(timeline, tmp_path / "a.pdf")
