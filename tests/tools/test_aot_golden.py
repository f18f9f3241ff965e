"""The kept compiled steps: what counts as a difference, and that each point is a layout that there can be."""

import copy
import json

import pytest

from deepseek_jax.config_io import override_all
from deepseek_jax.planning.device_memory import device_memory
from deepseek_jax.planning.job import with_device_count
from experiments.run import find_recipe
from tools import aot_golden
from tools.plan import job_of

POINT = {
    "devices": 16,
    "microbatches": 4,
    "arguments": 1000,
    "results": 0,
    "temporaries": 10_000,
    "collectives": {"all-to-all": [7, 5.0e9], "all-reduce": [2, 1.0]},
    "largest": [[10, "f32[1]", "x"]],
    "jax": "0.10.2",
    "planned": {"masters": 6000.0, "weights": 5000.0, "lost": 300.0},
    "seconds": 1.0,
    "host_memory": 1,
    "peak": 11_000,
    "usable": 20_000.0,
}


def changed(**fields):
    return copy.deepcopy(POINT) | fields


def test_what_is_as_it_was_is_no_difference():
    assert aot_golden.differences(changed(temporaries=10_290, seconds=9.0, host_memory=7), POINT) == []


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"arguments": 1001}, "arguments: 1,001 and not 1,000"),
        ({"temporaries": 10_301}, "temporaries: 10,301, +3.0% of 10,000"),
        (
            {"collectives": {"all-to-all": [7, 6.0e9], "all-reduce": [2, 1.0]}},
            "all-to-all: 7 of 6,000,000,000 bytes in a step and not 7 of 5,000,000,000",
        ),
        (
            {"collectives": {"all-to-all": [7, 5.0e9], "all-reduce": [2, 1.0], "all-gather": [1, 8.0]}},
            "all-gather: 1 of 8 bytes in a step and not 0 of 0",
        ),
        ({"collectives": {"all-to-all": [7, 5.0e9]}}, "all-reduce: 0 of 0 bytes in a step and not 2 of 1"),
    ],
)
def test_a_difference_is_a_line(fields, line):
    assert aot_golden.differences(changed(**fields), POINT) == [line]


def test_the_command_compares_keeps_and_refuses(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(aot_golden, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr(aot_golden, "compile_point", lambda devices: changed(devices=devices))
    assert aot_golden.main(["--points", "16"]) == 1
    assert "16 devices: nothing was kept" in capsys.readouterr().out
    assert aot_golden.main(["--points", "16,64", "--write"]) == 0
    assert sorted(json.loads((tmp_path / "kept.json").read_text())) == ["16", "64"]
    assert aot_golden.main(["--points", "64"]) == 0
    assert "as kept" in capsys.readouterr().out
    monkeypatch.setattr(aot_golden, "compile_point", lambda devices: changed(devices=devices, results=1))
    assert aot_golden.main(["--points", "64"]) == 1
    assert "64 devices: results: 1 and not 0" in capsys.readouterr().out
    assert aot_golden.main(["--points", "65"]) == 2
    assert "no point of 65 devices; there are 16, 64, 512, 2048" in capsys.readouterr().err


@pytest.mark.parametrize("devices", aot_golden.POINTS)
def test_points_are_layouts_of_so_many_devices(devices):
    recipe, changes = aot_golden.POINTS[devices]
    experiment = override_all(find_recipe(recipe)(), list(changes))
    assert with_device_count(experiment.parallel, devices) == experiment.parallel
    assert job_of(experiment).devices == devices


def test_the_kept_points_are_these():
    kept = json.loads(aot_golden.KEPT.read_text())
    assert set(kept) <= {str(devices) for devices in aot_golden.POINTS}
    for devices, one in kept.items():
        assert one["devices"] == int(devices)
        assert one["peak"] == one["arguments"] + one["results"] + one["temporaries"] <= one["usable"]
        assert sum(size for size, *_ in one["largest"]) <= one["temporaries"]
        assert {"all-to-all", "all-reduce", "collective-permute"} <= set(one["collectives"])


def test_the_planner_is_within_a_tenth_of_the_compiler():
    """docs/planner.md, "Beside the compiler"."""
    for devices, one in json.loads(aot_golden.KEPT.read_text()).items():
        recipe, changes = aot_golden.POINTS[int(devices)]
        job = job_of(override_all(find_recipe(recipe)(), list(changes)))
        planned = device_memory(job)
        assert (planned.total - planned.lost) / one["peak"] == pytest.approx(1, abs=0.1), devices
