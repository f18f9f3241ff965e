"""Balance in the report: load per device, entropy and dead experts, and a loud word where routing was forced."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from deepseek_jax.evaluation import report, report_plots

LAYERS, DEVICES, STEPS = 3, 4, 6
MODEL = {"num_dense_layers": 1, "num_layers": 3, "mtp_depth": 1}
NAMES = ["layer 2", "layer 3", "MTP 1"]


def run(steps: int = STEPS, devices: int = DEVICES, layers: int = LAYERS, *, start: int = 1) -> list[dict]:
    """Training records whose loads of devices, entropy and dead experts differ from step to step."""
    records = []
    for step in range(start, start + steps):
        share = np.random.default_rng(step).dirichlet(np.full(devices, 50), layers)
        records.append(
            {
                "step": step,
                "tokens": 1000 * step,
                "kind": "train",
                "max_vio": [0.1 * step] * layers,
                "load_entropy": [1 - layer / 100 - step / 1000 for layer in range(layers)],
                "dead_experts": [(layer + step) % 4 for layer in range(layers)],
                "device_load": share.tolist(),
                "device_load_max": (share.max(axis=1) * devices).tolist(),
            }
        )
    return records


def page(folder, train: list[dict], config: dict | None = None) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model": MODEL}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in train))
    return report.write_report(folder).read_text()


def alts(text: str) -> list[str]:
    return re.findall(r'<img alt="([^"]*)"', text)


@pytest.fixture(autouse=True)
def style():
    with report_plots.styled():
        yield


@pytest.mark.parametrize("layers", [LAYERS, 13])
def test_entropy_and_dead_experts_have_a_line_for_each_layer(layers):
    train = run(layers=layers)
    entropy, dead = report_plots.load_evenness(train, NAMES).axes[:2]
    for axes, name, title in (
        (entropy, "load_entropy", "Entropy of the load, 1 = even"),
        (dead, "dead_experts", "Dead experts"),
    ):
        assert axes.get_title("left") == title
        lines = axes.get_lines()
        assert len(lines) == layers
        for layer, line in enumerate(lines):
            np.testing.assert_array_equal(line.get_xdata(), [record["tokens"] for record in train])
            np.testing.assert_array_equal(line.get_ydata(), [record[name][layer] for record in train])
        if layers == LAYERS:
            assert [line.get_label() for line in lines] == NAMES
    assert dead.get_ylim()[0] == 0


def test_no_dead_expert_is_a_line_at_the_bottom():
    train = [record | {"dead_experts": [0] * LAYERS} for record in run()]
    assert report_plots.load_evenness(train).axes[1].get_ylim() == (0, 1)


def test_one_of_the_two_is_enough():
    train = [{k: v for k, v in record.items() if k != "dead_experts"} for record in run()]
    entropy, dead = report_plots.load_evenness(train).axes
    assert len(entropy.get_lines()) == LAYERS
    assert [text.get_text() for text in dead.texts] == ["not recorded"]


def test_devices_are_shown_over_time_and_by_layer():
    """Share × devices: over time the mean of all layers, by layer the last logged step; balanced is mid-scale."""
    train = run()
    over_time, by_layer = report_plots.device_heat_maps(train, NAMES).axes[:2]
    loads = np.array([record["device_load"] for record in train]) * DEVICES
    (mesh,) = over_time.collections
    np.testing.assert_allclose(np.asarray(mesh.get_array()), loads.mean(axis=1).T)  # [device, time]
    assert mesh.norm(1.0) == 0.5
    assert over_time.get_xlim() == (1000, 1000 * STEPS)
    assert over_time.get_ylim() == (DEVICES - 0.5, -0.5)  # device 0 at the top
    (mesh,) = by_layer.collections
    np.testing.assert_allclose(np.asarray(mesh.get_array()), loads[-1])  # [layer, device]
    assert mesh.norm(1.0) == 0.5
    assert mesh.norm(loads[-1].max()) <= 1
    assert [label.get_text() for label in by_layer.get_yticklabels()] == NAMES
    assert by_layer.get_ylim() == (LAYERS - 0.5, -0.5)


@pytest.mark.parametrize("share", [[1.0, 0.0, 0.0, 0.0], [0.25] * 4])
def test_the_colours_hold_the_worst_load_and_an_even_one(share):
    (record,) = run(1, 4, 1)
    mesh = report_plots.device_heat_maps([record | {"device_load": [share]}]).axes[1].collections[0]
    assert 0 <= mesh.norm(4 * min(share)) <= 0.5 <= mesh.norm(4 * max(share)) <= 1
    assert mesh.norm.vmin >= 0


def test_a_run_on_another_mesh_shows_the_steps_of_the_last_one():
    """Eight devices, then four: only loads of equally many devices share a picture."""
    train = run(4, 8) + run(3, 4, start=5)
    (mesh,) = report_plots.device_heat_maps(train).axes[0].collections
    assert np.asarray(mesh.get_array()).shape == (4, 3)


def test_many_layers_and_devices_fit():
    figure = report_plots.device_heat_maps(run(3, 320, 59))
    assert report_plots.data_uri(figure, pixels=True).startswith("data:image/png")
    assert len(figure.axes[1].get_yticks()) == 16


def test_the_page_shows_the_pictures_of_balance_with_words(tmp_path, monkeypatch):
    seen = {}
    for name in ("load_evenness", "device_heat_maps"):
        draw = getattr(report_plots, name)
        monkeypatch.setattr(
            report_plots, name, lambda *arguments, n=name, d=draw: seen.update({n: arguments}) or d(*arguments)
        )
    text = page(tmp_path, run())
    assert seen == {"load_evenness": (run(), NAMES), "device_heat_maps": (run(), NAMES)}
    assert "entropy of the load and dead experts of each layer over training tokens" in alts(text)
    assert "heat maps of each device's load, over training tokens and by layer" in [
        alt.replace("&#x27;", "'") for alt in alts(text)
    ]
    assert "a step waits for the busiest device" in text
    assert len(set(alts(text))) == len(alts(text)) == text.count("<figcaption>")


def test_a_run_of_one_device_has_no_picture_of_devices(tmp_path):
    assert report_plots.device_heat_maps(run(devices=1)) is None
    text = page(tmp_path, run(devices=1))
    assert "device&#x27;s load" not in text
    assert "dead experts of each layer" in text


def test_a_run_from_before_these_metrics_shows_what_it_has(tmp_path):
    """And nothing is called missing that did not exist then."""
    names = ("load_entropy", "dead_experts", "device_load", "device_load_max")
    old = [{k: v for k, v in record.items() if k not in names} for record in run()]
    text = page(tmp_path, old)
    section = text[text.index("<h2>Expert load</h2>") : text.index("<h2>Samples</h2>")]
    assert alts(section) == ["MaxVio of each layer over training tokens"]
    assert section.count("not recorded") == 1  # of the loads of experts, which these records leave out
    assert 'class="alarm"' not in text


@pytest.mark.parametrize(
    "record",
    [
        {"device_load": [], "load_entropy": [], "dead_experts": []},
        {"device_load": [[0.5, 0.5], [1.0]], "load_entropy": ["nan"], "dead_experts": [1]},
        {"device_load": None, "load_entropy": None},
    ],
)
def test_odd_metrics_make_a_page(tmp_path, record):
    text = page(tmp_path, [{"step": 1, "tokens": 10, "kind": "train", **record}])
    assert "device&#x27;s load" not in text


@pytest.mark.parametrize(
    ("config", "metrics", "loud"),
    [
        ({"force_balanced_routing": True}, {}, True),
        ({}, {"forced_balance": True}, True),
        ({"force_balanced_routing": False}, {"forced_balance": False}, False),
        ({}, {}, False),
    ],
)
def test_forced_balance_is_said_loudly_before_all_else(tmp_path, config, metrics, loud):
    """By the saved config, or by any logged step."""
    train = run()
    train[2] |= metrics
    text = page(tmp_path, train, config)
    banners = re.findall(r'<p class="alarm" role="alert">FORCED BALANCE', text)
    assert len(banners) == loud
    if loud:
        assert text.index('class="alarm"') < text.index('class="tiles"')
