"""JSON Lines, plain or compressed: every line is parsed once when the corpus is opened, so errors come early."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import zstandard
from etils import epath

from deepseek_jax.data.config import Jsonl
from deepseek_jax.data.documents import Document, Documents, InMemory, SkipCounter, decode_utf8, digests_of, list_files
from deepseek_jax.data.errors import DataError

_PATTERNS = ("**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.zst")
_COMPRESSED = (".gz", ".zst")
_CHUNK = 1 << 20


def iterate_jsonl(source: Jsonl, skips: SkipCounter) -> Iterator[Document]:
    """Documents of all files in order, one line in memory at a time. Raises `DataError` with file and line."""
    for name, path in list_files(source.path, _PATTERNS, skips):
        for line, _, text in _iterate_file(path, source.field, skips):
            yield Document(f"{name}:{line}", text)


def open_jsonl(source: Jsonl) -> Documents:
    """All documents of `source` in random access."""
    skips = SkipCounter(source.on_error)
    files = list_files(source.path, _PATTERNS, skips)
    if any(path.suffix in _COMPRESSED for _, path in files):
        documents: Documents = InMemory(source.path, iterate_jsonl(source, skips))
    else:
        documents = _IndexedLines(source, files, skips)
    skips.report(source.path)
    return documents


class _IndexedLines(Documents):
    """Plain files: per document the file, the line's number and its offset; texts stay on disk."""

    def __init__(self, source: Jsonl, files: list[tuple[str, epath.Path]], skips: SkipCounter):
        self.name = source.path
        self._field = source.field
        self._files = files
        self.total_bytes = 0
        rows, ids = [], []
        for number, (name, path) in enumerate(files):
            for line, offset, text in _iterate_file(path, source.field, skips):
                rows.append((number, line, offset))
                ids.append(f"{name}:{line}")
                self.total_bytes += len(text.encode())
        self._rows = np.array(rows, np.int64).reshape(-1, 3)
        self.digests = digests_of(iter(ids))

    def __getitem__(self, index: int) -> Document:
        number, line, offset = (int(x) for x in self._rows[index])
        name, path = self._files[number]
        with path.open("rb") as file:
            file.seek(offset)
            data = file.readline()
        changed = DataError(f"{path}:{line}: the line is not what it was when the run began; was the file changed?")
        try:
            text = _text_of(data, self._field, f"{path}:{line}", offset)
        except DataError as error:
            raise changed from error
        if text is None:
            raise changed
        return Document(f"{name}:{line}", text)


def _iterate_file(path: epath.Path, field: str, skips: SkipCounter) -> Iterator[tuple[int, int, str]]:
    """`(line number from 1, byte offset, text)` of each document of one file. The offset counts unpacked bytes."""
    offset = 0
    for number, line in enumerate(_lines(path), start=1):
        try:
            text = _text_of(line, field, f"{path}:{number}", offset)
        except DataError as error:
            skips.broken(str(error))
        else:
            if text:  # blank lines and empty texts hold nothing to learn
                yield number, offset, text
        offset += len(line)


def _text_of(line: bytes, field: str, where: str, offset: int) -> str | None:
    """The text of one line, or None if the line is blank. Raises `DataError` that begins with `where`."""
    if not line.strip():
        return None
    content = decode_utf8(line, where, offset)
    try:
        record = json.loads(content.rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})".replace(" line 1 column", " column")) from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: holds a {type(record).__name__}, not an object with a field {field!r}")
    if field not in record:
        raise DataError(f"{where}: no field {field!r} (it has: {', '.join(map(str, record)) or 'none'})")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} holds a {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, UTF-8 cannot
        raise DataError(f"{where}: field {field!r} holds half a surrogate pair, which is no text") from None
    return text


def _lines(path: epath.Path) -> Iterator[bytes]:
    """Lines of a file with their ends, unpacked by suffix. Raises `DataError` if the packed data breaks off."""
    with path.open("rb") as file:
        if path.suffix == ".gz":
            yield from _unpack_errors(path, gzip.GzipFile(fileobj=file), "gzip")
        elif path.suffix == ".zst":
            yield from _unpack_errors(path, _split_lines(_zstd_chunks(file)), "zstd")
        else:
            yield from file


def _unpack_errors(path: epath.Path, lines: Iterator[bytes], kind: str) -> Iterator[bytes]:
    try:
        yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: the {kind} file is damaged or cut short ({error}); fetch it again") from None


def _zstd_chunks(file: BinaryIO) -> Iterator[bytes]:
    """Unpacked chunks of all frames. zstandard's own readers take a frame that breaks off for the end of the file."""
    unpack, inside = None, False
    while data := file.read(_CHUNK):
        while data:
            unpack = unpack or zstandard.ZstdDecompressor().decompressobj()
            inside = True
            yield unpack.decompress(data)
            data = unpack.unused_data if unpack.eof else b""
            if unpack.eof:
                unpack, inside = None, False
    if inside:
        raise EOFError("the last frame has no end")


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines with their ends, joined over chunk borders."""
    pending: list[bytes] = []
    for chunk in chunks:
        *whole, rest = chunk.split(b"\n")
        for piece in whole:
            yield b"".join([*pending, piece, b"\n"])
            pending = []
        if rest:
            pending.append(rest)
    if pending:
        yield b"".join(pending)
