"""The safetensors format: what indexes and headers say, checked, and the header of a file to be written.

A file is the length of its header (uint64, little-endian), the header (JSON: by tensor its dtype, shape and byte range,
counted from the header's end) and the tensors, without gaps.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from deepseek_jax.interop.errors import InteropError
from deepseek_jax.wording import first_few

INDEX = "model.safetensors.index.json"
"""The file that says which shard holds which tensor."""

DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
    }.items()
}
"""By what the format calls it the dtype of the arrays."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""By dtype what the format calls it."""
TensorForm = tuple[np.dtype, tuple[int, ...]]
"""Dtype and shape."""

_SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2")

_MAX_HEADER = 100_000_000  # bytes; the package refuses longer ones too
_MAX_DIMENSIONS = 32  # of an array in numpy 1


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a folder, without its data."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    offset: int
    """Where its data begins in `file`, in bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return nbytes_of(self.dtype, self.shape)


def nbytes_of(dtype: np.dtype, shape: Iterable[int]) -> int:
    """Bytes of the data of an array."""
    return math.prod(shape) * dtype.itemsize


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder without an index."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise unreadable(folder, error) from None
    found = [folder / name for name in names if name.endswith(".safetensors")]
    if found:
        return found
    pickles = [name for name in names if name.endswith((".pt", ".pth")) or fnmatch(name, "pytorch_model*.bin")]
    if pickles:
        raise InteropError(
            f"{folder}: only safetensors files are read, and {pickles[0]} is a pickle, which runs code when it is "
            "opened; fetch or make the safetensors form of the model"
        )
    raise InteropError(f"{folder}: there is no safetensors file")


def read_index(folder: Path) -> dict[str, list[str]] | None:
    """By file name the tensors that the index of `folder` puts there; None without an index. All files exist."""
    if not os.path.isdir(folder):
        what = "not a folder; name the one it is in" if os.path.lexists(folder) else "no such folder"
        raise InteropError(f"{folder}: {what}")
    path = folder / INDEX
    if not os.path.lexists(path):
        return None
    try:
        index = _parse_json(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise InteropError(f"{path}: not valid JSON ({error})") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InteropError(f"{path}: has no weight_map, which says which file holds which tensor")
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\\0"):
            raise InteropError(
                f"{path}: tensor {name!r} is in {reprlib.repr(file)}, which is not a file of this folder"
            )
        files.setdefault(file, []).append(name)
    missing = sorted(file for file in files if not os.path.exists(folder / file))
    if missing:
        held = sum(len(files[file]) for file in missing)
        raise InteropError(
            f"{folder}: {len(missing)} of {len(files)} files of the index are missing, with {held} of "
            f"{len(weight_map)} tensors: {first_few(map(repr, missing))}; fetch the rest"
        )
    return files


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors, in the order of their data, and metadata of a file, whose size agrees with them."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            _check_length(path, start, length, size)
            text = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(text) < length:
        raise InteropError(f"{path}: truncated inside its header; fetch it again")
    try:
        header = _parse_json(text) if text.startswith(b"{") else None
    except (ValueError, RecursionError) as error:
        raise InteropError(f"{path}: the header is not valid JSON ({error})") from None
    if header is None:
        raise InteropError(f"{path}: not a safetensors file: its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InteropError(f"{path}: __metadata__ must map text to text")
    tensors = [_tensor(path, 8 + length, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    _check_coverage(path, tensors, 8 + length, size)
    return {info.name: info for info in tensors}, metadata


def _check_length(path: Path, start: bytes, length: int, size: int) -> None:
    """Raises unless a header of `length` bytes can follow `start`, the first 8 bytes of a file of `size` bytes."""
    if start == b"version ":
        raise InteropError(f"{path}: only a Git LFS pointer; fetch the file itself with `git lfs pull`")
    if len(start) < 8:
        raise InteropError(f"{path}: truncated: the file has {size} bytes, too few for a safetensors file")
    if length > min(_MAX_HEADER, size - 8):
        raise InteropError(
            f"{path}: truncated or not a safetensors file: it has {size} bytes and says that its header has {length} "
            f"(at most {_MAX_HEADER} are read)"
        )


def _tensor(path: Path, data_start: int, name: str, entry: Any) -> TensorInfo:
    """The tensor of one entry of a header, whose data starts at `data_start`; checked by itself."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise InteropError(f"{where}: its entry in the header is not an object")
    kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if isinstance(kind, str) and kind in _SUB_BYTE:
        raise InteropError(f"{where} is {kind}, whose values are smaller than a byte; such dtypes are not supported")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise InteropError(f"{where}: unknown dtype {reprlib.repr(kind)} (known: {', '.join(DTYPES)})")
    if not _are_sizes(shape):
        raise InteropError(f"{where}: shape {reprlib.repr(shape)} is not a list of sizes")
    dtype = DTYPES[kind]
    if len(shape) > _MAX_DIMENSIONS or math.prod(filter(None, shape)) * dtype.itemsize >= 1 << 63:
        raise InteropError(f"{where}: shape {reprlib.repr(shape)} is more than an array can have")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise InteropError(f"{where}: data_offsets {reprlib.repr(offsets)} are not two positions")
    begin, end = offsets
    if end - begin != nbytes_of(dtype, shape):
        raise InteropError(
            f"{where}: {kind} of shape {shape} has {nbytes_of(dtype, shape)} bytes, and its data_offsets "
            f"{reprlib.repr(offsets)} hold another number"
        )
    return TensorInfo(name, tuple(shape), dtype, path, data_start + begin)


def _check_coverage(path: Path, tensors: Iterable[TensorInfo], data_start: int, size: int) -> None:
    """Raises unless `tensors`, sorted, fill a file of `size` bytes from `data_start` on, each byte once."""
    end = data_start
    for info in tensors:
        if info.offset != end:
            problem = "overlaps the one before it" if info.offset < end else "leaves a hole before it"
            raise InteropError(f"{path}: tensor {info.name!r} {problem}: it begins at {info.offset}, not {end}")
        end += info.nbytes
    if size < end:
        raise InteropError(f"{path}: truncated: the file has {size} bytes, its header describes {end}; fetch it again")
    if size > end:
        raise InteropError(f"{path}: the file has {size} bytes, its header describes {end}; fetch it again")


def make_header(ranges: Mapping[str, tuple[TensorForm, tuple[int, int]]], metadata: Mapping[str, str]) -> bytes:
    """The start of a file, up to its data: by tensor its form and byte range. Its length is a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, ((dtype, shape), data_offsets) in ranges.items():
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": data_offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse_json(data: bytes) -> Any:
    """JSON in UTF-8. Raises `ValueError`, also for a name that an object has twice, or `RecursionError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise ValueError(f"{twice!r} is there twice")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether `value` is a list of integers that are sizes or positions."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def unreadable(path: Path, error: OSError) -> InteropError:
    """What is said of a file or folder that the system does not give."""
    return InteropError(f"{path}: cannot be read ({error.strerror or error})")
