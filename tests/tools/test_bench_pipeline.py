"""The pipeline's benchmark: its bubbles, and a model that stages fill without padding."""

import subprocess
import sys

import pytest

from deepseek_jax.parallel.pipeline.schedule import StageMap
from deepseek_jax.parallel.placement import place
from tools.bench.pipeline_cases import model_of


def test_simulated_bubbles_equal_the_published_formulas():
    """DualPipe, table 2: (P/2 - 1)(F&B + B - 3W), and so on for the others."""
    command = [sys.executable, "-m", "tools.bench.pipeline", "--part=bubble", "--ranks=4", "--ranks=6"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| dualpipe | 6 | 4 | 4 | yes |" in done.stdout
    assert "All equal their formulas." in done.stdout


@pytest.mark.parametrize("stages", [2, 4, 8, 16])
def test_the_measured_model_fills_its_stages(stages):
    """So that no schedule is charged for layers that are not there: only the first stage has dense layers."""
    placement = place(model_of(stages), stage_map=StageMap("straight", stages))
    slots = [slot for kind in ("moe", "mtp") for stage in placement.slots[kind] for slot in stage]
    assert len(slots) == 16
    assert None not in slots
