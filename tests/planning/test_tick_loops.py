"""What a pipeline's loops over ticks hold: copies, conditionals, and which exchanges need each other."""

import pytest

from deepseek_jax.planning.compiled import read_program
from deepseek_jax.planning.overlap import Replay
from deepseek_jax.planning.tick_loops import chains, exchanges_that_need, tick_loops

SHAPE = "f32[600,600]{1,0}"
PAIR = f"({SHAPE}, {SHAPE})"
FORWARD = 'metadata={op_name="jit(step)/while/body/jvp()/ffn/dispatch/all_to_all"}'
BACKWARD = 'metadata={op_name="jit(step)/while/body/transpose(jvp())/ffn/combine/all_to_all"}'


def step(layers: str, *, ticks: str = "", carry: str = PAIR) -> str:
    """Six ticks of two layers each, which carry (what forward passes read, what backward ones do)."""
    return f"""\
HloModule m

%layer (p: {PAIR}) -> {PAIR} {{
  %p = {PAIR} parameter(0)
  %x = {SHAPE} get-tuple-element(%p), index=0
  %d = {SHAPE} get-tuple-element(%p), index=1
{layers}}}

%true (t: {SHAPE}) -> {SHAPE} {{
  %t = {SHAPE} parameter(0)
  ROOT %dense = {SHAPE} negate(%t)
}}

%false (f: {SHAPE}) -> {SHAPE} {{
  ROOT %f = {SHAPE} parameter(0)
}}

%always (c: {PAIR}) -> pred[] {{
  %c = {PAIR} parameter(0)
  ROOT %yes = pred[] constant(true)
}}

%tick (q: {carry}) -> {carry} {{
  %q = {carry} parameter(0)
{ticks}  ROOT %w = {PAIR} while(%q), condition=%always, body=%layer, backend_config={{"known_trip_count":{{"n":"2"}}}}
}}

ENTRY %main (a: {carry}) -> {carry} {{
  %a = {carry} parameter(0)
  ROOT %ticks = {carry} while(%a), condition=%always, body=%tick, backend_config={{"known_trip_count":{{"n":"6"}}}}
}}
"""


INDEPENDENT = f"""\
  %f = {SHAPE} all-to-all(%x), replica_groups={{{{0,1}}}}, {FORWARD}
  %b = {SHAPE} all-to-all(%d), replica_groups={{{{0,1}}}}, {BACKWARD}
  ROOT %r = {PAIR} tuple(%f, %b)
"""
IN_ONE_TURN = INDEPENDENT.replace("all-to-all(%d)", "all-to-all(%f)")
ACROSS_TURNS = INDEPENDENT.replace("tuple(%f, %b)", "tuple(%f, %f)")


@pytest.mark.parametrize(
    ("layers", "needing"), [(INDEPENDENT, {"f"}), (IN_ONE_TURN, {"f", "b"}), (ACROSS_TURNS, {"f", "b"})]
)
def test_exchanges_that_need_another_are_found_through_loops(layers, needing):
    """The next layer's forward exchange needs this one's; a backward one only where its data comes from there."""
    assert exchanges_that_need(read_program(step(layers)), "tick", {"f"}) == needing


@pytest.mark.parametrize(("layers", "sizes"), [(INDEPENDENT, (1, 1)), (IN_ONE_TURN, (2,)), (ACROSS_TURNS, (2,))])
def test_independent_exchanges_are_counted_in_groups(layers, sizes):
    """What a scheduler can lay beside each other: groups that need nothing of each other in any number of layers."""
    program = read_program(step(layers))
    (inner,) = [loop for loop in program.loops if program.body(loop) == "layer"]
    assert chains(program, inner) == sizes


def test_a_loop_over_ticks_is_described():
    copy = f"  %g = {SHAPE} get-tuple-element(%q), index=0\n  %copy.7 = {SHAPE} copy(%g)\n"
    branch = f"""\
  %p0 = pred[] constant(true)
  %cond = {SHAPE} conditional(%p0, %copy.7, %copy.7), true_computation=%true, false_computation=%false, \
metadata={{op_name="jit(step)/while/body/jvp()/dense_layer/cond"}}
"""
    program = read_program(step(INDEPENDENT, ticks=copy + branch))
    (loop,) = tick_loops(program, {600}, Replay(program))
    assert (loop.turns, loop.exchanges, loop.sums) == (6, 2, 0)
    assert [(layers.turns, layers.chains) for layers in loop.layer_loops] == [(2, (1, 1))]
    assert (loop.conditionals, loop.around_exchanges) == ({"dense_layer": 1}, 0)
    assert loop.ring_copies == ("copy.7",)
    assert loop.span.exposed == pytest.approx(loop.span.exchange)
    assert loop.span.exchange > 0


def test_work_that_a_table_may_leave_out_counts_as_a_branch_and_once():
    """A loop of one turn or none around an exchange keeps it from running beside anything else."""
    text = step(INDEPENDENT).replace(', backend_config={"known_trip_count":{"n":"2"}}', "")
    program = read_program(text)
    (loop,) = tick_loops(program, set(), Replay(program))
    assert (loop.around_exchanges, loop.layer_loops) == (1, ())
    twice = read_program(step(INDEPENDENT))
    (other,) = tick_loops(twice, set(), Replay(twice))
    assert other.span.exchange == pytest.approx(2 * loop.span.exchange)
    assert other.around_exchanges == 0
