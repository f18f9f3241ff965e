"""Hugging Face folders of random weights, as the released ones are laid out: names, dtypes, MTP and its copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.interop.architecture import write_architecture
from deepseek_jax.interop.fp8 import E4M3, quantise
from deepseek_jax.interop.layout import Entry, entries
from deepseek_jax.interop.quantization import Quantization, write_quantization
from deepseek_jax.interop.safetensors import FolderWriter, TensorFolder

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BLOCK = (128, 128)


def random_tensors(
    model: ModelConfig, *, dtype: Any = BFLOAT16, fp8: Quantization | None = None, e8m0: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """Every tensor of a folder; biases in float32, some of them negative; scales beside what is FP8."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for entry in entries(model).values():
        for name in (name for row in entry.tensors for name in row):
            for each, array in _tensor(entry, name, rng, np.dtype(dtype), fp8, e8m0):
                tensors[each] = array
        for copy in entry.copies:
            tensors[copy] = tensors[entry.tensors[0][0]]
    return tensors


def _tensor(entry: Entry, name: str, rng, dtype: np.dtype, fp8: Quantization | None, e8m0: bool):
    values = (rng.standard_normal(entry.tensor_shape) * 0.1).astype(np.float32)
    if entry.name.endswith(".scale"):
        values += 1
    if name.endswith("e_score_correction_bias"):
        yield name, values
    elif fp8 is not None and entry.may_be_fp8:
        codes, scales = quantise(values, powers_of_two=fp8.scale_format == "ue8m0")
        yield name, codes
        yield f"{name}_scale_inv", scales.astype(ml_dtypes.float8_e8m0fnu) if e8m0 else scales
    else:
        yield name, values.astype(dtype)


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], *, shard_bytes: int = 5_000_000_000) -> None:
    """The files of weights of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    forms = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    with FolderWriter(folder, forms, shard_bytes=shard_bytes) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def write_folder(
    folder: Path,
    model: ModelConfig,
    *,
    fp8: Quantization | None = None,
    shard_bytes: int = 5_000_000_000,
    config: dict[str, Any] | None = None,
    **tensors: Any,
) -> Path:
    """A whole folder with random weights; `config` is added to config.json."""
    write_tensors(folder, random_tensors(model, fp8=fp8, **tensors), shard_bytes=shard_bytes)
    document = write_quantization({**write_architecture(model), "torch_dtype": "bfloat16"}, fp8)
    (folder / "config.json").write_text(json.dumps({**document, **(config or {})}))
    return folder


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder."""
    with TensorFolder(folder) as tensors:
        return {name: tensors.read(name) for name in tensors}


def assert_same_tensors(one: Path, other: Path) -> None:
    """Bit for bit, dtypes and names included."""
    left, right = read_tensors(one), read_tensors(other)
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert (array.dtype, array.shape) == (right[name].dtype, right[name].shape), name
        assert array.tobytes() == right[name].tobytes(), name


def is_code(name: str, tensors: dict[str, np.ndarray]) -> bool:
    """Whether a tensor is FP8."""
    return tensors[name].dtype == E4M3
