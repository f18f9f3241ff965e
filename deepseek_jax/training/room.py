"""Which setting of a dispatcher's ladder the next step runs with: up at once, down after a while."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_jax.parallel.dispatch import Dispatcher, ExchangeDispatcher

MARGIN = 1.1
"""A smaller setting counts as enough for demands that leave it so much air."""
PATIENCE = 50
"""Steps in a row that must have fitted the next smaller setting before a run goes down to it."""


class RoomControl:
    """Starts one setting above the least: a fresh router is far from balance, and each rerun costs a step.

    What it decides is part of a run (the order of sums in a matmul depends on the size of its buffer), so checkpoints
    keep it.
    """

    def __init__(self):
        self._setting, self._calm, self._patience = 1, 0, PATIENCE
        self.reruns = 0
        """Steps of this process that ran again."""
        self.used = 0
        """The place in the ladder of what the last step ran with."""

    def setting(self, ladder: Sequence[Dispatcher]) -> int:
        """The place in the ladder of the next step's setting."""
        return min(self._setting, len(ladder) - 1)

    def overflowed(self, ladder: Sequence[Dispatcher]) -> None:
        """A step found too little room: the next setting, from which it is longer before a run comes down."""
        if self.setting(ladder) == len(ladder) - 1:
            raise AssertionError("the last setting of the ladder has room for any routing")
        self._setting, self._calm = self.setting(ladder) + 1, 0
        self.reruns += 1
        self._patience = min(2 * self._patience, 64 * PATIENCE)

    def fitted(self, ladder: Sequence[Dispatcher], demand: np.ndarray, tokens: int | None = None) -> None:
        """A step of `tokens` a device had room, and needed `demand` (see `Traffic`; its largest on any device)."""
        place = self.used = self.setting(ladder)
        smaller = ladder[place - 1] if place else None
        if not isinstance(smaller, ExchangeDispatcher) or not smaller.fits(demand, tokens=tokens, margin=MARGIN):
            self._calm = 0
            return
        self._calm += 1
        if self._calm >= self._patience:
            self._setting, self._calm = place - 1, 0

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"setting": self._setting, "calm": self._calm, "patience": self._patience}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on as a run did that was saved."""
        self._setting, self._calm, self._patience = (int(state[key]) for key in ("setting", "calm", "patience"))
