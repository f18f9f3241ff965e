"""`block_scaled_matmul`: Fprop, Dgrad and Wgrad in FP8 (section 3.3), as exact as float32 sums are, at any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_oracle import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.block_scaled_matmul import block_scaled_matmul
from pallas_kernels.quantize import Quantized, quantize, requantize

ROW, COLUMN, BLOCK = (1, 128), (128, 1), (128, 128)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def exact(q):
    return dequantize(np.asarray(q.codes), np.asarray(q.scales), q.tile)


def distance(got, wanted):
    return np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted)


def cosine_difference(got, wanted):
    a, b = np.asarray(got, np.float64).ravel(), np.asarray(wanted, np.float64).ravel()
    return 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


PRODUCTS = {
    "Fprop": lambda a, b: (quantize(a, ROW), quantize(b, BLOCK)),
    "Dgrad": lambda a, b: (quantize(a, ROW), quantize(b.T, BLOCK).T),
    "Wgrad": lambda a, b: (quantize(a.T, COLUMN).T, quantize(b, COLUMN)),
    "Wgrad, re-tiled": lambda a, b: (requantize(quantize(a.T, ROW), COLUMN).T, quantize(b, COLUMN)),
    "one scale": lambda a, b: (quantize(a, None), quantize(b, None)),
    "gradients in blocks": lambda a, b: (quantize(a, BLOCK), quantize(b, BLOCK)),
    "E5M2 gradients": lambda a, b: (quantize(a, ROW, dtype=jnp.float8_e5m2), quantize(b, BLOCK)),
}


@pytest.mark.parametrize(
    ("product", "bound"), [("Fprop", 1e-3), ("Dgrad", 1e-3), ("Wgrad", 1e-3), ("Wgrad, re-tiled", 1.5e-3)]
)
def test_products_point_where_the_unquantised_ones_do(product, bound):
    a, b = normal(0, 256, 384), normal(1, 384, 320)
    got = block_scaled_matmul(*PRODUCTS[product](a, b), out_dtype=jnp.float32)
    assert 1e-4 < cosine_difference(got, np.asarray(a, np.float64) @ np.asarray(b)) < bound


@pytest.mark.parametrize("implementation", ["dequantize", "reference"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_it_is_the_product_of_the_dequantised_matrices(product, implementation):
    """Within 1e-6 of the norm of each row, with odd sizes everywhere."""
    a, b = PRODUCTS[product](normal(0, 131, 300), normal(1, 300, 257))
    got = block_scaled_matmul(a, b, out_dtype=jnp.float32, implementation=implementation)
    wanted = exact(a) @ exact(b)
    error = np.linalg.norm(np.asarray(got, np.float64) - wanted, axis=1)
    assert (error <= 1e-6 * np.linalg.norm(wanted, axis=1)).all()


@settings(max_examples=12)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(1, 1, 1), (5, 129, 128), (7, 640, 200)]),
    st.sampled_from(["Fprop", "Wgrad"]),
)
def test_dequantizing_first_is_the_reference_at_any_size(seed, sizes, product):
    m, k, n = sizes
    rng = np.random.default_rng(seed)
    a = jnp.asarray(rng.standard_normal((m, k)) * 2.0 ** rng.uniform(-8, 8, (m, k)), jnp.float32)
    a, b = PRODUCTS[product](a, jnp.asarray(rng.standard_normal((k, n)), jnp.float32))
    portable, reference = (
        block_scaled_matmul(a, b, out_dtype=jnp.float32, implementation=name) for name in ("dequantize", "reference")
    )
    # Relative to the sums of magnitudes, since a sum may cancel.
    size = np.abs(exact(a)) @ np.abs(exact(b))
    assert (np.abs(np.asarray(portable, np.float64) - np.asarray(reference)) <= 1e-6 * size).all()


def test_reference_by_hand():
    """Two blocks of 128 and a rest: each product of codes times its own two scales."""
    rng = np.random.default_rng(0)
    a_codes, b_codes = (rng.integers(-4, 5, s).astype(np.float32) for s in ((2, 300), (300, 3)))
    a_scales, b_scales = np.asarray([[1, 2, 4], [8, 16, 32]], np.float32), np.asarray([[0.5], [0.25], [2]], np.float32)
    a = Quantized(jnp.asarray(a_codes, jnp.float8_e4m3fn), jnp.asarray(a_scales), ROW)
    b = Quantized(jnp.asarray(b_codes, jnp.float8_e4m3fn), jnp.asarray(b_scales), BLOCK)
    wanted = np.zeros((2, 3))
    for i, where in enumerate((slice(0, 128), slice(128, 256), slice(256, 300))):
        wanted += a_codes[:, where] @ b_codes[where] * a_scales[:, [i]] * b_scales[i]
    for name in ("reference", "dequantize"):
        got = block_scaled_matmul(a, b, out_dtype=jnp.float32, implementation=name)
        np.testing.assert_array_equal(got, wanted)  # small integers and powers of two: no rounding at all


@pytest.mark.parametrize("implementation", ["dequantize", "reference", "14_bits"])
@pytest.mark.parametrize("sizes", [(0, 5, 7), (5, 0, 7), (5, 7, 0), (0, 0, 0)])
def test_empty_products_are_zeros(sizes, implementation):
    m, k, n = sizes
    a, b = quantize(jnp.ones((m, k)), ROW), quantize(jnp.ones((k, n)), BLOCK)
    got = block_scaled_matmul(a, b, implementation=implementation)
    assert (got.shape, got.dtype) == ((m, n), jnp.bfloat16)
    assert not np.asarray(got, np.float32).any()


@pytest.mark.parametrize("implementation", ["dequantize", "reference"])
def test_the_result_is_rounded_once(implementation):
    a, b = PRODUCTS["Fprop"](normal(0, 64, 256), normal(1, 256, 64))
    wide = block_scaled_matmul(a, b, out_dtype=jnp.float32, implementation=implementation)
    np.testing.assert_array_equal(block_scaled_matmul(a, b, implementation=implementation), wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("implementation", ["dequantize", "reference", "14_bits"])
def test_under_jit_vmap_and_shard_map(implementation):
    a, b = quantize(normal(0, 3, 16, 200), ROW), quantize(normal(1, 3, 200, 24), BLOCK)

    def product(a, b):
        return block_scaled_matmul(a, b, out_dtype=jnp.float32, implementation=implementation)

    singles = np.stack([product(*jax.tree.map(lambda leaf: leaf[i], (a, b))) for i in range(3)])  # noqa: B023
    np.testing.assert_allclose(jax.jit(jax.vmap(product))(a, b), singles, rtol=1e-5, atol=1e-4)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("data")
    sharded = jax.shard_map(jax.vmap(product), mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=True)
    np.testing.assert_allclose(jax.jit(sharded)(a, b), singles, rtol=1e-5, atol=1e-4)


def test_bad_operands_say_what_would_be_valid():
    x, w = normal(0, 130, 200), normal(1, 200, 140)
    a, b = quantize(x, ROW), quantize(w, BLOCK)
    with pytest.raises(ValueError, match=r"needs a in tiles of 1×128 or 128×128 or one scale.*not \(128, 1\)"):
        block_scaled_matmul(quantize(x, COLUMN), b)
    with pytest.raises(ValueError, match=r"needs b in tiles of 128×1 or 128×128 or one scale.*not \(1, 128\)"):
        block_scaled_matmul(a, quantize(w, ROW))
    with pytest.raises(ValueError, match=r"a \[M, K\] and b \[K, N\], not \(130, 200\) and \(140, 200\)"):
        block_scaled_matmul(a, b.T)
    with pytest.raises(ValueError, match="one is an array: make it one with `quantize`"):
        block_scaled_matmul(a, w)
    with pytest.raises(ValueError, match="bfloat16 or float32, not float16"):
        block_scaled_matmul(a, b, out_dtype=jnp.float16)
    with pytest.raises(ValueError, match="not float8_e4m3fn and bfloat16"):
        block_scaled_matmul(Quantized(a.codes, a.scales.astype(jnp.bfloat16), ROW), b)
    with pytest.raises(ValueError, match="it has mosaic_gpu, dequantize, reference, 14_bits"):
        block_scaled_matmul(a, b, implementation="cudnn")
    for match, call in {
        "codes": lambda: block_scaled_matmul(Quantized(a.codes.astype(jnp.int8), a.scales, ROW), b),
        "tiles": lambda: block_scaled_matmul(quantize(x, COLUMN), b),
    }.items():
        with pytest.raises(ValueError, match=match) as error:
            call()
        assert "\n" not in str(error.value)
