"""How far a run is: a bar on a terminal, one plain line per logged step elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

_SMOOTHING = 0.3
"""Weight of the latest interval in the rate behind the ETA."""


def human_count(number: float) -> str:
    """`12345` as `12.3k`, `14.8e12` as `14.8T`; below a thousand as it is."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.3g}T"


def human_time(seconds: float) -> str:
    """`200` as `3m20s`, `7265` as `2h01m`, `200000` as `2d07h`; below a minute `12s`."""
    total = round(seconds)
    for unit, size, small_unit, small in (("d", 86_400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if total >= size:
            return f"{total // size}{unit}{total % size // small:02d}{small_unit}"
    return f"{total}s"


class TrainingClock:
    """Seconds of training alone: what passes within `paused()`, such as an evaluation, does not count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._paused = 0.0

    def __call__(self) -> float:
        return self._clock() - self._paused

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time within; the device should have finished its steps before. Does not nest."""
        begin = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - begin


class Progress:
    """Shows steps, loss, rate and time left of a run of `total_tokens`; a context manager.

    A resumed run passes `start_tokens`, what was seen before it; `total_steps` is shown where it is known. A `quiet`
    one shows nothing: of several processes one speaks.
    """

    def __init__(
        self,
        total_tokens: int,
        *,
        total_steps: int | None = None,
        start_tokens: int = 0,
        console: Console | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total_tokens, self._total_steps = total_tokens, total_steps
        self._console = console or Console(highlight=False, quiet=quiet)
        self._clock = clock
        self._mark = (clock(), start_tokens)
        self._reports = 0
        self._rate = 0.0
        """Tokens per second, smoothed."""
        self._bar: RichProgress | None = None
        if self._console.is_terminal and not quiet:
            columns = (BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f}% | {task.fields[text]}"))
            self._bar = RichProgress(*columns, console=self._console, refresh_per_second=4)
            self._task = self._bar.add_task("", total=total_tokens, completed=start_tokens, text="compiling")

    def advance(self, tokens: int) -> None:
        """Moves the bar to `tokens` seen: for the steps that are not logged, and costs no host sync."""
        if self._bar:
            self._bar.update(self._task, completed=tokens)

    def report(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Shows a logged step; `values` are scalars by name, in the order to show them, the loss first."""
        now, (then, tokens_then) = self._clock(), self._mark
        rate = (tokens - tokens_then) / max(now - then, 1e-9)
        # The first interval holds the first step, which warms up, so the second replaces it; later ones are smoothed.
        self._rate = rate if self._reports < 2 else _SMOOTHING * rate + (1 - _SMOOTHING) * self._rate
        self._mark, self._reports = (now, tokens), self._reports + 1
        text = self._line(step, tokens, values, rate)
        if self._bar:
            self._bar.update(self._task, completed=tokens, text=text)
        else:
            self.log(text)

    def log(self, message: str) -> None:
        """Prints a line of its own, above the bar where there is one."""
        # Without soft_wrap a pipe gets lines broken at 80 columns; without markup=False "[...]" disappears.
        self._console.print(message, soft_wrap=True, markup=False)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def _line(self, step: int, tokens: int, values: Mapping[str, float], rate: float) -> str:
        parts = [f"step {step}/{self._total_steps}" if self._total_steps else f"step {step}"]
        parts += [f"{name} {value:.4g}" for name, value in values.items()]
        parts.append(f"{human_count(rate)} tok/s")
        parts.append(f"{human_count(tokens)}/{human_count(self._total_tokens)} tokens")
        left = max(self._total_tokens - tokens, 0)
        if left and self._rate > 0:
            parts.append(f"eta {human_time(left / self._rate)}")
        return " | ".join(parts)
