"""What temporary memory holds, from the compiler's plan: arrays that share no bytes, by the names of the program."""

import os
import subprocess
import sys

from deepseek_jax.planning.buffers import Buffer, largest_buffers, read_plan
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
    found = largest_buffers(read_plan(tmp_path))
    assert found[0].size == 64 * 256 * 4, "x @ v, or its gradient"
    assert 0.9 * int(total) < sum(one.size for one in found) <= int(total)
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


def test_no_plan_is_no_buffers(tmp_path):
    assert read_plan(tmp_path) == ""
    assert largest_buffers("") == []
