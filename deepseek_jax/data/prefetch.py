"""A thread that works ahead, for a consumer that takes a different number of items each time."""

from __future__ import annotations

import atexit
import collections
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_live: weakref.WeakSet[Prefetcher] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that is still inside native code when the interpreter goes away aborts the process."""
    for prefetcher in list(_live):
        prefetcher.close()


class Prefetcher(Generic[T]):
    """Runs `items` in a thread, some way ahead of `take`: twice what was taken last.

    An exception of `items` reaches the caller of `take` after the items before it.
    """

    def __init__(self, items: Iterator[T], *, depth: int = 16):
        self._items = items
        self._ready: collections.deque[T] = collections.deque()
        self._changed = threading.Condition()
        self._depth = depth
        self._error: BaseException | None = None
        self._ended = self._closed = False
        self._thread = threading.Thread(target=self._work, name="data-prefetch", daemon=True)
        self._thread.start()
        _live.add(self)

    def take(self, count: int) -> list[T]:
        """The next `count` items, in order; fewer only at the end."""
        with self._changed:
            self._depth = max(self._depth, 2 * count)
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._ready) >= count or self._ended)
            if len(self._ready) < count and self._error is not None:
                raise self._error
            taken = [self._ready.popleft() for _ in range(min(count, len(self._ready)))]
            self._changed.notify_all()
            return taken

    def close(self) -> None:
        """Ends the thread; what it had ready is dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        try:
            while self._wait_for_room():
                item = next(self._items)
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
        except StopIteration:
            pass
        except BaseException as error:
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
            return not self._closed
