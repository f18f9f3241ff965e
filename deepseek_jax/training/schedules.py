"""What changes as a run proceeds, as functions of tokens seen: learning rate, batch size, MTP weight, bias rate.

Schedules run on the host in Python numbers (14.8T tokens fit no int32), and each step gets their values as scalars.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from deepseek_jax.config import require

Shape = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """From the end of the phase before until `until` tokens: go to `value` along `shape`."""

    until: int
    value: float
    shape: Shape = "constant"

    def __post_init__(self):
        require(self.until > 0, f"a schedule phase must end after token 0, not at {self.until}")
        require(self.shape in ("constant", "linear", "cosine"), f"unknown phase shape {self.shape!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A piecewise function of tokens seen; after its last phase it stays at that phase's value."""

    phases: tuple[Phase, ...]
    start: float = 0.0

    def __post_init__(self):
        require(len(self.phases) > 0, "a curve needs at least one phase")
        ends = [phase.until for phase in self.phases]
        require(ends == sorted(set(ends)), f"the phases of a curve must end one after another, not at {ends}")

    @property
    def is_constant(self) -> bool:
        """Whether it has the same value everywhere."""
        first = self.phases[0]
        begin = first.value if first.shape == "constant" else self.start
        return all(phase.value == begin for phase in self.phases)

    def __call__(self, tokens: int) -> float:
        """The value after `tokens` tokens."""
        begin, value = 0, self.start
        for phase in self.phases:
            if tokens < phase.until:
                if phase.shape == "constant":
                    return phase.value
                progress = (tokens - begin) / (phase.until - begin)
                if phase.shape == "cosine":
                    progress = (1 - math.cos(math.pi * progress)) / 2
                return value + (phase.value - value) * progress
            begin, value = phase.until, phase.value
        return value


def constant(value: float) -> Curve:
    """The same value throughout."""
    return Curve(phases=(Phase(until=1, value=value),), start=value)


def stepped(*steps: tuple[int, float], final: float) -> Curve:
    """Constant pieces: `stepped((10, a), (20, b), final=c)` is a before token 10, b before token 20, then c."""
    phases = [Phase(until=until, value=value) for until, value in steps]
    return Curve(phases=(*phases, Phase(until=steps[-1][0] + 1, value=final)), start=steps[0][1])


MTP_WEIGHT = constant(0.3)
BIAS_RATE = constant(0.001)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The course of a run. `learning_rate` is relative to `optimizer.peak_lr`."""

    total_tokens: int
    learning_rate: Curve
    batch_rows: Curve
    """Sequences per optimizer step."""
    batch_multiple: int = 1
    """A ramping batch size is rounded down to a multiple of this, so that few shapes are compiled."""
    mtp_weight: Curve = MTP_WEIGHT
    """λ of the MTP losses (section 2.2)."""
    bias_rate: Curve = BIAS_RATE
    """γ of the router bias update (section 2.1.2)."""
    balance_weight: float = 1e-4
    """α of the sequence-wise balance loss."""

    def __post_init__(self):
        require(self.total_tokens > 0, f"schedule.total_tokens must be positive, not {self.total_tokens}")
        require(self.batch_multiple >= 1, f"schedule.batch_multiple must be at least 1, not {self.batch_multiple}")
        rows = [phase.value for phase in self.batch_rows.phases]
        if self.batch_rows.phases[0].shape != "constant":
            rows.append(self.batch_rows.start)  # from where the first phase ramps
        require(min(rows) >= 1, f"schedule.batch_rows must be at least 1 everywhere, start included, not {min(rows):g}")

    def mismatch(self) -> str | None:
        """What it means that the learning rate's curve was made for another length than `total_tokens`, if it was."""
        curve, total = self.learning_rate, self.total_tokens
        end = curve.phases[-1].until
        if end == total or curve.is_constant:
            return None
        last = f"{curve.phases[-1].value:.3g} x optimizer.peak_lr"
        effect = f"stays at {last} from there on" if end < total else f"ends at {curve(total):.3g} x, not {last}"
        return (
            f"schedule.total_tokens is {total:,}, but the learning rate's curve is made for {end:,}: it {effect}; for "
            f"the whole course in {total:,} write schedule=paper_schedule({total}, ...) in the recipe, or set "
            "schedule.learning_rate.phases.N.until, and those of the other curves"
        )

    def rows(self, tokens: int) -> int:
        """The batch size in sequences after `tokens` tokens."""
        return max(int(self.batch_rows(tokens)) // self.batch_multiple, 1) * self.batch_multiple


def paper_schedule(
    total_tokens: int,
    *,
    warmup_tokens: int,
    rows: int,
    start_rows: int | None = None,
    batch_multiple: int = 1,
    decay_from: float = 10 / 14.8,
    decay_until: float = 14.3 / 14.8,
    final_from: float = (14.8 - 0.167) / 14.8,
) -> ScheduleConfig:
    """DeepSeek-V3's pre-training course (section 4.2), its milestones as fractions of `total_tokens`.

    Learning rate: linear warm-up, constant, cosine to a tenth, constant, then 7.3/220 of the peak for the last stretch.
    Batch: linear ramp from `start_rows` over the first 469B of 14.8T tokens. λ of MTP 0.3 until the decay starts, then
    0.1; γ of the bias 0.001 until the decay ends, then 0.
    """
    decay, floor, last = (int(total_tokens * f) for f in (decay_from, decay_until, final_from))
    ramp = max(int(total_tokens * 0.469 / 14.8), 1)
    batch = constant(rows)
    if start_rows is not None and start_rows != rows:
        batch = Curve(start=start_rows, phases=(Phase(until=ramp, value=rows, shape="linear"),))
    return ScheduleConfig(
        total_tokens=total_tokens,
        learning_rate=Curve(
            phases=(
                Phase(until=warmup_tokens, value=1.0, shape="linear"),
                Phase(until=decay, value=1.0),
                Phase(until=floor, value=0.1, shape="cosine"),
                Phase(until=last, value=0.1),
                Phase(until=total_tokens, value=7.3 / 220),
            )
        ),
        batch_rows=batch,
        batch_multiple=batch_multiple,
        mtp_weight=stepped((decay, 0.3), final=0.1),
        bias_rate=stepped((floor, 0.001), final=0.0),
    )
