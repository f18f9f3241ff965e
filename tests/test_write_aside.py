"""A file is written beside its place and moved there: whole, or as it was."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from etils import epath

from deepseek_jax.paths import write_aside


def test_the_file_is_utf8_and_nothing_else_stays(tmp_path):
    for text in ("größer\n", "new"):
        write_aside(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_bytes() == text.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_leaves_the_old_file_and_no_half_of_the_new_one(tmp_path, monkeypatch):
    write_aside(tmp_path / "a.txt", "old")

    def write_half(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(epath.Path(".")), "write_bytes", write_half)
    with pytest.raises(OSError, match="No space left"):
        write_aside(str(tmp_path / "a.txt"), "new and longer")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old"}


def test_a_folder_in_its_place_is_told_as_by_the_system(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(IsADirectoryError, match=rf"Is a directory: '{tmp_path}/a.txt'$") as told:
        write_aside(tmp_path / "a.txt", "text")
    assert told.value.errno == errno.EISDIR
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
