"""The first lines that a run prints: what trains, on what, and what of it is unusual."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from deepseek_jax.parallel.dispatch import ExpertMesh, choose_dispatcher
from deepseek_jax.parallel.mesh import AXES, ParallelConfig
from deepseek_jax.training.canonical import parameter_count
from deepseek_jax.training.empty_slots import empty_slots
from deepseek_jax.training.experiment import Experiment
from deepseek_jax.training.progress import human_count
from deepseek_jax.training.start import batch_sizes
from deepseek_jax.training.step import Trainer

FORCED_BALANCE = (
    "WARNING: FORCED BALANCE. Tokens go to experts in turn, whatever the router says (force_balanced_routing): "
    "speeds can be compared, losses mean nothing"
)


def opening_lines(
    experiment: Experiment, trainer: Trainer, *, tokens: int, flops_per_token: float, peak_flops: float
) -> Iterator[str]:
    """Model and devices, the mesh if there are several, the pipeline if there is one, and warnings."""
    yield (
        f"{human_count(parameter_count(trainer))} parameters on {jax.device_count()} x {jax.devices()[0].device_kind}; "
        f"{flops_per_token / 1e6:,.1f} MFLOP per token, matmul peak {peak_flops / 1e9:,.0f} GFLOP/s; "
        f"{human_count(max(experiment.schedule.total_tokens - tokens, 0))} tokens to go"
    )
    if jax.device_count() > 1:
        yield _layout(experiment.parallel)
    if experiment.parallel.pipe > 1:
        yield _pipeline(trainer)
        if padding := _padding(experiment, trainer):
            yield padding
    if experiment.force_balanced_routing:
        yield FORCED_BALANCE
    if mismatch := experiment.schedule.mismatch():
        yield f"warning: {mismatch}"


def _layout(parallel: ParallelConfig) -> str:
    axes = " x ".join(f"{name} {size}" for name, size in zip(AXES, parallel.shape, strict=True) if size > 1)
    dispatcher = choose_dispatcher(parallel.dispatcher, ExpertMesh(parallel.node, parallel.expert))
    state = "once across" if parallel.zero else "on every one of the"
    return f"mesh {axes}; tokens reach experts by {dispatcher}; optimizer state {state} data ranks"


def _pipeline(trainer: Trainer) -> str:
    """The schedule, the layers of each stage, and what its padding costs."""
    placement, empty = trainer.placement, empty_slots(trainer)
    names = [[name for of_kind in placement.slots.values() for name in of_kind[i]] for i in range(placement.num_stages)]
    layers = ", ".join(str(sum(bool(name and name.startswith("layers.")) for name in of)) for of in names)
    cost = f"empty slots hold up to {_bytes(empty.total)} of a device, {_bytes(empty.state)} between steps"
    waiting = "" if trainer.schedule.put_off is None else f" with put_off={trainer.schedule.put_off}"
    return (
        f"pipeline {trainer.schedule.name}{waiting} over {placement.ranks} ranks; stages of {layers} layers; "
        f"{cost if empty.total else 'no slot is empty'}"
    )


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _padding(experiment: Experiment, trainer: Trainer) -> str | None:
    """Which steps get empty rows, so that the schedule has the microbatches that it needs."""
    empty = {rows: trainer.padded_rows(rows) - rows for rows in batch_sizes(experiment.schedule)}
    padded = [rows for rows, count in empty.items() if count]
    if not padded:
        return None
    sizes = f"{padded[0]}" if len(padded) == 1 else f"{padded[0]} to {padded[-1]}"
    most = max(empty.values())
    count = f"{most} empty ones" if len(padded) == 1 else f"up to {most} empty ones"
    return f"steps of {sizes} rows are padded with {count} for {trainer.schedule.name}"
