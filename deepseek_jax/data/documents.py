"""Documents: what every source offers, and how its files are found and read."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from absl import logging
from etils import epath

from deepseek_jax.data.errors import DataError
from deepseek_jax.paths import user_path

if TYPE_CHECKING:
    from deepseek_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Document:
    """One text with a stable identity: a relative path, or `file:line`, the same on every machine."""

    id: str
    text: str


def digest(document_id: str) -> int:
    """64 bits that depend on the identity alone: the split, the order and the random choices of a document."""
    return int.from_bytes(hashlib.blake2b(id_bytes(document_id), digest_size=8).digest(), "big")


def id_bytes(document_id: str) -> bytes:
    """An identity in bytes. Names of files are UTF-8 by custom only: the bytes of another name are kept as they are."""
    return document_id.encode("utf-8", "surrogateescape")


class Documents:
    """A corpus in random access. Subclasses set the three attributes and implement `__getitem__`."""

    name: str
    """How messages call it."""
    digests: np.ndarray
    """uint64 `[N]`: `digest` of every document's id."""
    total_bytes: int
    """Bytes of all texts in UTF-8: mixture weights are shares of it."""

    def __len__(self) -> int:
        return len(self.digests)

    def __getitem__(self, index: int) -> Document:
        raise NotImplementedError

    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        """The document's tokens, int32 `[n]`, without any special token."""
        return tokenizer.encode(self[index].text)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises `DataError` if the corpus was tokenized with another tokenizer. Text takes any."""


class InMemory(Documents):
    """Documents held as Python strings: sources that cannot be read from the middle."""

    def __init__(self, name: str, documents: Iterator[Document]):
        self.name = name
        self._documents = list(documents)
        self.digests = digests_of(document.id for document in self._documents)
        self.total_bytes = sum(len(document.text.encode()) for document in self._documents)

    def __getitem__(self, index: int) -> Document:
        return self._documents[index]


def digests_of(ids: Iterator[str]) -> np.ndarray:
    """uint64 `[N]`: `digest` of each id."""
    return np.fromiter((digest(i) for i in ids), dtype=np.uint64)


def decode_utf8(data: bytes, where: str, offset: int = 0) -> str:
    """Text of `data`, line ends untouched. Raises `DataError` with `where` and the byte offset in the file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        position = offset + error.start
        raise DataError(
            f"{where}: invalid UTF-8 at byte offset {position} (0x{data[error.start]:02x}); convert the file to UTF-8"
        ) from None


def list_files(path: str, patterns: tuple[str, ...], skips: SkipCounter) -> list[tuple[str, epath.Path]]:
    """`(relative name, path)` of a file, of a folder's files that match `patterns`, or of a glob's; sorted by name.

    Hidden files and folders are passed over, links are followed; `skips` takes folders that cannot be read. Raises
    `DataError` if there is nothing.
    """
    root = user_path(path, "the corpus")
    wildcard = next((i for i, part in enumerate(root.parts) if any(c in part for c in "*?[")), None)
    if wildcard is not None and not root.exists():
        patterns = ("/".join(root.parts[wildcard:]),)
        root = epath.Path(*root.parts[:wildcard]) if wildcard else epath.Path(".")
    elif not root.exists():
        raise DataError(f"{path}: no such file or folder")
    elif not root.is_dir():
        return [(root.name, root)]
    wanted = [pattern.split("/") for pattern in patterns]
    files = sorted(
        (name, file)
        for name, file in _walk(root, skips)
        if any(_matches(name.split("/"), pattern) for pattern in wanted)
    )
    if not files:
        raise DataError(f"{path}: no file matches {' or '.join(patterns)}")
    return files


def _walk(root: epath.Path, skips: SkipCounter) -> Iterator[tuple[str, epath.Path]]:
    """`(relative name, path)` of all files under `root` but hidden ones. (`epath` has no recursive glob.)"""
    for folder, names in _walk_cloud(root) if "://" in str(root) else _walk_local(str(root), skips):
        prefix = "" if folder == root else folder.relative_to(root).as_posix() + "/"
        yield from ((prefix + name, folder / name) for name in names if not name.startswith("."))


def _walk_cloud(root: epath.Path) -> Iterator[tuple[epath.Path, list[str]]]:
    for folder, subfolders, names in root.walk():
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield folder, names


def _walk_local(root: str, skips: SkipCounter) -> Iterator[tuple[epath.Path, list[str]]]:
    """Folders and the names of their files, links followed; a folder that has several names is read once.

    (`epath` follows links to folders in no version of Python, and passes over what it cannot read.)
    """

    def unreadable(error: OSError) -> None:
        skips.broken(f"{error.filename}: cannot be read ({error.strerror or error})")

    waiting, seen = [root], set()
    while waiting:  # links come after all folders, so that a folder keeps its own name where it has one
        for folder, subfolders, names in os.walk(waiting.pop(0), onerror=unreadable):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            paths = (os.path.join(folder, name) for name in subfolders)
            waiting += filter(os.path.islink, paths)  # which `os.walk` does not follow by itself
            yield epath.Path(folder), names


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a relative path fits a glob, both cut at `/`; `**` stands for any number of folders."""
    if not pattern or not parts:
        return not pattern and not parts
    if pattern[0] == "**":
        rest = pattern[1:] or ["*"]
        return any(_matches(parts[i:], rest) for i in range(len(parts)))
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


class SkipCounter:
    """What to do with a broken line or row: raise `DataError` at once, or count it and report at the end."""

    def __init__(self, on_error: str):
        self._raise = on_error == "raise"
        self.count = 0
        self.first = ""

    def broken(self, message: str) -> None:
        """Takes one broken piece, told as `file:line: what is wrong`."""
        if self._raise:
            raise DataError(message + "; on_error=skip leaves such documents out")
        self.first = self.first or message
        self.count += 1

    def report(self, name: str) -> None:
        """Warns how many were left out, if any."""
        if self.count:
            logging.warning("%s: left out %d broken documents, the first: %s", name, self.count, self.first)
