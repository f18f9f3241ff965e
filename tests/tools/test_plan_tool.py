"""`python -m tools.plan` as a user meets it: the plan, the search, calibration, JSON, one line for a mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_jax.planning.calibration import deepseek_figures, system_figures
from experiments import v3
from tools import plan as tool
from tools.plan_text import table

V3 = ["--recipe", "v3.pretrain"]


def printed(capsys, *arguments: str, code: int = 0) -> str:
    assert tool.main(list(arguments)) == code
    out, err = capsys.readouterr()
    return err if code else out


def test_the_plan_of_the_reports_run(capsys):
    text = printed(capsys, *V3, "--gpus", "2048", "--gpu", "h800")
    assert "v3.pretrain on 2,048 h800: pipe 16 x data 2 x node 8 x expert 8, dualpipe" in text
    assert "120 microbatches" in text
    assert "671.026B" in text
    assert "36.63B" in text
    assert "260.6 G (attention causal)" in text
    assert "It does not fit" in text
    assert "fits with --set parallel.recompute=full" in text
    for words in ("bubble", "MFU", "GPU hours", "at $2 an hour", "dispatch", "DeepGEMM", "tools.plan --calibration"):
        assert words in text, words


def test_what_it_says_would_fit_does(capsys):
    """Its own words, given back to it."""
    text = printed(capsys, *V3, "--gpu", "h200")
    line = next(line for line in text.splitlines() if line.startswith("  fits with"))
    changes = line.removeprefix("  fits with ").split(":")[0].split()
    assert "It fits, with" in printed(capsys, *V3, "--gpu", "h200", *changes)


def test_json_has_the_same_numbers(capsys):
    found = json.loads(printed(capsys, *V3, "--gpus", "4096", "--gpu", "b200", "--json"))
    assert found["devices"] == 4096
    assert found["step"]["total"] == pytest.approx(sum(v for k, v in found["step"].items() if k != "total"))
    parts = {k: v for k, v in found["memory"].items() if k not in ("total", "usable")}
    assert found["memory"]["total"] == pytest.approx(sum(parts.values()))
    assert found["fits"] == (found["memory"]["total"] <= found["memory"]["usable"])
    assert found["run"]["dollars"] == pytest.approx(6.03 * found["run"]["gpu_hours"])
    assert found["run"]["tokens"] == pytest.approx(14.8e12)


def test_a_price_and_the_growing_batch_are_counted(capsys):
    """The course has nine sizes of batches, and a GPU hour costs what one says."""
    course = tool.course_of(v3.pretrain())
    assert len(course) == 9
    assert sum(one.tokens for one in course) == pytest.approx(14.8e12)
    assert {one.rows for one in course} >= {3072, 15_360}
    assert "at $1.25 an hour" in printed(capsys, *V3, "--gpu", "h200", "--price", "1.25")


def test_evaluations_and_checkpoints_are_in_the_run(capsys):
    """Every 1000 steps of 4 MB, twice because of the moving average, and every 500; a slow disk holds training up."""
    arguments = [*V3, "--gpu", "h800", "--gpus", "2048"]
    text = printed(capsys, *arguments)
    assert re.search(r"\d+ evaluations: \d+(\.\d+)? s each", text)
    assert re.search(r"\d+ checkpoints: 0\.0\d+ s each", text)
    assert "no evaluations on the way are counted" in printed(capsys, *arguments, "--set", "evaluation.max_bytes=none")
    run = json.loads(printed(capsys, *arguments, "--json"))["run"]
    slow = json.loads(printed(capsys, *arguments, "--json", "--storage", "0.001"))["run"]
    more = slow["pauses"]["checkpoint_seconds"] - run["pauses"]["checkpoint_seconds"]
    assert more > 1000
    count = run["pauses"]["checkpoints"]
    assert count == 2 * run["pauses"]["evaluations"] or count == 2 * run["pauses"]["evaluations"] + 1
    assert slow["hours"] - run["hours"] == pytest.approx(count * more / 3600)
    assert "--storage is GB" in printed(capsys, *arguments, "--storage", "0", code=2)


def test_the_search_ranks_and_gives_the_command(capsys):
    arguments = ["--recipe", "tiny.pretrain", "--gpu", "h100", "--gpus", "4", "--search", "--top", "3"]
    text = printed(capsys, *arguments)
    assert "layouts of 4 h100s" in text
    assert "The first one: --set parallel.pipe=" in text
    found = json.loads(printed(capsys, *arguments, "--json"))
    totals = [one["step"]["total"] for one in found["best"]]
    assert totals == sorted(totals)
    assert len(totals) == 3
    changes = [word for setting in found["best"][0]["layout"] for word in ("--set", setting)]
    again = json.loads(printed(capsys, "--recipe", "tiny.pretrain", "--gpu", "h100", "--gpus", "4", *changes, "--json"))
    assert again["step"]["total"] == pytest.approx(totals[0])


def test_deepseeks_mesh_fits_into_deepseeks_gpus_where_no_weight_gradient_waits(capsys):
    """docs/pipeline.md: in FP8, with all but layers' inputs computed again."""
    lean = [*V3, "--gpu", "h800", "--set", "precision=v3_fp8", "--set", "parallel.recompute=full", "--json"]
    waiting = json.loads(printed(capsys, *lean))
    without = json.loads(printed(capsys, *lean, "--set", "parallel.put_off=0"))
    assert (waiting["fits"], without["fits"]) == (False, True)
    assert without["memory"]["put_off"] == 0
    assert "parallel.put_off=0" in without["layout"]


def test_schedules_beside_each_other(capsys):
    text = printed(capsys, *V3, "--gpu", "h200", "--set", "precision=v3_fp8", "--schedules")
    assert "When 1F1B beats DualPipe:" in text
    for name in ("dualpipe_v", "zb_h1", "gpipe"):
        assert name in text


def test_the_calibration_says_what_is_an_input_and_what_missed(capsys):
    text = printed(capsys, "--calibration")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    figures = (*deepseek_figures(), *system_figures())
    assert len(rows) == len(figures) + 4
    for said, missed in (("first missed", "first_is_met"), ("second missed", "is_met")):
        assert sum(said in row for row in rows) == sum(getattr(one, missed) is False for one in figures) > 0
    assert sum("| input" in row for row in rows) == sum(one.role == "input" for one in figures)
    found = json.loads(printed(capsys, "--calibration", "--json"))
    assert [one["of"] for one in found["deepseek"]] == [one.of for one in deepseek_figures()]


def test_the_documented_table_is_the_printed_one(capsys):
    """docs/planner.md has the table of this very program."""
    page = (Path(__file__).parents[2] / "docs" / "planner.md").read_text()
    for block in printed(capsys, "--calibration").split("\n\n"):
        if block.startswith("|"):
            assert block in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*V3, "--gpu", "h900"], r"there is no GPU 'h900'; did you mean h800? there are h800, h100"),
        ([*V3, "--gpus", "1500"], "1,500 devices are no multiple of 1,024"),
        ([*V3, "--gpus", "0"], "--gpus is how many there are"),
        (["--recipe", "v3.pretrian"], "Did you mean v3.pretrain?"),
        ([], "name a recipe"),
        ([*V3, "--set", "parallel.expert=7"], "256 experts cannot be split evenly"),
        ([*V3, "--set", "parallel.node=1", "--set", "parallel.expert=64"], "do not fit into one node of 8 h200s"),
        ([*V3, "--set", "parallel.pipe=64", "--set", "parallel.data=1"], "has 61 layers"),
        ([*V3, "--set", "paralel.pipe=64"], "paralel"),
        ([*V3, "--price", "-1"], "dollars"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    text = printed(capsys, *arguments, code=2)
    assert message in text
    assert text.startswith("error: ")
    assert text.count("\n") == 1


def test_none_fits_is_an_exit_code_and_says_what_would(capsys):
    arguments = ["--recipe", "v3.pretrain", "--gpu", "h800", "--gpus", "2", "--search", "--top", "2"]
    assert tool.main(arguments) == 1
    text = capsys.readouterr().out
    assert "None fits" in text
    assert "It fits on " in text
    assert "GB lacking" in text


def test_as_a_command():
    command = [sys.executable, "-m", "tools.plan", "--recipe", "tiny.pretrain", "--gpu", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tiny.pretrain on 1 cpu" in done.stdout
    assert "$" not in done.stdout.split("The run")[1].split("\n")[0]


def test_tables_are_markdown():
    assert table(("a", "b"), [("word", "1.5")], left=(0,)) == "| a    |   b |\n|------|----:|\n| word | 1.5 |"


@pytest.mark.parametrize(
    ("recipe", "devices"), [("pretrain", 2048), ("pretrain_512", 512), ("pretrain_256", 256), ("pretrain_64", 64)]
)
def test_recipes_at_scale_have_a_mesh_and_a_price(recipe, devices, capsys):
    found = json.loads(printed(capsys, "--recipe", f"v3.{recipe}", "--gpu", "gb200", "--json"))
    assert found["devices"] == devices
    assert found["run"]["tokens"] == pytest.approx(14.8e12)
    if recipe in ("pretrain_256", "pretrain_64"):
        assert found["fits"]


def test_what_no_change_makes_fit_says_how_many_would(capsys):
    """671B on eight devices."""
    text = printed(capsys, "--recipe", "v3.pretrain_8", "--gpu", "h200")
    assert "No one, two or three changes make it fit" in text
    assert "It fits on 128 of them: parallel.pipe=" in text
    assert "Nor does it fit" in printed(capsys, "--recipe", "v3.extend_128k", "--gpu", "h200")


@pytest.mark.parametrize(("recipe", "length", "rows"), [("extend_32k", 32_768, 1920), ("extend_128k", 131_072, 480)])
def test_context_extensions_are_the_reports(recipe, length, rows):
    """Section 4.3: a thousand steps each at 7.3e-6, with YaRN, as many tokens a step as pre-training ends with."""
    experiment = getattr(v3, recipe)()
    assert experiment.schedule.total_tokens == 1000 * rows * length
    assert tool.course_of(experiment) == ((pytest.approx(1000 * rows * length), rows),)
    assert experiment.optimizer.peak_lr * experiment.schedule.learning_rate(10**9) == 7.3e-6
    assert experiment.model.attention.yarn is not None
    assert rows * length == v3.ROWS * v3.LENGTH


def test_fine_tuning_is_the_reports():
    """Section 5.1: two epochs of 1.5M instances, 5e-6 to 1e-6 by a cosine, samples that do not see each other."""
    experiment = v3.sft()
    total, peak = experiment.schedule.total_tokens, experiment.optimizer.peak_lr
    rates = [peak * experiment.schedule.learning_rate(tokens) for tokens in (0, total // 2, total)]
    assert rates == pytest.approx([5e-6, 3e-6, 1e-6])
    assert total == 3_000_000 * 1500
    assert experiment.mask_documents


def test_the_page_is_whole_and_needs_nothing_else(tmp_path, capsys):
    """Memory bar with its limit, time bar, pipeline picture; no script, no address to fetch from."""
    page = tmp_path / "plan.html"
    changes = ["--set", "precision=v3_fp8", "--set", "parallel.recompute=full", "--set", "parallel.put_off=0"]
    text = printed(capsys, *V3, "--gpu", "h200", *changes, "--html", str(page))
    html = page.read_text()
    assert "v3.pretrain on 2,048 h200" in html
    assert html.count('class="bar"') == 2
    assert html.count('class="limit"') == 1
    assert "<svg" in html
    assert text.splitlines()[0] in html
    assert "<script" not in html
    assert "src=" not in html
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", html)]
    plan = json.loads(printed(capsys, *V3, "--gpu", "h200", *changes, "--json"))
    parts = [size for key, size in plan["memory"].items() if key not in ("total", "usable") and size]
    shares = [size / plan["memory"]["usable"] for size in parts]
    assert widths[: len(shares)] == pytest.approx([100 * share for share in shares], abs=1e-3), (
        "the limit is the whole bar"
    )
    assert sum(widths[len(shares) :]) == pytest.approx(100, abs=0.01), "and a step's parts are all of it"


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, capsys):
    text = printed(
        capsys, "--recipe", "tiny.pretrain", "--gpu", "cpu", "--html", str(tmp_path / "no" / "a.html"), code=2
    )
    assert text.startswith("error: ")
    assert text.count("\n") == 1
