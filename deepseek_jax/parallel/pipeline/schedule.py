"""When each stage works on which microbatch. The one-rank schedule is gradient accumulation."""

from __future__ import annotations

import dataclasses

from deepseek_jax.config import require


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A schedule's name, its pipeline ranks and its microbatches per step (both directions together)."""

    name: str
    ranks: int
    microbatches: int

    def __post_init__(self):
        require(self.microbatches >= 1, f"a schedule needs at least one microbatch, not {self.microbatches}")
        require(
            self.ranks == 1,
            f"schedule {self.name!r} over {self.ranks} pipeline ranks is not available: set parallel.pipe to 1",
        )
