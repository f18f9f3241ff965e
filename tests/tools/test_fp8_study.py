"""The controlled run of FP8: what its runs differ in, the paper's rule, and one line for what cannot be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from absl.testing import flagsaver

from deepseek_jax.config import ConfigError
from deepseek_jax.config_io import diff, load_config, save_config
from deepseek_jax.training.experiment import Experiment
from deepseek_jax.training.metrics import MetricsWriter
from tools.bench import fp8_study as tool
from tools.bench.fp8_study_report import Run, draw, largest_error, relative_errors, spread_of_seeds, table, verdict

STEPS = 20


@pytest.fixture(autouse=True)
def flags(tmp_path):
    """The command's flags, as `main` finds them."""
    tool.flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(
        workdir=str(tmp_path / "study"), train_steps=STEPS, virtual_devices=1, runs=["baseline_1", "fp8"]
    ):
        yield


def config(name: str, steps: int | None = STEPS, recipe: str = "tiny.pretrain") -> Experiment:
    return tool.study_config(recipe, tool.CASES[name], steps=steps, compute="float32", virtual_devices=1)


def run_of(losses, role: str = "fp8", **changes) -> Run:
    losses = np.asarray(losses, np.float64)
    tokens = 100.0 * np.arange(1, len(losses) + 1)
    run = Run(label=role, role=role, tokens=tokens, losses=losses, total_tokens=2000, tokenizer="t")
    return dataclasses.replace(run, **changes)


BASE = np.linspace(6, 3, STEPS)


# --- what the runs are ------------------------------------------------------------------------------------------------


def test_runs_differ_in_initial_weights_and_precision_alone():
    """Equal tokens and data: what decides them, `seed`, data and schedule, is the same everywhere."""
    first = config("baseline_1")
    assert {path for path, _, _ in diff(first, config("baseline_2"))} == {"weights_seed"}
    for name in ("fp8", "per_tensor", "cast", "no_promotion", "coarse"):
        assert all(path.startswith("precision.") for path, _, _ in diff(first, config(name))), name
    assert config("fp8").precision.fp8 == tool.Fp8Config()
    assert {config(name).precision.compute for name in tool.CASES} == {"float32"}
    assert first.logging.every_steps == 1


@pytest.mark.parametrize(("recipe", "steps"), [("tiny.pretrain", 20), ("tiny.pretrain", 1000), ("small.pretrain", 7)])
def test_a_short_study_is_the_whole_course_in_so_many_steps(recipe, steps):
    schedule = config("baseline_1", steps, recipe).schedule
    length = config("baseline_1", steps, recipe).data.sequence_length
    tokens = taken = 0
    while tokens < schedule.total_tokens:
        tokens += schedule.rows(tokens) * length
        taken += 1
    assert taken == steps
    assert schedule.mismatch() is None
    full = config("baseline_1", None, recipe).schedule
    for share in (0.02, 0.5, 0.75, 0.97, 0.995):
        here, there = (s.learning_rate(int(share * s.total_tokens)) for s in (schedule, full))
        assert here == pytest.approx(there, abs=0.02)


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_losses_are_smoothed_by_an_exponential_moving_average_of_09():
    """Appendix B.1."""
    np.testing.assert_allclose(run_of([4.0, 2.0, 3.0]).smoothed, [4.0, 3.8, 0.9 * 3.8 + 0.3])


def test_the_error_is_the_largest_of_the_second_half():
    """Nothing of the first half counts but what the moving average remembers of it."""
    base = run_of(BASE, "baseline")
    early, late = BASE.copy(), BASE.copy()
    early[0] *= 2
    late[-1] *= 1.1
    errors = relative_errors(run_of(early), base)
    assert largest_error(run_of(early), base) == pytest.approx(errors[10]) != errors.max()
    assert largest_error(run_of(late), base) == pytest.approx(0.1 * 0.1 * BASE[-1] / base.smoothed[-1])
    assert largest_error(run_of(0.99 * BASE), base) == pytest.approx(0.01)


def test_the_limit_is_a_quarter_percent_or_the_spread_of_the_seeds():
    """ "Done when" 3: below 0.25%, or below the spread of the seeds where that is larger; the control must fail."""
    base = run_of(BASE, "baseline")
    near, far = run_of(1.001 * BASE, "baseline"), run_of(0.99 * BASE, "baseline")
    fp8, control = run_of(1.004 * BASE), run_of(1.02 * BASE, "control")
    assert spread_of_seeds([base, fp8]) is None
    for seeds, passes in (([base], False), ([base, near], False), ([base, near, far], True)):
        lines = table([*seeds, fp8, control])
        row = next(line for line in lines if line.startswith("| fp8 |"))
        assert ("| passes |" in row, "| FAILS |" in row) == (passes, not passes)
        assert "| fails, as it should |" in lines[-1]
    assert spread_of_seeds([base, near, far]) == pytest.approx(0.01)
    assert verdict(run_of(1.001 * BASE, "control"), base, 0.0025) == "passes, so it shows nothing"


def test_a_run_that_diverged_fails_and_one_under_way_has_no_verdict():
    base = run_of(BASE, "baseline")
    lost = run_of(BASE[:8], "control", diverged=True)
    assert largest_error(lost, base) == np.inf
    assert verdict(lost, base, 0.01) == "fails, as it should"
    assert verdict(run_of(BASE[:15]), base, 0.01) == "unfinished: 15 steps"


def test_runs_that_saw_other_tokens_are_not_compared():
    base = run_of(BASE, "baseline")
    for other in (run_of(BASE, tokens=base.tokens + 1), run_of(BASE, tokenizer="another")):
        with pytest.raises(ConfigError, match=r"saw other tokens"):
            relative_errors(other, base)


def test_the_picture_shows_losses_and_errors_with_the_band_of_seeds():
    base, other = run_of(BASE, "baseline"), run_of(1.01 * BASE, "baseline")
    losses, errors = draw([base, other, run_of(1.003 * BASE)]).axes
    assert [len(line.get_xdata()) for line in losses.get_lines()[:3]] == [STEPS] * 3
    np.testing.assert_allclose(errors.get_lines()[0].get_ydata(), 0.3, err_msg="percent")
    assert errors.collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(1.0)


# --- the command ------------------------------------------------------------------------------------------------------


def write_run(folder: Path, experiment: Experiment, losses, *, done: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_config(experiment, folder / "config.json")
    (folder / "tokenizer.json").write_text("{}")
    with MetricsWriter(folder, tensorboard=False, resume_step=0) as writer:
        for step, loss in enumerate(losses, 1):
            writer.write(step, {"loss_main": loss}, tokens=step * 8 * 256)
    if done:
        (folder / "result.json").write_text(json.dumps({"heldout_bits_per_byte": 1.5, "wall_seconds": 60}))


@pytest.fixture
def commands(monkeypatch):
    """What was started, in the place of runs: each leaves a folder as a run that was trained to its end does."""
    found = []

    def wait(command, log):
        found.append(command)
        folder = Path(command[command.index("--workdir") + 1])
        source = folder / "config.json" if "--resume" in command else Path(command[command.index("--config") + 1])
        write_run(folder, load_config(Experiment, source), BASE)
        return 0

    monkeypatch.setattr(tool, "_wait", wait)
    return found


def test_the_command_trains_what_is_missing_goes_on_with_what_was_stopped_and_reports(tmp_path, commands, capsys):
    study = tmp_path / "study"
    write_run(study / "baseline_1", config("baseline_1"), BASE[:5], done=False)
    assert tool.main(["fp8_study"]) == 0
    assert [("--resume" in c, Path(c[c.index("--workdir") + 1]).name) for c in commands] == [
        (True, "baseline_1"),
        (False, "fp8"),
    ]
    printed = capsys.readouterr().out
    assert "| FP8, the rest float32 | " in printed
    assert (
        "--recipe tiny.pretrain --train_steps 20 --compute float32 --virtual_devices 1 --runs baseline_1,fp8" in printed
    )
    assert (study / "fp8_study.md").read_text() in printed
    assert (study / "fp8_study.png").read_bytes().startswith(b"\x89PNG")
    assert (study / "fp8_study.svg").read_bytes().startswith(b"<?xml")
    assert tool.main(["fp8_study"]) == 0  # all is there
    assert len(commands) == 2


def test_report_only_trains_nothing(tmp_path, commands, capsys):
    with flagsaver.flagsaver(report_only=True):
        assert tool.main(["fp8_study"]) == 1
        assert capsys.readouterr().err.startswith("error: no run of this study in ")
        write_run(tmp_path / "study" / "baseline_1", config("baseline_1"), BASE)
        assert tool.main(["fp8_study"]) == 0
    assert not commands


def test_a_run_that_diverged_is_not_tried_again(tmp_path, commands, monkeypatch):
    folder = tmp_path / "study" / "fp8"
    write_run(folder, config("fp8"), BASE[:5], done=False)
    (folder / "nonfinite_step_6.npz").touch()
    assert tool.main(["fp8_study"]) == 0
    assert [Path(c[c.index("--workdir") + 1]).name for c in commands] == ["baseline_1"]
    assert "infinite | FAILS |" in (tmp_path / "study" / "fp8_study.md").read_text()


@pytest.mark.parametrize(("status", "message"), [(130, "was stopped and is saved"), (1, "status 1: the last words")])
def test_a_run_that_ends_early_ends_the_study_with_a_line(tmp_path, monkeypatch, capsys, status, message):
    def wait(command, log):
        log.write_text("many\nthe last words\n")
        return status

    monkeypatch.setattr(tool, "_wait", wait)
    assert tool.main(["fp8_study"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: baseline_1 ")
    assert message in err[-1]


def test_bad_input_is_one_line_and_trains_nothing(tmp_path, commands, capsys):
    other = dataclasses.replace(config("fp8"), seed=3)
    for changes, message in (
        ({"runs": ["baseline_1", "fp9"]}, "--runs: there is no fp9; there are baseline_1, baseline_2, "),
        ({"runs": ["fp8"]}, "--runs needs baseline_1"),
        ({"recipe": "tiny.pretrian"}, "no recipe tiny.pretrian. Did you mean tiny.pretrain?"),
        ({}, f"{tmp_path}/study/fp8 holds another run: seed is 3 there and 0 in this study; name another --workdir"),
    ):
        if not changes:
            write_run(tmp_path / "study" / "fp8", other, BASE)
        with flagsaver.flagsaver(**changes):
            assert tool.main(["fp8_study"]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"error: {message}")
        assert err.count("\n") == 1
    assert not commands
