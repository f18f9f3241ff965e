"""FLOPs that ran, counted from a profile: every product times how often it ran, conditionals and loops included."""

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.planning.compiled import read_program
from tools.bench.trace import read_trace


def test_products_count_as_often_as_they_ran(tmp_path):
    """Of 10 turns 3 take the branch with a product more, which no count from the program alone could know."""

    def function(x, w, which):
        def turn(x, more):
            y = jnp.tanh(x @ w)
            return lax.cond(more, lambda y: jnp.tanh(y @ w), lambda y: y, y), None

        return lax.scan(turn, x, which)[0]

    x, w, which = jnp.ones((64, 128)), jnp.ones((128, 128)) / 128, jnp.arange(10) < 3
    compiled = jax.jit(function).lower(x, w, which).compile()
    compiled(x, w, which).block_until_ready()
    with jax.profiler.trace(tmp_path):
        compiled(x, w, which).block_until_ready()
    found = read_trace(tmp_path, read_program(compiled.as_text()))
    assert found["flops"] == 13 * 2 * 64 * 128 * 128
    assert found["seconds"]["products"] > 0
