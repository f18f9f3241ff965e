"""Arrays of every dtype and shape, and safetensors files, right and wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from deepseek_jax.interop.safetensors import FolderWriter, TensorFolder
from deepseek_jax.interop.safetensors_format import DTYPES

SHAPES = [(3, 5), (), (0,), (4, 0, 2), (7,), (1, 2, 3, 2)]


def random_array(dtype: np.dtype, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Any bits, so NaNs of every kind too; of BOOL only the two that it has."""
    data = np.random.default_rng(seed).integers(0, 2 if dtype == np.bool_ else 256, (*shape, dtype.itemsize), np.uint8)
    return data.reshape(-1).view(dtype).reshape(shape)


def every_dtype() -> dict[str, np.ndarray]:
    return {
        f"{name}.{'x'.join(map(str, shape))}": random_array(dtype, shape, seed)
        for seed, (name, dtype) in enumerate(DTYPES.items())
        for shape in SHAPES
    }


def write(folder: Path, arrays: dict[str, np.ndarray], **settings) -> None:
    folder.mkdir(exist_ok=True)
    with FolderWriter(folder, {n: (a.dtype, a.shape) for n, a in arrays.items()}, **settings) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def assert_same(array: np.ndarray, expected: np.ndarray) -> None:
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    assert array.tobytes() == expected.tobytes()


def assert_holds(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    with TensorFolder(folder) as tensors:
        assert set(tensors) == set(arrays)
        for name, expected in arrays.items():
            assert_same(tensors.read(name), expected)


def raw_file(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="U8", shape=(2,), offsets=(0, 2)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
