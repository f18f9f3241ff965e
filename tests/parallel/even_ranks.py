"""How many ranks the tests of pipeline schedules go through."""

from __future__ import annotations

EVEN = range(2, 17, 2)
"""Every even P up to 16: the sizes at which all schedules exist."""
