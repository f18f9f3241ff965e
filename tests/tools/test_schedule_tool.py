"""`python -m tools.schedule`: cells and numbers of a schedule, files on request, and one line where it cannot be."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from deepseek_jax.parallel.pipeline.generators import GENERATORS, dualpipe, make_schedule, zb_h1
from deepseek_jax.parallel.pipeline.text import read_schedule, to_text
from tools import schedule as tool


def run(capsys, *argv: str) -> str:
    """What the command prints."""
    assert tool.main(argv) == 0
    return capsys.readouterr().out


def error(capsys, *argv: str) -> str:
    """The one line that the command ends with."""
    assert tool.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")
    ]


def test_the_example_of_the_issue(capsys, tmp_path):
    """dualpipe, P = 8, M = 20: cells per rank, the simulator's numbers beside them, and a picture."""
    file = tmp_path / "dualpipe.svg"
    out = run(capsys, "dualpipe", "--ranks", "8", "--microbatches", "20", "--draw", str(file))
    assert file.read_text().startswith("<svg")
    assert "dualpipe: 8 ranks, 20 microbatches, bidirectional stages" in out
    table = rows(out)[2:]
    assert [row[:7] for row in table[:2]] == [
        ["0", "60", "6", "12", "8", "1", "20"],
        ["1", "60", "6", "12", "8", "2", "40"],
    ]
    assert table[0][7] == "7×F0 3×(F1 B1 W1) F1 3×(F0+BW1 F1+BW0) 3×(BW1 F1+BW0) BW1 4×(B0 W0)"
    assert "makespan 66, bubble 6 (9.1%)" in out
    assert "38 ticks: makespan 72, bubble 12 (16.7%)" in out


@pytest.mark.parametrize("name", GENERATORS)
def test_compact_cells_are_all_cells(name):
    """Writing repeats out again gives each rank's cells, without their microbatches."""

    def expanded(text: str) -> list[str]:
        parts = re.findall(r"(?:(\d+)×)?(?:\(([^)]*)\)|(\S+))", text)
        return [word for count, group, one in parts for word in int(count or 1) * (group or one).split()]

    schedule = make_schedule(name, 4, 12)
    for cells in schedule.cells:
        assert expanded(tool.compact(cells)) == [tool._shape(cell) for cell in cells]
        assert len(tool.compact(cells)) < 200


def test_costs_change_the_numbers(capsys):
    """The costs of the command line: F&B at 2 saves one of three in each overlapped cell."""
    out = run(capsys, "dualpipe", "--ranks", "4", "--microbatches", "16", "--costs", "F=1,B=1,W=1,FB=2,send=0")
    assert "makespan 38, bubble 1 " in out


def test_comparison_ranks_all_schedules(capsys):
    """With --memory, what does not fit comes after what does, with the reason."""
    argv = ("zb_h1", "--ranks", "4", "--microbatches", "12", "--compare", "--memory", "4.5")
    table = rows(run(capsys, *argv).split("\n\n")[-1])[2:]
    assert sorted(row[7] for row in table) == sorted(GENERATORS)
    fits = [row[7] for row in table if len(row) < 9 or not row[8]]
    assert fits == ["zb_h1", "dualpipe_v", "one_f_one_b"]
    refused = {row[7]: row[8] for row in table if row[7] not in fits}
    assert refused["dualpipe"] == "a rank holds 5, more than the limit of 4.5"


def test_comparison_says_what_cannot_be(capsys):
    out = run(capsys, "gpipe", "--ranks", "3", "--microbatches", "4", "--compare")
    assert "dualpipe needs an even number of ranks, not 3: use 2 or 4" in out


def test_text_and_trace_are_written_and_text_is_read_again(capsys, tmp_path):
    text, trace = tmp_path / "out.txt", tmp_path / "t.json"
    first = run(capsys, "zb_h1", "--ranks", "2", "--microbatches", "4", "--text", str(text), "--trace", str(trace))
    assert read_schedule(text) == zb_h1(2, 4)
    assert json.loads(trace.read_text())["traceEvents"]
    assert run(capsys, "--file", str(text)) == first


def test_lock_step_is_what_is_drawn_and_compared(capsys, tmp_path):
    file = tmp_path / "ticks.svg"
    argv = ("one_f_one_b", "--ranks", "4", "--microbatches", "16", "--lock-step", "--draw", str(file), "--compare")
    out = run(capsys, *argv)
    assert "lock-step ticks" in file.read_text()
    makespans = {row[7]: row[0] for row in rows(out.split("\n\n")[-1])[2:]}
    assert (makespans["one_f_one_b"], makespans["dualpipe"]) == ("72", "50")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["dualpip", "--ranks", "4", "--microbatches", "8"], "did you mean dualpipe?"),
        (["dualpipe", "--ranks", "4"], "schedule dualpipe needs --microbatches"),
        (["dualpipe", "--microbatches", "8"], "schedule dualpipe needs --ranks"),
        ([], "name a schedule (gpipe, "),
        (["dualpipe", "--ranks", "5", "--microbatches", "20"], "even number of ranks, not 5: use 4 or 6"),
        (["dualpipe", "--ranks", "8", "--microbatches", "12"], "at least 16 microbatches (8 each way), not 12"),
        (["gpipe", "--ranks", "2", "--microbatches", "4", "--chunks", "3"], "chunks belong to interleaved_one_f_one_b"),
        (["gpipe", "--ranks", "2", "--microbatches", "4", "--costs", "X=1"], "--costs: 'X=1' sets none of F, B, W, FB"),
        (["gpipe", "--ranks", "2", "--microbatches", "4", "--costs", "F=a"], "--costs: 'F=a' has no number"),
        (["gpipe", "--ranks", "2", "--microbatches", "4", "--costs", "F=-1"], "the cost of F is -1"),
        (["gpipe", "--ranks", "2", "--microbatches", "4", "--draw", "a.pdf"], "must end in .svg or .png"),
        (["gpipe", "--ranks", "2", "--microbatches", "4", "--draw", "none/a.svg"], "No such file or directory"),
        (["--file", "none.txt"], "there is no schedule file none.txt"),
        (["gpipe", "--file", "none.txt"], "--file says all of a schedule: leave out a name"),
    ],
)
def test_one_line_where_it_cannot_be(capsys, tmp_path, monkeypatch, argv, said):
    """Exit code 2, one line, nothing printed."""
    monkeypatch.chdir(tmp_path)
    assert said in error(capsys, *argv)


def test_a_broken_file_is_named_with_its_line(capsys, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(to_text(dualpipe(2, 4)).replace("F0.1", "F0:1", 1))
    assert f"{file}, line 6: 'F0:': " in error(capsys, "--file", str(file))


def test_as_a_module():
    """The command of the documentation, in a process of its own."""
    argv = [sys.executable, "-m", "tools.schedule", "gpipe", "--ranks", "2", "--microbatches", "2"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "gpipe: 2 ranks, 2 microbatches" in done.stdout
