"""What a step sends: expected destinations of tokens, bytes of an exchange, weights and gradients."""

import dataclasses
import itertools
import random

import pytest

from deepseek_jax import zoo
from deepseek_jax.config import MoEConfig
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.planning.calibration import deepseek_job
from deepseek_jax.planning.devices import H800
from deepseek_jax.planning.efficiency import HOPPER
from deepseek_jax.planning.job import Job
from deepseek_jax.planning.traffic import (
    Exchange,
    exchanges,
    expected_places,
    stage_transfer_bytes,
    weight_seconds,
    weight_traffic,
)
from deepseek_jax.precision.policy import BF16


@pytest.mark.parametrize("places", [2, 4, 8])
def test_expected_places_are_the_mean_over_all_choices(places):
    """Every choice of two of four groups, and of two of their four experts, equally often."""
    moe = MoEConfig(num_experts=8, experts_per_token=2, num_groups=4, groups_per_token=2)
    counts = []
    for groups in itertools.combinations(range(4), 2):
        pool = [expert for expert in range(8) if expert // 2 in groups]
        counts += [len({e * places // 8 for e in chosen}) for chosen in itertools.combinations(pool, 2)]
    assert expected_places(moe, places) == pytest.approx(sum(counts) / len(counts))


def test_expected_nodes_of_v3():
    """At most four (section 3.2.2), a little less since eight experts of four groups can leave one out."""
    moe, rng = zoo.deepseek_v3().moe, random.Random(0)
    drawn = []
    for _ in range(4000):
        groups = rng.sample(range(8), 4)
        drawn.append(len({e // 32 for e in rng.sample([e for e in range(256) if e // 32 in groups], 8)}))
    assert expected_places(moe, 8) == pytest.approx(sum(drawn) / len(drawn), rel=0.01)
    assert expected_places(moe, 8) < 4


def test_wire_bytes_of_v3():
    """7392 bytes a token out in FP8 with its 56 scales, 14,336 back in BF16, to at most four nodes."""
    job = dataclasses.replace(deepseek_job(), imbalance=1.0)
    dispatch, combine = exchanges(job)
    nodes = expected_places(job.model.moe, 8)
    assert dispatch.network == pytest.approx(4096 * nodes * 7392)
    assert combine.network == pytest.approx(4096 * nodes * 14_336)
    assert dispatch.node / dispatch.network == pytest.approx(expected_places(job.model.moe, 64) / nodes)


def test_the_slower_link_counts():
    fast = H800.node_bandwidth * HOPPER.node
    assert Exchange(network=50e9, node=fast / 2).seconds(H800) == pytest.approx(1.0)
    assert Exchange(network=5e9, node=fast).seconds(H800) == pytest.approx(1.0)


def test_nothing_is_exchanged_on_one_device():
    job = Job(model=zoo.tiny(), parallel=ParallelConfig(data=4), precision=BF16, length=64, rows=8)
    assert exchanges(job) == (Exchange(0, 0), Exchange(0, 0))
    assert stage_transfer_bytes(job) == 0


def _pipeline(**layout) -> Job:
    parallel = ParallelConfig(pipe=2, data=2, node=2, expert=2, microbatch_rows=1, **layout)
    return Job(model=zoo.tiny(), parallel=parallel, precision=BF16, length=64, rows=64)


def test_weights_and_gradients_by_the_usual_algorithms():
    """(n-1)/n of each gathered in BF16 and scattered in float32; dense over eight copies, experts over two; and both
    ways between the ranks of a mirrored stage."""
    traffic = weight_traffic(_pipeline(schedule="dualpipe"), 80.0, 20.0)
    spread = 80 * 7 / 8 + 20 / 2
    assert (traffic.gathered, traffic.reduced, traffic.mirrored) == (2 * spread, 4 * spread, 6 * 100)
    one = weight_traffic(_pipeline(schedule="one_f_one_b"), 80.0, 20.0)
    assert (one.gathered, one.reduced, one.mirrored) == (2 * spread, 4 * spread, 0)
    apart = weight_traffic(_pipeline(schedule="one_f_one_b", zero=False), 80.0, 20.0)
    assert (apart.gathered, apart.reduced) == (0, 8 * spread), "an all-reduce sends twice as much"


def test_sums_go_within_nodes_first():
    """16 devices of two nodes of eight: 7/8 of the weights within, and half of an eighth between them."""
    parallel = ParallelConfig(pipe=2, node=2, expert=8, microbatch_rows=1, schedule="one_f_one_b")
    job = Job(model=zoo.tiny(), parallel=parallel, precision=BF16, length=64, rows=64)
    dense = 1e9
    within = H800.node_bandwidth * HOPPER.collectives
    between = H800.network_bandwidth * HOPPER.collectives
    expected = 6 * dense * (7 / 8 / within + 1 / 2 / 8 / between)
    assert weight_seconds(job, H800, dense, 0.0) == pytest.approx(expected)


def test_embeddings_travel_with_hidden_states_for_mtp():
    """In this library; other systems are taken to send hidden states alone."""
    job = _pipeline()
    assert stage_transfer_bytes(job) == 2 * 64 * 192 * 2
    assert stage_transfer_bytes(dataclasses.replace(job, execution="free")) == 64 * 192 * 2
