"""Placing experts from a run's recorded loads: the numbers shown, the file written, and one line where it cannot."""

from __future__ import annotations

import json

import numpy as np
import pytest
from absl.testing import flagsaver

from deepseek_jax.planning.expert_placement import ExpertPlacement, plan_placement
from deepseek_jax.training.metrics import MetricsWriter
from tools import place_experts as tool

MODEL = {"num_dense_layers": 1, "num_layers": 2, "mtp_depth": 1, "moe": {"num_groups": 2}}
EARLY = [[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]
LATE = [[[0.5, 0.3, 0.1, 0.1], [0.25] * 4], [[0.3, 0.3, 0.3, 0.1], [0.25] * 4]]
MEAN = [[0.4, 0.3, 0.2, 0.1], [0.25] * 4]


@pytest.fixture(autouse=True)
def flags():
    """The command's flags, as `main` finds them."""
    tool.flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver():
        yield


@pytest.fixture
def run(tmp_path):
    """Three logged steps of a model with one MoE layer and one MTP module of four experts each."""
    folder = tmp_path / "mine"
    with MetricsWriter(folder, tensorboard=False) as writer:
        for step, load in zip((10, 20, 30), [EARLY, *LATE], strict=True):
            writer.write(step, {"loss": 1.0, "load": load}, tokens=step)
        writer.write(30, {"heldout_bits_per_byte": 2.5}, tokens=30, kind="eval")
    (folder / "config.json").write_text(json.dumps({"model": MODEL}))
    return folder


def _call(run, **values) -> int:
    with flagsaver.flagsaver(**values):
        return tool.main(["place_experts", str(run)])


def test_the_last_steps_are_averaged(run):
    loads, first, last = tool.mean_loads(run, {}, 2)
    np.testing.assert_allclose(loads, MEAN)
    assert (first, last) == (20, 30)
    np.testing.assert_allclose(tool.mean_loads(run, {}, 100)[0][0], np.mean([EARLY[0], *(x[0] for x in LATE)], axis=0))


def test_the_plan_is_shown_by_layer(run, capsys):
    """Shares .4 .3 | .2 .1 are 1.4 times the mean of two devices; .4 .1 | .3 .2 are even, and two experts move."""
    assert _call(run, devices=2, steps=2) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{run}: mean load of logged steps 20 to 30",
        "4 experts as 4 replicas on 2 devices, nodes: 1 (global)",
        "",
        "layer      MaxVio before   after   moved slots",
        "layer 2            0.400   0.000             2",
        "MTP 1              0.000   0.000             2",
        "mean, sum          0.200   0.000             4",
        "",
        "experts of each device",
        "layer 2: 0 3 | 1 2",
        "MTP 1  : 0 2 | 1 3",
    ]


def test_nodes_keep_the_groups_of_the_model_unless_others_are_named(run, capsys):
    assert _call(run, devices=2, nodes=2, steps=2) == 0
    out = capsys.readouterr().out
    assert "nodes: 2 (hierarchical: 1 of 2 groups on each node)" in out
    assert "layer 2: 0 1 || 2 3" in out
    assert _call(run, devices=2, nodes=2, groups=1, steps=2) == 0
    out = capsys.readouterr().out
    assert "nodes: 2 (global)" in out
    assert "layer 2: 0 3 || 1 2" in out


def test_the_file_holds_the_plan_and_can_be_the_next_ones_before(run, tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert _call(run, devices=2, replicas=6, steps=2, json=str(path)) == 0
    document = json.loads(path.read_text())
    expected = plan_placement(MEAN, 6, devices=2, groups=2)
    assert document["physical_to_logical"] == expected.physical_to_logical.tolist()
    assert document["replica_counts"] == expected.replica_counts.tolist()
    assert document["layers"] == ["layer 2", "MTP 1"]
    assert document["steps"] == [20, 30]
    np.testing.assert_allclose(document["loads"], MEAN)
    np.testing.assert_allclose(document["max_vio_before"], [0.4, 0], atol=1e-12)
    np.testing.assert_allclose(document["max_vio_after"], expected.device_load(MEAN).max(axis=1) * 2 - 1, atol=1e-12)
    before = ExpertPlacement(np.tile(np.arange(4), (2, 1)), 4, 2)
    assert document["moved_slots"] == expected.moved_from(before).tolist()
    # The same plan again: nothing moves, and it is as good as before.
    assert _call(run, devices=2, replicas=6, steps=2, before=str(path), json=str(path)) == 0
    again = json.loads(path.read_text())
    assert again["moved_slots"] == [0, 0]
    assert again["max_vio_before"] == again["max_vio_after"] == document["max_vio_after"]
    capsys.readouterr()


def test_where_experts_do_not_divide_among_devices_nothing_came_before(run, capsys):
    assert _call(run, devices=3, replicas=6) == 0
    assert [line.split()[-3::2] for line in capsys.readouterr().out.splitlines()[4:7]] == [["-", "-"]] * 3


def test_a_run_without_a_config_needs_the_groups(run, capsys):
    (run / "config.json").unlink()
    assert _call(run, devices=2) == 2
    assert "no config.json that tells its model's expert groups; name --groups" in capsys.readouterr().err
    assert _call(run, devices=2, groups=1) == 0
    assert "row 0: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"devices": 3}, "4 replicas do not divide among 3 devices; 6 would"),
        ({"devices": 0}, "devices must be positive, not 0"),
        ({"devices": 2, "replicas": 2}, "2 replicas do not hold 4 experts"),
        ({"devices": 2, "nodes": 4}, "2 devices do not divide among 4 nodes"),
        ({"devices": 2, "groups": 3}, "4 experts do not divide into 3 groups"),
        ({"devices": 2, "steps": 0}, "--steps must be positive, not 0"),
        ({"devices": 2, "before": "{here}/nothing.json"}, "[Errno 2] No such file or directory: "),
        ({"devices": 2, "before": "{here}/text.json"}, "{here}/text.json is not JSON: "),
        ({"devices": 2, "before": "{here}/list.json"}, "{here}/list.json does not hold a JSON object"),
        ({"devices": 2, "before": "{here}/empty.json"}, "{here}/empty.json: a placement in JSON is an object with "),
        ({"devices": 2, "before": "{here}/other.json"}, "the earlier placement has 1 layers, this one 2"),
        ({"devices": 2, "json": "{here}"}, "[Errno 21] Is a directory: "),
    ],
)
def test_bad_numbers_and_files_are_one_line(run, tmp_path, capsys, values, message):
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "empty.json").write_text("{}")
    other = ExpertPlacement(np.arange(4)[None], 4, 2)
    (tmp_path / "other.json").write_text(json.dumps(other.to_dict()))
    here = {k: v.format(here=tmp_path) if isinstance(v, str) else v for k, v in values.items()}
    assert _call(run, **here) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: " + message.format(here=tmp_path))


def test_runs_without_loads_of_their_own_are_one_line(run, tmp_path, capsys):
    def said(folder) -> str:
        assert _call(folder, devices=2) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert said(tmp_path / "nowhere") == f"error: no run at {tmp_path}/nowhere: it is not a folder"
    (tmp_path / "empty").mkdir()
    assert said(tmp_path / "empty") == f"error: no metrics at {tmp_path}/empty/metrics.jsonl"
    with MetricsWriter(tmp_path / "dense", tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0, "load": []}, tokens=1)
    assert "recorded no loads of experts" in said(tmp_path / "dense")
    assert said("gs://bucket/run").startswith("error: the run must be on a local or mounted disk")
    (run / "config.json").write_text(json.dumps({"model": MODEL, "force_balanced_routing": True}))
    assert "forced its routing to be even" in said(run)
    (run / "config.json").write_text(json.dumps({"model": MODEL}))
    with MetricsWriter(run, tensorboard=False, resume_step=30) as writer:
        writer.write(40, {"load": EARLY, "forced_balance": True}, tokens=40)
    assert "forced its routing to be even" in said(run)


def test_without_a_run_or_devices_the_usage_is_shown(run, capsys):
    assert tool.main(["place_experts"]) == 2
    assert _call(run) == 2
    err = capsys.readouterr().err
    assert err.count("usage: python -m tools.place_experts RUN_FOLDER --devices N") == 2
