"""What temporary memory holds, from the compiler's plan: arrays that share no bytes, by the names of the program."""

import os
import subprocess
import sys

from deepseek_jax.planning.buffers import Buffer, largest_buffers, lost_between, read_plan
from deepseek_jax.planning.compiled import read_program

COMPILE = """
import jax, jax.numpy as jnp

def loss(x, w, v):
    for _ in range(3):
        x = jnp.tanh(x @ w)
    return jnp.square(x @ v).sum()

shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 64), (64, 64), (64, 256))]
compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
print(compiled.memory_analysis().temp_size_in_bytes)
print(compiled.as_text())
"""


def test_buffers_of_a_program_have_its_names_and_share_no_bytes(tmp_path):
    environment = os.environ | {"XLA_FLAGS": f"--xla_dump_to={tmp_path}", "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    total, _, text = done.stdout.partition("\n")
    made = {one.name: one for of in read_program(text).computations.values() for one in of.instructions}
    plan, ranges = read_plan(tmp_path)
    found = largest_buffers(plan)
    assert found[0].size == 64 * 256 * 4, "x @ v, or its gradient"
    assert 0.9 * int(total) < sum(one.size for one in found) <= int(total)
    lost = lost_between(plan, ranges)
    assert lost is not None
    assert 0 <= lost < 0.1 * int(total)
    for i, one in enumerate(found):
        assert made[one.name].bytes == one.size
        assert all(one.end <= other.offset or other.end <= one.offset for other in found[:i])


PLAN = """\
BufferAssignment:
allocation 0: size 4096, output shape is |f32[32,32]|, maybe-live-out:
 value: <83 result @0> (size=4096,offset=0): f32[32,32]{1,0}
allocation 1: size 8192, parameter 0, shape |f32[64,32]| at ShapeIndex {}:
 value: <80 x.1 @0> (size=8192,offset=0): f32[64,32]{1,0}
allocation 2: size 3000, preallocated-temp:
 value: <1 small @0> (size=1000,offset=0): f32[250]{0}
 value: <2 large{1} @0> (size=2000,offset=500): bf16[10,100]{1,0:T(8,128)}
 value: <3 last.3 @0> (size=500,offset=2500): f8e4m3fn[500]{0}
 value: <4 first @0> (size=400,offset=0): f32[100]{0}

Total bytes used: 15000
"""


def test_of_those_that_share_bytes_the_largest_is_named():
    """`small` lies where `large` does at another time; arguments and results are not temporary."""
    wanted = [
        Buffer("large", "bf16[10,100]", 500, 2000),
        Buffer("last.3", "f8e4m3fn[500]", 2500, 500),
        Buffer("first", "f32[100]", 0, 400),
    ]
    assert largest_buffers(PLAN) == wanted
    assert largest_buffers(PLAN, 1) == wanted[:1]
    assert wanted[0].end == 2500


RANGES = """\
HloLiveRange (max 9):
  InstructionSequence:
    0:x.1
  BufferLiveRange:
    x.1{}:0-9
    small{}:1-3
    first{}:4-6
    large{1}:4-7
    last.3{}:7-8
  Live ranges at 7 (peak):
    x.1{}: 8192 bytes (cumulative: 8192 bytes)
"""


def test_what_is_lost_is_what_arrays_never_have_at_once():
    """2000 and 500 of 3000 bytes at instruction 7; arguments lie elsewhere, and two names of one place count once."""
    assert lost_between(PLAN, RANGES) == 500
    assert lost_between(PLAN, RANGES.replace("last.3{}:7-8", "last.3{}:8-8")) == 600, "400 and 2000"
    named_twice = PLAN.replace(" value: <3 ", " value: <9 small.1 @0> (size=500,offset=2500): f32[125]{0}\n value: <3 ")
    assert lost_between(named_twice, RANGES.replace("small{}", "small.1{}:7-7\n    small{}")) == 500


def test_live_ranges_are_those_of_the_largest_program(tmp_path):
    for name, plan in (("a", PLAN), ("b", "BufferAssignment:\n")):
        (tmp_path / f"{name}.sm_9.0_gpu_after_optimizations-buffer-assignment.txt").write_text(plan)
    (tmp_path / "a.sm_9.0_gpu_after_optimizations-live-range.txt").write_text(RANGES)
    assert read_plan(tmp_path) == (PLAN, RANGES)


def test_no_plan_is_no_buffers(tmp_path):
    assert read_plan(tmp_path) == ("", "")
    assert largest_buffers("") == []
    assert lost_between("", "") is None
