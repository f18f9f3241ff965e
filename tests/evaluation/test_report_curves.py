"""The report's curves are the numbers of metrics.jsonl: each panel the column that its title names, at its tokens."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deepseek_jax.evaluation import report, report_plots

LAYERS, EXPERTS, STEPS = 3, 8, 30
SCALARS = (
    "loss_main", "loss_mtp", "loss_balance", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "batch_rows"
)  # fmt: skip
PANELS = {
    "Learning rate": ("learning_rate", 1),
    "Gradient norm, before clipping": ("grad_norm", 1),
    "Balance loss, without α": ("loss_balance", 1),
    "Tokens per second": ("tokens_per_second", 1),
    "Model FLOPs utilisation, %": ("mfu", 100),
    "Sequences per batch": ("batch_rows", 1),
}


def run(steps: int = STEPS) -> list[dict]:
    """Records in which no two columns are alike and tokens grow unevenly, as with a ramped batch."""
    rng = np.random.default_rng(steps)
    tokens = np.cumsum(rng.integers(100, 900, steps)).tolist()
    return [
        {
            "kind": "train",
            "step": step,
            "tokens": tokens[step - 1],
            **{name: rng.uniform(1, 2) * 2.0**i for i, name in enumerate(SCALARS)},
            "load": rng.dirichlet(np.ones(EXPERTS), LAYERS).tolist(),
            "max_vio": rng.uniform(0, 4, LAYERS).tolist(),
        }
        for step in range(1, steps + 1)
    ]


def evaluations(train: list[dict]) -> list[dict]:
    return [
        {"kind": "eval", "tokens": r["tokens"], "heldout_loss": 9 - i, "heldout_bits_per_byte": 3 - i / 7}
        for i, r in enumerate(train[9::10])
    ]


def values(records: list[dict], name: str) -> list[float]:
    return [record[name] for record in records]


def lines(axes: Axes) -> dict[str, np.ndarray]:
    """`(x, y)` of the lines with a name."""
    named = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    assert len({line.get_label() for line in named}) == len(named)
    return {line.get_label(): np.asarray(line.get_data(), np.float64) for line in named}


def titled(figure: Figure) -> dict[str, Axes]:
    """Axes by their title, which the report's style puts on the left."""
    return {axes.get_title("left") or axes.get_title("center"): axes for axes in figure.axes}


def spied(monkeypatch, *names: str) -> dict[str, Figure]:
    """Gets the figures that a report draws with the functions `names`."""
    drawn = {}

    def spy(name: str) -> None:
        draw = getattr(report_plots, name)
        monkeypatch.setattr(report_plots, name, lambda *arguments: drawn.setdefault(name, draw(*arguments)))

    for name in names:
        spy(name)
    return drawn


@pytest.fixture(autouse=True)
def style():
    with report_plots.styled():
        yield


def test_the_losses_are_those_of_the_records():
    train = run()
    judged = evaluations(train)
    axes = titled(report_plots.loss_curves(train, judged, {"gzip": 2.5, "xz": 1.5}))
    assert list(axes) == ["Loss, nats per token", "Held-out bits per byte"]
    losses, bits = (lines(a) for a in axes.values())
    assert set(losses) == {"MTP", "main", "held-out"}
    np.testing.assert_array_equal(losses["main"], [values(train, "tokens"), values(train, "loss_main")])
    np.testing.assert_array_equal(losses["MTP"], [values(train, "tokens"), values(train, "loss_mtp")])
    np.testing.assert_array_equal(losses["held-out"], [values(judged, "tokens"), values(judged, "heldout_loss")])
    assert set(bits) == {"held-out", "gzip", "xz"}
    np.testing.assert_array_equal(bits["held-out"], [values(judged, "tokens"), values(judged, "heldout_bits_per_byte")])
    assert (bits["gzip"][1] == 2.5).all()
    assert (bits["xz"][1] == 1.5).all()
    for a, expected in zip(axes.values(), (set(losses), set(bits)), strict=True):
        assert a.get_xlabel() == "tokens"
        assert {text.get_text() for text in a.get_legend().get_texts()} == expected


def test_the_moving_average_has_its_own_lines():
    train = run()
    judged = evaluations(train)
    for record in judged:
        record["heldout_average_loss"] = record["heldout_loss"] - 1
        record["heldout_average_bits_per_byte"] = record["heldout_bits_per_byte"] - 0.1
    for axes, name in zip(report_plots.loss_curves(train, judged, {}).axes, ("loss", "bits_per_byte"), strict=True):
        drawn = lines(axes)
        for label, column in (("held-out", "heldout"), ("held-out, average", "heldout_average")):
            expected = [values(judged, "tokens"), values(judged, f"{column}_{name}")]
            np.testing.assert_array_equal(drawn[label], expected)


def test_many_losses_are_shown_faintly_with_their_running_mean():
    """A window of a fiftieth of the points; towards the ends, of those that are there."""
    train = run(150)
    axes = report_plots.loss_curves(train, [], {}).axes[0]
    faint = [np.asarray(line.get_data()) for line in axes.get_lines() if line.get_label().startswith("_")]
    main = np.array(values(train, "loss_main"))
    assert [line[1].tolist() for line in faint] == [main.tolist(), values(train, "loss_mtp")]
    x, y = lines(axes)["main"]
    np.testing.assert_array_equal(x, values(train, "tokens"))
    np.testing.assert_allclose(y[1:-1], (main[:-2] + main[1:-1] + main[2:]) / 3)
    np.testing.assert_allclose(y[[0, -1]], [main[:2].mean(), main[-2:].mean()])


@pytest.mark.parametrize("rising", [False, True])
def test_every_training_panel_shows_its_own_column(rising):
    """Also where the gradient norm spans so much that its axis is logarithmic."""
    train = run()
    for number, record in enumerate(train):
        record["grad_norm"] *= 1 + rising * number
    axes = titled(report_plots.training_curves(train))
    assert list(axes) == list(PANELS)
    for title, (name, scale) in PANELS.items():
        (line,) = axes[title].get_lines()
        expected = [values(train, "tokens"), np.multiply(values(train, name), scale)]
        np.testing.assert_allclose(np.asarray(line.get_data()), expected, err_msg=title)
        assert axes[title].get_xlabel() == "tokens"
        (bottom, top), (low, high) = axes[title].get_ylim(), (min(expected[1]), max(expected[1]))
        assert bottom <= low < high <= top, title
    assert axes["Gradient norm, before clipping"].get_yscale() == ("log" if rising else "linear")


def test_what_is_not_a_number_is_a_gap_and_no_point():
    train = run()
    for number, bad in ((3, math.nan), (7, None), (11, "nan")):
        train[number]["loss_main"] = train[number]["learning_rate"] = bad
    del train[20]["learning_rate"]
    good = [record for i, record in enumerate(train) if i not in (3, 7, 11)]
    main = lines(report_plots.loss_curves(train, [], {}).axes[0])["main"]
    np.testing.assert_array_equal(main, [values(good, "tokens"), values(good, "loss_main")])
    (line,) = titled(report_plots.training_curves(train))["Learning rate"].get_lines()
    good.remove(train[20])
    np.testing.assert_array_equal(line.get_data(), [values(good, "tokens"), values(good, "learning_rate")])


@pytest.mark.parametrize("layers", [LAYERS, 13])
def test_max_violation_has_a_line_for_each_layer(layers):
    """With a legend, or, where layers are many, with a colour bar."""
    train = run()
    for number, record in enumerate(train):
        record["max_vio"] = [layer + number / STEPS for layer in range(layers)]
    axes = report_plots.max_violation(train).axes[0]
    drawn = lines(axes)
    assert list(drawn) == [f"MoE layer {layer + 1}" for layer in range(layers)]
    for layer, (x, y) in enumerate(drawn.values()):
        np.testing.assert_array_equal(x, values(train, "tokens"))
        np.testing.assert_array_equal(y, [record["max_vio"][layer] for record in train])
    assert len({line.get_color() for line in axes.get_lines()}) == layers
    assert axes.get_title("left").startswith("MaxVio")
    assert axes.get_xlabel() == "tokens"
    assert axes.get_ylim()[0] == 0
    assert (axes.get_legend() is not None) == (layers <= 12)


def test_the_heat_map_shows_each_load_times_the_number_of_experts():
    """Balanced is 1, in the middle of the colours; a few records are shown one by one."""
    train = run()
    figure = report_plots.load_heat_maps(train)
    panels = [axes for axes in figure.axes if axes.get_title("left")]
    assert [axes.get_title("left") for axes in panels] == [f"MoE layer {layer + 1}" for layer in range(LAYERS)]
    for layer, axes in enumerate(panels):
        (mesh,) = axes.collections
        expected = np.array([record["load"][layer] for record in train]).T * EXPERTS  # [expert, time]
        np.testing.assert_allclose(np.asarray(mesh.get_array()), expected)
        assert mesh.norm(1.0) == 0.5
        assert mesh.norm.vmin == 0
        np.testing.assert_array_equal(mesh.get_coordinates()[:, 0, 1], np.arange(EXPERTS + 1) - 0.5)
        assert axes.get_xlim() == (train[0]["tokens"], train[-1]["tokens"])
        assert axes.get_ylim() == (EXPERTS - 0.5, -0.5)  # expert 0 in the first row, at the top
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("tokens", "expert")


@pytest.mark.parametrize("steps", [STEPS, 1000])
def test_the_heat_map_shows_an_event_at_its_tokens(steps):
    """With a ramped batch too: half of the steps are over in a quarter of the tokens."""
    tokens = np.cumsum(np.arange(1, steps + 1)) * 1000
    event = steps // 2
    collapsed, balanced = np.eye(2)[:1].tolist(), [[0.5, 0.5]]
    train = [{"tokens": int(t), "load": collapsed if i < event else balanced} for i, t in enumerate(tokens)]
    (mesh,) = report_plots.load_heat_maps(train).axes[0].collections
    loads, edges = np.asarray(mesh.get_array())[0], mesh.get_coordinates()[0, :, 0]
    assert (np.diff(edges) > 0).all()
    drawn = edges[:-1][loads < 1.5][0]
    together = -(-steps // 400)  # steps in one column of the picture
    assert abs(drawn - tokens[event]) < tokens[event + together] - tokens[event - together]


def test_layers_are_named_by_what_they_are(tmp_path, monkeypatch):
    """Rows of `load`: the MoE layers, counted with the dense ones, then the MTP modules."""
    model = {"num_dense_layers": 2, "num_layers": 4, "mtp_depth": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in run()))
    drawn = spied(monkeypatch, "load_heat_maps", "max_violation")
    report.write_report(tmp_path)
    names = ["layer 3", "layer 4", "MTP 1"]
    assert [axes.get_title("left") for axes in drawn["load_heat_maps"].axes][:LAYERS] == names
    assert list(lines(drawn["max_violation"].axes[0])) == names


@pytest.mark.parametrize("max_bytes", [60_000, None])
@pytest.mark.parametrize("done", [True, False])
def test_held_out_points_that_read_less_than_the_last_are_told_apart(tmp_path, monkeypatch, max_bytes, done):
    """`evaluation.max_bytes` bounds the text of all points but the one that is the run's result."""
    train = run()
    judged = evaluations(train)
    (tmp_path / "config.json").write_text(json.dumps({"evaluation": {"max_bytes": max_bytes}}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*train, *judged]))
    if done:
        result = {"heldout_bits_per_byte": judged[-1]["heldout_bits_per_byte"], "gzip": {"concatenated": 2.5}}
        (tmp_path / "result.json").write_text(json.dumps(result))
    drawn = spied(monkeypatch, "loss_curves")
    page = report.write_report(tmp_path).read_text()
    apart = done and max_bytes is not None
    for axes, name in zip(drawn["loss_curves"].axes, ("heldout_loss", "heldout_bits_per_byte"), strict=True):
        shown = {label: line.tolist() for label, line in lines(axes).items() if label.startswith("held-out")}
        points = [values(judged, "tokens"), values(judged, name)]
        if apart:
            assert shown == {"held-out, part": [p[:-1] for p in points], "held-out, all": [p[-1:] for p in points]}
        else:
            assert shown == {"held-out": points}
    assert ("points on the way: about 60,000 bytes of the text" in page) == (max_bytes is not None)
    assert ("All of it: the diamond, gzip." in page) == apart


@pytest.mark.parametrize("steps", [99, 100])
def test_a_running_mean_is_promised_where_it_is_drawn(tmp_path, monkeypatch, steps):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in run(steps)))
    drawn = spied(monkeypatch, "loss_curves")
    page = report.write_report(tmp_path).read_text()
    assert len(drawn["loss_curves"].axes[0].get_lines()) == (4 if steps == 100 else 2)
    assert ("running mean" in page) == (steps == 100)


def test_the_main_and_the_mtp_loss_are_seen_where_they_are_alike():
    """The thinner line lies on the wider one."""
    main, mtp = report_plots.loss_curves(run(), [], {}).axes[0].get_lines()
    assert (main.get_label(), mtp.get_label()) == ("main", "MTP")
    assert mtp.get_linewidth() * 2 <= main.get_linewidth()


def test_every_picture_has_a_caption_and_says_what_it_is_to_those_who_do_not_see_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in run()))
    page = report.write_report(tmp_path).read_text()
    alts = re.findall(r'<img alt="([^"]*)"', page)
    assert len(set(alts)) == len(alts) == page.count("<figcaption>") == 4
    assert "<figcaption></figcaption>" not in page
    assert any("learning rate" in alt and "gradient norm" in alt for alt in alts)


def test_the_bars_are_as_long_as_the_bits_per_byte():
    axes = report_plots.compression_bars(
        1.5, {"concatenated": 2.0, "per_file": 2.25}, {"concatenated": 1.25, "per_file": 1.75}
    ).axes[0]
    shown = dict(
        zip([t.get_text() for t in axes.get_yticklabels()], [p.get_width() for p in axes.patches], strict=True)
    )
    assert shown == {
        "this model": 1.5,
        "xz -9e, all files as one": 1.25,
        "xz -9e, file by file": 1.75,
        "gzip -9, all files as one": 2.0,
        "gzip -9, file by file": 2.25,
    }
    assert [text.get_text() for text in axes.texts] == [f"{value:.3f}" for value in shown.values()]
    assert all(patch.get_x() == 0 for patch in axes.patches)
    assert axes.get_xlabel() == "bits per byte of held-out text"


def test_the_page_hands_the_records_of_the_run_to_the_pictures(tmp_path, monkeypatch):
    """Training records to the training curves, evaluations to the held-out ones, the compressors' sizes as lines."""
    train = run()
    judged = evaluations(train)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*train, *judged]))
    result = {name: {"concatenated": size, "per_file": size + 1} for name, size in (("gzip", 2.5), ("xz", 1.5))}
    (tmp_path / "result.json").write_text(json.dumps({"heldout_bits_per_byte": 1.25, **result}))
    seen = {}

    def spy(name: str) -> None:
        draw = getattr(report_plots, name)
        monkeypatch.setattr(report_plots, name, lambda *arguments: seen.update({name: arguments}) or draw(*arguments))

    for name in ("compression_bars", "loss_curves", "training_curves", "load_heat_maps", "max_violation"):
        spy(name)
    report.write_report(tmp_path)
    assert seen == {
        "compression_bars": (1.25, result["gzip"], result["xz"]),
        "loss_curves": (train, judged, {"gzip": 2.5, "xz": 1.5}, []),
        "training_curves": (train,),
        "load_heat_maps": (train, []),
        "max_violation": (train, []),
    }
