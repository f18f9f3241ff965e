"""Draws one metric of several runs: `python -m tools.compare --metric=max_vio --out=vio.png runs/a runs/b`.

A metric with one value per layer, such as MaxVio, is averaged over layers. Prints the mean over the last quarter too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

from deepseek_jax.config import ConfigError
from deepseek_jax.evaluation.report_plots import styled
from deepseek_jax.training.metrics import read_metrics

METRIC = flags.DEFINE_string("metric", "max_vio", "the metric to draw")
OUT = flags.DEFINE_string("out", "compare.png", "the picture to write (.png or .svg)")
TITLE = flags.DEFINE_string("title", None, "the picture's title")

LABELS = {
    "max_vio": "MaxVio",
    "load": "expert load",
    "loss_main": "main loss, nats per token",
    "loss_mtp": "MTP loss, nats per token",
    "loss_balance": "balance loss, without α",
    "heldout_loss": "held-out loss, nats per token",
    "heldout_bits_per_byte": "held-out bits per byte",
    "heldout_average_loss": "held-out loss of the weights' moving average, nats per token",
    "heldout_average_bits_per_byte": "held-out bits per byte of the weights' moving average",
}


def label(run: str, metric: str) -> str:
    """What the vertical axis shows."""
    name = LABELS.get(metric, metric.replace("_", " "))
    per_layer = any(isinstance(record.get(metric), list) for record in read_metrics(run))
    return f"{name}, mean over layers" if per_layer else name


def series(run: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and values of a run's metric; per-layer values are averaged.

    Raises:
      ConfigError: the run has no such metric; the message lists those it has.
    """
    records = [record for record in read_metrics(run) if metric in record]
    if not records:
        names = sorted({name for record in read_metrics(run) for name in record})
        raise ConfigError(f"{run} has no metric {metric}; it has {', '.join(names)}")
    tokens = np.array([record["tokens"] for record in records], np.float64)
    return tokens, np.array([np.mean(record[metric]) for record in records])


def _without_hook(tokens: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leaves out a last point that is close behind the one before.

    A run logs its last step whatever the rhythm: the noise of two steps side by side would end the line in a hook.
    """
    gaps = np.diff(tokens)
    end = -1 if len(gaps) > 1 and gaps[-1] < gaps[-2] / 2 else None
    return tokens[:end], values[:end]


def draw(runs: Sequence[str], metric: str, title: str | None) -> Figure:
    """One line per run, over tokens."""
    with styled():
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for run in runs:
            tokens, values = series(run, metric)
            if not metric.startswith("heldout"):  # of these, the last is the run's result
                tokens, values = _without_hook(tokens, values)
            axes.plot(tokens / 1e6, values, label=Path(run).name)
        name = label(runs[0], metric)
        axes.set(xlabel="million tokens", ylabel=name, title=title or name[0].upper() + name[1:], ylim=(0, None))
        axes.legend()
        return figure


def main(argv: Sequence[str]) -> int:
    """Draws the runs named on the command line and prints their late means."""
    runs = [run.rstrip("/") for run in argv[1:]]
    if not runs:
        print("usage: python -m tools.compare [--metric=NAME] [--out=FILE] RUN_FOLDER …", file=sys.stderr)
        return 2
    try:
        with styled():
            draw(runs, METRIC.value, TITLE.value).savefig(OUT.value, dpi=160)
        for run in runs:
            values = series(run, METRIC.value)[1]
            late = values[-max(len(values) // 4, 1) :].mean()
            print(f"{Path(run).name}: {METRIC.value} {late:.4g} over the last quarter")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(OUT.value)
    return 0


if __name__ == "__main__":
    app.run(main)
