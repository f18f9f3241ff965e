"""Words that error messages share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_SHOWN = 5


def first_few(items: Iterable[Any], *, separator: str = ", ") -> str:
    """The first few of `items`, and how many more there are."""
    items = list(items)
    more = len(items) - _SHOWN
    return separator.join(map(str, items[:_SHOWN])) + (f" and {more} more" if more > 0 else "")
