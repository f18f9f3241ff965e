"""SIGINT and SIGTERM as a flag that the training loop looks at between steps."""

from __future__ import annotations

import os
import signal
from typing import Any


class StoppedAtOnce(KeyboardInterrupt):
    """A second SIGINT or SIGTERM came before the first had ended the run."""

    def __init__(self, number: int):
        super().__init__(f"{name_of(number)} again: stopped at once; what no checkpoint holds is lost")
        self.signal = number


class Signals:
    """Notes SIGINT and SIGTERM, so that a run saves before it leaves; a second one stops it at once."""

    def __init__(self):
        self.received: int | None = None
        """The signal that came, if one did."""
        self.answer = "saving after this step"
        """What a first signal leads to, as the run says it when one comes; set it where that changes."""

    def __enter__(self) -> Signals:
        self._previous: dict[int, Any] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        except ValueError:
            pass  # not the main thread, as in a notebook's worker: the signals are not ours to take
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        del frame
        if self.received is not None:
            raise StoppedAtOnce(number)
        self.received = number
        # A large model's step takes a while, and whoever sees nothing happen asks again. A handler may not `print`.
        os.write(2, f"{name_of(number)}: {self.answer}; once more stops at once\n".encode())


def name_of(number: int) -> str:
    """`SIGTERM` for 15."""
    return signal.Signals(number).name
