"""Quantisation written a second time, tile by tile in NumPy and ml_dtypes, for the package to be compared with."""

import ml_dtypes
import numpy as np

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)


def tiles_of(shape, tile):
    """(index of the scale, slices of its elements) of every tile of a matrix."""
    high, wide = tile or (max(shape[0], 1), max(shape[1], 1))
    for i in range(-(-shape[0] // high)):
        for j in range(-(-shape[1] // wide)):
            yield (i, j), np.s_[i * high : (i + 1) * high, j * wide : (j + 1) * wide]


def quantize(x, tile, dtype=E4M3, power_of_two=False):
    """Codes and float32 scales of a matrix."""
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    codes, scales = np.zeros(x.shape, dtype), {}
    for index, where in tiles_of(x.shape, tile):
        values = x[where].astype(np.float32)
        scale = np.maximum(np.abs(values).max(), np.float32(1e-4)) * (np.float32(1) / largest)
        if power_of_two:
            scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
        if not np.isfinite(scale):
            scale = np.float32(np.nan)
        codes[where] = np.clip(values / scale, -largest, largest).astype(dtype)
        scales[index] = scale
    count = np.max(list(scales), axis=0) + 1
    return codes, np.array([[scales[i, j] for j in range(count[1])] for i in range(count[0])], np.float32)


def dequantize(codes, scales, tile, dtype=np.float64):
    """Code times scale."""
    values = codes.astype(dtype)
    for index, where in tiles_of(codes.shape, tile):
        values[where] *= scales[index].astype(dtype)
    return values


def wide_range(rng, shape, low=-30, high=10):
    """float32 of every magnitude between two powers of two, and some zeros."""
    values = rng.standard_normal(shape) * 2.0 ** rng.uniform(low, high, shape)
    return np.where(rng.random(shape) < 0.05, 0, values).astype(np.float32)
