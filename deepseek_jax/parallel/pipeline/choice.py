"""Which schedule a run uses: one of the known ones by name, or a user's own from a text file."""

from __future__ import annotations

import dataclasses
import functools

from deepseek_jax.config import ConfigError, require
from deepseek_jax.parallel.pipeline.generators import make_schedule
from deepseek_jax.parallel.pipeline.put_off import PUTS_OFF, with_less_put_off
from deepseek_jax.parallel.pipeline.schedule import Schedule, StageMap
from deepseek_jax.parallel.pipeline.text import read_schedule

SUFFIX = ".txt"
"""Ends the name of a file with a schedule."""


@dataclasses.dataclass(frozen=True)
class ScheduleChoice:
    """A schedule for any number of microbatches that it can have."""

    name: str
    """A key of `GENERATORS`, or the path of a text file that ends in .txt; over one rank it does not matter."""
    ranks: int
    chunks: int | None = None
    """Of an interleaved schedule."""
    put_off: int | None = None
    """How many weight gradients may wait on a rank; None: as many as the schedule has it."""

    def make(self, microbatches: int) -> Schedule:
        """The schedule of a step of so many microbatches.

        Raises:
          ConfigError: there is none; the message says what would be valid.
        """
        if self.ranks == 1:
            return make_schedule("one_rank", 1, microbatches)
        if not self.name.endswith(SUFFIX):
            try:
                known = make_schedule(self.name, self.ranks, microbatches, chunks=self.chunks)
            except ConfigError as error:
                chunks = f" parallel.chunks={self.chunks}" if self.chunks else ""
                fields = f"parallel.schedule={self.name} parallel.pipe={self.ranks}{chunks}"
                raise ConfigError(f"{fields}: {error}") from None
            if self.put_off is None:
                return known
            require(
                self.name in PUTS_OFF,
                f"parallel.put_off={self.put_off} is for {', '.join(PUTS_OFF)}: in parallel.schedule={self.name} no "
                "weight gradient waits",
            )
            return with_less_put_off(known, self.put_off)
        own = self._own
        require(
            own.microbatches == microbatches,
            f"parallel.schedule={self.name} is for {own.microbatches} microbatches, a step has {microbatches}: change "
            "the batch or parallel.microbatch_rows, or write a schedule for it",
        )
        return own

    def fitting(self, microbatches: int) -> int:
        """The least number of microbatches that there is a schedule for, and no less than so many.

        Raises:
          ConfigError: there is no schedule of this name and so many ranks.
        """
        if self.ranks == 1:
            return microbatches
        if not self.name.endswith(SUFFIX):
            return _fitting(self, microbatches)
        most = self._own.microbatches
        require(
            microbatches <= most,
            f"parallel.schedule={self.name} is for {most} microbatches, a batch has {microbatches}: change the batch "
            "or parallel.microbatch_rows, or write a schedule for it",
        )
        return most

    @functools.cached_property
    def stage_map(self) -> StageMap:
        """Where stages live; the same for any number of microbatches."""
        return self.make(self.fitting(1)).stages

    @functools.cached_property
    def _own(self) -> Schedule:
        for name, value in (("chunks", self.chunks), ("put_off", self.put_off)):
            require(value is None, f"parallel.{name}={value} does not go with a schedule of one's own")
        own = read_schedule(self.name)
        require(
            own.ranks == self.ranks,
            f"parallel.schedule={self.name} is for {own.ranks} pipeline ranks, parallel.pipe is {self.ranks}",
        )
        return own


@functools.cache
def _fitting(choice: ScheduleChoice, microbatches: int) -> int:
    refusal: ConfigError | None = None
    for count in range(microbatches, max(microbatches, 2 * choice.ranks) + 2 * choice.ranks + 1):
        try:
            choice.make(count)
        except ConfigError as error:
            refusal = refusal or error
            continue
        return count
    assert refusal is not None
    raise refusal
