"""A compiled program's schedule replayed: what is exposed of each exchange, and what links carry it."""

import pytest

from deepseek_jax.planning.compiled import read_program
from deepseek_jax.planning.overlap import Replay, Speeds, replica_group

SPEEDS = Speeds(flops=1e12, efficiency=1, memory=1e18, within_node=1e9, between_nodes=1e8, devices_per_node=2)
DOT = "f32[100,100]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
"""2 us at 1e12 FLOPs per second."""
MOVE = "f32[100,100]{1,0} all-to-all"


def program(body: str) -> Replay:
    head = "HloModule m\n\nENTRY %main (x: f32[100,100]) -> f32[100,100] {\n  %x = f32[100,100]{1,0} parameter(0)\n"
    text = f"{head}{body}}}\n"
    return Replay(read_program(text), SPEEDS)


def groups(text: str) -> str:
    return f"replica_groups={text}, dimensions={{0}}"


def test_what_waits_at_once_is_exposed_whole():
    """40,000 bytes, half of them to the other device of the node: 20 us."""
    replay = program(
        f"  %go = ((f32[100,100]), f32[100,100]) all-to-all-start(%x), {groups('{{0,1}}')}\n"
        f"  %end = f32[100,100]{{1,0}} all-to-all-done(%go)\n  ROOT %y = {DOT}\n"
    )
    assert replay.span("main") == pytest.approx((22e-6, 2e-6, 20e-6, 20e-6))


def test_compute_between_start_and_end_hides_an_exchange():
    replay = program(
        f"  %go = ((f32[100,100]), f32[100,100]) all-to-all-start(%x), {groups('{{0,1}}')}\n"
        f"  %a = {DOT}\n  %b = {DOT}\n  %c = {DOT}\n  %end = f32[100,100]{{1,0}} all-to-all-done(%go)\n"
        "  ROOT %y = f32[100,100]{1,0} bitcast(%end)\n"
    )
    assert replay.span("main") == pytest.approx((20e-6, 6e-6, 20e-6, 14e-6))


def test_an_exchange_that_does_not_start_apart_from_its_end_is_exposed():
    replay = program(f"  %a = {DOT}\n  ROOT %y = {MOVE}(%a), {groups('{{0,1}}')}\n")
    assert replay.span("main") == pytest.approx((22e-6, 2e-6, 20e-6, 20e-6))


def test_exchanges_share_a_link_but_not_both_kinds():
    """Two over NVLink, 20 us each, follow each other; one over the network, 200 us, runs beside them."""
    start = "((f32[100,100]), f32[100,100]) all-to-all-start(%x)"
    done = "f32[100,100]{1,0} all-to-all-done"

    def replay(first: str, second: str) -> float:
        lines = f"  %g = {start}, {groups(first)}\n  %h = {start}, {groups(second)}\n"
        return program(f"{lines}  %i = {done}(%g)\n  ROOT %j = {done}(%h)\n").span("main").total

    assert replay("{{0,1}}", "{{0,1}}") == pytest.approx(40e-6)
    assert replay("{{0,1}}", "{{0,2}}") == pytest.approx(200e-6)


LOOP = """\
HloModule m

%body (p: (f32[96,8], f32[8,8])) -> (f32[96,8], f32[8,8]) {
  %p = (f32[96,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %rows = f32[96,8]{1,0} get-tuple-element(%p), index=0
  %w = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %block = f32[16,8]{1,0} dynamic-slice(%rows), dynamic_slice_sizes={16,8}
  %y = f32[16,8]{1,0} dot(%block, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %new = f32[96,8]{1,0} dynamic-update-slice(%rows, %y)
  ROOT %t = (f32[96,8]{1,0}, f32[8,8]{1,0}) tuple(%new, %w)
}

%more (q: (f32[96,8], f32[8,8])) -> pred[] {
  ROOT %q = pred[] parameter(0)
}

ENTRY %main (a: (f32[96,8], f32[8,8])) -> (f32[96,8], f32[8,8]) {
  %a = (f32[96,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  ROOT %loop = (f32[96,8]{1,0}, f32[8,8]{1,0}) while(%a), condition=%more, body=%body
}
"""


def test_a_loop_over_blocks_of_rows_goes_as_far_as_they_are_filled():
    """96 rows in blocks of 16, two thirds of them filled: 4 turns of 2 * 16 * 8 * 8 FLOPs."""
    span = Replay(read_program(LOOP), SPEEDS).span("main")
    assert span.total == pytest.approx(4 * 2 * 16 * 8 * 8 / 1e12, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,8,16},{1,9,17}}, x", (0, 8, 16)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("channel_id=1", None),
    ],
)
def test_groups_of_devices_are_read_in_both_notations(text, group):
    assert replica_group(text) == group
