"""`ops.lookup`: shards of the vocabulary add up to the whole, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import ops


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_add_up_to_the_whole(shards):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        weight, cotangent = jnp.asarray(rng.normal(size=(12, 3))), jnp.asarray(rng.normal(size=(5, 7, 3)))
        tokens = jnp.asarray(rng.integers(0, 12, (5, 7)), jnp.int32)
        size = 12 // shards

        def in_shards(weight):
            parts = [ops.lookup(weight[i : i + size], tokens, jnp.int32(i)) for i in range(0, 12, size)]
            return sum(parts)

        got, got_vjp = jax.vjp(in_shards, weight)
        wanted, wanted_vjp = jax.vjp(lambda weight: weight[tokens], weight)
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_allclose(got_vjp(cotangent)[0], wanted_vjp(cotangent)[0], rtol=1e-13)


def test_a_token_of_another_shard_gives_zeros_and_no_gradient():
    tokens = jnp.asarray([0, 3, 4, 7, 8, 11], jnp.int32)
    out, vjp = jax.vjp(lambda weight: ops.lookup(weight, tokens, 4), jnp.ones((4, 2)))
    np.testing.assert_array_equal(out[:, 0], [0, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(vjp(jnp.full((6, 2), 5.0))[0][:, 0], [5, 0, 0, 5])


@pytest.mark.parametrize("offset", [None, 0])
def test_the_gradient_of_a_frequent_token_is_summed_in_float32(offset):
    tokens = jnp.full(4096, 3, jnp.int32)
    gradient = jax.grad(lambda w: ops.lookup(w, tokens, offset).astype(jnp.float32).sum())(
        jnp.ones((8, 2), jnp.bfloat16)
    )
    np.testing.assert_array_equal(gradient[3].astype(jnp.float32), 4096)
