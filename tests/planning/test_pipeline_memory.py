"""What a pipeline's device must hold, from its tables: flat in microbatches for all schedules but GPipe."""

import dataclasses

import pytest

from deepseek_jax.parallel.pipeline.generators import make_schedule
from deepseek_jax.parallel.pipeline.tables import make_tables
from deepseek_jax.planning.pipeline_memory import PipelineMemory, StageBytes, pipeline_memory

NOTHING = StageBytes(*[0] * len(dataclasses.fields(StageBytes)))


def memory(name: str, microbatches: int, ranks: int = 4, **sizes) -> PipelineMemory:
    stage = dataclasses.replace(NOTHING, **sizes)
    return pipeline_memory(make_tables(make_schedule(name, ranks, microbatches)), stage)


@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b", "zb_h1", "dualpipe", "dualpipe_v"])
def test_memory_does_not_grow_with_microbatches_but_for_gpipe(name):
    """DualPipe, table 2: activations of P + 1 microbatches, whatever their number."""
    sizes = {"x": 1, "output": 1, "residual": 100, "stash": 10}
    few, many = memory(name, 8, **sizes), memory(name, 32, **sizes)
    assert (few == many) == (name != "gpipe")


def test_rings_are_the_schedules_rows_and_a_scratch_row():
    """DualPipe, table 2: P + 1 residuals; a stash for each input gradient whose W is put off."""
    stash = make_tables(make_schedule("dualpipe", 4, 8)).rings.stash
    assert memory("dualpipe", 8, residual=1).rings == 4 + 1 + 1
    assert memory("dualpipe", 8, stash=1).rings == stash + 1 > 1
    assert memory("one_f_one_b", 8, stash=1).rings == 0


def test_two_directions_hold_two_stages_and_one_set_of_ends():
    one = memory("one_f_one_b", 8, weights=10, gradients=20, ends=1, ends_gradients=2, layer=7)
    two = memory("dualpipe", 8, weights=10, gradients=20, ends=1, ends_gradients=2, layer=7)
    assert (one.copies, one.gradients, one.transients) == (11, 22, 14)
    assert (two.copies, two.gradients) == (21, 42)
    assert two.total == two.rings + 21 + 42 + two.transients


def test_beside_a_backward_a_forwards_residuals_wait_for_their_row():
    tables = make_tables(make_schedule("dualpipe", 4, 8))
    stage = dataclasses.replace(NOTHING, residual=100, layer=7)
    apart, steady = (pipeline_memory(tables, stage, steady=steady) for steady in (False, True))
    assert (apart.transients, steady.transients) == (14, 114)
    none = make_tables(make_schedule("zb_h1", 4, 8))
    assert none.steady is None
    assert pipeline_memory(none, stage, steady=True).transients == 14
