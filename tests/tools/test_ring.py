"""The simulated ring: it obeys its own rules, goes as fast as its slowest part, and is drawn as it is committed."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from deepseek_jax.parallel.pipeline.draw import picture_svg
from pallas_kernels.block_scaled_matmul.config import MatmulConfig, step_cycles
from tools import ring

CONFIGS = [
    MatmulConfig(128, 128, stages=5, cluster=2),
    MatmulConfig(192, 128, stages=4, cluster=2),
    MatmulConfig(128, 64, stages=8),
    MatmulConfig(192, 64, stages=5, cluster=2, b_tile=(128, 1)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_stage_holds_one_step_and_the_tensor_cores_make_one_product_at_a_time(config):
    """Each step is loaded once and multiplied once by each consumer, and 9 steps are no multiple of those at once."""
    run = ring.simulate(config, 4096, 9, 3)
    steps = list(range(27))
    for what in {span.what for span in run.spans}:
        spans = sorted((s for s in run.spans if s.what == what), key=lambda s: (s.start, s.end))
        assert all(a.end <= b.start + 1e-6 for a, b in itertools.pairwise(spans)), what
    for kind in ("ask", "come", "on its way", "full", "read"):
        assert [s.step for s in run.spans if s.kind == kind] == steps
    for w in range(config.consumers):
        assert [s.step for s in run.spans if s.kind == "multiply" and s.consumer == w] == steps
        assert len([s for s in run.spans if s.what == f"consumer {w}" and s.kind == "write"]) == 3


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_within_a_tile_a_step_takes_as_long_as_its_slowest_part(config):
    """What `step_cycles` says without a simulation, where there are stages enough to hide latencies."""
    config = dataclasses.replace(config, stages=12)
    short, long = (ring.simulate(config, 4096, steps, 1).end for steps in (240, 480))
    assert (long - short) / 240 == pytest.approx(max(step_cycles(config, 4096).values()), rel=0.01)


def test_too_few_stages_cost_time():
    """The less of the ring is in flight, the longer the wait; what each column says grows upwards."""
    rows = [line.split("|") for line in ring.stages_table((2048,))[2:]]
    cycles = [int(row[4]) for row in rows]
    assert cycles == sorted(cycles, reverse=True)
    assert cycles[0] > 1.5 * cycles[-1]
    assert ["too much" in row[3] for row in rows] == [False] * 4 + [True] * 2


def test_the_picture_is_the_committed_one(tmp_path, capsys):
    committed = Path(__file__).parents[2] / "docs" / "kernels" / "ring.svg"
    assert ring.main(["--draw", str(tmp_path / "ring.svg")]) == 0
    assert (tmp_path / "ring.svg").read_text() == committed.read_text() == picture_svg(ring.drawn())
    assert ring.main(["--draw", str(tmp_path / "ring.png")]) == 0
    assert (tmp_path / "ring.png").read_bytes()[:4] == b"\x89PNG"
    assert ring.main(["--draw", "ring.pdf"]) == 2
    assert capsys.readouterr().err == "error: the picture ring.pdf must end in .svg or .png\n"
