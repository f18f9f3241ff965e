"""`ops.linear` and its separate gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import ops


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (5,)])
def test_linear_and_its_gradients_equal_plain_products(shape):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, w = jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=(5, 4)))
        cotangent = jnp.asarray(rng.normal(size=(*shape[:-1], 4)))

        def through(product):
            return lambda x, w: (product(x, w) * cotangent).sum()

        np.testing.assert_allclose(ops.linear(x, w), x @ w, rtol=1e-14)
        ours = jax.grad(through(ops.linear), (0, 1))(x, w)
        expected = jax.grad(through(jnp.matmul), (0, 1))(x, w)
        for a, b in zip(ours, expected, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-13)


def test_bfloat16_stays_bfloat16():
    x, w = jnp.ones((3, 5), jnp.bfloat16), jnp.ones((5, 4), jnp.bfloat16)
    dx, dw = jax.grad(lambda x, w: ops.linear(x, w).sum().astype(jnp.float32), (0, 1))(x, w)
    assert (ops.linear(x, w).dtype, dx.dtype, dw.dtype) == (jnp.bfloat16,) * 3


def test_highest_precision_reaches_the_product_and_both_gradients():
    x, w = jnp.ones((3, 5)), jnp.ones((5, 4))

    def loss(x, w):
        return ops.linear(x, w, precision=jax.lax.Precision.HIGHEST).sum()

    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, w).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert all("[HIGHEST, HIGHEST]" in line for line in products)
