"""Whether the kernels equal their references on the device at hand: ragged and empty operands, and every magnitude.

A reference runs on the CPU where every bit is compared: a GPU does not round 1 / scale to nearest. Operands are made by
references as well, so that one kernel's fault is not another's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.block_scaled_matmul import block_scaled_matmul
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_matmul_dw, grouped_matmul_dx
from pallas_kernels.permute import combine_rows, gather_rows, inverse_of_slots
from pallas_kernels.quantize import (
    GRADIENT_AMAX,
    Quantized,
    quantize,
    quantize_both,
    quantize_swiglu,
    quantize_weight,
    requantize,
    swiglu_backward,
)

ROW, COLUMN, BLOCK = (1, 128), (128, 1), (128, 128)
_quantized = functools.partial(quantize, implementation="reference")
TENSOR_CORE_BITS = 2e-3
"""Error that tensor cores may make, relative to the sum of the magnitudes: they keep about 14 bits."""
SIZES = ((1000, 1000, 1000), (64, 2112, 7168), (1, 1, 7), (0, 8, 8))
"""M, N and K of matmuls."""
GROUPS = (0, 700, 1, 0, 300, 129)
"""Rows of each group, of `GROUPED_ROWS`."""
GROUPED_ROWS, GROUPED_WIDTHS = 1600, (1000, 600)
SHAPES = ((1024, 7168), (1000, 1000), (1, 7))
"""Of what is quantised."""
FLOATS = (jnp.bfloat16, jnp.float32)
SWIGLU = ((1000, 2048), (70, 128))
"""Rows and channels."""
PERMUTED = ((4096, 33000, 8, 7168), (100, 900, 6, 1500))
"""Tokens, rows, rows of a token, channels."""


class CheckFailed(Exception):
    """A kernel's results are not those of its reference; says which and by how much."""


def run_checks(implementation: str = "mosaic_gpu", say: Callable[[str], None] = print) -> tuple[str, ...]:
    """The ops whose implementation equals the reference; of each op `say` gets a line."""
    passed = []
    for op, check in CHECKS.items():
        try:
            check(implementation)
        except Exception as error:  # Whatever a compiler or a driver raises: the kernel is not to be used.
            lines = str(error).splitlines() or [""]
            say(f"{op}: FAILED: {type(error).__name__}: {lines[0]}")
        else:
            passed.append(op)
            say(f"{op}: equals its reference")
    return tuple(passed)


# --- comparisons ------------------------------------------------------------------------------------------------------


def _require_same(got: Any, want: Any, what: str) -> None:
    """Every bit of both trees' arrays."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            raise CheckFailed(f"{what}: {one.dtype}{one.shape}, not {other.dtype}{other.shape}")
        unequal = int((one.reshape(-1).view(np.uint8) != other.reshape(-1).view(np.uint8)).sum())
        if unequal:
            raise CheckFailed(f"{what}: {unequal} of {one.nbytes} bytes differ")


def _require_close(got: Any, want: Any, error: Any, what: str) -> None:
    """Within `error`, which broadcasts to them; not-a-number in the same places."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise CheckFailed(f"{what}: {got.shape}, not {want.shape}")
    bad = ~(np.abs(got - want) <= np.asarray(error)) & ~(np.isnan(got) & np.isnan(want))
    if bad.any():
        raise CheckFailed(f"{what}: {int(bad.sum())} of {got.size} are wrong, one by {np.nanmax(np.abs(got - want)):g}")


def _require_nearly(got: Quantized, want: Quantized, what: str) -> None:
    """Scales within a rounding of bfloat16, and codes that are the same or, one in a hundred, neighbours."""
    _require_close(got.scales, want.scales, 2.0**-7 * np.asarray(want.scales), f"{what}, scales")
    steps = np.abs(_ordered(got.codes) - _ordered(want.codes))
    if steps.size and (steps.max() > 1 or (steps > 0).mean() > 0.01):
        raise CheckFailed(f"{what}: {(steps > 0).mean():.2%} of the codes differ, one by {steps.max()} steps")


def _ordered(codes: Array) -> np.ndarray:
    """Integers that follow each other as E4M3 numbers do."""
    bits = np.asarray(codes).view(np.uint8).astype(int)
    return np.where(bits < 128, bits, 128 - bits)


def _on_cpu(function: Callable, *arrays: Any) -> Any:
    """What a function makes of arrays on the CPU."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return function(*jax.device_put(arrays, cpu))


# --- operands ---------------------------------------------------------------------------------------------------------


def _normal(seed: int, *shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def _wide_range(shape: tuple[int, int], dtype: Any) -> Array:
    """Magnitudes over many powers of two, and zeros of both signs."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape) * 2.0 ** rng.uniform(-30, 10, shape)
    values *= 2.0 ** rng.integers(-20, 20, (shape[0], 1)) * 2.0 ** rng.integers(-20, 20, (1, shape[1]))
    return jnp.asarray(np.where(rng.random(shape) < 0.05, np.copysign(0, values), values), dtype)


def _magnitudes(*operands: Any) -> tuple[Array, ...]:
    """Of quantised operands or arrays, in float32."""
    arrays = (q.dequantize() if isinstance(q, Quantized) else q.astype(jnp.float32) for q in operands)
    return tuple(jnp.abs(array) for array in arrays)


# --- matmuls ----------------------------------------------------------------------------------------------------------


def _check_matmul(implementation: str) -> None:
    for m, n, k in SIZES:
        x, w, dy = _normal(0, m, k), _normal(1, k, n), _normal(2, m, n)
        wgrad = _quantized(x, COLUMN).T, _quantized(dy, COLUMN)
        for name, (a, b) in {"Fprop": (_quantized(x, ROW), _quantized(w, BLOCK)), "Wgrad": wgrad}.items():
            got, want = (
                block_scaled_matmul(a, b, out_dtype=jnp.float32, implementation=each)
                for each in (implementation, "reference")
            )
            size = jnp.matmul(*_magnitudes(a, b), precision="highest")
            _require_close(got, want, TENSOR_CORE_BITS * np.asarray(size) + 1e-30, f"{name} of M={m}, N={n}, K={k}")


def _grouped_operands(quantized: bool, alignment: int) -> dict[str, tuple[Any, Any]]:
    """Both operands of each product, with zeros in the rows of no group."""
    starts = np.cumsum([0, *(-(-size // alignment) * alignment for size in GROUPS)])
    real = np.zeros((GROUPED_ROWS, 1), bool)
    for start, size in zip(starts, GROUPS, strict=False):
        real[start : start + size] = True
    x, dy = (jnp.where(real, _normal(seed, GROUPED_ROWS, width), 0) for seed, width in enumerate(GROUPED_WIDTHS))
    w = _normal(2, len(GROUPS), *GROUPED_WIDTHS)
    if not quantized:
        return {"x": (x, w), "dy": (dy, w), "both": (x, dy)}
    blocks = _quantized(w, BLOCK)
    both = _quantized(x, COLUMN), _quantized(dy, COLUMN)
    return {"x": (_quantized(x, ROW), blocks), "dy": (_quantized(dy, ROW), blocks), "both": both}


def _check_grouped(function: Callable, operands: str) -> Callable[[str], None]:
    def check(implementation: str) -> None:
        for quantized, alignment in ((True, 128), (False, 128), (True, 1), (False, 1)):
            if operands == "both" and (quantized, alignment) == (True, 1):
                continue  # A tile of 128 rows would straddle groups.
            what = f"in {'FP8' if quantized else 'bfloat16'}, groups at multiples of {alignment}"
            _check_grouped_product(function, operands, quantized, alignment, implementation, what)

    return check


def _check_grouped_product(function, operands, quantized, alignment, implementation, what):
    sizes, (a, b) = jnp.asarray(GROUPS, jnp.int32), _grouped_operands(quantized, alignment)[operands]
    options: dict[str, Any] = {"alignment": alignment}
    wide = options if operands == "both" else options | {"out_dtype": jnp.float32}

    def run(each):
        return function(a, b, sizes, **wide, implementation=each)

    size = np.asarray(function(*_magnitudes(a, b), sizes, **options, implementation="reference"))
    _require_close(run(implementation), run("reference"), TENSOR_CORE_BITS * size + 1e-30, what)


def _check_grouped_derivative(implementation: str) -> None:
    """Of arrays, through `jax.grad`: the gradients of both operands."""
    x, w = _grouped_operands(False, 1)["x"]
    sizes = jnp.asarray(GROUPS, jnp.int32)

    def gradients(each):
        def loss(x, w):
            y = grouped_matmul(x, w, sizes, implementation=each)
            return jnp.square(y.astype(jnp.float32)).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(x, w)

    for got, want, what in zip(gradients(implementation), gradients("reference"), "xw", strict=True):
        size = np.abs(np.asarray(want, np.float32))
        _require_close(got, want, 2.0**-5 * (size + size.mean()), f"the gradient of {what} in bfloat16")


def _check_grouped_matmul(implementation: str) -> None:
    _check_grouped(grouped_matmul, "x")(implementation)
    _check_grouped_derivative(implementation)


# --- quantisers -------------------------------------------------------------------------------------------------------


def _check_quantizer(function: Callable, tiles: tuple) -> Callable[[str], None]:
    """Of `function(x[, tile])`, in every tile or in those of its own (None)."""

    def check(implementation: str) -> None:
        for shape in SHAPES:
            for dtype in (jnp.bfloat16, jnp.float32):
                x = _wide_range(shape, dtype)
                for tile in tiles:
                    for power_of_two, floor in ((False, 1e-4), (True, GRADIENT_AMAX)):
                        _check_one_quantizer(function, x, tile, power_of_two, floor, implementation)

    return check


def _check_one_quantizer(function, x, tile, power_of_two, floor, implementation):
    def call(x, implementation):
        more = () if tile is None else (tile,)
        return function(x, *more, power_of_two=power_of_two, smallest_amax=floor, implementation=implementation)

    want = _on_cpu(lambda x: call(x, "reference"), x)
    _require_same(call(x, implementation), want, f"{x.dtype}{x.shape} in {tile or 'its tiles'}")


def _check_requantize(implementation: str) -> None:
    for shape in SHAPES:
        for power_of_two in (False, True):
            _check_one_requantize(shape, {"power_of_two": power_of_two}, implementation)


def _check_one_requantize(shape, how, implementation):
    kept = _quantized(_wide_range(shape, jnp.float32), ROW, **how)
    want = _on_cpu(lambda q: requantize(q, COLUMN, implementation="reference", **how), kept)
    _require_same(requantize(kept, COLUMN, implementation=implementation, **how), want, f"{shape}, {how}")


def _swiglu_operands(rows: int, channels: int, dtype: Any) -> tuple[Array, Array, Array]:
    gate_up, dhidden = _normal(0, rows, 2 * channels).astype(dtype), _normal(1, rows, channels).astype(dtype)
    return gate_up, dhidden, jnp.abs(_normal(2, rows)).astype(jnp.float32)


def _check_swiglu(implementation: str) -> None:
    for (rows, channels), dtype, power_of_two in itertools.product(SWIGLU, FLOATS, (False, True)):
        gate_up, _, weights = _swiglu_operands(rows, channels, dtype)
        for given in (weights, None):

            def run(each, given=given, gate_up=gate_up, power_of_two=power_of_two):
                return quantize_swiglu(gate_up, given, power_of_two=power_of_two, implementation=each)

            for got, want, what in zip(run(implementation), run("reference"), ("hidden", "gate_up"), strict=True):
                _require_nearly(got, want, f"{what} of {gate_up.dtype}{gate_up.shape}")


def _check_swiglu_backward(implementation: str) -> None:
    for (rows, channels), dtype, power_of_two in itertools.product(SWIGLU, FLOATS, (False, True)):
        gate_up, dhidden, weights = _swiglu_operands(rows, channels, dtype)
        _, kept = quantize_swiglu(gate_up, weights, power_of_two=power_of_two, implementation="reference")
        for given in (weights, None):

            def run(each, given=given, kept=kept, dhidden=dhidden, power_of_two=power_of_two):
                return swiglu_backward(kept, dhidden, given, power_of_two=power_of_two, implementation=each)

            _require_same_gradients(run(implementation), run("reference"))


def _require_same_gradients(got, want):
    error = 2.0**-7 * np.abs(np.asarray(want.gate_up, np.float32)) + 1e-4
    _require_close(got.gate_up, want.gate_up, error, "the gradient of gate_up")
    if want.weights is not None:
        error = 1e-3 * np.abs(np.asarray(want.weights)) + 1e-3
        _require_close(got.weights, want.weights, error, "the gradient of weights")
    _require_nearly(got.hidden, want.hidden, "hidden in 128×1")


# --- rows -------------------------------------------------------------------------------------------------------------


def _permuted(dtype: Any, tokens: int, rows: int, choices: int, width: int) -> tuple[Array, Array, Array, Array]:
    """x, a buffer of rows, slots of which two name nothing, and weights."""
    rng = np.random.default_rng(0)
    slots = rng.permutation(max(rows, tokens * choices))[: tokens * choices].reshape(tokens, choices)
    slots[0, 0], slots[-1, -1] = -1, rows + 3
    x, buffer = (_normal(seed, count, width).astype(dtype) for seed, count in ((1, tokens), (2, rows)))
    weights = jnp.asarray(rng.standard_normal(slots.shape), jnp.float32)
    return x, buffer, jnp.asarray(slots, jnp.int32), weights


def _check_gather(implementation: str) -> None:
    for size in PERMUTED:
        for dtype in (jnp.bfloat16, jnp.float32):
            x, buffer, slots, _ = _permuted(dtype, *size)
            index = inverse_of_slots(slots, buffer.shape[0])
            for rows in (x, _quantized(x, ROW)):
                got, want = (gather_rows(rows, index, implementation=each) for each in (implementation, "reference"))
                _require_same(got, want, f"rows of {dtype.__name__}{x.shape}")
            _check_gathers_derivative(x, slots, index, implementation)


def _check_gathers_derivative(x, slots, index, implementation):
    """Each token's rows summed, by the gradient of a sum of squares."""

    def gradient(each):
        def loss(x):
            return jnp.square(gather_rows(x, index, inverse=slots, implementation=each).astype(jnp.float32)).sum()

        return jax.jit(jax.grad(loss))(x)

    got, want = gradient(implementation), gradient("reference")
    size = np.abs(np.asarray(want, np.float32))
    _require_close(got, want, 2.0**-6 * (size + size.mean()), f"the gradient for {x.dtype}{x.shape}")


def _check_combine(implementation: str) -> None:
    for size in PERMUTED:
        for dtype, relative in ((jnp.bfloat16, 2.0**-7), (jnp.float32, 1e-5)):
            _, buffer, slots, weights = _permuted(dtype, *size)
            _check_combined(buffer, slots, weights, relative, implementation)
            got, want = (combine_rows(buffer, slots, implementation=each) for each in (implementation, "reference"))
            magnitude = np.abs(np.asarray(want, np.float32))
            _require_close(got, want, relative * (magnitude + magnitude.mean()), f"a plain sum of {buffer.dtype}")


def _check_combined(buffer, slots, weights, relative, implementation):
    """The weighted sum, and its derivatives by the gradient of a sum of squares."""
    index = inverse_of_slots(slots, buffer.shape[0])

    def both(each):
        def loss(rows, weights):
            sums = combine_rows(rows, slots, weights, inverse=index, implementation=each)
            return jnp.square(sums.astype(jnp.float32)).sum(), sums

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(buffer, weights)

    for got, want in zip(jax.tree.leaves(both(implementation)), jax.tree.leaves(both("reference")), strict=True):
        size = np.abs(np.asarray(want, np.float32))
        _require_close(got, want, 4 * relative * (size + size.mean()), f"{buffer.dtype}{buffer.shape}, {slots.shape}")


CHECKS: dict[str, Callable[[str], None]] = {
    "block_scaled_matmul": _check_matmul,
    "grouped_matmul": _check_grouped_matmul,
    "grouped_matmul_dx": _check_grouped(grouped_matmul_dx, "dy"),
    "grouped_matmul_dw": _check_grouped(grouped_matmul_dw, "both"),
    "quantize": _check_quantizer(quantize, (ROW, COLUMN, BLOCK)),
    "quantize_both": _check_quantizer(quantize_both, (None,)),
    "quantize_weight": _check_quantizer(quantize_weight, (None,)),
    "requantize": _check_requantize,
    "quantize_swiglu": _check_swiglu,
    "swiglu_backward": _check_swiglu_backward,
    "gather_rows": _check_gather,
    "combine_rows": _check_combine,
}
"""Of each op, by the name that it goes by in `choose`."""
