"""What temporary memory holds, from the compiler's plan: arrays that share no bytes, by the names of the program."""

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.planning.buffers import Buffer, largest_buffers
from deepseek_jax.planning.compiled import read_program


def compiled():
    def loss(x, w, v):
        for _ in range(3):
            x = jnp.tanh(x @ w)
        return jnp.square(x @ v).sum()

    shapes = ((64, 64), (64, 64), (64, 256))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arguments).compile()


def test_buffers_share_no_bytes_and_add_up_to_no_more_than_the_memory():
    program = compiled()
    total = program.memory_analysis().temp_size_in_bytes
    found = largest_buffers(program)
    assert max(one.end for one in found) <= total
    for i, one in enumerate(found):
        assert all(one.end <= other.offset or other.end <= one.offset for other in found[:i])
    assert sum(one.size for one in found) > 0.9 * total
    assert [one.size for one in found] == sorted((one.size for one in found), reverse=True)


def test_they_have_the_names_and_sizes_of_instructions():
    program = compiled()
    computations = read_program(program.as_text()).computations.values()
    sizes = {one.name: one.bytes for computation in computations for one in computation.instructions}
    found = largest_buffers(program)
    assert found[0].size == 64 * 256 * 4, "x @ v, or its gradient"
    for one in found:
        assert sizes[one.name] == one.size
    assert any("dot_general" in one.op_name for one in found)
    assert largest_buffers(program, 1) == found[:1]


def test_a_compiler_that_says_nothing_is_named():
    class Silent:
        def memory_analysis(self):
            return object()

    with pytest.raises(ValueError, match="does not say where it places arrays"):
        largest_buffers(Silent())


def test_an_end():
    assert Buffer("x", "", 8, 4).end == 12
