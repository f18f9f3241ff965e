"""What is read back from a compiled program: FLOPs by trip counts, copies, collectives, and what needs what."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from deepseek_jax.planning.compiled import (
    Array,
    collective_bytes,
    copies_of,
    count_collectives,
    flops,
    read_program,
)


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return read_program(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_loop_counts_as_often_as_it_turns():
    """FLOPs: 2 m n k for each of 5 turns; what a fusion or a call holds is found."""

    def function(x, w):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]

    program = compiled(function, (8, 16), (16, 16))
    assert flops(program) == 5 * 2 * 8 * 16 * 16
    assert [loop.trips for loop in program.loops] == [5]


def test_branches_count_by_their_shares():
    def function(p, x):
        return lax.cond(p.sum() > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    program = compiled(function, (1,), (16, 16))
    assert flops(program) == 3 * 2 * 16**3
    # jax's false branch comes first.
    assert flops(program, shares=lambda _: [1.0, 0.0]) + flops(program, shares=lambda _: [0.0, 1.0]) == 3 * 2 * 16**3


PROGRAM = """\
HloModule jit_step, is_scheduled=true

%inner (p: bf16[8,16]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %copy.2 = bf16[8,16]{1,0} copy(%p)
}

%body (arg: (s32[], f32[4,8], /*index=2*/bf16[8,16])) -> (s32[], f32[4,8], bf16[8,16]) {
  %arg = (s32[], f32[4,8]{1,0}, /*index=2*/bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %ring = f32[4,8]{1,0} get-tuple-element(%arg), index=1
  %copy.1 = f32[4,8]{1,0} copy(%ring), metadata={op_name="jit(step)/while/body/add"}
  %x = bf16[8,16]{1,0} get-tuple-element(%arg), index=2
  %y = bf16[8,16]{1,0} fusion(%x), kind=kLoop, calls=%inner
  %go = ((bf16[8,16]{1,0}), bf16[8,16]{1,0}) all-to-all-start(%y), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  %z = bf16[8,16]{1,0} all-to-all-done(%go)
  %sum = f32[4,8]{1,0} all-reduce-start(%copy.1), channel_id=2, replica_groups={{0,1}}, to_apply=%add
  %summed = f32[4,8]{1,0} all-reduce-done(%sum)
  ROOT %out = (s32[], f32[4,8]{1,0}, bf16[8,16]{1,0}) tuple(%i, %copy.1, %z)
}

%test (arg: (s32[], f32[4,8], bf16[8,16])) -> pred[] {
  %arg.1 = (s32[], f32[4,8]{1,0}, bf16[8,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%i.1, %i.1), direction=LT
}

ENTRY %main (a: (s32[], f32[4,8], bf16[8,16])) -> (s32[], f32[4,8], bf16[8,16]) {
  %a = (s32[], f32[4,8]{1,0}, bf16[8,16]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[4,8]{1,0}, bf16[8,16]{1,0}) while(%a), condition=%test, body=%body, \
backend_config={"known_trip_count":{"n":"7"}}
}
"""


def test_shapes_calls_and_trip_counts_are_read():
    program = read_program(PROGRAM)
    (loop,) = program.loops
    assert (program.entry, loop.trips, program.body(loop)) == ("main", 7, "body")
    assert loop.arrays == (Array("s32", ()), Array("f32", (4, 8)), Array("bf16", (8, 16)))
    assert loop.bytes == 4 + 4 * 32 + 2 * 128
    assert program.instructions == 2 + 11 + 3 + 2
    assert program.computations["body"].by_name["copy.1"].op_name == "jit(step)/while/body/add"


def test_copies_of_a_shape_are_found_inside_fusions_too():
    program = read_program(PROGRAM)
    assert [one.name for one in copies_of(program, "body", {Array("f32", (4, 8))})] == ["copy.1"]
    assert [one.name for one in copies_of(program, "body", {Array("bf16", (8, 16))})] == ["copy.2"]
    assert not copies_of(program, "body", {Array("f32", (8, 4))})


def test_a_collective_that_starts_and_ends_counts_once():
    assert count_collectives(read_program(PROGRAM)) == {"all-to-all": 1, "all-reduce": 1}


def test_bytes_of_collectives_count_as_often_as_their_loop_turns():
    """In each of 7 turns 256 bytes and 128: a start's shape may name operands as well, or not."""
    assert collective_bytes(read_program(PROGRAM)) == {"all-to-all": 7 * 256.0, "all-reduce": 7 * 128.0}


def test_reach_is_what_needs_a_result():
    """F's and B's exchanges are independent where neither reaches the other."""
    body = read_program(PROGRAM).computations["body"]
    assert body.reach(body.by_name["y"]) == {"go", "z", "out"}
    assert body.reach(body.by_name["copy.1"]) == {"out", "sum", "summed"}


def test_text_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        read_program("module @jit_step {}\n")
