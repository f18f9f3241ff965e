"""What a device of a pipeline must hold during a step, from its schedule's tables and the sizes of one stage."""

from __future__ import annotations

import dataclasses

from deepseek_jax.parallel.pipeline.tables import TickTables


@dataclasses.dataclass(frozen=True)
class StageBytes:
    """Bytes of one stage on one device: activations of one microbatch, and what is kept of its weights."""

    x: int
    """What goes from stage to stage."""
    output: int
    """What the last stage leaves for the loss."""
    residual: int
    """What an F leaves for its B and W."""
    stash: int
    """What a B leaves for a later W."""
    weights: int
    """Its working copy."""
    gradients: int
    """The sum of its gradients over microbatches, float32 or wider."""
    ends: int
    """The working copy of the model's ends: this rank's part."""
    ends_gradients: int
    layer: int
    """What one layer computes besides its residual, forward or backward, and lets go before the next."""


@dataclasses.dataclass(frozen=True)
class PipelineMemory:
    """Bytes of a device besides its state: masters, moments and the batch."""

    rings: int
    """What waits between ticks, scratch rows and what the last tick received included."""
    copies: int
    """Working copies of the weights of all slots, and of the ends."""
    gradients: int
    """Sums over microbatches."""
    transients: int
    """Of one stage at work: a layer forward and one backward, which read and write rings and sums where they lie. Where
    steady ticks have a body of their own, an F runs beside a B, and what it leaves waits for the row that B reads."""

    @property
    def total(self) -> int:
        """All parts together."""
        return self.rings + self.copies + self.gradients + self.transients


def pipeline_memory(tables: TickTables, stage: StageBytes, *, steady: bool = False) -> PipelineMemory:
    """What a step by these tables holds at most on the rank that holds most.

    Args:
      tables: the schedule's.
      stage: sizes of its largest stage.
      steady: whether its steady ticks, where it has any, have a body of their own (`parallel.overlap` is not off).
    """
    rows = tables.rings
    sides = sum(tables.directions_of_x), sum(tables.directions_of_dx)
    waiting = (rows.activation + 1 + sides[0]) * stage.x + (rows.gradient + 1 + sides[1]) * stage.x
    waiting += (rows.output + 2) * stage.output + (rows.residual + 1) * stage.residual
    waiting += (rows.stash + 1) * stage.stash if rows.stash else 0
    slots = tables.schedule.stages.slots
    return PipelineMemory(
        rings=waiting,
        copies=slots * stage.weights + stage.ends,
        gradients=slots * stage.gradients + stage.ends_gradients,
        transients=2 * stage.layer + (stage.residual if steady and tables.steady else 0),
    )
