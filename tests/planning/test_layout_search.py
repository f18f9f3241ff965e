"""The search over layouts: as good as trying them all, honest about what does not fit, and done in time."""

import dataclasses
import math

import pytest

from deepseek_jax import zoo
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.planning.calibration import deepseek_job
from deepseek_jax.planning.device_memory import device_memory
from deepseek_jax.planning.devices import GB200, H100, H200, H800
from deepseek_jax.planning.job import Job, check_layout
from deepseek_jax.planning.plan import make_plan
from deepseek_jax.planning.search import (
    candidates,
    least_seconds,
    meshes,
    remedies,
    search,
    settings,
    smallest_that_fits,
)
from deepseek_jax.precision.policy import BF16
from deepseek_jax.training.sharding_table import abstract_trainer
from experiments import tiny
from tools.plan import job_of


def lite(**changes) -> Job:
    """DeepSeek-V2-Lite, whose layouts on 16 devices can all be tried."""
    job = Job(
        model=dataclasses.replace(zoo.deepseek_v2_lite(), num_layers=8),
        parallel=ParallelConfig(),
        precision=BF16,
        length=4096,
        rows=256,
    )
    return dataclasses.replace(job, **changes)


def test_the_best_are_those_of_trying_all():
    tight = dataclasses.replace(H800, memory=40e9)
    found = search(lite(), tight, 8, top=5)
    plans = [make_plan(one, tight) for one in candidates(lite(), tight, 8)]
    fitting = sorted(plan.step.total for plan in plans if plan.fits)
    assert found.complete
    assert (found.tried, found.fitting) == (len(plans), len(fitting))
    assert 0 < len(fitting) < len(plans), "some fit and some do not, or this would test little"
    assert [plan.step.total for plan in found.best] == pytest.approx(fitting[:5])
    assert found.simulated < len(fitting), "the bound leaves some out"
    assert all(plan.fits for plan in found.best)
    assert all(memory.total > tight.usable_memory for _, memory in found.nearest)


def test_no_schedule_is_faster_than_the_bound():
    for one in list(candidates(lite(), H800, 8))[::7]:
        assert make_plan(one, H800).step.total >= least_seconds(one, H800) * (1 - 1e-9)


def test_meshes_are_whole():
    """Experts in whole nodes of eight, and every axis product is the count; which of them a model allows it says."""
    found = list(meshes(deepseek_job(), H800, 256))
    assert all(math.prod(mesh.values()) == 256 for mesh in found)
    assert all(mesh["node"] == 1 or mesh["expert"] == 8 for mesh in found)
    for one in candidates(deepseek_job(), H800, 256):
        check_layout(one, H800, 256)
    wide = [mesh for mesh in meshes(deepseek_job(), GB200, 256) if mesh["node"] * mesh["expert"] == 64]
    assert wide
    assert all(mesh["expert"] == 64 for mesh in wide), "one NVLink domain has 72"


def test_every_axis_is_tried():
    tried = list(candidates(lite(), H800, 8))
    for values in (
        {one.parallel.pipe for one in tried},
        {one.parallel.expert for one in tried},
        {one.parallel.schedule for one in tried},
        {one.microbatch_rows for one in tried},
        {one.parallel.recompute for one in tried},
        {one.is_fp8 for one in tried},
        {one.parallel.zero for one in tried},
    ):
        assert len(values) > 1


@pytest.mark.parametrize("device", [H800, H200], ids=lambda device: device.name)
def test_remedies_make_it_fit(device):
    """The recipe of the report, as this library runs it, needs more than a device has in BF16."""
    job = dataclasses.replace(deepseek_job(), precision=BF16, execution="lock_step")
    assert device_memory(job).total > device.usable_memory
    found = remedies(job, device)
    assert found
    for one in found:
        assert one.plan.fits
        assert one.plan.job.devices == job.devices
    least = min(len(one.changes) for one in found)
    assert all(len(one.changes) == least for one in found)
    assert [one.plan.step.total for one in found] == sorted(one.plan.step.total for one in found)


def test_what_cannot_fit_says_what_could():
    """671B on eight H800s: nothing fits, each says how much it lacks, and some number of them could."""
    found = search(deepseek_job(), H800, 8, top=3)
    assert found.best == ()
    assert found.nearest
    larger = smallest_that_fits(deepseek_job(), H800, 8)
    assert larger is not None
    assert larger.devices > 8
    assert device_memory(larger).total <= H800.usable_memory


def test_time_that_runs_out_is_said():
    assert not search(lite(), H800, 8, seconds=0.0).complete


def test_a_prime_number_of_devices_has_a_mesh():
    assert list(meshes(lite(), H800, 97)) == [{"pipe": 1, "data": 97, "node": 1, "expert": 1}]


def test_settings_are_what_the_command_line_takes():
    assert list(settings(deepseek_job())) == [
        "parallel.pipe=16",
        "parallel.data=2",
        "parallel.node=8",
        "parallel.expert=8",
        "parallel.schedule=dualpipe",
        "parallel.microbatch_rows=1",
        "parallel.recompute=selective",
        "parallel.zero=true",
        "precision=v3_fp8",
    ]


@pytest.mark.parametrize("count", [12, 16])
def test_what_is_found_can_be_made(count):
    """The trainer takes the best layouts: vocabulary, experts, groups and stages split as they must."""
    experiment = dataclasses.replace(tiny.pretrain(), model=dataclasses.replace(zoo.tiny(), num_layers=12))
    found = search(job_of(experiment), H800, count, top=4)
    assert found.best
    for plan in found.best:
        parallel = dataclasses.replace(plan.job.parallel, overlap=None)
        trainer = abstract_trainer(dataclasses.replace(experiment, parallel=parallel, precision=plan.job.precision))
        assert math.prod(trainer.mesh.shape.values()) == count


def test_a_vocabulary_that_stages_cannot_share_is_no_layout():
    """129,280 rows over seven ranks: this library splits embedding and head over them, others need not."""
    locked = dataclasses.replace(deepseek_job(), execution="lock_step")
    assert all(one.parallel.pipe == 1 for one in candidates(locked, H800, 7))
    assert any(one.parallel.pipe == 7 for one in candidates(deepseek_job(), H800, 7))


def test_a_recipe_without_a_mesh_learns_to_take_one():
    """DeepSeek-V2-Lite with its whole batch at once and every expert on each device: smaller microbatches, and experts
    spread over the node, make it fit."""
    job = dataclasses.replace(
        lite(), model=zoo.deepseek_v2_lite(), rows=4608, parallel=ParallelConfig(data=8), moment_bytes=4
    )
    (found,) = remedies(job, H100)
    assert found.plan.fits
    assert found.changes == ("parallel.microbatch_rows=1", "parallel.expert=8 parallel.data=1")
    larger = smallest_that_fits(job, H200, 8)
    assert larger is not None
    assert larger.devices == 8, "as many may do, on another mesh"
