"""The first lines that a run prints: what trains, on what, and what of it is unusual."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from deepseek_jax.parallel.dispatch import ExpertMesh, choose_dispatcher
from deepseek_jax.parallel.mesh import AXES, ParallelConfig
from deepseek_jax.training.experiment import Experiment
from deepseek_jax.training.progress import human_count
from deepseek_jax.training.step import Trainer

FORCED_BALANCE = (
    "WARNING: FORCED BALANCE. Tokens go to experts in turn, whatever the router says (force_balanced_routing): "
    "speeds can be compared, losses mean nothing"
)


def opening_lines(
    experiment: Experiment, trainer: Trainer, *, tokens: int, flops_per_token: float, peak_flops: float
) -> Iterator[str]:
    """Model and devices, the mesh if there are several, and warnings."""
    count = sum(leaf.size for leaf in jax.tree.leaves(trainer.params_layout.abstract()))
    yield (
        f"{human_count(count)} parameters on {jax.device_count()} x {jax.devices()[0].device_kind}; "
        f"{flops_per_token / 1e6:,.1f} MFLOP per token, matmul peak {peak_flops / 1e9:,.0f} GFLOP/s; "
        f"{human_count(max(experiment.schedule.total_tokens - tokens, 0))} tokens to go"
    )
    if jax.device_count() > 1:
        yield _layout(experiment.parallel)
    if experiment.force_balanced_routing:
        yield FORCED_BALANCE
    if mismatch := experiment.schedule.mismatch():
        yield f"warning: {mismatch}"


def _layout(parallel: ParallelConfig) -> str:
    axes = " x ".join(f"{name} {size}" for name, size in zip(AXES, parallel.shape, strict=True) if size > 1)
    dispatcher = choose_dispatcher(parallel.dispatcher, ExpertMesh(parallel.node, parallel.expert))
    state = "once across" if parallel.zero else "on every one of the"
    return f"mesh {axes}; tokens reach experts by {dispatcher}; optimizer state {state} data ranks"
