"""The simulator: the reference table, the published formulas as properties, and the ranking."""

from __future__ import annotations

import pytest
from even_ranks import EVEN

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.pipeline.generators import (
    GENERATORS,
    dualpipe,
    dualpipe_v,
    eager_one_f_one_b,
    gpipe,
    interleaved_one_f_one_b,
    make_schedule,
    one_f_one_b,
    one_rank,
    zb_h1,
)
from deepseek_jax.parallel.pipeline.simulate import Costs, Sizes, assign_ticks, best, simulate

UNEVEN = Costs(forward=1.0, input_gradient=1.25, weight_gradient=0.75)
"""Costs that binary fractions hold exactly, so that sums of them can be compared without a tolerance."""


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "makespan", "bubble", "activations", "stash"),
    [
        ("gpipe", 4, 16, 57, 9, 16, 0),
        ("one_f_one_b", 4, 16, 57, 9, 4, 0),
        ("dualpipe", 4, 16, 50, 2, 5, 2),
        ("one_f_one_b", 8, 32, 117, 21, 8, 0),
        ("dualpipe", 8, 32, 102, 6, 9, 4),
        ("one_f_one_b", 16, 128, 429, 45, 16, 0),
        ("dualpipe", 16, 128, 398, 14, 17, 8),
        ("dualpipe_v", 8, 128, 782, 14, 17, 8),
    ],
)
def test_the_reference_table(name, ranks, microbatches, makespan, bubble, activations, stash):
    """F = B = W = 1; the last row is 16 stages on 8 ranks."""
    timeline = simulate(make_schedule(name, ranks, microbatches))
    assert (timeline.makespan, timeline.bubble) == (makespan, bubble)
    assert (max(timeline.peak_activations), max(timeline.peak_stash)) == (activations, stash)


# --- formulas -------------------------------------------------------------------------------------------------------


def sums(costs: Costs):
    f, b, w = costs.forward, costs.input_gradient, costs.weight_gradient
    return f, b, w, costs.pair


@pytest.mark.parametrize("ranks", EVEN)
@pytest.mark.parametrize("costs", [Costs(), UNEVEN], ids=["equal", "uneven"])
def test_bubbles_are_the_published_formulas(ranks, costs):
    """1F1B and GPipe (P-1)(F+B), interleaved the same of a chunk, ZB-H1 (P-1)(F+B-2W); B there is the full backward.

    ZB-H1's is the table's of the paper, which holds where F, B and W are alike; others make ranks wait longer.
    """
    f, b, w, _ = sums(costs)
    for microbatches in (2 * ranks, 4 * ranks):
        for make in (gpipe, one_f_one_b):
            assert simulate(make(ranks, microbatches), costs).bubble == (ranks - 1) * (f + b + w)
        for chunks in (2, 3):
            timeline = simulate(interleaved_one_f_one_b(ranks, microbatches, chunks), costs)
            assert timeline.bubble == (ranks - 1) * (f + b + w)
        if costs == Costs():
            assert simulate(zb_h1(ranks, microbatches), costs).bubble == (ranks - 1) * (f + (b + w) - 2 * w)


@pytest.mark.parametrize("ranks", EVEN)
@pytest.mark.parametrize("more", [0, 2, 14])
def test_dualpipes_bubble(ranks, more):
    """(P/2-1)(F&B+B-3W) with B the full backward, whatever M; DualPipeV's is that of as many stages as 2P."""
    microbatches = 2 * ranks + more
    _, b, w, pair = sums(Costs())
    timeline = simulate(dualpipe(ranks, microbatches))
    assert set(timeline.idle) == {(ranks // 2 - 1) * (pair + (b + w) - 3 * w)}
    timeline = simulate(dualpipe_v(ranks, microbatches))
    assert set(timeline.idle) == {(ranks - 1) * (pair + (b + w) - 3 * w)}


@pytest.mark.parametrize("ranks", EVEN)
@pytest.mark.parametrize("overlapped", [2.0, 2.5])
def test_with_a_cheap_overlap_the_formula_is_the_middle_ranks_idle_time(ranks, overlapped):
    """F&B < F + B: end ranks have more work that overlaps nothing, and idle less than the formula."""
    costs = Costs(overlapped=overlapped)
    timeline = simulate(dualpipe(ranks, 4 * ranks), costs)
    formula = (ranks // 2 - 1) * (overlapped + 2 - 3)
    middle = (ranks // 2 - 1, ranks // 2)
    assert [timeline.idle[rank] for rank in middle] == [formula, formula]
    assert max(timeline.idle) == formula
    if ranks > 4:
        assert timeline.bubble < formula


@pytest.mark.parametrize("ranks", EVEN)
def test_memory_is_the_published_one(ranks):
    """P for 1F1B and ZB-H1, P + 1 for DualPipe, 2P - 1 for eager 1F1B, M for GPipe; stash at most P/2 for DualPipe."""
    microbatches = 4 * ranks

    def peaks(schedule):
        timeline = simulate(schedule)
        return max(timeline.peak_activations), max(timeline.peak_stash)

    assert peaks(gpipe(ranks, microbatches)) == (microbatches, 0)
    assert peaks(one_f_one_b(ranks, microbatches)) == (ranks, 0)
    assert peaks(eager_one_f_one_b(ranks, microbatches)) == (2 * ranks - 1, 0)
    assert peaks(interleaved_one_f_one_b(ranks, microbatches, 2)) == (3 * ranks - 1, 0)
    assert peaks(zb_h1(ranks, microbatches)) == (ranks, ranks)
    assert peaks(dualpipe(ranks, microbatches)) == (ranks + 1, ranks // 2)
    assert peaks(dualpipe_v(ranks, microbatches)) == (2 * ranks + 1, ranks)


def test_zb_h1_holds_no_more_on_any_rank():
    """All ranks put off just so many weight gradients as keep P microbatches in flight."""
    assert simulate(zb_h1(8, 32)).peak_activations == (8,) * 8


# --- lock step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "loss"),
    [
        ("dualpipe", 4, 16, 0.0),
        ("dualpipe", 16, 128, 0.045),
        ("one_f_one_b", 16, 128, 0.296),
        ("eager_one_f_one_b", 16, 128, 0.0),
        ("gpipe", 16, 128, 0.0),
    ],
)
def test_what_lock_step_loses(name, ranks, microbatches, loss):
    """DualPipe 0% at P = 4, 4.5% at P = 16; 1F1B 30%, because its F and B ticks alternate; eager 1F1B 0%."""
    schedule = make_schedule(name, ranks, microbatches)
    lost = simulate(schedule, mode="lock_step").makespan / simulate(schedule).makespan - 1
    assert lost == pytest.approx(loss, abs=5e-4)


@pytest.mark.parametrize("name", GENERATORS)
def test_ticks_meet_every_dependency(name):
    """A result is read in a later tick than it is made in, but for a W with its own B; one cell per rank and tick."""
    schedule = make_schedule(name, 4, 12)
    ticks = assign_ticks(schedule)
    at = {(r, op): ticks[r][index] for r in range(4) for index, op in schedule.ops(r)}
    for (rank, op), tick in at.items():
        for needed in schedule.needs(rank, op):
            assert at[needed] < tick or (op.kind == "W" and at[needed] == tick)
    for of_rank in ticks:
        assert list(of_rank) == sorted(set(of_rank))


def test_a_tick_costs_its_most_expensive_cell_and_a_transfer():
    """P = 2, M = 1 of 1F1B: four ticks (F; F; BW; BW), of which the second and the last send nothing."""
    costs = Costs(forward=1, input_gradient=2, weight_gradient=3, transfer=10)
    timeline = simulate(one_f_one_b(2, 1), costs, "lock_step")
    assert timeline.number_of_ticks == 4
    assert timeline.starts == ((0.0, 27.0), (11.0, 12.0))
    assert timeline.makespan == 32.0


# --- costs ----------------------------------------------------------------------------------------------------------


def test_transfers_delay_the_receiver_alone():
    """P = 2, M = 1: F, send, F, BW, send, BW; the sender itself goes on."""
    timeline = simulate(one_f_one_b(2, 1), Costs(transfer=0.5))
    assert timeline.makespan == 1 + 0.5 + 1 + 2 + 0.5 + 2
    timeline = simulate(one_f_one_b(2, 2), Costs(transfer=0.5))
    assert timeline.starts[0][:2] == (0.0, 1.0)


def test_an_overlapped_pair_costs_what_it_says():
    """F beside a full backward costs FB; beside B alone it saves as much, but never undercuts the longer part."""
    costs = Costs(overlapped=2.25)
    (pair,) = {cell for cells in dualpipe(2, 4).cells for cell in cells if len(cell) == 3 and cell[0][1:] == (0, 1)}
    assert costs.of(pair) == 2.25
    assert costs.of(pair[:2]) == 1.25
    assert Costs(forward=1.5, overlapped=2.0).of(pair[:2]) == 1.5
    assert costs.of(pair[1:]) == 2.0
    assert costs.scaled(0.5).of(pair) == 1.125


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"forward": -1}, "the cost of F is -1"),
        ({"transfer": float("nan")}, "the cost of send is nan"),
        ({"weight_gradient": float("inf")}, "the cost of W is inf"),
        ({"overlapped": 1.5}, "at least the longer of them, 2, and at most both, 3"),
        ({"overlapped": 4.0}, "at most both, 3"),
    ],
)
def test_costs_that_cannot_be(values, said):
    with pytest.raises(ConfigError, match=said):
        Costs(**values)


def test_sends_count_what_leaves_a_rank():
    """Middle ranks send each microbatch on and its gradient back, the ends one of the two; a vee's turn is free."""
    assert simulate(one_f_one_b(4, 6)).sends == (6, 12, 12, 6)
    assert simulate(dualpipe(4, 8)).sends == (8, 16, 16, 8)
    assert simulate(dualpipe_v(2, 4)).sends == (8, 8)
    assert simulate(interleaved_one_f_one_b(2, 4, 2)).sends == (12, 12)
    assert simulate(one_rank(5)).sends == (0,)


def test_gradient_accumulation_has_no_bubble():
    timeline = simulate(one_rank(5))
    assert (timeline.makespan, timeline.bubble, timeline.efficiency) == (15, 0, 1)
    assert (timeline.peak_activations, timeline.peak_stash) == ((1,), (0,))


# --- best -----------------------------------------------------------------------------------------------------------


def test_best_ranks_by_makespan_and_says_why_not():
    """Costs are of 1/P of the model: DualPipeV, whose stages are half as big, does not seem to take twice as long."""
    found = best(8, 20)
    assert [one.name for one in found] == [
        "dualpipe", "zb_h1", "dualpipe_v", "one_f_one_b", "eager_one_f_one_b", "gpipe", "interleaved_one_f_one_b",
    ]  # fmt: skip
    made = {one.name: one.timeline.makespan for one in found if one.timeline}
    assert (made["dualpipe"], made["dualpipe_v"], made["one_f_one_b"]) == (66, 67, 81)
    assert found[-1].timeline is None
    assert "multiple of 8" in found[-1].refusal


def test_best_keeps_to_the_memory_limit():
    """DualPipe's P + 1 and eager 1F1B's 2P - 1 are over a limit of 8.5; DualPipeV's 2P + 1 halves are not."""
    found = best(8, 32, memory_limit=8.5)
    assert {one.name for one in found if one.refusal is None} == {"zb_h1", "dualpipe_v", "one_f_one_b"}
    over = {one.name: one.refusal for one in found if one.refusal}
    assert over["dualpipe"] == "a rank holds 9, more than the limit of 8.5"


def test_best_counts_mirrored_weights_and_stash():
    """Bidirectional: two copies of the weights; the stash of the rank that holds most with its activations."""
    sizes = Sizes(activation=1, stash=0.5, weights=10)
    memory = {one.name: one.memory for one in best(4, 16, sizes=sizes)}
    assert memory["one_f_one_b"] == 4 + 10
    assert memory["zb_h1"] == 4 + 0.5 * 4 + 10
    assert memory["dualpipe"] == 5 + 0.5 * 2 + 20


def test_best_in_lock_step_prefers_what_keeps_step():
    """1F1B falls behind its eager form when one program runs all ranks."""
    names = [one.name for one in best(8, 32, mode="lock_step", names=("one_f_one_b", "eager_one_f_one_b", "dualpipe"))]
    assert names == ["dualpipe", "eager_one_f_one_b", "one_f_one_b"]
