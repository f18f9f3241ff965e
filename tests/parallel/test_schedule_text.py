"""Schedules as text: exact round trips, and errors that name file, line and word."""

from __future__ import annotations

import pytest
from even_ranks import EVEN

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.pipeline import text as module
from deepseek_jax.parallel.pipeline.generators import GENERATORS, dualpipe, make_schedule, one_rank
from deepseek_jax.parallel.pipeline.schedule import Op
from deepseek_jax.parallel.pipeline.text import from_text, read_schedule, to_text, write_schedule

GOOD = """\
schedule     mine   # a comment
stages       straight
ranks        2
microbatches 1

# another one
rank 0: F0.0 B0.0 W0.0
rank 1: F0.0 BW0.0
"""


@pytest.mark.parametrize("ranks", EVEN)
@pytest.mark.parametrize("name", GENERATORS)
def test_round_trips_are_exact(name, ranks):
    """Reading what was written gives the same schedule, and writing that the same text, for every even P ≤ 16."""
    schedule = make_schedule(name, ranks, 2 * ranks)
    text = to_text(schedule)
    assert from_text(text) == schedule
    assert to_text(from_text(text)) == text


def test_round_trips_with_chunks_and_through_a_file(tmp_path):
    schedule = make_schedule("interleaved_one_f_one_b", 2, 4, chunks=3)
    write_schedule(schedule, tmp_path / "schedule.txt")
    assert read_schedule(tmp_path / "schedule.txt") == schedule
    assert from_text(to_text(one_rank(3))) == one_rank(3)


def test_the_text_is_one_line_per_rank():
    """Readable, and two schedules differ in the lines of the ranks that do."""
    assert to_text(dualpipe(2, 4)) == (
        "schedule     dualpipe\nstages       bidirectional\nranks        2\nmicrobatches 4\n\n"
        "rank 0: F0.0 F1.2 F0.1 BW1.2 F1.3+BW0.0 BW1.3 B0.1 W0.1\n"
        "rank 1: F1.2 F0.0 F1.3 BW0.0 F0.1+BW1.2 BW0.1 B1.3 W1.3\n"
    )


def test_comments_blanks_and_order_do_not_matter():
    lines = GOOD.splitlines()
    shuffled = "\n".join(
        [lines[7].replace(":", " :"), "", *lines[3::-1], "  " + lines[6].replace("rank 0: ", "rank 0:")]
    )
    assert from_text(shuffled) == from_text(GOOD)
    assert from_text(GOOD).cells[0] == ((Op("F", 0, 0),), (Op("B", 0, 0),), (Op("W", 0, 0),))


def test_the_documented_example_is_read():
    """What the module's docstring shows is a schedule that runs."""
    example = [line for line in (module.__doc__ or "").splitlines() if line.startswith("    ")]
    assert from_text("\n".join(example)).name == "my_1f1b"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("F0.0 B0.0", "F0.0 X0.0", "my.txt, line 7: 'X0.0': 'X0.0' is no op"),
        ("F0.0 B0.0", "F0.0+G B0.0", "my.txt, line 7: 'F0.0+G': 'G' is no op"),
        ("F0.0 B0.0", "F0,0 B0.0", "my.txt, line 7: 'F0,0'"),
        ("straight", "sideways", "my.txt, line 2: 'sideways': stages is one of straight, bidirectional"),
        ("microbatches 1", "microbatches one", "my.txt, line 4: 'one': microbatches is a whole number"),
        ("ranks        2", "ranks 2 3", "my.txt, line 3: '3': ranks takes one word"),
        ("ranks        2", "rankz 2", "my.txt, line 3: 'rankz': a line begins with one of schedule, stages"),
        ("ranks        2", "stages vee", "my.txt, line 3: 'stages': it has a line already"),
        ("ranks        2", "", "my.txt: there is no line 'ranks'"),
        ("straight", "interleaved", "my.txt: there is no line 'chunks'"),
        ("rank 1:", "rank 0:", "my.txt, line 8: '0:': rank 0 has a line already"),
        ("rank 1:", "rank 1", "my.txt, line 8: 'rank 1': a rank's line begins with its number and a colon"),
        ("rank 1:", "rank", "my.txt, line 8: 'rank F0.0': a rank's line begins"),
        ("rank 1:", "rank 5:", "my.txt: there is no line 'rank 1:', and ranks is 2"),
        ("rank 1:", "rank 1: BW0.0 F0.0\nrank 2:", "my.txt: there is a line 'rank 2:', but ranks is 2"),
        ("mine ", "mi+ne ", "my.txt: a schedule's name is one word"),
        ("ranks        2", "ranks 0", "my.txt: there is a line 'rank 0:', but ranks is 0"),
        ("rank 1: F0.0 BW0.0", "rank 1: F0.0", "rank 1: B0.0 (input gradient of microbatch 0) is in none"),
        ("rank 1: F0.0 BW0.0", "rank 1: BW0.0 F0.0", "rank 1, cell 0 (BW0.0): B0.0 needs F0.0 before it"),
        ("W0.0\n", "W0.0 F0.0\n", "rank 0, cell 3 (F0.0): F0.0 is there twice, first in cell 0"),
    ],
)
def test_a_broken_file_says_where(tmp_path, old, new, said):
    """File, line and word of what is not in the form; file, rank, cell and op of what cannot run."""
    assert old.strip() in GOOD
    (tmp_path / "my.txt").write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        read_schedule(tmp_path / "my.txt")
    message = str(caught.value)
    assert said in message.replace(f"{tmp_path}/", "")
    assert message.startswith(str(tmp_path / "my.txt"))
    assert "\n" not in message


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="there is no schedule file"):
        read_schedule(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="there is no schedule file"):
        read_schedule(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not text in UTF-8"):
        read_schedule(tmp_path / "bytes")
    (tmp_path / "empty").write_text("")
    with pytest.raises(ConfigError, match="there is no line 'schedule'"):
        read_schedule(tmp_path / "empty")
