"""The pictures of a run's report: matplotlib figures from plain records, without pyplot's global state."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import matplotlib
import matplotlib.cm
import numpy as np
from matplotlib.colors import Normalize, TwoSlopeNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

# One colour, one meaning, in every picture.
HELDOUT, TRAIN, MTP, GZIP, XZ = "#3b5bdb", "#e8710a", "#343a40", "#2b8a3e", "#862e9c"
AVERAGE = "#15aabf"
GREY, INK = "#868e96", "#212529"
LAYERS = matplotlib.colormaps["viridis"]
LOADS = matplotlib.colormaps["RdBu_r"]
_MAX_COLUMNS = 400
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#adb5bd",
    "axes.labelcolor": "#495057",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9ecef",
    "xtick.color": "#868e96",
    "ytick.color": "#868e96",
    "xtick.labelcolor": "#495057",
    "ytick.labelcolor": "#495057",
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "deepseek_jax",  # the same run gives the same file
}

Records = Sequence[Mapping[str, Any]]


def styled():
    """A context in which figures are made and saved."""
    return matplotlib.rc_context(_STYLE)


def data_uri(figure: Figure, *, pixels: bool = False) -> str:
    """The figure in a `data:` address: an SVG, or with `pixels` a PNG, which is smaller for heat maps."""
    buffer = io.BytesIO()
    if pixels:
        figure.savefig(buffer, format="png", dpi=160)
    else:
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    kind = "png" if pixels else "svg+xml"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def column(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and finite values of the scalar `name`, over the records that have it."""
    pairs = [(r.get("tokens", r.get("step", 0)), r[name]) for r in records if _finite(r.get(name))]
    tokens, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(tokens, np.float64), np.asarray(values, np.float64)


def compression_bars(model: float | None, gzip: Mapping[str, float] | None, xz: Mapping[str, float] | None) -> Figure:
    """Held-out bits per byte of the model and of the compressors, as bars from zero; shorter is better."""
    readings: list[tuple[str, float | None, str | tuple[float, float, float]]] = [("this model", model, HELDOUT)]
    for name, sizes, light in (("xz -9e", xz, _lighter(XZ)), ("gzip -9", gzip, _lighter(GZIP))):
        for key, reading in (("concatenated", "all files as one"), ("per_file", "file by file")):
            readings.append((f"{name}, {reading}", (sizes or {}).get(key), light))
    bars = [(name, value, colour) for name, value, colour in readings if _finite(value)]
    figure = Figure(figsize=(9, 0.5 + 0.42 * len(bars)), layout="constrained")
    axes = figure.subplots()
    longest = max(value for _, value, _ in bars)
    for row, (_, value, colour) in enumerate(bars):
        axes.barh(row, value, color=colour, height=0.66)
        weight = "bold" if colour == HELDOUT else "normal"
        axes.text(value + longest * 0.01, row, f"{value:.3f}", va="center", fontweight=weight)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.09)
    axes.set_xlabel("bits per byte of held-out text")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


def loss_curves(train: Records, evaluations: Records, baselines: Mapping[str, float], complete: Records = ()) -> Figure:
    """Training and held-out losses; beside them held-out bits per byte on its way past the compressors.

    Evaluations in `complete` read all held-out text where the others read a part of it: they stand by themselves. Where
    the moving average of the weights was evaluated as well, it has lines of its own.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    losses, bits = figure.subplots(1, 2, width_ratios=(3, 2))
    # The two are often nearly alike: the thin line on the wide one shows both.
    _smoothed(losses, *column(train, "loss_main"), TRAIN, "main", width=2.6)
    _smoothed(losses, *column(train, "loss_mtp"), MTP, "MTP", width=1.0)
    read = [(evaluations, "o-", 4.5, "held-out, part" if complete else "held-out")]
    read.append((complete, "D", 7, "held-out, all"))
    for axes, unit in ((losses, "loss"), (bits, "bits_per_byte")):
        for records, style, size, label in read:
            for name, of, colour in (("heldout", "", HELDOUT), ("heldout_average", ", average", AVERAGE)):
                tokens, values = column(records, f"{name}_{unit}")
                if len(values):
                    axes.plot(tokens, values, style, color=colour, markersize=size, label=label + of)
    losses.set_title("Loss, nats per token")
    for name, colour in (("gzip", GZIP), ("xz", XZ)):
        if name in baselines:
            bits.axhline(baselines[name], color=colour, linewidth=1.3, linestyle="--", label=name)
    bits.set_title("Held-out bits per byte")
    for axes in (losses, bits):
        _token_axis(axes)
        _legend(axes)
    return figure


def training_curves(train: Records) -> Figure:
    """Learning rate, batch, gradient norm, balance loss, throughput and MFU: one small picture each."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    panels = figure.subplots(2, 3)
    _panel(panels[0, 0], train, "learning_rate", "Learning rate", zero=True)
    _panel(panels[0, 1], train, "grad_norm", "Gradient norm, before clipping", log=True)
    _panel(panels[0, 2], train, "loss_balance", "Balance loss, without α")
    _panel(panels[1, 0], train, "tokens_per_second", "Tokens per second", zero=True)
    _panel(panels[1, 1], train, "mfu", "Model FLOPs utilisation, %", zero=True, scale=100)
    _panel(panels[1, 2], train, "batch_rows", "Sequences per batch", zero=True)
    return figure


def load_heat_maps(train: Records, names: Sequence[str] = ()) -> Figure | None:
    """Share of tokens of each expert over time, times the number of experts, one panel per layer with experts.

    `names` are those of the layers; they are numbered where the names are not as many as they.
    """
    rows = [r for r in train if r.get("load") and _rectangular(r["load"])]
    shapes = {np.shape(row["load"]) for row in rows}
    if len(shapes) != 1:
        return None
    tokens = _tokens(rows)
    loads = np.asarray([row["load"] for row in rows], np.float64)  # [time, layer, expert]
    _, layers, experts = loads.shape
    loads, edges = _binned(loads * experts, tokens)
    names = _layer_names(names, layers)
    columns = layers if layers <= 4 else 3 if layers <= 9 else 6
    height = 1.9 if layers <= 9 else 1.35
    figure = Figure(figsize=(11, 0.6 + height * math.ceil(layers / columns)), layout="constrained")
    panels = figure.subplots(math.ceil(layers / columns), columns, sharex=True, sharey=True, squeeze=False)
    top = max(2.0, float(np.nanpercentile(loads, 99.5)))
    for layer, axes in enumerate(panels.flat):
        if layer >= layers:
            axes.set_visible(False)
            panels.flat[layer - columns].tick_params(labelbottom=True)  # nothing below it shows the ticks
            continue
        rows_at = np.arange(experts + 1) - 0.5
        image = axes.pcolormesh(edges, rows_at, loads[:, layer].T, cmap=LOADS, norm=TwoSlopeNorm(1, 0, top))
        axes.set_ylim(experts - 0.5, -0.5)  # expert 0 at the top
        axes.set_title(names[layer], pad=4)
        axes.grid(False)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(4))
    figure.supxlabel("tokens", fontsize=10, color="#495057")
    figure.supylabel("expert", fontsize=10, color="#495057")
    shrink = min(0.9, 2 * columns / layers)  # as long as two rows are high
    bar = figure.colorbar(image, ax=panels, shrink=shrink, aspect=25, pad=0.01, label="load ÷ balanced load")
    bar.outline.set_visible(False)
    return figure


def max_violation(train: Records, names: Sequence[str] = ()) -> Figure | None:
    """MaxVio of each layer with experts over time: how far the busiest expert is above the balanced load."""
    rows = _per_layer(train, "max_vio")
    if rows is None:
        return None
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set_title("MaxVio = busiest expert's load ÷ balanced load − 1")
    _layer_lines(axes, rows, names)
    axes.set_ylim(bottom=0)
    return figure


def load_evenness(train: Records, names: Sequence[str] = ()) -> Figure | None:
    """Entropy of the load and dead experts of each layer over time; None where neither was recorded."""
    readings = {
        "Entropy of the load, 1 = even": _per_layer(train, "load_entropy"),
        "Dead experts": _per_layer(train, "dead_experts"),
    }
    if all(rows is None for rows in readings.values()):
        return None
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, 2), readings.items(), strict=True):
        axes.set_title(title)
        if rows is None:
            _not_recorded(axes)
            continue
        _layer_lines(axes, rows, names)
        if title == "Dead experts":
            axes.set_ylim(0, max(1, axes.get_ylim()[1]))
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def device_heat_maps(train: Records, names: Sequence[str] = ()) -> Figure | None:
    """Load of each device over time, all layers together, and by layer in the last logged step; 1 is balanced.

    A run that went on with another number of devices shows the steps with the last one. None without loads of devices,
    or with those of one device.
    """
    rows = [r for r in train if r.get("device_load") and _rectangular(r["device_load"])]
    if not rows:
        return None
    shape = np.shape(rows[-1]["device_load"])
    layers, devices = shape
    if devices < 2:
        return None
    rows = [row for row in rows if np.shape(row["device_load"]) == shape]
    loads = np.asarray([row["device_load"] for row in rows], np.float64) * devices  # [time, layer, device]
    over_time, edges = _binned(loads.mean(axis=1, keepdims=True), _tokens(rows))
    spread = max(0.1, float(np.abs(loads[-1] - 1).max()), float(np.abs(over_time - 1).max()))
    scale = TwoSlopeNorm(1, max(0.0, 1 - spread), 1 + spread)
    figure = Figure(figsize=(11, min(6.0, max(2.8, 1.2 + 0.24 * max(layers, devices)))), layout="constrained")
    panels = figure.subplots(1, 2)
    marks = np.arange(max(layers, devices) + 1) - 0.5
    panels[0].pcolormesh(edges, marks[: devices + 1], over_time[:, 0].T, cmap=LOADS, norm=scale)
    panels[0].set(title="All layers, over time", ylabel="device", ylim=(devices - 0.5, -0.5))
    _token_axis(panels[0])
    image = panels[1].pcolormesh(marks[: devices + 1], marks[: layers + 1], loads[-1], cmap=LOADS, norm=scale)
    panels[1].set(title="By layer, last logged step", xlabel="device", ylim=(layers - 0.5, -0.5))
    shown = np.unique(np.linspace(0, layers - 1, min(layers, 16)).round().astype(int))
    panels[1].set_yticks(shown, [_layer_names(names, layers)[layer] for layer in shown])
    for axis in (panels[0].yaxis, panels[1].xaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    for axes in panels:
        axes.grid(False)
    bar = figure.colorbar(image, ax=panels, aspect=25, pad=0.01, label="load ÷ balanced load")
    bar.outline.set_visible(False)
    return figure


def has_running_mean(train: Records) -> bool:
    """Whether the losses are so many that `loss_curves` draws their running mean."""
    return any(_window(column(train, name)[1]) > 1 for name in ("loss_main", "loss_mtp"))


def _window(values: np.ndarray) -> int:
    """Points of a running mean: a fiftieth of them all."""
    return max(len(values) // 50, 1)


def _smoothed(axes, tokens: np.ndarray, values: np.ndarray, colour: str, label: str, *, width: float) -> None:
    """Every point faintly, and their running mean on top where there are many."""
    window = _window(values)
    if window == 1:
        if len(values):
            axes.plot(tokens, values, color=colour, linewidth=width, label=label)
        return
    axes.plot(tokens, values, color=_lighter(colour), alpha=0.6, linewidth=0.8)
    kernel = np.ones(window)
    mean = np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
    axes.plot(tokens, mean, color=colour, linewidth=width, label=label)


def _per_layer(train: Records, name: str) -> Records | None:
    """The records with the metric `name`, tokens and a number by each layer's index; None unless all have as many."""
    rows = [r for r in train if r.get(name)]
    if len({len(row[name]) for row in rows}) != 1:
        return None
    return [
        {"tokens": tokens, **{str(i): v for i, v in enumerate(row[name])}}
        for tokens, row in zip(_tokens(rows).tolist(), rows, strict=True)
    ]


def _layer_lines(axes, rows: Records, names: Sequence[str]) -> None:
    """One line for each layer of what `_per_layer` gives, with a legend, or a colour bar where they are many."""
    layers = len(rows[0]) - 1
    names = _layer_names(names, layers)
    for layer in range(layers):
        colour = LAYERS(0.9 * layer / max(layers - 1, 1))
        axes.plot(*column(rows, str(layer)), color=colour, linewidth=1.4, label=names[layer])
    _token_axis(axes)
    if layers <= 12:
        _legend(axes, ncols=2 if layers > 4 else 1)
    else:
        scale = matplotlib.cm.ScalarMappable(Normalize(1, layers / 0.9), LAYERS)
        bar = axes.figure.colorbar(scale, ax=axes, boundaries=np.arange(0.5, layers + 1), pad=0.01)
        ticks = np.unique(np.linspace(1, layers, 6).round().astype(int)).tolist()
        bar.set_ticks(ticks, labels=[names[tick - 1] for tick in ticks])


def _panel(axes, train: Records, name: str, title: str, *, zero=False, log=False, scale=1.0) -> None:
    tokens, values = column(train, name)
    axes.set_title(title)
    _token_axis(axes)
    if not len(values):
        _not_recorded(axes)
        return
    axes.plot(tokens, values * scale, color=TRAIN, linewidth=1.3)
    if log and values.min() > 0 and values.max() / values.min() > 5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif zero:
        axes.set_ylim(0, max(values.max() * scale * 1.08, 1e-12))
    if values.max() * scale >= 1e4:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _token_axis(axes) -> None:
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _legend(axes, **options) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**options)
    else:
        _not_recorded(axes)


def _not_recorded(axes) -> None:
    axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])


def _binned(loads: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `_MAX_COLUMNS` time steps, means over runs of neighbours, and the tokens between which each is drawn.

    A record stands for the tokens that are nearer to its own than to another's: with a ramped batch, or with a step
    logged off the rhythm, these are not equally many.
    """
    stride = -(-len(loads) // _MAX_COLUMNS)
    starts = np.arange(0, len(loads), stride)
    counts = np.diff([*starts, len(loads)])
    means = np.add.reduceat(loads, starts, axis=0) / counts[:, None, None]
    middles = (tokens[starts[1:] - 1] + tokens[starts[1:]]) / 2
    last = tokens[-1] if tokens[-1] > tokens[0] else tokens[0] + 1  # one record has a width too
    return means, np.array([tokens[0], *middles, last])


def _tokens(rows: Records) -> np.ndarray:
    """The tokens at each record, or its step where it has none."""
    return np.asarray([row.get("tokens", row.get("step", 0)) for row in rows], np.float64)


def _layer_names(names: Sequence[str], layers: int) -> Sequence[str]:
    return names if len(names) == layers else [f"MoE layer {layer + 1}" for layer in range(layers)]


def _rectangular(rows: Sequence[Sequence[float]]) -> bool:
    return len({len(row) for row in rows}) == 1


def _lighter(colour: str) -> tuple[float, float, float]:
    """Half-way to white; unlike transparency it does not show the grid through."""
    return tuple((np.asarray(to_rgb(colour)) + 1) / 2)


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
