"""Ends a run that is stuck: a rank that waits in a collective for another says nothing, and would wait for good.

Two lines of defence. A thread looks at the time of the last step; it says what is wrong in a line, prints every
thread's stack and ends the process with code 1. Where the main thread is in C code that keeps Python's lock, that
thread cannot run: then a timer of `faulthandler`, which needs no lock, prints the stacks after half the limit more
(under its own line, `Timeout (…)!`) and ends the process as well.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import threading
import time
from collections.abc import Iterator

SLOW = 4
"""How many limits a compilation, an evaluation or a checkpoint may take: they end some time too."""

_STEPS_AFTER = 2
"""Steps after something slow that have the longer limit too: another rank may still be at it, and this one waits for
that rank in its next step, of which it hears at the one after."""

_PATIENCE = 1.5
"""When the timer that needs no lock strikes, in limits."""
_STDERR = 2


class Watchdog:
    """Watches for steps while it is entered; `beat(step)` is one.

    The limit is `SLOW` times as long within `slow()`, and until the second step after it or after the beginning.

    Where all ranks wait for one, they find it at the same time; each prints its stacks and waits a moment before it
    ends, so that the end of one does not cut short what another, the one that is stuck, has to say.

    Args:
      limit_seconds: the longest time without a step; 0 watches nothing.
      process: the number of this process in the run.
    """

    def __init__(self, limit_seconds: float, *, process: int = 0):
        self._limit, self._process = limit_seconds, process
        self._last: tuple[float, int] = (0.0, 0)
        """When the last step was, or what is slow began, and which step."""
        self._factor = SLOW
        self._slow_beats = _STEPS_AFTER
        """Beats until the limit is the usual one; 0 where it is, or where something slow goes on."""
        self._lock = threading.Lock()
        """Held where the timer is set, so that none is left behind at the end."""
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._limit:
            self._over.clear()
            self._begin_anew()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is not None:
            self._over.set()
            with self._lock:
                faulthandler.cancel_dump_traceback_later()
            self._thread = None

    def beat(self, step: int) -> None:
        """A step was made. Costs no more than reading the clock."""
        # In this order a look in between sees a limit that is too long, never one that is too short.
        self._last = (time.monotonic(), step)
        if self._slow_beats:
            self._slow_beats -= 1
            if not self._slow_beats:
                self._factor = 1

    @contextlib.contextmanager
    def slow(self) -> Iterator[None]:
        """What happens within is no step and may take `SLOW` limits; after it the time to the next step begins anew."""
        self._factor, self._slow_beats = SLOW, 0
        self._begin_anew()
        try:
            yield
        finally:
            self._slow_beats = _STEPS_AFTER
            self._begin_anew()

    def _begin_anew(self) -> None:
        self._last = (time.monotonic(), self._last[1])
        self._set_timer()

    def _set_timer(self) -> None:
        with self._lock:
            if self._limit and not self._over.is_set():
                left = self._last[0] + _PATIENCE * self._limit * self._factor - time.monotonic()
                faulthandler.dump_traceback_later(max(left, 0.001), exit=True, file=_STDERR)

    def _watch(self) -> None:
        while not self._over.wait(min(self._limit / 20, 10.0)):
            limit = self._limit * self._factor
            since, step = self._last
            if time.monotonic() - since > limit:
                self._end(step, limit)
            self._set_timer()

    def _end(self, step: int, limit: float) -> None:
        who = f"process {self._process} ({socket.gethostname()}, pid {os.getpid()})"
        message = (
            f"error: {who} has made no step for {limit:g} s, since step {step}: it is stuck where these stacks show "
            "and ends; --resume continues from the last checkpoint, logging.watchdog_seconds sets the limit\n"
        )
        os.write(_STDERR, message.encode())
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        time.sleep(min(self._limit / 4, 10.0))
        os._exit(1)
