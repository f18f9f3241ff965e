"""The Hopper kernels of `permute`, run on a CPU by Pallas' interpreter, which also looks for data races.

What it does not run, and this file does not show: layouts of registers, and TMA's zeros beyond an array, in whose place
the interpreter is told to read zeros. The program for sm_90a is looked at in test_mosaic_quantize_aot.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_interpreter import interpret

from pallas_kernels.permute import combine_rows, gather_rows, inverse_of_slots, mosaic_gpu, portable, reference, vjp
from pallas_kernels.permute.config import COPY_BYTES, PermuteConfig, combine_config, gather_config
from pallas_kernels.permute.tables import weights_of_rows


def problem(tokens, rows, choices, width, dtype):
    """x, a buffer of rows, slots of which some name nothing, the tokens of the rows, and weights."""
    rng = np.random.default_rng(0)
    slots = rng.permutation(max(rows, tokens * choices))[: tokens * choices].reshape(tokens, choices)
    slots[0, 0], slots[-1, -1] = -1, rows + 3
    slots = jnp.asarray(slots, jnp.int32)
    x, buffer = (jnp.asarray(rng.standard_normal((n, width)), dtype) for n in (tokens, rows))
    return x, buffer, slots, inverse_of_slots(slots, rows), jnp.asarray(rng.standard_normal(slots.shape), jnp.float32)


def assert_close(got, want, relative):
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    np.testing.assert_allclose(got, want, rtol=relative, atol=relative)


SMALL = {"gather_rows": PermuteConfig(2, 8, 2, 1), "combine_rows": PermuteConfig(1, 8, 2, 1)}
"""Few stages and one block: every stage is filled several times."""
SIZES = {
    "more items than stages, several chunks": (5, 17, 3, 2048, jnp.bfloat16, 2, SMALL),
    "a last chunk that is shorter, columns that fill no line": (4, 15, 3, 1500, jnp.float32, 1, SMALL),
    "a row, a token, less than a chunk; the default": (1, 1, 1, 130, jnp.bfloat16, 1, {}),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_they_are_the_reference(sizes):
    *shape, dtype, sms, configs = sizes
    x, buffer, slots, index, weights = problem(*shape, dtype)
    how = {"config": configs.get("gather_rows"), "sms": sms}
    got = interpret(mosaic_gpu.gather_rows, x, index, **how)
    np.testing.assert_array_equal(got.astype(jnp.float32), reference.gather_rows(x, index).astype(jnp.float32))
    # float32 sums in another order, and then perhaps another rounding to bfloat16.
    relative = 2**-8 if dtype == jnp.bfloat16 else 1e-6
    got = interpret(mosaic_gpu.combine_rows, buffer, slots, weights, config=configs.get("combine_rows"), sms=sms)
    assert_close(got, reference.combine_rows(buffer, slots, weights), relative)
    of_rows = weights_of_rows(weights, slots, buffer.shape[0])
    drows, dots = interpret(mosaic_gpu.gather_rows_and_dots, x, index, of_rows, buffer, **how)
    want = portable.gather_rows_and_dots(x, index, of_rows, buffer)
    assert_close(drows, want[0], relative)
    assert_close(dots, want[1], 1e-4)


def test_codes_are_gathered_as_they_are():
    codes = jnp.asarray(np.random.default_rng(0).standard_normal((7, 700)), jnp.float8_e4m3fn)
    index = jnp.asarray([6, 0, -5, 3, 7, 3])
    got = interpret(mosaic_gpu.gather_rows, codes, index, sms=1)
    np.testing.assert_array_equal(got.astype(jnp.float32), reference.gather_rows(codes, index).astype(jnp.float32))


def test_what_no_slot_names_does_not_matter():
    """NaN in rows that belong to no token, in weights of no row, and in shared memory before it is written."""
    x, buffer, slots, index, weights = problem(4, 20, 3, 1024, jnp.float32)
    empty = index == x.shape[0]
    poisoned = jnp.where(empty[:, None], jnp.nan, buffer)
    nowhere = (slots < 0) | (slots >= buffer.shape[0])
    y = interpret(mosaic_gpu.combine_rows, poisoned, slots, jnp.where(nowhere, jnp.nan, weights), sms=1)
    assert_close(y, reference.combine_rows(buffer, slots, weights), 1e-6)
    of_rows = jnp.where(empty, jnp.nan, weights_of_rows(weights, slots, buffer.shape[0]))
    drows, dots = interpret(mosaic_gpu.gather_rows_and_dots, x, index, of_rows, poisoned, sms=1)
    assert not np.asarray(drows)[np.asarray(empty)].any()
    assert not np.asarray(dots)[np.asarray(empty)].any()
    rows = reference.gather_rows(x, jnp.arange(4))
    got = interpret(mosaic_gpu.gather_rows, x, jnp.arange(4), sms=1, uninitialized="nan")
    np.testing.assert_array_equal(got, rows)


def test_the_gradients_made_by_kernels(monkeypatch):
    """`vjp.py` with interpreted kernels in place of those of a GPU."""
    x, buffer, slots, index, weights = problem(4, 15, 3, 256, jnp.float32)
    kernels = ("gather_rows", "combine_rows", "gather_rows_and_dots")
    interpreted = {k: functools.partial(interpret, getattr(mosaic_gpu, k), sms=1) for k in kernels}
    monkeypatch.setitem(vjp._IMPLEMENTATIONS, "mosaic_gpu", type("Interpreted", (), interpreted))

    def both(name, x, buffer, weights):
        y = vjp.combine_rows(buffer, slots, weights, index, name)
        return y, vjp.combine_rows(vjp.gather_rows(x, index, slots, name), slots, None, index, name)

    y, pull = jax.vjp(functools.partial(both, "mosaic_gpu"), x, buffer, weights)
    want, pull_want = jax.vjp(functools.partial(both, "portable"), x, buffer, weights)
    cotangent = jax.tree.map(jnp.cos, want)
    for a, b in zip(jax.tree.leaves((y, pull(cotangent))), jax.tree.leaves((want, pull_want(cotangent))), strict=True):
        assert_close(a, b, 1e-5)


def test_vmap_adds_a_dimension_to_the_grid():
    x, _, _, index, _ = problem(4, 15, 3, 256, jnp.float32)
    several = jnp.stack([x, x + 1])
    got = interpret(lambda x, **how: jax.vmap(lambda x: mosaic_gpu.gather_rows(x, index, **how))(x), several, sms=1)
    np.testing.assert_array_equal(got, jax.vmap(lambda x: reference.gather_rows(x, index))(several))


@pytest.mark.parametrize("width", [7168, 5120, 2048, 1536, 640, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn])
def test_chunks_to_be_copied_are_even_and_neither_small_nor_large(width, dtype):
    config = gather_config(width, jnp.dtype(dtype))
    size, row = config.chunk_bytes(jnp.dtype(dtype)), width * jnp.dtype(dtype).itemsize
    assert min(row, COPY_BYTES) / 2 < size <= COPY_BYTES
    assert row % size == 0


def test_a_config_that_cannot_be_had():
    x, slots = jnp.ones((8, 256)), jnp.zeros((2, 8), jnp.int32)
    with pytest.raises(ValueError, match=r"stages=8.* needs 271360 bytes .* a block has 232448: 6 stages would fit"):
        mosaic_gpu.combine_rows(x, slots, None, config=PermuteConfig(1, 8, 8, 1))
    with pytest.raises(ValueError, match="chunks of float32 need lines in multiples of 4, not 6"):
        mosaic_gpu.combine_rows(x, slots, None, config=PermuteConfig(1, 6, 2, 1))
    with pytest.raises(ValueError, match=r"config\.rows is 1, not 2"):
        mosaic_gpu.combine_rows(x, slots, None, config=PermuteConfig(2, 8, 2, 1))
    with pytest.raises(ValueError, match="every size is at least 1"):
        PermuteConfig(1, 8, 0, 1)
    for dtype in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        combine_config(mosaic_gpu.MOST_CHOICES, dtype).check("combine_rows", dtype, mosaic_gpu.MOST_CHOICES, 2)


def test_empty_arrays():
    x, slots = jnp.zeros((0, 5)), jnp.zeros((3, 0), jnp.int32)
    np.testing.assert_array_equal(mosaic_gpu.gather_rows(x, jnp.zeros(2, jnp.int32)), np.zeros((2, 5)))
    np.testing.assert_array_equal(mosaic_gpu.combine_rows(jnp.ones((4, 5)), slots, None), np.zeros((3, 5)))
    drows, dots = mosaic_gpu.gather_rows_and_dots(x, jnp.zeros(2, jnp.int32), jnp.ones(2), jnp.ones((2, 5)))
    assert not np.asarray(drows).any()
    assert not np.asarray(dots).any()


def test_on_another_device_it_says_why_it_cannot_run():
    if jax.default_backend() == "gpu":
        pytest.skip("this device may be a Hopper GPU")
    message = r"'mosaic_gpu' cannot run here: .*compute capability 9\.0.*jax runs on cpu"
    with pytest.raises(ValueError, match=f"gather_rows: implementation {message}"):
        gather_rows(jnp.ones((2, 8)), jnp.arange(2), implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=f"combine_rows: implementation {message}"):
        combine_rows(jnp.ones((2, 8)), jnp.zeros((2, 1), jnp.int32), implementation="mosaic_gpu")


def test_on_a_hopper_gpu_arguments_decide(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "not_hopper", lambda: None)
    x = jnp.ones((8, 8))
    assert mosaic_gpu.supported(x, 16) is None
    assert mosaic_gpu.supported(x.astype(jnp.float8_e4m3fn)) is None
    assert "not float8_e4m3fn" in mosaic_gpu.supported(x.astype(jnp.float8_e4m3fn), 8)
    assert "not float16" in mosaic_gpu.supported(x.astype(jnp.float16))
    assert "at most 16 rows of a token, not 17" in mosaic_gpu.supported(x, 17)
    with pytest.raises(ValueError, match="gather_rows: implementation 'mosaic_gpu' cannot run here: it sums at"):
        gather_rows(x, jnp.arange(2), inverse=jnp.zeros((8, 17), jnp.int32), implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="'mosaic_gpu' cannot run here: it sums at most 16"):
        mosaic_gpu.combine_rows(x, jnp.zeros((2, 17), jnp.int32), None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(4096, 33000, 8, 7168), (100, 900, 6, 1500)])
def test_on_a_gpu_they_are_the_reference(shape, dtype):
    obstacle = mosaic_gpu.supported(jnp.ones((1, 1), dtype), 8)
    if obstacle:
        pytest.skip(obstacle)
    x, buffer, slots, index, weights = problem(*shape, dtype)
    got, want = mosaic_gpu.gather_rows(x, index), portable.gather_rows(x, index)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
    relative = 2**-7 if dtype == jnp.bfloat16 else 1e-5
    got, want = (f.combine_rows(buffer, slots, weights) for f in (mosaic_gpu, portable))
    assert_close(got, want, relative)
    of_rows = weights_of_rows(weights, slots, buffer.shape[0])
    got, want = (f.gather_rows_and_dots(x, index, of_rows, buffer) for f in (mosaic_gpu, portable))
    assert_close(got[0], want[0], relative)
    assert_close(got[1], want[1], 1e-3)
