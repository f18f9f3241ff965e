"""Comparing runs: one line per run over tokens, late means, and clear words where there is nothing to compare."""

from __future__ import annotations

import json

import numpy as np
import pytest
from absl.testing import flagsaver

from deepseek_jax.config import ConfigError
from deepseek_jax.training.metrics import MetricsWriter
from tools import compare


@pytest.fixture(autouse=True)
def flags():
    """The command's flags, as `main` finds them."""
    compare.flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver():
        yield


@pytest.fixture
def runs(tmp_path):
    """Two runs of eight logged steps: MaxVio of two layers falls in one and rises in the other."""
    for name, sign in (("with", -1), ("without", 1)):
        with MetricsWriter(tmp_path / name, tensorboard=False) as writer:
            for step in range(1, 9):
                values = {
                    "loss": 10.0 / step,
                    "loss_main": 9.0 / step,
                    "max_vio": [2 + sign * step / 8, 4 + sign * step / 8],
                }
                writer.write(step, values, tokens=500_000 * step)
            writer.write(8, {"heldout_bits_per_byte": 2.5}, tokens=4_000_000, kind="eval")
    return [str(tmp_path / "with"), str(tmp_path / "without")]


def test_a_series_averages_over_layers(runs):
    tokens, values = compare.series(runs[0], "max_vio")
    np.testing.assert_array_equal(tokens, 500_000 * np.arange(1, 9))
    np.testing.assert_allclose(values, 3 - np.arange(1, 9) / 8)
    np.testing.assert_allclose(compare.series(runs[0], "loss")[1], 10 / np.arange(1, 9))
    np.testing.assert_array_equal(compare.series(runs[1], "heldout_bits_per_byte"), [[4_000_000], [2.5]])


def test_an_unknown_metric_lists_those_there_are(runs):
    with pytest.raises(ConfigError, match=r"with has no metric maxvio; it has .*loss, loss_main, max_vio"):
        compare.series(runs[0], "maxvio")


def test_the_picture_has_a_named_line_for_each_run(runs):
    axes = compare.draw(runs, "max_vio", None).axes[0]
    assert [line.get_label() for line in axes.get_lines()] == ["with", "without"]
    for line, sign in zip(axes.get_lines(), (-1, 1), strict=True):
        x, y = np.asarray(line.get_data(), np.float64)
        np.testing.assert_allclose(x, np.arange(1, 9) / 2, err_msg="million tokens")
        np.testing.assert_allclose(y, 3 + sign * np.arange(1, 9) / 8)
    name = "MaxVio, mean over layers"
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title("left")) == ("million tokens", name, name)
    assert axes.get_ylim()[0] == 0
    assert compare.draw(runs, "loss_main", "Losses").axes[0].get_ylabel() == "main loss, nats per token"
    assert compare.draw(runs, "loss", "Losses").axes[0].get_title("left") == "Losses"


@pytest.mark.parametrize(("metric", "kind"), [("loss", "train"), ("heldout_loss", "eval")])
def test_the_last_step_does_not_end_a_line_in_a_hook(tmp_path, metric, kind):
    """It is logged whatever the rhythm; of an evaluation it is the result, and stays."""
    tokens = [1, 10, 20, 30, 31]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in tokens:
            writer.write(step, {metric: 1.0}, tokens=step * 1_000_000, kind=kind)
    (line,) = compare.draw([str(tmp_path)], metric, None).axes[0].get_lines()
    assert line.get_xdata().tolist() == (tokens[:-1] if kind == "train" else tokens)
    assert len(compare.series(str(tmp_path), metric)[0]) == len(tokens)


@pytest.mark.parametrize(("name", "magic"), [("vio.png", b"\x89PNG"), ("vio.svg", b"<?xml")])
def test_the_command_writes_a_picture_and_prints_late_means(runs, tmp_path, capsys, name, magic):
    with flagsaver.flagsaver(out=str(tmp_path / name)):
        assert compare.main(["compare", runs[0] + "/", runs[1]]) == 0
    assert (tmp_path / name).read_bytes().startswith(magic)
    # Steps 7 and 8 are the last quarter: 3 ± 7.5 / 8.
    assert capsys.readouterr().out.splitlines() == [
        "with: max_vio 2.062 over the last quarter",
        "without: max_vio 3.938 over the last quarter",
        str(tmp_path / name),
    ]


def test_what_cannot_be_compared_is_one_line(runs, tmp_path, capsys):
    assert compare.main(["compare"]) == 2
    assert capsys.readouterr().err.startswith("usage: python -m tools.compare ")
    for argv, message in (
        ([str(tmp_path / "nowhere")], f"error: no metrics at {tmp_path}/nowhere"),
        ([runs[0], str(tmp_path / "nowhere")], f"error: no metrics at {tmp_path}/nowhere"),
    ):
        with flagsaver.flagsaver(out=str(tmp_path / "none.png")):
            assert compare.main(["compare", *argv]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(message)
        assert captured.err.count("\n") == 1
    with flagsaver.flagsaver(metric="nothing"):
        assert compare.main(["compare", runs[0]]) == 1
    assert "has no metric nothing; it has" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


def test_a_run_of_a_dead_process_is_read_up_to_its_torn_line(runs):
    with open(f"{runs[0]}/metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 9, "tokens": 1})[:-4])
    assert len(compare.series(runs[0], "loss")[1]) == 8
