"""Folders of safetensors files, read and written one tensor at a time.

This is not the `safetensors` package, because that one maps files, whose pages then count as memory of the process, and
cannot write a file whose tensors come one after another.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from deepseek_jax.interop.errors import InteropError
from deepseek_jax.interop.safetensors_format import (
    INDEX,
    NAMES,
    TensorForm,
    TensorInfo,
    find_files,
    make_header,
    nbytes_of,
    read_header,
    read_index,
    unreadable,
)
from deepseek_jax.wording import first_few

__all__ = ["INDEX", "FolderWriter", "TensorFolder", "TensorInfo"]

_IO_BYTES = 1 << 30  # per system call: Linux stops below 2 GiB, others refuse more
_COPY_BYTES = 64 << 20
_METADATA = MappingProxyType({"format": "pt"})


class TensorFolder(Mapping[str, TensorInfo]):
    """The tensors of a folder of safetensors files: all headers are read and checked, data only when asked for.

    With a `model.safetensors.index.json` these are the files that it names, otherwise all `*.safetensors`. Reading from
    several threads is fine; closing while one of them reads is not.

    Args:
      folder: a local path.

    Raises:
      InteropError: a folder or file that is missing, damaged, or at odds with the index.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        """`__metadata__` of all files; where two differ, the later file's."""
        self._open: dict[Path, int] | None = {}
        self._lock = threading.Lock()
        index = read_index(self.folder)
        for file in find_files(self.folder) if index is None else [self.folder / name for name in sorted(index)]:
            tensors, metadata = read_header(file)
            if index is not None:
                _check_against_index(file, set(tensors), set(index[file.name]))
            for name in tensors:
                if name in self.tensors:
                    raise InteropError(f"{file}: tensor {name!r} is in {self.tensors[name].file.name} too")
            self.tensors |= tensors
            self.metadata |= metadata
        self.total_bytes = sum(info.nbytes for info in self.tensors.values())
        """Bytes of all tensors' data."""

    def __getitem__(self, name: str) -> TensorInfo:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor as a new array that may be written to; with `rows`, that range of its first dimension only.

        Raises `InteropError` if there is no such tensor, or its file cannot be read or has become shorter.
        """
        if name not in self.tensors:
            raise InteropError(f"{self.folder}: there is no tensor {name!r}")
        info = self.tensors[name]
        shape, offset = info.shape, info.offset
        if rows is not None:
            if not shape:
                raise ValueError(f"{name!r} is a scalar and has no rows")
            start, stop, step = rows.indices(shape[0])
            if step != 1:
                raise ValueError(f"rows must be a range without steps, not {rows}")
            offset += start * nbytes_of(info.dtype, shape[1:])
            shape = (max(stop - start, 0), *shape[1:])
        array = np.empty(shape, info.dtype)
        try:
            self._read_into(info.file, _bytes_of(array), offset)
        except OSError as error:
            raise unreadable(info.file, error) from None
        if info.dtype == np.bool_ and (array.view(np.uint8) > 1).any():
            raise InteropError(f"{info.file}: tensor {name!r} is BOOL and holds bytes that are neither 0 nor 1")
        return array

    def _read_into(self, path: Path, data: memoryview, offset: int) -> None:
        """Fills `data` from the bytes of a file at `offset`."""
        file = self._descriptor(path)
        done = 0
        while done < len(data):
            count = os.preadv(file, [data[done : done + _IO_BYTES]], offset + done)
            if count == 0:
                raise InteropError(f"{path}: truncated: the file ends at byte {offset + done}; fetch it again")
            done += count

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if self._open is None:
                raise ValueError(f"{self.folder}: read after it was closed")
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
            return self._open[path]

    def close(self) -> None:
        """Closes the files; nothing can be read afterwards."""
        with self._lock:
            files, self._open = self._open or {}, None
        for file in files.values():
            os.close(file)

    def __enter__(self) -> TensorFolder:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()


def _check_against_index(file: Path, tensors: set[str], named: set[str]) -> None:
    """Raises unless the `tensors` in `file` are the `named` ones, which the index puts there."""
    if lacking := sorted(named - tensors):
        raise InteropError(
            f"{file}: lacks {len(lacking)} of the {len(named)} tensors that the index puts there: "
            f"{first_few(map(repr, lacking))}"
        )
    if left_over := sorted(tensors - named):
        raise InteropError(
            f"{file}: the index does not put {len(left_over)} of its {len(tensors)} tensors there: "
            f"{first_few(map(repr, left_over))}"
        )


@dataclasses.dataclass
class _Shard:
    """A file to be written: its tensors' byte ranges, counted from the header's end, and where that is."""

    name: str
    ranges: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    nbytes: int = 0
    waiting: int = 0
    """Tensors not written yet."""
    file: int | None = None
    data_start: int = 0


class FolderWriter:
    """Writes tensors into the shards of a folder as they come, in any order, and holds none of them.

    A shard is opened for its first tensor, in its full size, and closed after its last. Use as a context manager:
    leaving it without an error is `close`.

    Args:
      folder: exists, and has none of the files yet.
      tensors: by name dtype and shape, in the order in which they lie in the shards.
      shard_bytes: of data per shard; a tensor is never split, so a larger one has a shard of its own.
      metadata: goes into each header; `{"format": "pt"}` is what transformers asks for.

    Raises:
      InteropError: a name or a dtype that the format does not have.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tensors: Mapping[str, tuple[Any, tuple[int, ...]]],
        *,
        shard_bytes: int = 5_000_000_000,
        metadata: Mapping[str, str] = _METADATA,
    ):
        self._folder = Path(folder)
        self._tensors: dict[str, TensorForm] = {
            name: (np.dtype(dtype), tuple(shape)) for name, (dtype, shape) in tensors.items()
        }
        self._metadata = dict(metadata)
        self._shards = _plan(self._folder, self._tensors, shard_bytes)
        self._shard_of = {name: shard for shard in self._shards for name in shard.ranges}
        self._rows: dict[str, np.ndarray] = {}  # of tensors written in part, bool [rows]: which are there
        self._written: set[str] = set()

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes a whole tensor. Raises `ValueError` if it is not as announced, or there already."""
        self._check(name, array, whole=True)
        if name in self._rows:
            raise ValueError(f"{name!r} was written in part before")
        self._put(name, array, 0)
        self._finish(name)

    def write_rows(self, name: str, start: int, array: np.ndarray) -> None:
        """Writes rows `start` to `start + len(array)` of a tensor's first dimension; each row must come once."""
        self._check(name, array, whole=False)
        dtype, shape = self._tensors[name]
        stop = start + len(array)
        if not 0 <= start <= stop <= shape[0]:
            raise ValueError(f"{name!r} has {shape[0]} rows, and not {start} to {stop}")
        rows = self._rows.setdefault(name, np.zeros(shape[0], np.bool_))
        if rows[start:stop].any():
            raise ValueError(f"{name!r}: a row of {start} to {stop} was written before")
        self._put(name, array, start * nbytes_of(dtype, shape[1:]))
        rows[start:stop] = True
        if rows.all():
            self._finish(name)

    def close(self) -> None:
        """Writes the index, if there are several shards. Raises `InteropError` if a tensor was never written."""
        self._close_files()
        missing = [name for name in self._tensors if name not in self._written]
        if missing:
            raise InteropError(
                f"{self._folder}: {len(missing)} of {len(self._tensors)} tensors were never written: "
                f"{first_few(map(repr, missing))}"
            )
        if len(self._shards) > 1:
            total = sum(shard.nbytes for shard in self._shards)
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: shard.name for name, shard in self._shard_of.items()},
            }
            (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _check(self, name: str, array: np.ndarray, *, whole: bool) -> None:
        if name not in self._tensors:
            raise ValueError(f"{name!r} is none of the tensors to write")
        if name in self._written:
            raise ValueError(f"{name!r} was written before")
        dtype, shape = self._tensors[name]
        if not whole and not shape:
            raise ValueError(f"{name!r} is a scalar and has no rows")
        compared = 0 if whole else 1
        if array.dtype != dtype or array.ndim != len(shape) or array.shape[compared:] != shape[compared:]:
            raise ValueError(f"{name!r} is {dtype}{list(shape)}, and {array.dtype}{list(array.shape)} came")

    def _put(self, name: str, array: np.ndarray, offset: int) -> None:
        """Writes `array` at `offset` (bytes) of the tensor's data."""
        shard = self._shard_of[name]
        file = self._open(shard) if shard.file is None else shard.file
        position = shard.data_start + shard.ranges[name][0] + offset
        for piece in _pieces(array):
            _write_all(file, _bytes_of(piece), position)
            position += piece.nbytes

    def _open(self, shard: _Shard) -> int:
        """Makes the shard's file, with its header and its full size; there is none if that fails."""
        start = make_header(
            {name: (self._tensors[name], limits) for name, limits in shard.ranges.items()}, self._metadata
        )
        path = self._folder / shard.name
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _reserve(file, len(start) + shard.nbytes)
            _write_all(file, start, 0)
        except BaseException:
            os.close(file)
            path.unlink()
            raise
        shard.file, shard.data_start = file, len(start)
        return file

    def _finish(self, name: str) -> None:
        self._rows.pop(name, None)
        self._written.add(name)
        shard = self._shard_of[name]
        shard.waiting -= 1
        if not shard.waiting:
            self._close_file(shard)

    def _close_file(self, shard: _Shard) -> None:
        file, shard.file = shard.file, None
        if file is not None:
            os.close(file)

    def _close_files(self) -> None:
        for shard in self._shards:
            self._close_file(shard)

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.close()
        else:
            self._close_files()


def _plan(folder: Path, tensors: Mapping[str, TensorForm], shard_bytes: int) -> list[_Shard]:
    """The shards of `tensors`, filled in order."""
    if not tensors or shard_bytes < 1:
        raise ValueError(f"{folder}: needs a tensor to write, and shards of at least 1 byte, not {shard_bytes}")
    shards = [_Shard("")]
    for name, (dtype, shape) in tensors.items():
        if dtype not in NAMES:
            raise InteropError(f"{folder}: tensor {name!r} is {dtype}, which safetensors files cannot hold")
        if name == "__metadata__":
            raise InteropError(f"{folder}: a tensor cannot be named {name!r}; the format has that name for itself")
        size = nbytes_of(dtype, shape)
        if shards[-1].nbytes and shards[-1].nbytes + size > shard_bytes:
            shards.append(_Shard(""))
        shard = shards[-1]
        shard.ranges[name] = (shard.nbytes, shard.nbytes + size)
        shard.nbytes += size
        shard.waiting += 1
    for number, shard in enumerate(shards, 1):
        place = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        shard.name = f"model{place}.safetensors"
    return shards


def _reserve(file: int, size: int) -> None:
    """Gives an open file its full size, and the space for it where the system can: a full disk shows at once."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(file, size)


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """`array` in order as contiguous arrays; where it has to be copied, at most `_COPY_BYTES` at once."""
    if array.flags.c_contiguous:
        yield array
    elif array.nbytes <= _COPY_BYTES:
        yield np.ascontiguousarray(array)
    elif rows := _COPY_BYTES // (array.nbytes // len(array)):
        for start in range(0, len(array), rows):
            yield np.ascontiguousarray(array[start : start + rows])
    else:
        for row in array:
            yield from _pieces(row)


def _bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array, as bytes."""
    return array.reshape(-1).view(np.uint8).data


def _write_all(file: int, data: bytes | memoryview, position: int) -> None:
    """Writes all of `data` at `position`."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done : done + _IO_BYTES], position + done)
