"""The plain layers: what an embedding's gradient is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.model.layers import Embedding


def embedding_gradient(tokens, dtype):
    graphdef = nnx.graphdef(Embedding(8, 4, init_std=0.1))

    def loss(weight):
        return nnx.merge(graphdef, {"weight": weight})(tokens).astype(jnp.float32).sum()

    return jax.grad(loss)(jnp.ones((8, 4), dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_frequent_token_keeps_its_whole_gradient(dtype):
    tokens = jnp.asarray([3] * 4096 + [5, 5, 7]).reshape(1, -1)
    gradient = embedding_gradient(tokens, jnp.dtype(dtype))
    assert gradient.dtype == jnp.dtype(dtype)
    expected = np.zeros((8, 4))
    expected[3], expected[5], expected[7] = 4096, 2, 1
    np.testing.assert_array_equal(np.asarray(gradient, np.float64), expected)


def test_a_token_beyond_the_vocabulary_is_the_last_row_in_both_directions():
    gradient = embedding_gradient(jnp.asarray([[9, 0]]), jnp.float32)
    np.testing.assert_array_equal(gradient[:, 0], [1, 0, 0, 0, 0, 0, 0, 1])
