"""Pipeline schedules: the published order of ops, and one clear line for what cannot run."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
from even_ranks import EVEN

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.pipeline import check as checking
from deepseek_jax.parallel.pipeline.check import check
from deepseek_jax.parallel.pipeline.generators import (
    GENERATORS,
    dualpipe,
    dualpipe_v,
    gpipe,
    interleaved_one_f_one_b,
    make_schedule,
    one_f_one_b,
    one_rank,
    zb_h1,
)
from deepseek_jax.parallel.pipeline.schedule import Op, Schedule, StageMap, cell_text


def replace_cells(schedule: Schedule, rank: int, cells) -> Schedule:
    every = list(schedule.cells)
    every[rank] = tuple(cells)
    return dataclasses.replace(schedule, cells=tuple(every))


def refusal(schedule: Schedule) -> str:
    """The one line that `check` refuses a schedule with."""
    with pytest.raises(ConfigError) as caught:
        check(schedule)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- where stages live ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stages",
    [StageMap("straight", 4), StageMap("bidirectional", 4), StageMap("vee", 4), StageMap("interleaved", 4, 3)],
    ids=lambda stages: stages.kind,
)
def test_home_is_the_inverse_of_stage(stages):
    """Every (rank, slot) has one stage of one direction, and each stage of each direction has one home."""
    places = {(rank, slot) for rank in range(stages.ranks) for slot in range(stages.slots)}
    for rank, slot in places:
        assert stages.home(stages.direction(slot), stages.stage(rank, slot)) == (rank, slot)
    homes = {stages.home(d, s) for d in range(stages.directions) for s in range(stages.stages)}
    assert homes == places


def test_the_maps_are_the_papers():
    """DualPipe: stages r and P - 1 - r on rank r; DualPipeV: r and 2P - 1 - r; interleaved: r, P + r, 2P + r."""

    def on_rank_1(stages):
        return [stages.stage(1, slot) for slot in range(stages.slots)]

    assert on_rank_1(StageMap("straight", 4)) == [1]
    assert on_rank_1(StageMap("bidirectional", 4)) == [1, 2]
    assert on_rank_1(StageMap("vee", 4)) == [1, 6]
    assert on_rank_1(StageMap("interleaved", 4, 3)) == [1, 5, 9]
    assert (StageMap("vee", 4).stages, StageMap("bidirectional", 4).copies) == (8, 2)


# --- the published order --------------------------------------------------------------------------------------------


class Recorder:
    """Records the cells that the published DualPipe issues on a rank: by phase, W from a queue, no microbatches."""

    def __init__(self):
        self.cells: list[tuple[str, ...]] = []
        self.queue: list[int] = []

    def forward(self, phase: int):
        self.cells.append((f"F{phase}",))

    def backward(self, phase: int, enable_zb: bool = False):
        self.cells.append((f"B{phase}",) if enable_zb else (f"B{phase}", f"W{phase}"))
        if enable_zb:
            self.queue.append(phase)

    def both(self, forward: int, backward: int):
        self.cells.append((f"F{forward}", f"B{backward}", f"W{backward}"))

    def weight(self):
        self.cells.append((f"W{self.queue.pop(0)}",))


def published(half_ranks: int, half_rank: int, middle: bool, main: int) -> list[tuple[str, ...]]:
    """Steps 1 to 8 of section 5.1 of the fact sheet, which is how github.com/deepseek-ai/DualPipe issues its work."""
    run = Recorder()
    for _ in range((half_ranks - half_rank - 1) * 2):
        run.forward(0)
    for _ in range(half_rank + 1):
        run.forward(0)
        run.forward(1)
    for _ in range(half_ranks - half_rank - 1):
        run.backward(1, enable_zb=True)
        run.weight()
        run.forward(1)
    for i in range(main):
        if i == 0 and middle:
            run.forward(0)
            run.backward(1)
        else:
            run.both(0, 1)
        run.both(1, 0)
    for _ in range(half_ranks - half_rank - 1):
        run.backward(1)
        run.both(1, 0)
    enable_zb = False
    for i in range(half_rank + 1):
        if i == (half_rank + 1) // 2 and half_rank % 2 == 1:
            enable_zb = True
        run.backward(1, enable_zb)
        if i == (half_rank + 1) // 2 and half_rank % 2 == 0:
            enable_zb = True
        run.backward(0, enable_zb)
    for _ in range(half_ranks - half_rank - 1):
        run.weight()
        run.backward(0, enable_zb=True)
    for _ in range(half_rank + 1):
        run.weight()
    assert not run.queue
    return run.cells


def shapes(schedule: Schedule, rank: int, phase_of_slot) -> list[tuple[str, ...]]:
    return [tuple(f"{op.kind}{phase_of_slot[op.slot]}" for op in cell) for cell in schedule.cells[rank]]


def assert_microbatches_in_order(schedule: Schedule):
    """Each slot takes its microbatches in order, of each kind."""
    for rank in range(schedule.ranks):
        for slot in range(schedule.stages.slots):
            for kind in "FBW":
                taken = [op.microbatch for _, op in schedule.ops(rank) if op[:2] == (kind, slot)]
                assert taken == list(schedule.microbatches_of(slot))


@pytest.mark.parametrize("ranks", EVEN)
@pytest.mark.parametrize("more", [0, 2, 10])
def test_dualpipe_has_the_published_order(ranks, more):
    """Tech report, section 3.2.1, figure 5: every rank's ops, for every even P ≤ 16, from M = 2P on."""
    microbatches = 2 * ranks + more
    schedule = check(dualpipe(ranks, microbatches))
    for rank in range(ranks):
        half_rank = min(rank, ranks - 1 - rank)
        second_half = rank >= ranks // 2
        main = microbatches // 2 - ranks + half_rank + 1
        expected = published(ranks // 2, half_rank, half_rank == ranks // 2 - 1, main)
        assert shapes(schedule, rank, (1, 0) if second_half else (0, 1)) == expected
    assert_microbatches_in_order(schedule)


@pytest.mark.parametrize("ranks", [1, *EVEN, 5])
@pytest.mark.parametrize("more", [0, 1, 8])
def test_dualpipe_v_has_the_published_order(ranks, more):
    """The same eight steps with P for P/2, r for h, and M - 2P + r + 1 pairs in step 4; odd P and M are no matter."""
    microbatches = 2 * ranks + more
    schedule = check(dualpipe_v(ranks, microbatches))
    for rank in range(ranks):
        expected = published(ranks, rank, rank == ranks - 1, microbatches - 2 * ranks + rank + 1)
        assert shapes(schedule, rank, (0, 1)) == expected
    assert_microbatches_in_order(schedule)


def test_the_papers_figure():
    """P = 8, M = 20: the first rank begins with seven forwards of direction 0, then meets direction 1's first."""
    schedule = dualpipe(8, 20)
    assert " ".join(map(cell_text, schedule.cells[0][:14])) == (
        "F0.0 F0.1 F0.2 F0.3 F0.4 F0.5 F0.6 F1.10 B1.10 W1.10 F1.11 B1.11 W1.11 F1.12"
    )
    assert [cell_text(cell) for cell in schedule.cells[3][8:13]] == [
        "F0.4", "BW1.10", "F1.14+BW0.0", "F0.5+BW1.11", "F1.15+BW0.1",
    ]  # fmt: skip
    steps = [len(cells) for cells in schedule.cells]
    assert steps == [s1 + 2 * s2 + 3 * s3 + 2 * s4 + 2 * s5 + 2 * s6 + 2 * s7 + s8 + (h == 3) * 1
                     for h, (s1, s2, s3, s4, s5, s6, s7, s8) in enumerate(
                         [(6, 1, 3, 3, 3, 1, 3, 1), (4, 2, 2, 4, 2, 2, 2, 2),
                          (2, 3, 1, 5, 1, 3, 1, 3), (0, 4, 0, 6, 0, 4, 0, 4)])] + steps[3::-1]  # fmt: skip


def test_one_f_one_b_is_pipedreams():
    """P - 1 - r forwards ahead, then forward and full backward in turn."""
    schedule = one_f_one_b(4, 6)
    assert " ".join(map(cell_text, schedule.cells[2])) == (
        "F0.0 F0.1 BW0.0 F0.2 BW0.1 F0.3 BW0.2 F0.4 BW0.3 F0.5 BW0.4 BW0.5"
    )


def test_zb_h1_is_the_handcrafted_one():
    """Figure 3 of the zero-bubble paper: rank r puts its weight gradients off by r backwards."""
    schedule = zb_h1(4, 8)
    for rank in range(4):
        place = {op: index for index, op in schedule.ops(rank)}
        for m in range(8 - rank):
            behind = [op for op in place if op.kind == "B" and place[Op("B", 0, m)] < place[op] <= place[Op("W", 0, m)]]
            assert len(behind) == rank


def test_interleaved_takes_p_microbatches_through_each_chunk():
    """Section 2.2 of Narayanan et al.: chunk 0 of P microbatches, chunk 1 of the same, then the next P."""
    forwards = [op for _, op in interleaved_one_f_one_b(2, 4, chunks=2).ops(0) if op.kind == "F"]
    assert [(op.slot, op.microbatch) for op in forwards] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3),
    ]  # fmt: skip


# --- check ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("ranks", EVEN)
def test_every_generator_passes(name, ranks):
    """Every op once, every dependency met, no deadlock, first in first out, for every even P ≤ 16."""
    for microbatches in (2 * ranks, 4 * ranks):
        schedule = check(make_schedule(name, ranks, microbatches))
        assert (schedule.name, schedule.ranks, schedule.microbatches) == (name, ranks, microbatches)


@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b", "eager_one_f_one_b", "zb_h1"])
@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 5])
def test_straight_schedules_take_any_number_of_ranks_and_microbatches(name, ranks, microbatches):
    check(make_schedule(name, ranks, microbatches))


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
def test_interleaved_with_any_number_of_chunks(chunks):
    for ranks in (1, 2, 4):
        check(make_schedule("interleaved_one_f_one_b", ranks, 3 * ranks, chunks=chunks))


def test_a_missing_op_is_named():
    schedule = one_f_one_b(4, 6)
    cells = [cell for cell in schedule.cells[2] if cell != (Op("F", 0, 3),)]
    message = refusal(replace_cells(schedule, 2, cells))
    assert "rank 2: F0.3 (forward of microbatch 3) is in none of its 11 cells" in message


def test_a_missing_weight_gradient_is_named():
    schedule = one_f_one_b(4, 6)
    cells = [cell[:1] if cell[0] == Op("B", 0, 5) else cell for cell in schedule.cells[1]]
    assert "rank 1: W0.5 (weight gradient of microbatch 5)" in refusal(replace_cells(schedule, 1, cells))


def test_a_doubled_op_is_named():
    schedule = one_f_one_b(4, 6)
    cells = [*schedule.cells[1], (Op("F", 0, 3),)]
    message = refusal(replace_cells(schedule, 1, cells))
    assert "rank 1, cell 12 (F0.3): F0.3 is there twice, first in cell 4" in message


def test_a_deadlock_names_who_waits_for_whom():
    """Rank 0 wants a backward before its second forward, rank 1 the second forward before any backward."""
    schedule = gpipe(2, 2)
    f, b, w = ([Op(kind, 0, m) for m in (0, 1)] for kind in "FBW")
    first = [(f[0],), (b[0], w[0]), (f[1],), (b[1], w[1])]
    message = refusal(replace_cells(schedule, 0, first))
    assert message.endswith(
        "deadlocks: rank 0, cell 1: B0.0 waits for B0.0 of rank 1; rank 1, cell 1: F0.1 waits for F0.1 of rank 0"
    )


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        # Rank 1 makes a gradient before the output that it is of.
        (one_f_one_b(2, 2), "rank 1, cell 0 (BW0.0): B0.0 needs F0.0 before it, which comes only in cell 1"),
        # Rank 0 makes microbatch 0 first, rank 1 uses 1 first: a channel that keeps order would give it the wrong one.
        (gpipe(2, 2), "rank 1, cell 0 (F0.1): F0.1 overtakes: rank 0 made its input after that of microbatch 0"),
    ],
    ids=["a backward before its forward", "messages that overtake"],
)
def test_what_comes_too_early_is_named(schedule, said):
    """Rank 1's first two cells, swapped."""
    first, second, *rest = schedule.cells[1]
    assert said in refusal(replace_cells(schedule, 1, [second, first, *rest]))


def test_a_forward_and_its_own_backward_cannot_share_a_cell():
    schedule = one_rank(1)
    message = refusal(replace_cells(schedule, 0, [(Op("F", 0, 0), Op("B", 0, 0), Op("W", 0, 0))]))
    assert "rank 0, cell 0 (F0.0+BW0.0): B0.0 needs F0.0 before it, which comes in the same cell" in message


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ((), "rank 0, cell 8 is empty"),
        ((Op("F", 1, 0),), "F1.0 has slot 1, a rank has slots 0 to 0"),
        ((Op("F", 0, 9),), "F0.9 has microbatch 9, slot 0 works on 0 to 3"),
        ((Op("F", 0, 0), Op("F", 0, 1)), "a cell has at most one F"),
    ],
)
def test_cells_that_cannot_be(cell, said):
    schedule = gpipe(2, 4)
    assert said in refusal(replace_cells(schedule, 0, [*schedule.cells[0], cell]))


def test_a_direction_keeps_to_its_own_microbatches():
    """Of 16 microbatches the second direction has 8 to 15."""
    schedule = dualpipe(4, 16)
    cells = [(Op("F", 1, 3),), *schedule.cells[0]]
    assert "F1.3 has microbatch 3, slot 1 works on 8 to 15" in refusal(replace_cells(schedule, 0, cells))


# --- what a generator refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "said"),
    [
        ("dualpipe", 3, 12, "dualpipe needs an even number of ranks, not 3: use 2 or 4"),
        ("dualpipe", 1, 12, "dualpipe needs an even number of ranks, not 1: use 2"),
        ("dualpipe", 8, 14, "dualpipe over 8 ranks needs at least 16 microbatches (8 each way), not 14"),
        ("dualpipe", 4, 11, "two directions need an even number of microbatches, not 11: use 12"),
        ("dualpipe_v", 8, 15, "dualpipe_v over 8 ranks needs at least 16 microbatches, not 15"),
        ("interleaved_one_f_one_b", 4, 10, "a multiple of 4 microbatches, not 10: use 8 or 12"),
        ("interleaved_one_f_one_b", 4, 3, "a multiple of 4 microbatches, not 3: use 4"),
        ("gpipe", 0, 4, "at least one rank, not 0"),
        ("gpipe", 2, 0, "at least one microbatch, not 0"),
        ("one_rank", 2, 4, "one_rank runs on one pipeline rank, not on 2"),
        ("dualpip", 2, 4, "there is no schedule 'dualpip'; did you mean dualpipe?"),
        ("xyz", 2, 4, "there are one_rank, gpipe"),
    ],
)
def test_one_line_says_what_would_work(name, ranks, microbatches, said):
    with pytest.raises(ConfigError) as caught:
        make_schedule(name, ranks, microbatches)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_said_to_work_works():
    """The least number of microbatches that a message names is accepted, and one fewer pair is not."""
    for ranks in EVEN:
        check(dualpipe(ranks, 2 * ranks))
        check(dualpipe_v(ranks, 2 * ranks))
        with pytest.raises(ConfigError):
            dualpipe(ranks, 2 * ranks - 2)


def test_chunks_only_where_there_are_any():
    with pytest.raises(ConfigError, match="chunks belong to interleaved_one_f_one_b, not to gpipe"):
        make_schedule("gpipe", 2, 4, chunks=2)


def test_schedules_are_plain_data():
    """The modules of schedules import no jax: they can be printed, checked and drawn on a machine without it."""
    folder = Path(checking.__file__).parent
    for name in ("schedule", "generators", "check", "text", "simulate", "steady", "tables", "draw", "choice"):
        tree = ast.parse((folder / f"{name}.py").read_text())
        modules = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert not {module for module in modules if module.split(".")[0] == "jax"}, name
        assert "deepseek_jax.parallel.pipeline.executor" not in modules, name
