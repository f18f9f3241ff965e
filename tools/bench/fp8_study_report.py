"""What `fp8_study` makes of its runs: smoothed losses, relative errors, the verdict, the table and the picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, StrMethodFormatter

from deepseek_jax.config import require
from deepseek_jax.evaluation import report_plots as plots
from deepseek_jax.training.metrics import read_metrics

SMOOTHING = 0.9
"""Of the exponential moving average of losses (appendix B.1)."""
LIMIT = 0.0025
"""The relative error that the paper stays below (section 3.3)."""
METRIC = "loss_main"
BASELINE, FP8, CONTROLS = plots.INK, plots.HELDOUT, (plots.TRAIN, plots.XZ, plots.AVERAGE)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What is compared of a run. N logged steps, which are all of them."""

    label: str
    role: str
    """"baseline", "fp8" or "control"."""
    tokens: np.ndarray
    """`[N]`: tokens seen after each step."""
    losses: np.ndarray
    """`[N]`: the main loss of each step, nats per token."""
    total_tokens: int
    """Of the whole course."""
    tokenizer: str
    """The file's text: runs of two tokenizers do not see the same tokens."""
    diverged: bool = False
    """It ended because something was not finite."""
    bits_per_byte: float | None = None
    """Of held-out text, at its end."""
    seconds: float | None = None

    @property
    def done(self) -> bool:
        """Whether it came to its end, or will get no further."""
        return self.diverged or bool(len(self.tokens) and self.tokens[-1] >= self.total_tokens)

    @property
    def smoothed(self) -> np.ndarray:
        """`[N]`: the exponential moving average of the losses, which begins with the first one."""
        values = np.empty_like(self.losses)
        for i, loss in enumerate(self.losses):
            values[i] = loss if i == 0 else SMOOTHING * values[i - 1] + (1 - SMOOTHING) * loss
        return values


def read_run(folder: Path, label: str, role: str) -> Run:
    """A run from its folder, as far as it came.

    Raises:
      ConfigError: its metrics cannot be read.
    """
    records = read_metrics(folder, "train")
    config = json.loads((folder / "config.json").read_text())
    path = folder / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    return Run(
        label=label,
        role=role,
        tokens=np.array([record["tokens"] for record in records], np.float64),
        losses=np.array([record[METRIC] for record in records], np.float64),
        total_tokens=config["schedule"]["total_tokens"],
        tokenizer=(folder / "tokenizer.json").read_text(),
        diverged=any(folder.glob("nonfinite_step_*.npz")),
        bits_per_byte=result.get("heldout_bits_per_byte"),
        seconds=result.get("wall_seconds"),
    )


def relative_errors(run: Run, baseline: Run) -> np.ndarray:
    """Smoothed loss against the baseline's, minus one, at every step that both have: `[min(N)]`.

    Raises:
      ConfigError: the runs did not see the same tokens.
    """
    steps = min(len(run.tokens), len(baseline.tokens))
    same = np.array_equal(run.tokens[:steps], baseline.tokens[:steps]) and run.tokenizer == baseline.tokenizer
    require(same, f"the runs {run.label!r} and {baseline.label!r} saw other tokens: train them again together")
    return run.smoothed[:steps] / baseline.smoothed[:steps] - 1


def largest_error(run: Run, baseline: Run) -> float:
    """The largest relative error, in magnitude, over the second half of the course; infinite for a run that diverged.

    0 where no step of that half was taken yet.
    """
    if run.diverged:
        return np.inf
    errors = relative_errors(run, baseline)
    late = errors[baseline.tokens[: len(errors)] > baseline.total_tokens / 2]
    return float(np.abs(late).max(initial=0))


def spread_of_seeds(runs: Sequence[Run]) -> float | None:
    """The largest error of any other baseline against the first; None where there is no other."""
    first, *others = [run for run in runs if run.role == "baseline"]
    return max((largest_error(run, first) for run in others), default=None)


def table(runs: Sequence[Run]) -> list[str]:
    """The Markdown table with its verdicts; the first run is the baseline."""
    first, spread = runs[0], spread_of_seeds(runs)
    limit = max(LIMIT, spread or 0)
    rule = f"the larger of {LIMIT:.2%} and the spread of the seeds, " + (
        f"{spread:.2%}" if spread is not None else "of which there is one"
    )
    lines = [
        f"Error: of the main loss, smoothed by {SMOOTHING}, against the first run at the same step, over the second "
        f"half of training. FP8 passes below {limit:.2%}, {rule}.",
        "",
        "| run | final loss | held-out bits per byte | mean error | largest error | verdict | wall time |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        bits = "" if run.bits_per_byte is None else f"{run.bits_per_byte:.4f}"
        seconds = "" if run.seconds is None else f"{run.seconds / 60:.1f} min"
        late = relative_errors(run, first)[first.tokens[: len(run.tokens)] > first.total_tokens / 2]
        mean = "" if run is first or not len(late) else f"{late.mean():+.3%}"
        largest = "" if run is first else "infinite" if run.diverged else f"{largest_error(run, first):.3%}"
        final = "not finite" if run.diverged else f"{run.smoothed[-1]:.4f}"
        lines.append(
            f"| {run.label} | {final} | {bits} | {mean} | {largest} | {verdict(run, first, limit)} | {seconds} |"
        )
    return lines


def verdict(run: Run, baseline: Run, limit: float) -> str:
    """What the test says of a run: FP8 and the controls pass it below `limit`."""
    if not (run.done and baseline.done):
        return f"unfinished: {len(run.tokens)} steps"
    if run.role == "baseline":
        return "baseline" if run is baseline else "another seed"
    passes = largest_error(run, baseline) < limit
    if run.role == "control":
        return "passes, so it shows nothing" if passes else "fails, as it should"
    return "passes" if passes else "FAILS"


def draw(runs: Sequence[Run]) -> Figure:
    """Smoothed losses; beside them relative errors, on a band as wide as the baselines' seeds lie apart."""
    first = runs[0]
    with plots.styled():
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        losses, errors = figure.subplots(1, 2)
        controls = iter(CONTROLS)
        for run in runs:
            colour = {"baseline": BASELINE, "fp8": FP8}.get(run.role) or next(controls)
            thin = run.role == "baseline" and run is not first
            label = run.label + (", diverged" if run.diverged else "")
            style = {"color": colour, "label": label, "linewidth": 0.9 if thin else 1.7, "alpha": 0.5 if thin else 1}
            losses.plot(run.tokens, run.smoothed, **style)
            if run.role != "baseline":
                magnitude = np.abs(relative_errors(run, first))
                errors.plot(run.tokens[: len(magnitude)], 100 * magnitude, **style)
        others = [np.abs(relative_errors(run, first)) for run in runs[1:] if run.role == "baseline"]
        if others:
            steps = min(map(len, others))
            band = 100 * np.max([error[:steps] for error in others], axis=0)
            errors.fill_between(first.tokens[:steps], 0, band, color="#ced4da", linewidth=0, label="between seeds")
        errors.axhline(100 * LIMIT, color=plots.GREY, linestyle="--", linewidth=1.1, label=f"{LIMIT:.2%}")
        for axes in (losses, errors):
            axes.axvline(first.total_tokens / 2, color=plots.GREY, linestyle=":", linewidth=1.1)
            axes.set_xlabel("tokens")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.legend(fontsize=8.5, frameon=True, framealpha=0.9, edgecolor="none")
        losses.set_title(f"Main loss, nats per token, smoothed by {SMOOTHING}")
        errors.set_title("Relative error, %; judged right of the dotted line")
        errors.set(yscale="log", ylim=(1e-3, None))
        errors.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        return figure
