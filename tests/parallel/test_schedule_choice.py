"""Which schedule a run gets, for any batch: never one that the next line of the program then refuses."""

from __future__ import annotations

import dataclasses

import pytest
from small_model import gradient_descent, small

from deepseek_jax.config import ConfigError
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.parallel.pipeline.choice import ScheduleChoice
from deepseek_jax.parallel.pipeline.generators import GENERATORS, gpipe
from deepseek_jax.parallel.pipeline.schedule import StageMap
from deepseek_jax.parallel.pipeline.text import to_text
from deepseek_jax.parallel.placement import place
from deepseek_jax.training.sharding_table import abstract_mesh
from deepseek_jax.training.step import Trainer
from deepseek_jax.training.step_config import StepConfig

CONFIG = small(num_layers=8)


def trainer(parallel: ParallelConfig, stage_map: StageMap | None = None) -> Trainer:
    placement = place(CONFIG, stage_map=stage_map or parallel.schedule_choice.stage_map)
    config = StepConfig(schedule=parallel.schedule, microbatch_rows=parallel.microbatch_rows)
    return Trainer(Transformer(CONFIG), placement, abstract_mesh(parallel), gradient_descent, config)


@pytest.mark.parametrize("size", [None, 1, 2, 4])
@pytest.mark.parametrize("schedule", GENERATORS)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_padded_batch_needs_no_more_padding(schedule, size, shards):
    """And splits into microbatches that there is a schedule for."""
    run = trainer(ParallelConfig(pipe=2, data=shards, schedule=schedule, microbatch_rows=size))
    for rows in range(1, 40):
        padded = run.padded_rows(rows)
        assert padded >= rows
        assert run.padded_rows(padded) == padded
        run.schedule.make(run.microbatches((padded, 13)))


def test_one_stage_pads_to_whole_microbatches_alone():
    run = trainer(ParallelConfig(data=2, microbatch_rows=4))
    assert [run.padded_rows(rows) for rows in (1, 3, 8, 9)] == [2, 4, 8, 16]


@pytest.mark.parametrize(
    ("choice", "microbatches", "message"),
    [
        (ScheduleChoice("dualpipe", 3), 8, "parallel.schedule=dualpipe parallel.pipe=3: dualpipe needs an even number"),
        (ScheduleChoice("dualpipe", 4), 6, "parallel.pipe=4: dualpipe over 4 ranks needs at least 8 microbatches"),
        (ScheduleChoice("dualpip", 2), 4, "there is no schedule 'dualpip'; did you mean dualpipe?"),
        (ScheduleChoice("gpipe", 2, chunks=3), 4, "parallel.chunks=3: chunks belong to interleaved_one_f_one_b"),
        (ScheduleChoice("nowhere.txt", 2), 4, "there is no schedule file nowhere.txt"),
    ],
)
def test_what_is_wrong_is_said_with_its_fields(choice, microbatches, message):
    with pytest.raises(ConfigError) as refusal:
        choice.make(microbatches)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_is_read_again_by_another_run(tmp_path):
    path = tmp_path / "own.txt"
    for microbatches in (4, 6):
        path.write_text(to_text(dataclasses.replace(gpipe(2, microbatches), name="own")))
        choice = ScheduleChoice(str(path), 2)
        assert choice.fitting(1) == microbatches
        assert choice.make(microbatches).microbatches == microbatches
    with pytest.raises(ConfigError, match="is for 6 microbatches, a batch has 7"):
        choice.fitting(7)
    with pytest.raises(ConfigError, match=r"is for 2 pipeline ranks, parallel\.pipe is 4"):
        ScheduleChoice(str(path), 4).fitting(1)


def test_layers_must_be_placed_as_the_schedule_runs_them():
    """In the order of another one, a model would compute something else."""
    parallel = ParallelConfig(pipe=2, schedule="interleaved_one_f_one_b")
    trainer(parallel)
    with pytest.raises(ConfigError, match="placed in vee stages, schedule interleaved_one_f_one_b runs interleaved"):
        trainer(parallel, StageMap("vee", 2))
    trainer(ParallelConfig(pipe=2, schedule="dualpipe"), StageMap("straight", 2))
