"""Bytes that a training step holds on one device of a mesh, part by part, as this library runs it.

What stages keep is counted from shapes, with the room for routed rows that a run has at least (`parallel.capacity`).
What the compiler needs besides is not known here: `tools.aot` compiles the step and says.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.parameters import RouterBias, abstract_values
from deepseek_jax.model.quantized import quantized_names
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.pipeline.choice import SUFFIX
from deepseek_jax.planning.flops import attention_matmuls
from deepseek_jax.planning.job import Job
from deepseek_jax.planning.kept import kept_bytes, routed_rows
from deepseek_jax.planning.memory import layer_bytes, step_memory
from deepseek_jax.planning.pipeline_memory import StageBytes, pipeline_memory
from deepseek_jax.planning.stages import place_once
from deepseek_jax.planning.timeline import tick_tables
from deepseek_jax.precision.policy import Fp8Config
from deepseek_jax.tree import flatten

FRAGMENTATION = 0.04
"""Of all but masters and moments, what is lost between arrays. In the compiled step for 2048 devices it is 0.1% or
5.0%, by its room for routed tokens (`tools.aot`); what a GPU's allocator loses besides is not measured."""
STEADY_LOOPS = 3
"""Loops over ticks of a schedule with steady ones: those before, these, those after. XLA has the gradients of a stage's
dense layers once in each besides their sum, since a conditional gives them: counted in compiled steps
(`tools.aot_golden`)."""
MIRRORED_LEAVES = 3
"""How often a weight's gradient is there when it goes from a stage to its mirror: what is sent, what comes, the sum."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameters of one layer or end: those that every device of a stage has, and those of all routed experts."""

    dense: float = 0.0
    experts: float = 0.0
    quantised: float = 0.0
    """Of all of them, the share that FP8 keeps in codes."""

    def __add__(self, other: Counts) -> Counts:
        total = self.dense + self.experts + other.dense + other.experts
        both = self.quantised * (self.dense + self.experts) + other.quantised * (other.dense + other.experts)
        return Counts(self.dense + other.dense, self.experts + other.experts, both / total if total else 0.0)

    def times(self, count: float) -> Counts:
        """So many of them."""
        return dataclasses.replace(self, dense=count * self.dense, experts=count * self.experts)


@functools.lru_cache(maxsize=64)
def parameter_counts(config: ModelConfig, fp8: Fp8Config | None = None) -> Mapping[str, Counts]:
    """`Counts` of one layer of each kind (`dense`, `moe`, `mtp`), and of both `ends` together, with router biases."""
    model = Transformer(config, fp8)
    in_codes = set(quantized_names(model)) if fp8 is not None else set()
    layers = {"dense": config.num_dense_layers, "moe": config.num_moe_layers, "mtp": config.mtp_depth}
    found: dict[str, list[float]] = {kind: [0.0, 0.0, 0.0] for kind in (*layers, "ends")}
    for values in (abstract_values(model), abstract_values(model, RouterBias)):
        for name, value in flatten(values).items():
            kind = name.split(".")[0]
            kind, count = (kind, layers[kind]) if kind in layers else ("ends", 1)
            size = math.prod(value.shape) / count
            found[kind][1 if ".experts." in name else 0] += size
            found[kind][2] += size if name in in_codes else 0.0
    return {kind: Counts(d, e, q / (d + e) if d + e else 0.0) for kind, (d, e, q) in found.items()}


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device, on the rank that holds most."""

    masters: float
    """Float32 weights, and the optimizer's moments."""
    weights: float
    """Copies that the step works with, in the compute dtype or in FP8."""
    gradients: float
    """Float32 sums over microbatches, and beside them the gradient of one where they do not lie in place."""
    activations: float
    """What forward passes leave for backward passes, and what waits between stages."""
    put_off: float
    """What input gradients leave for weight gradients that wait."""
    buffers: float
    """One layer at work, both ways, with its rows for experts, logits, and gradients on their way to their sums; or at
    a step's end, where that is more, those on their way to mirrored stages."""
    lost: float
    """Between buffers."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))


def device_memory(job: Job) -> DeviceMemory:
    """What a step of a job holds."""
    return _of_pipeline(job) if job.parallel.pipe > 1 else _of_one_stage(job)


def stage_counts(job: Job) -> Counts:
    """Parameters of one stage as it is stored, empty slots included, with a device's share of the experts."""
    placement = place_once(job.model, job.parallel.layers_per_stage, job.stage_map)
    counts = parameter_counts(job.model, job.precision.fp8)
    # The tail's stack has MTP modules' parameters in all stages, since all have stacks of one shape.
    whole = sum((counts[kind].times(placement.size(kind)) for kind in ("dense", "moe", "mtp")), start=Counts())
    return dataclasses.replace(whole, experts=whole.experts / (job.parallel.node * job.parallel.expert))


def end_counts(job: Job) -> Counts:
    """Parameters of the model's two ends on one rank."""
    return parameter_counts(job.model, job.precision.fp8)["ends"].times(1 / job.parallel.pipe)


def owned(job: Job) -> tuple[float, float]:
    """(dense, experts) that one device holds of its own stages and its part of the ends: each stage counts once.

    In lock step stages are padded to one size; else the mean over ranks.
    """
    stage, ends = stage_counts(job), end_counts(job)
    if job.execution == "free":
        counts, config = parameter_counts(job.model, job.precision.fp8), job.model
        layers = {"dense": config.num_dense_layers, "moe": config.num_moe_layers, "mtp": config.mtp_depth}
        whole = sum((counts[kind].times(number) for kind, number in layers.items()), start=Counts())
        split = job.parallel.node * job.parallel.expert
        return whole.dense / job.parallel.pipe + ends.dense, whole.experts / job.parallel.pipe / split
    count = job.stage_map.stages / job.stage_map.ranks
    return count * stage.dense + ends.dense, count * stage.experts


def _masters(job: Job) -> float:
    dense, experts = owned(job)
    each = 4 + 2 * job.moment_bytes
    if not job.parallel.zero:
        return each * (dense + experts)
    return each * (dense / job.parallel.batch_shards + experts / job.parallel.data)


def _copy_bytes(job: Job, counts: Counts) -> float:
    """Of the working copy of some parameters."""
    total = counts.dense + counts.experts
    if job.is_fp8:
        return total * (counts.quantised * (1 + 4 / 128**2) + (1 - counts.quantised) * job.width)
    return total * job.width


def _of_pipeline(job: Job) -> DeviceMemory:
    stage, ends = stage_counts(job), end_counts(job)
    tables = tick_tables(job.parallel.schedule_choice, _microbatches_that_show(job))
    sizes = stage_bytes(job)
    parts = pipeline_memory(tables, sizes, steady=job.parallel.overlap != "off")
    put_off = (tables.rings.stash + 1) * sizes.stash if tables.rings.stash else 0
    logits = job.tokens * job.model.vocab_size / job.parallel.pipe * job.width
    masters = _masters(job)
    loops = STEADY_LOOPS if job.parallel.overlap != "off" and tables.steady else 1
    found = {
        "masters": masters,
        "weights": tables.schedule.stages.slots * _copy_bytes(job, stage) + _copy_bytes(job, ends),
        "gradients": float(parts.gradients),
        "activations": float(parts.rings - put_off),
        "put_off": float(put_off),
        "buffers": max(parts.transients + logits + loops * _dense_gradients(job), _largest_mirrored(job)),
    }
    return DeviceMemory(**found, lost=FRAGMENTATION * (sum(found.values()) - masters))


def _dense_gradients(job: Job) -> float:
    """Bytes of the gradients of a stage's dense layers."""
    slots = place_once(job.model, job.parallel.layers_per_stage, job.stage_map).size("dense")
    return 4 * slots * parameter_counts(job.model, job.precision.fp8)["dense"].dense


def _largest_mirrored(job: Job) -> float:
    """Bytes besides sums when the largest weight's gradient goes to its mirror, at the end of a step; else 0."""
    if job.stage_map.copies == 1:
        return 0.0
    placement = place_once(job.model, job.parallel.layers_per_stage, job.stage_map)
    experts = job.model.moe.num_experts / (job.parallel.node * job.parallel.expert)
    moe = (placement.size("moe") or placement.size("mtp")) * experts * job.model.moe.expert_ffn_size
    widest = max(placement.size("dense") * job.model.dense_ffn_size, moe)
    return MIRRORED_LEAVES * 4 * 2 * widest * job.model.hidden_size


def _microbatches_that_show(job: Job) -> int:
    """With how many microbatches a schedule stores as much as it ever does: two for each rank, or three, with which it
    has steady ticks, if the step has as many; but in GPipe, which stores all, and in a schedule of one's own those that
    the step has."""
    choice = job.parallel.schedule_choice
    grows = choice.name == "gpipe" or choice.name.endswith(SUFFIX)
    return job.microbatches if grows else choice.fitting(min(max(job.microbatches, 2 * choice.ranks), 3 * choice.ranks))


def _of_one_stage(job: Job) -> DeviceMemory:
    """Gradient accumulation on one rank."""
    split = job.parallel.node * job.parallel.expert
    whole = step_memory(
        job.model,
        job.tokens,
        microbatches=job.microbatches,
        moment_bytes=job.moment_bytes,
        compute_bytes=job.width,
        recompute=job.parallel.recompute,
        fp8=job.precision.fp8,
    )
    dense, experts = owned(job)
    share = (dense + experts) / (dense + split * experts)
    masters, counts = _masters(job), stage_counts(job) + end_counts(job)
    gathered = job.parallel.zero and job.parallel.batch_shards > 1
    copied = job.width != 4 or job.is_fp8 or gathered
    elsewhere = 0.0
    if split > 1:
        elsewhere = kept_bytes(job, dense=False) - kept_bytes(job, dense=False, room=1.0, elsewhere=False)
    extra = job.tokens * elsewhere * (job.model.num_moe_layers if job.parallel.recompute != "full" else 1)
    found = {
        "masters": masters,
        "weights": _copy_bytes(job, counts) if copied else 0.0,
        "gradients": whole.gradients * share + whole.head_gradients,
        "activations": whole.activations + extra,
        "put_off": 0.0,
        "buffers": job.tokens * job.model.vocab_size * job.width / 8 + _layer_at_work(job),
    }
    return DeviceMemory(**found, lost=FRAGMENTATION * (sum(found.values()) - masters))


# --- one stage of a pipeline ------------------------------------------------------------------------------------------


def stage_bytes(job: Job) -> StageBytes:
    """`StageBytes` of a job's stages, which all have as many slots as the fullest."""
    placement = place_once(job.model, job.parallel.layers_per_stage, job.stage_map)
    dense, moe = placement.size("dense"), placement.size("moe") + placement.size("mtp")
    stage, ends = stage_counts(job), end_counts(job)
    width, tokens, a = job.model.hidden_size, job.tokens, job.width
    streams = 2 if job.model.mtp_depth else 1
    full = job.parallel.recompute == "full"
    mtp = placement.size("mtp")
    kept: float
    if full:
        kept = (dense + moe + 1) * width * a
    else:
        kept = dense * kept_bytes(job, dense=True) + moe * kept_bytes(job, dense=False) + 3 * mtp * width * a
    stash = dense * _put_off(job, dense=True) + moe * _put_off(job, dense=False) + mtp * 5 * width * a
    return StageBytes(
        x=streams * tokens * width * a,
        output=streams * tokens * width * a,
        residual=round(tokens * kept),
        stash=round(tokens * stash),
        weights=round(_copy_bytes(job, stage)),
        gradients=round(4 * (stage.dense + stage.experts)),
        ends=round(_copy_bytes(job, ends)),
        ends_gradients=round(4 * ends.dense),
        layer=round(_layer_at_work(job)),
    )


def _put_off(job: Job, *, dense: bool) -> float:
    """Bytes per token that the input gradients of a layer leave for its weight gradients: gradients of outputs, and
    inputs that are computed again."""
    moe, width, a = job.model.moe, job.model.hidden_size, job.width
    code = 1 + 4 / 128 if job.is_fp8 else a
    outputs = sum(one.outputs for one in attention_matmuls(job.model))
    found = (outputs + width) * code
    rows = routed_rows(job)
    shared = moe.num_shared_experts * moe.expert_ffn_size
    if dense:
        found += job.model.dense_ffn_size * a
    else:
        found += rows * (width * code + moe.expert_ffn_size * a) + shared * a + 4 * moe.num_experts
    if job.parallel.recompute != "full":
        return found
    attention = job.model.attention
    inputs = (attention.q_lora_rank or 0) + attention.kv_lora_rank + attention.num_heads * attention.v_head_dim + width
    gate_up = 2 * job.model.dense_ffn_size if dense else rows * (width + 2 * moe.expert_ffn_size) + 2 * shared
    return found + (inputs + gate_up) * code


def _layer_at_work(job: Job) -> float:
    """Bytes of what one layer computes besides what it keeps, and lets go."""
    layer = layer_bytes(job.model, job.model.num_moe_layers == 0, False, job.width, False)
    rows = routed_rows(job) - job.model.moe.experts_per_token
    return job.tokens * (layer + rows * (2 * job.model.hidden_size + 3 * job.model.moe.expert_ffn_size) * job.width)
