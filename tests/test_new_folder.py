"""A folder is made aside and moved to its name: whole, or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.paths import new_folder


def test_it_appears_under_its_name_at_the_end_and_not_before(tmp_path):
    target = tmp_path / "above" / "new"
    with new_folder(target, "the model") as folder:
        assert isinstance(folder, Path)
        assert folder.parent == target.parent
        assert folder.name.startswith(".new.")
        assert folder.name.endswith(".partial")
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("text")
        assert not target.exists()
    assert [path.relative_to(target) for path in sorted(target.rglob("*"))] == [Path("sub"), Path("sub/a")]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_of_one_that_fails(tmp_path, error):
    def fill() -> None:
        with new_folder(str(tmp_path / "new"), "the model") as folder:
            (folder / "a").write_text("text")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        fill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_what_has_the_name_already_is_kept(tmp_path, kind):
    target = tmp_path / "new"
    make = {"folder": target.mkdir, "file": target.touch, "broken link": lambda: target.symlink_to("nowhere")}[kind]
    message = f"^the model {target} exists already; choose another name or remove it$"

    def fill() -> None:
        with new_folder(target, "the model") as folder:
            (folder / "a").write_text("text")
            make()

    with pytest.raises(ConfigError, match=message):
        fill()  # it comes meanwhile
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(ConfigError, match=message), new_folder(target, "the model"):
        raise AssertionError("begun although the name is taken")
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_that_takes_no_folder_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    for path, message in (
        ("gs://bucket/new", "the model must be on a local or mounted disk, which gs://bucket/new is not"),
        (tmp_path / "file/new", f"the model cannot be at {tmp_path}/file/new: {tmp_path}/file is not a folder; "),
    ):
        with pytest.raises(ConfigError, match=message), new_folder(path, "the model"):
            raise AssertionError("begun although there is no place for it")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_path_may_begin_with_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with new_folder("~/new", "the model"):
        pass
    assert (tmp_path / "new").is_dir()


def test_the_folder_has_the_rights_of_any_other(tmp_path):
    (tmp_path / "other").mkdir()
    with new_folder(tmp_path / "new", "the model"):
        pass
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "other").stat().st_mode
