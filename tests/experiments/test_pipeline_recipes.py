"""Recipes over pipeline stages, from shapes alone: what they train, and that their batches fit their schedules."""

from __future__ import annotations

import dataclasses

import pytest

from deepseek_jax import zoo
from deepseek_jax.config import ConfigError
from deepseek_jax.config_io import override_all
from deepseek_jax.parallel.pipeline.generators import GENERATORS
from deepseek_jax.training.loop import train
from deepseek_jax.training.opening import opening_lines
from deepseek_jax.training.sharding_table import abstract_trainer
from deepseek_jax.training.start import batch_sizes, check_pipeline
from experiments import tiny, v3

SMALL = (tiny.pretrain_dualpipe, tiny.pretrain_dualpipe_deep)


def opening(experiment):
    numbers = {"tokens": 0, "flops_per_token": 1e9, "peak_flops": 1e12}
    return list(opening_lines(experiment, abstract_trainer(experiment), **numbers))


@pytest.mark.parametrize("recipe", SMALL)
def test_the_quickstart_in_a_pipeline_is_the_quickstart_in_batches_twice_as_large(recipe):
    """MLA, MoE, bias balance, MTP and FIM as there, over as many tokens; what else differs is the layout."""
    base, changed = tiny.pretrain(), recipe()
    assert changed.model == zoo.tiny()
    assert changed.model.mtp_depth == 1
    assert changed.data == base.data
    assert changed.data.fim_rate > 0
    assert changed.schedule.bias_rate(0) > 0
    assert batch_sizes(changed.schedule) == [16] == [2 * rows for rows in batch_sizes(base.schedule)]
    assert dataclasses.replace(changed.schedule, batch_rows=base.schedule.batch_rows) == base.schedule
    assert changed.optimizer.peak_lr == pytest.approx(2**0.5 * base.optimizer.peak_lr, rel=0.02)
    assert changed.parallel.pipe * changed.parallel.data * changed.parallel.expert == 8


@pytest.mark.parametrize("recipe", SMALL)
def test_the_quickstart_in_a_pipeline_runs_by_any_schedule_that_its_layers_allow(recipe):
    """By one override; DualPipe's batches are full, as those of most are."""
    base = recipe()
    assert abstract_trainer(base).padded_rows(16) == 16
    for name in GENERATORS:
        changed = override_all(base, [f"parallel.schedule={name}"])
        if base.parallel.pipe == 4 and name in ("dualpipe_v", "interleaved_one_f_one_b"):
            with pytest.raises(ConfigError, match=r"^8 stages are more than the model's 4 layers"):
                abstract_trainer(changed)
            continue
        trainer = abstract_trainer(changed)
        check_pipeline(changed, trainer)
        assert trainer.padded_rows(16) == 16


def test_v3_says_which_of_its_batches_are_padded():
    """Its ramp begins with 24 microbatches a stage, and DualPipe over 16 ranks needs 32."""
    experiment = v3.pretrain()
    trainer = abstract_trainer(experiment)
    check_pipeline(experiment, trainer)
    assert {rows: trainer.padded_rows(rows) for rows in batch_sizes(experiment.schedule)} == {
        3072: 4096,
        **{rows: rows for rows in range(4608, 15_361, 1536)},
    }
    lines = opening(experiment)
    assert "steps of 3072 rows are padded with 1024 empty ones for dualpipe" in lines
    (pipeline,) = [line for line in lines if line.startswith("pipeline dualpipe over 16 ranks; stages of ")]
    layers = pipeline.partition("stages of ")[2].partition(" layers")[0].split(", ")
    assert sum(map(int, layers)) == 61
    assert "padded" not in " ".join(opening(v3.pretrain_512()))


def test_a_batch_that_never_fits_is_refused_with_what_would():
    experiment = override_all(v3.pretrain(), ["schedule.batch_rows.phases.0.value=3072"])
    with pytest.raises(ConfigError) as error:
        check_pipeline(experiment, abstract_trainer(experiment))
    assert str(error.value) == (
        "parallel.schedule=dualpipe parallel.pipe=16: dualpipe over 16 ranks needs at least 32 microbatches (16 each "
        "way), not 24; the largest batch is 3072 rows "
        "over 128 devices in microbatches of 1: raise schedule.batch_rows to 4096 or choose another parallel.schedule"
    )


@pytest.mark.parametrize("recipe", [v3.pretrain_8, v3.extend_128k])
def test_what_can_only_be_planned_says_so_when_it_is_started(recipe, tmp_path):
    with pytest.raises(
        ConfigError, match=r"can be planned \(python -m tools.plan\) but not run: .*; to try all the same"
    ):
        train(recipe(), workdir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    override_all(recipe(), ["cannot_run=none"]).check_runs()
