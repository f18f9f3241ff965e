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


def draw(runs: Sequence[str], metric: str, title: str | None) -> Figure:
    """One line per run, over tokens."""
    with styled():
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for run in runs:
            tokens, values = series(run, metric)
            axes.plot(tokens / 1e6, values, label=Path(run).name)
        axes.set(xlabel="million tokens", ylabel=metric, title=title or metric, ylim=(0, None))
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
