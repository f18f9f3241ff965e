"""Paths as a user names them: checked before anything is read or written, so that an error is one clear line."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from deepseek_jax.config import ConfigError, require

# Cloud scheme -> (modules of which etils needs one, our extra that installs it).
_BACKENDS = {"gs": (("gcsfs", "tensorflow"), "gcs"), "s3": (("s3fs", "tensorflow"), "s3")}


def user_path(path: epath.PathLike, what: str) -> epath.Path:
    """`path` as the one path type of the project; a local one may begin with `~`.

    Args:
      path: a local path, `gs://…` or `s3://…`.
      what: names it in the message, such as "the tokenizer".

    Raises:
      ConfigError: a scheme that is not supported, or whose backend is not installed.
    """
    scheme, separator, _ = str(path).partition("://")
    if not separator:
        return epath.Path(path).expanduser()
    require(scheme in _BACKENDS, f"{what} cannot be at {path}: use a local path, gs://… or s3://…")
    modules, extra = _BACKENDS[scheme]
    require(
        any(importlib.util.find_spec(module) for module in modules),
        f"{what} at {path} needs {modules[0]}, which is not installed: pip install 'deepseek_jax[{extra}]'",
    )
    return epath.Path(path)


def local_path(path: epath.PathLike, what: str) -> epath.Path:
    """Like `user_path`, for what is appended to or read by C++: raises `ConfigError` if `path` is in the cloud."""
    require("://" not in str(path), f"{what} must be on a local or mounted disk, which {path} is not")
    return user_path(path, what)


def check_writable(folder: epath.PathLike, what: str) -> None:
    """Raises `ConfigError` unless files can be made in `folder`, or it in the nearest folder above that exists.

    Tried with a folder that is gone again at once, because permissions alone do not tell: root has all of them. What
    is in the cloud is taken on trust.
    """
    if "://" in str(folder):
        return
    there = Path(folder).absolute()
    try:
        while not _is_there(there):
            there = there.parent
        require(there.is_dir(), f"{what} cannot be at {folder}: {there} is not a folder; choose another place")
        tempfile.TemporaryDirectory(prefix=".deepseek_jax.", dir=there).cleanup()
    except OSError as error:
        reason = f"{there} takes no file ({error.strerror or error})"
        raise ConfigError(f"{what} cannot be at {folder}: {reason}; choose another place") from None


def write_aside(path: epath.PathLike, text: str) -> None:
    """Writes a file in UTF-8 beside its place, then moves it there: what dies on the way leaves no half of a file."""
    target = epath.Path(path)
    if target.is_dir():  # said as `open` says it; etils would leave out the number
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    partial = target.parent / f"{target.name}.{uuid.uuid4().hex}.partial"
    try:
        partial.write_bytes(text.encode())
        partial.replace(target)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: epath.PathLike, what: str) -> Iterator[Path]:
    """A folder that appears under its name only when it is whole: made aside, moved there at the end.

    Yields the folder to fill, which lies beside `path` and is gone if anything fails; the folders above are made.

    Raises:
      ConfigError: `path` is in the cloud, takes no folder, or something has that name, at the start or at the end.
    """
    target = Path(local_path(path, what))
    _require_free(target, what)
    check_writable(target, what)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        _require_free(target, what)  # the system would move it over an empty folder
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _require_free(path: Path, what: str) -> None:
    require(not _is_there(path), f"{what} {path} exists already; choose another name or remove it")


def _is_there(path: Path) -> bool:
    """Whether anything has this name, be it a link that leads nowhere."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
