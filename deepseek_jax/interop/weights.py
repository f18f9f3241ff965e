"""What a source of weights offers, whether it is a Hugging Face folder or a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.interop.fp8 import BLOCK, E4M3, dequantise, quantise
from deepseek_jax.interop.layout import Entry
from deepseek_jax.interop.quantization import Quantization

_PIECE_BYTES = 1 << 28


class Tensor(NamedTuple):
    """A tensor as a Hugging Face folder holds it."""

    values: np.ndarray
    """`[out, in]`, or `[n]`; E4M3 codes where there are scales."""
    scales: np.ndarray | None = None
    """`[⌈out/128⌉, ⌈in/128⌉]`, float32 or E8M0."""
    block: tuple[int, int] = BLOCK
    compute: np.dtype | None = None
    """See `WeightSource`."""

    def decoded(self, dtype: np.dtype) -> np.ndarray:
        """The values, which are rounded to `dtype` only where they are codes."""
        return self.values if self.scales is None else dequantise(self.values, self.scales, dtype, self.block)

    def quantised(self, *, powers_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of 128×128 blocks, as training makes them: of what is left of the values in `compute`."""
        values = self.decoded(np.dtype(np.float32))
        return quantise(values if self.compute is None else values.astype(self.compute), powers_of_two=powers_of_two)


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
    compute: np.dtype | None
    """What the run that trained them rounds its weights to before it works with them or quantises them; None where no
    run of ours is known."""

    def form(self, entry: Entry) -> Form:
        """How the tensors of `entry` are stored."""
        ...

    def values(self, entry: Entry, row: int, rows: slice | None = None) -> Sequence[np.ndarray]:
        """The tensors `entry.tensors[row]`, or these rows of it, read now: fresh arrays."""
        ...

    def scales(self, entry: Entry, row: int) -> Sequence[np.ndarray]:
        """The scales of these tensors, which are FP8."""
        ...


def read(source: WeightSource, entry: Entry, row: int, rows: slice | None = None) -> list[Tensor]:
    """The tensors `entry.tensors[row]` with their scales, or these rows of one without scales, read now."""
    values = source.values(entry, row, rows)
    if not source.form(entry).is_fp8 or source.quantization is None:
        return [Tensor(value, compute=source.compute) for value in values]
    assert rows is None
    pairs = zip(values, source.scales(entry, row), strict=True)
    return [Tensor(value, scale, source.quantization.block) for value, scale in pairs]


def pieces(entry: Entry, *forms: Form) -> Iterator[tuple[int, slice | None]]:
    """How an array is gone through that is read in one of these forms and written in another.

    (row of `entry.tensors`, None) in turn; or (0, some of its rows) where a tensor is huge, as embedding and head are.
    """
    step = rows_at_once(entry, *forms)
    if step is None:
        yield from ((row, None) for row in range(len(entry.tensors)))
        return
    total = entry.tensor_shape[0]
    for start in range(0, total, step):
        yield 0, slice(start, min(start + step, total))


def rows_at_once(entry: Entry, *forms: Form) -> int | None:
    """How many rows of a huge tensor are a piece; None where tensors are taken whole."""
    single = len(entry.tensors) == len(entry.tensors[0]) == 1 and len(entry.spec.shape) == 2
    if not single or entry.row_order is not None or any(form.is_fp8 for form in forms):
        return None
    rows, columns = entry.tensor_shape
    row_bytes = columns * max(form.dtype.itemsize for form in forms)
    step = max(_PIECE_BYTES // row_bytes // 128 * 128, 128)
    return step if step < rows else None


def source_bytes(source: WeightSource) -> int:
    """Bytes of all weights as they are stored, without their scales."""
    return sum(int(np.prod(entry.spec.shape)) * source.form(entry).dtype.itemsize for entry in source.entries.values())
