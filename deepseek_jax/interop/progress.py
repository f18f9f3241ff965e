"""How far a conversion has come, in bytes: a bar on a terminal, a line now and then elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

_LINE_SECONDS = 10.0


class ByteProgress:
    """A context manager that is told of bytes as they are done."""

    def __init__(self, what: str, total: int, *, stream: TextIO | None = None, quiet: bool = False):
        """`what` says what is going on, such as "loading"; `total` is in bytes."""
        self._what, self._total, self._done = what, total, 0
        self._stream = sys.stderr if stream is None else stream
        self._quiet, self._started, self._said = quiet, time.monotonic(), time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> ByteProgress:
        if not self._quiet and self._stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            console = Console(file=self._stream)
            self._bar = Bar(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total)
        return self

    def add(self, count: int) -> None:
        """So many bytes more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif not self._quiet and time.monotonic() - self._said >= _LINE_SECONDS:
            self._said = time.monotonic()
            self._say()

    def __exit__(self, kind: object, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if not self._quiet and kind is None and time.monotonic() - self._started >= _LINE_SECONDS:
            self._say()

    def _say(self) -> None:
        rate = self._done / max(time.monotonic() - self._started, 1e-9)
        line = f"{self._what}: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB, {rate / 1e6:,.0f} MB/s"
        print(line, file=self._stream, flush=True)
