"""Bytes of a device: against what the library's own declarations and traced stages say, at DeepSeek-V3's size."""

import dataclasses
import functools

import jax
import pytest

from deepseek_jax import zoo
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.parallel.pipeline.generators import make_schedule
from deepseek_jax.parallel.pipeline.text import write_schedule
from deepseek_jax.planning.calibration import deepseek_job
from deepseek_jax.planning.device_memory import (
    DeviceMemory,
    device_memory,
    owned,
    parameter_counts,
    stage_bytes,
    stage_counts,
)
from deepseek_jax.planning.devices import H200
from deepseek_jax.planning.job import Job
from deepseek_jax.planning.memory import step_memory
from deepseek_jax.planning.parameters import total_parameters
from deepseek_jax.planning.plan import make_plan
from deepseek_jax.precision.policy import BF16, FLOAT32, V3_FP8
from deepseek_jax.training.sharding_table import abstract_trainer, sharding_table
from experiments import tiny, v3
from tools.bench.pipeline_memory import trace_run
from tools.plan import job_of

ROWS = 32 * 128
"""The least batch of DualPipe over 16 ranks, of 128 devices each."""


def recipe(precision=BF16, **layout):
    base = v3.pretrain()
    return dataclasses.replace(base, precision=precision, parallel=dataclasses.replace(base.parallel, **layout))


def test_counts_add_up_to_the_model():
    config = zoo.deepseek_v3()
    counts = parameter_counts(config)
    layers = {"dense": 3, "moe": 58, "mtp": 1, "ends": 1}
    total = sum(count * (counts[kind].dense + counts[kind].experts) for kind, count in layers.items())
    assert total == total_parameters(config)
    assert counts["moe"].experts == 256 * 3 * 7168 * 2048
    assert counts["dense"].experts == counts["ends"].experts == 0


def test_masters_weights_and_gradients_are_those_of_the_sharding_table():
    """Over wide layers, to 1%: the planner splits vectors as well, and gives every parameter the compute dtype."""
    wide = dataclasses.replace(zoo.tiny(), hidden_size=2048, dense_ffn_size=4096)
    experiment = dataclasses.replace(
        tiny.pretrain_dualpipe(),
        model=wide,
        precision=BF16,
        optimizer=dataclasses.replace(tiny.pretrain().optimizer, moment_dtype="bfloat16"),
    )
    table, memory = sharding_table(experiment), device_memory(job_of(experiment))
    seen = {name: sum(getattr(row, f"{name}_bytes") for row in table.rows) for name in ("master", "moment", "copy")}
    assert memory.masters == pytest.approx(seen["master"] + seen["moment"], rel=0.01)
    assert memory.weights == pytest.approx(seen["copy"], rel=0.01)
    assert memory.gradients == pytest.approx(sum(row.gradient_bytes for row in table.rows), rel=0.01)


@functools.cache
def traced(fp8: bool, recompute: str) -> dict[str, int]:
    """What a stage's arrays hold, traced on an abstract mesh of 2048 devices."""

    def read(run) -> dict[str, int]:
        def size(tree) -> int:
            return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

        shapes = run.shapes
        return {"residual": size(shapes.residual), "stash": size(shapes.stash), "x": size(shapes.out.x)}

    experiment = recipe(V3_FP8 if fp8 else BF16, recompute=recompute)
    return trace_run(abstract_trainer(experiment), (ROWS, 4097), read)


@pytest.mark.parametrize(
    ("fp8", "recompute"),
    [
        (False, "selective"),
        (True, "selective"),
        (False, "full"),
        pytest.param(True, "full", marks=pytest.mark.slow),
        pytest.param(False, "none", marks=pytest.mark.slow),
    ],
)
def test_what_a_stage_keeps_is_what_its_trace_keeps(fp8, recompute):
    """Residuals, stash and what travels, to 5%."""
    sizes = stage_bytes(job_of(recipe(V3_FP8 if fp8 else BF16, recompute=recompute)))
    seen = traced(fp8, recompute)
    assert sizes.x == seen["x"]
    assert sizes.residual == pytest.approx(seen["residual"], rel=0.05)
    assert sizes.stash == pytest.approx(seen["stash"], rel=0.05)


def test_dualpipe_holds_two_stages_and_the_state_of_one():
    """Table 2 of the report: twice the parameters of 1F1B in copies and gradients, P + 1 activations; masters alike."""
    two, one = (device_memory(job_of(recipe(schedule=name))) for name in ("dualpipe", "one_f_one_b"))
    assert two.masters == one.masters
    assert two.gradients / one.gradients == pytest.approx(2, rel=0.05)
    assert two.weights / one.weights == pytest.approx(2, rel=0.05)
    assert one.put_off == 0 < two.put_off
    assert two.activations / one.activations == pytest.approx(18 / 17, rel=0.01), "with their scratch rows"


def test_zero_splits_the_state_alone():
    with_zero, without = (device_memory(job_of(recipe(zero=zero))) for zero in (True, False))
    job = job_of(recipe())
    dense, experts = owned(job)
    assert with_zero.masters == 8 * (dense / 128 + experts / 2)
    assert without.masters == 8 * (dense + experts)
    assert without.gradients == with_zero.gradients


def test_empty_slots_are_held_too():
    """DeepSeek-V3 in 16 stages: stacks of 2 dense, 3 MoE layers and a tail (docs/design.md: 10% are empty)."""
    counts = parameter_counts(zoo.deepseek_v3())
    stage = stage_counts(job_of(recipe()))
    slots = {"dense": 2, "moe": 3, "mtp": 1}
    assert stage.dense == pytest.approx(sum(count * counts[kind].dense for kind, count in slots.items()))
    assert stage.experts == pytest.approx(4 * counts["moe"].experts / 64)
    even = owned(deepseek_job())
    assert sum(even) < sum(owned(job_of(recipe())))


def test_one_device_is_what_memory_says():
    """Float32 on one device: masters are used as they are, and the sum of gradients is the only copy."""
    job = Job(model=zoo.tiny(), parallel=ParallelConfig(), precision=FLOAT32, length=256, rows=8, moment_bytes=4)
    whole, memory = step_memory(zoo.tiny(), 8 * 256), device_memory(job)
    assert memory.masters == whole.parameters + whole.moments
    assert memory.weights == memory.put_off == 0
    assert memory.gradients == whole.gradients + whole.head_gradients
    assert memory.activations == whole.activations


def test_fp8_and_recomputation_take_less():
    totals = [
        device_memory(job_of(recipe(precision, recompute=recompute))).total
        for precision, recompute in ((BF16, "none"), (BF16, "selective"), (V3_FP8, "selective"), (V3_FP8, "full"))
    ]
    assert totals == sorted(totals, reverse=True)


def test_a_total_is_the_sum_of_its_parts():
    memory = device_memory(job_of(recipe()))
    assert memory.total == sum(getattr(memory, field.name) for field in dataclasses.fields(DeviceMemory))


def test_gpipe_stores_every_microbatch_and_others_do_not():
    """M rows of residuals, whatever M is; 1F1B's P do not grow."""

    def activations(schedule: str, rows: int) -> float:
        parallel = ParallelConfig(pipe=2, schedule=schedule, microbatch_rows=1)
        return device_memory(Job(model=zoo.tiny(), parallel=parallel, precision=BF16, length=64, rows=rows)).activations

    assert activations("gpipe", 16) / activations("gpipe", 8) == pytest.approx(2, rel=0.15)
    assert activations("one_f_one_b", 16) == activations("one_f_one_b", 8)


def test_a_schedule_of_ones_own_is_planned(tmp_path):
    path = tmp_path / "own.txt"
    write_schedule(make_schedule("one_f_one_b", 2, 3), path)
    parallel = ParallelConfig(pipe=2, schedule=str(path), microbatch_rows=1)
    own = Job(model=zoo.tiny(), parallel=parallel, precision=BF16, length=64, rows=3)
    named = dataclasses.replace(own, parallel=dataclasses.replace(parallel, schedule="one_f_one_b"))
    assert device_memory(own).total == device_memory(named).total
    assert make_plan(own, H200).step == make_plan(named, H200).step
