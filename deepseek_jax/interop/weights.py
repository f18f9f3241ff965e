"""What a source of weights offers, whether it is a Hugging Face folder or a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.interop.architecture import Quantization
from deepseek_jax.interop.fp8 import BLOCK, E4M3, dequantise
from deepseek_jax.interop.layout import Entry

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Tensor(NamedTuple):
    """A tensor as a Hugging Face folder holds it."""

    values: np.ndarray
    """`[out, in]`, or `[n]`; E4M3 codes where there are scales."""
    scales: np.ndarray | None = None
    """`[⌈out/128⌉, ⌈in/128⌉]`, float32 or E8M0."""
    block: tuple[int, int] = BLOCK

    def decoded(self, dtype: np.dtype) -> np.ndarray:
        """The values, which are rounded to `dtype` only where they are codes."""
        return self.values if self.scales is None else dequantise(self.values, self.scales, dtype, self.block)


class Form(NamedTuple):
    """How the tensors of one canonical array are stored."""

    dtype: np.dtype
    scale_dtype: np.dtype | None = None
    """Of the scales by block, where `dtype` is E4M3 and they are there."""

    @property
    def is_fp8(self) -> bool:
        """Codes with scales."""
        return self.dtype == E4M3


class WeightSource(Protocol):
    """Weights that can be read tensor by tensor, in the names, shapes and order of rows of a Hugging Face folder."""

    model: ModelConfig
    entries: Mapping[str, Entry]
    quantization: Quantization | None
    """Of the tensors that are FP8; None where none is."""

    def form(self, entry: Entry) -> Form:
        """How the tensors of `entry` are stored."""
        ...

    def values(self, entry: Entry, row: int) -> Sequence[np.ndarray]:
        """The tensors `entry.tensors[row]`, read now: fresh arrays."""
        ...

    def scales(self, entry: Entry, row: int) -> Sequence[np.ndarray]:
        """The scales of these tensors, which are FP8."""
        ...


def read(source: WeightSource, entry: Entry, row: int) -> list[Tensor]:
    """The tensors `entry.tensors[row]` with their scales, read now."""
    values = source.values(entry, row)
    if not source.form(entry).is_fp8 or source.quantization is None:
        return [Tensor(value) for value in values]
    pairs = zip(values, source.scales(entry, row), strict=True)
    return [Tensor(value, scale, source.quantization.block) for value, scale in pairs]
