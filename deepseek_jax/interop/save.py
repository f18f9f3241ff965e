"""Weights out to a Hugging Face folder, tensor by tensor: whole under its name, or not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from deepseek_jax.config import ConfigError
from deepseek_jax.interop.architecture import rope_interleaved, write_architecture
from deepseek_jax.interop.errors import InteropError
from deepseek_jax.interop.fp8 import BLOCK, E4M3, scale_shape
from deepseek_jax.interop.host import one_ahead
from deepseek_jax.interop.huggingface import SCALE_SUFFIX
from deepseek_jax.interop.layout import Entry
from deepseek_jax.interop.progress import ByteProgress
from deepseek_jax.interop.quantization import Quantization, write_quantization
from deepseek_jax.interop.safetensors import FolderWriter
from deepseek_jax.interop.weights import Form, Tensor, WeightSource, pieces, read
from deepseek_jax.paths import new_folder

Precision = Literal["keep", "bfloat16", "float16", "float32", "fp8", "fp8_ue8m0"]
"""How weights are written: each as it is stored; all in one dtype; or, as the released folders, the linear layers in
FP8 with scales by block (float32, or powers of two) and the rest in BF16. Router biases are float32 in all but "keep".
"""
PRECISIONS: tuple[Precision, ...] = ("keep", "bfloat16", "float16", "float32", "fp8", "fp8_ue8m0")
_FLOAT32 = np.dtype(np.float32)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def save(
    source: WeightSource,
    target: str | Path,
    *,
    precision: Precision = "keep",
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, Path | bytes] | None = None,
    shard_bytes: int = 5_000_000_000,
    progress: bool = True,
) -> None:
    """Writes a folder that `transformers`, and `deepseek_jax.load`, load.

    Weights that are FP8 already keep their codes and scales wherever FP8 is asked for. Those of a run become the codes
    and scales that it trains with, if all of its linear layers run in FP8 with a scale by block (`fp8`; with powers of
    two as scales, `fp8_ue8m0`).

    Args:
      source: where the weights are read from.
      target: the folder to make; it must not exist.
      precision: see `Precision`.
      config: an original config.json, whose other fields are kept.
      files: what else belongs in the folder, by name: a file to copy, or its content.
      shard_bytes: a file of weights is no larger, unless a single tensor is.
      progress: show a bar, in bytes.

    Raises:
      ConfigError: the target exists, or is in the cloud.
      InteropError: the architecture cannot be written so, or the disk has no room.
    """
    writing = _Writing(source, precision)
    plan = {name: form for entry in source.entries.values() for name, form in writing.tensors(entry)}
    document = writing.config(config)
    total = sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in plan.values())
    with (
        new_folder(target, "the Hugging Face folder") as folder,
        ByteProgress("writing", total, quiet=not progress) as done,
    ):
        check_room(folder, total)
        with FolderWriter(folder, plan, shard_bytes=shard_bytes) as writer:
            for name, rows, array in one_ahead(writing.everything()):
                if rows is None:
                    writer.write(name, array)
                else:
                    writer.write_rows(name, rows.start, array)
                done.add(array.nbytes)
        for name, content in (files or {}).items():
            put_file(folder / name, content)
        (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def convert(
    name: str, tensor: Tensor, form: Form, stored: Quantization | None, wanted: Quantization | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """A tensor in another form: values, and scales where the form has them.

    Codes are kept where they are scaled as `wanted` says; otherwise they are decoded in float32 and made anew. Raises
    `InteropError` where the tensor `name` holds numbers that the form has not.
    """
    if not form.is_fp8:
        values = tensor.decoded(form.dtype)
        if values.dtype == form.dtype:
            return values, None
        with np.errstate(over="ignore"):
            cast = values.astype(form.dtype)
        if form.dtype == np.float16 and np.isinf(cast).sum() > np.isinf(values).sum():
            raise InteropError(f"{name} has values beyond float16's 65,504; write bfloat16 or float32")
        return cast, None
    if tensor.scales is not None and stored == wanted:
        return tensor.values, tensor.scales
    assert wanted is not None
    codes, scales = tensor.quantised(powers_of_two=wanted.scale_format == "ue8m0")
    if not np.isfinite(scales).all():
        raise InteropError(f"{name} has values that are not finite, which have no scale; write bfloat16 or float32")
    return codes, scales


def put_file(path: Path, content: Path | bytes) -> None:
    """Makes a file from its content, or as a copy of another one."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        shutil.copyfile(content, path)


def check_room(folder: Path, needed: int) -> None:
    """Raises `InteropError` where a disk has no room for so many bytes more."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InteropError(
            f"{folder.parent} has {free / 1e9:,.1f} GB free, and {needed / 1e9:,.1f} GB are to be written; "
            "free some, or write to another disk"
        )


class _Writing:
    """What is written of each tensor of a source, in one precision."""

    def __init__(self, source: WeightSource, precision: Precision):
        if precision not in PRECISIONS:
            raise ConfigError(f"the precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        self.source, self.precision = source, precision
        self.quantization: Quantization | None = None
        """Of the FP8 tensors that are written."""
        stored = source.quantization
        if precision == "fp8_ue8m0":
            self.quantization = Quantization(scale_format="ue8m0")
        elif precision in ("keep", "fp8"):
            self.quantization = stored or (Quantization() if precision == "fp8" else None)

    def form(self, entry: Entry) -> Form:
        """How the tensors of an entry are written."""
        stored = self.source.form(entry)
        if self.precision == "keep" or (stored.is_fp8 and self.quantization == self.source.quantization):
            return stored
        if entry.name.endswith("router.bias"):
            return Form(_FLOAT32)
        if self.quantization is not None:
            if entry.may_be_fp8 and self.quantization.block != BLOCK:
                raise InteropError(
                    f"{entry.tensors[0][0]} is not FP8, and codes are made for blocks of 128x128 alone, not "
                    f"{'x'.join(map(str, self.quantization.block))} as the others': write bfloat16, or fp8_ue8m0"
                )
            return Form(E4M3, _FLOAT32) if entry.may_be_fp8 else Form(_BFLOAT16)
        return Form(np.dtype(getattr(ml_dtypes, self.precision, self.precision)))

    def tensors(self, entry: Entry) -> Iterator[tuple[str, tuple[np.dtype, tuple[int, ...]]]]:
        """Name, dtype and shape of every tensor of an entry, scales and copies included."""
        form = self.form(entry)
        for name in [*(name for row in entry.tensors for name in row), *entry.copies]:
            yield name, (form.dtype, entry.tensor_shape)
            if form.scale_dtype is not None:
                assert self.quantization is not None
                yield name + SCALE_SUFFIX, (form.scale_dtype, scale_shape(entry.tensor_shape, self.quantization.block))

    def everything(self) -> Iterator[tuple[str, slice | None, np.ndarray]]:
        """All tensors as they are written: name, which rows of it (None: all), what is there."""
        for entry in self.source.entries.values():
            form = self.form(entry)
            for row, rows in pieces(entry, self.source.form(entry), form):
                for name, tensor in zip(entry.tensors[row], read(self.source, entry, row, rows), strict=True):
                    values, scales = convert(name, tensor, form, self.source.quantization, self.quantization)
                    for each in (name, *entry.copies):
                        yield each, rows, values
                        if scales is not None:
                            yield each + SCALE_SUFFIX, None, scales

    def config(self, base: Mapping[str, Any] | None) -> dict[str, Any]:
        """config.json."""
        document = write_quantization(write_architecture(self.source.model, base=base), self.quantization)
        interleaved = any(entry.row_order is not None for entry in self.source.entries.values())
        if rope_interleaved(document) != interleaved:  # rows are written as they are stored
            document["rope_interleave"] = interleaved
        key = "dtype" if "dtype" in document else "torch_dtype"
        if self.precision != "keep":
            document[key] = self.precision if self.quantization is None else "bfloat16"
        elif key not in document:
            document[key] = self.source.form(self.source.entries["embedding.weight"]).dtype.name
        return document
