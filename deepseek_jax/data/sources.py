"""From a source's config to its documents: all in random access, or one after the other."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator

from etils import epath

from deepseek_jax.data.array_record import open_array_record
from deepseek_jax.data.config import ArrayRecord, Jsonl, Parquet, Source, StandardLibrary, TextFiles
from deepseek_jax.data.documents import Document, Documents, SkipCounter, decode_utf8, digests_of, list_files
from deepseek_jax.data.errors import DataError
from deepseek_jax.data.jsonl import iterate_jsonl, open_jsonl
from deepseek_jax.data.parquet import iterate_parquet, open_parquet

# Tests are not in every install, installed packages differ from machine to machine, and the rest is made at build time.
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
_GENERATED = ("_sysconfigdata", "config-")


def open_documents(source: Source) -> Documents:
    """The documents of `source` in random access. Raises `DataError` if it is missing, empty or broken."""
    documents: Documents
    match source:
        case StandardLibrary():
            documents = _open_files("the standard library", _standard_library(), SkipCounter("skip"))
        case TextFiles():
            skips = SkipCounter(source.on_error)
            documents = _open_files(source.path, list_files(source.path, (source.glob,), skips), skips)
        case Jsonl():
            documents = open_jsonl(source)
        case Parquet():
            documents = open_parquet(source)
        case ArrayRecord():
            documents = open_array_record(source)
        case _:
            raise TypeError(f"unknown source {source!r}")
    if len(documents) == 0:
        raise DataError(f"{documents.name}: holds no text")
    return documents


def stream_documents(source: Source) -> Iterator[Document]:
    """The documents of `source` in order, without holding them: for corpora larger than memory."""
    if isinstance(source, Jsonl | Parquet):
        skips = SkipCounter(source.on_error)
        yield from iterate_jsonl(source, skips) if isinstance(source, Jsonl) else iterate_parquet(source, skips)
        skips.report(source.path)
    else:
        documents = open_documents(source)
        yield from (documents[i] for i in range(len(documents)))


def _open_files(name: str, files: list[tuple[str, epath.Path]], skips: SkipCounter) -> Documents:
    documents = _Files(name, files, skips)
    skips.report(name)
    return documents


class _Files(Documents):
    """One document per file, read when asked for, and once before, so that errors come early."""

    def __init__(self, name: str, files: list[tuple[str, epath.Path]], skips: SkipCounter):
        self.name = name
        self._files = []
        self.total_bytes = 0
        for file in files:
            try:
                data = _read(file[1])
                decode_utf8(data, str(file[1]))
            except DataError as error:
                skips.broken(str(error))
            else:
                if data:
                    self._files.append(file)
                    self.total_bytes += len(data)
        self.digests = digests_of(name for name, _ in self._files)

    def __getitem__(self, index: int) -> Document:
        name, path = self._files[index]
        data = _read(path)
        try:
            return Document(name, decode_utf8(data, str(path)))
        except DataError as error:
            raise DataError(f"{path}: the file is not what it was when the run began; was it changed?") from error


def _read(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _standard_library() -> list[tuple[str, epath.Path]]:
    """`(relative name, path)` of the library's sources, sorted by name."""
    root = sysconfig.get_paths()["stdlib"]
    files = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY and not name.startswith(_GENERATED)]
        for name in names:
            if name.endswith(".py") and not name.startswith(_GENERATED):
                path = os.path.join(folder, name)
                files[os.path.relpath(path, root).replace(os.sep, "/")] = epath.Path(path)
    if not files:
        raise DataError(f"{root}: this Python comes without its library's source; name another source in data.sources")
    return sorted(files.items())
