"""Paths that cannot be used are refused in one line, wherever a user names one."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import pytest

from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.config_io import load_config, save_config
from deepseek_jax.data import ArrayRecord, Jsonl, Parquet, TextFiles, Tokenizer
from deepseek_jax.data.sources import open_documents
from deepseek_jax.paths import check_writable, local_path, user_path
from deepseek_jax.training import start
from deepseek_jax.training.checkpoint import CheckpointStore
from deepseek_jax.training.experiment import CheckpointConfig
from deepseek_jax.training.loop import train
from deepseek_jax.training.metrics import MetricsWriter
from experiments import tiny


@pytest.fixture
def no_backend(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.mark.parametrize(("scheme", "module", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_a_cloud_path_without_its_backend_names_the_extra(no_backend, scheme, module, extra):
    with pytest.raises(ConfigError) as error:
        user_path(f"{scheme}://bucket/a", "the tokenizer")
    assert str(error.value) == (
        f"the tokenizer at {scheme}://bucket/a needs {module}, which is not installed: "
        f"pip install 'deepseek_jax[{extra}]'"
    )


def test_a_cloud_path_with_its_backend_is_taken(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "gcsfs" or None)
    assert str(user_path("gs://bucket/a", "the tokenizer")) == "gs://bucket/a"


def test_an_unknown_scheme_is_refused():
    with pytest.raises(
        ConfigError, match=r"^the corpus cannot be at ftp://host/a: use a local path, gs://… or s3://…$"
    ):
        user_path("ftp://host/a", "the corpus")


def test_a_local_path_stays_as_it_is_but_for_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert Path(user_path("a/b", "the corpus")) == Path("a/b")
    assert Path(local_path("~/b", "the corpus")) == Path("/home/someone/b")


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (CheckpointStore, "the checkpoint folder"),
        (lambda path: open_documents(TextFiles(path=path)), "the corpus"),
        (lambda path: open_documents(Jsonl(path=path)), "the corpus"),
        (lambda path: open_documents(Parquet(path=path)), "the corpus"),
        (Tokenizer.load, "the tokenizer"),
        (lambda path: load_config(ModelConfig, path), "the config"),
        (lambda path: save_config(ModelConfig(), path), "the config"),
    ],
)
def test_what_may_be_in_the_cloud_says_what_it_needs(no_backend, use, what):
    with pytest.raises(ConfigError, match=rf"^{what} at gs://bucket/a needs gcsfs"):
        use("gs://bucket/a")


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (MetricsWriter, "the folder of the metrics"),
        (lambda path: open_documents(ArrayRecord(path=path)), "a tokenized corpus"),
        (lambda path: train(tiny.pretrain(), workdir=path), "the workdir"),
    ],
)
def test_what_must_be_local_says_so(use, what):
    with pytest.raises(ConfigError, match=rf"^{what} must be on a local or mounted disk, which gs://bucket/a is not$"):
        use("gs://bucket/a")


# --- folders to write to --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [".", "a", "a/b/c", "there", "there/a"])
def test_a_folder_that_takes_files_passes_and_nothing_of_the_trial_stays(tmp_path, folder):
    (tmp_path / "there").mkdir()
    check_writable(tmp_path / folder, "the workdir")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize("folder", ["file", "file/a/b", "link", "link/a"])
def test_a_file_or_a_broken_link_in_the_place_of_a_folder_is_named(tmp_path, folder):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ConfigError) as error:
        check_writable(tmp_path / folder, "the workdir")
    assert str(error.value) == (
        f"the workdir cannot be at {tmp_path / folder}: {tmp_path / folder.split('/')[0]} is not a folder; "
        "choose another place"
    )
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_takes_no_file_says_why(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"takes no file \(File name too long\)"):
        check_writable(tmp_path / ("long" * 99), "the checkpoint folder")

    def read_only(*arguments, **settings):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("os.mkdir", read_only)
    with pytest.raises(ConfigError) as error:
        check_writable(tmp_path / "a/b", "the checkpoint folder")
    assert str(error.value) == (
        f"the checkpoint folder cannot be at {tmp_path}/a/b: {tmp_path} takes no file (Read-only file system); "
        "choose another place"
    )


@pytest.mark.parametrize(
    ("workdir", "checkpoints", "message"),
    [
        ("file/run", None, "the workdir cannot be at {0}/file/run: {0}/file is not a folder"),
        ("run", "file/x", "the checkpoint folder cannot be at {0}/file/x: {0}/file is not a folder"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_tries_its_folders_before_it_reads_or_computes_anything(
    tmp_path, monkeypatch, workdir, checkpoints, message, resume
):
    def too_late(*arguments, **settings):
        raise AssertionError("the data was read first")

    monkeypatch.setattr(start, "make_tokenizer", too_late)
    (tmp_path / "file").touch()
    directory = checkpoints and str(tmp_path / checkpoints)
    experiment = dataclasses.replace(tiny.pretrain(), checkpoint=CheckpointConfig(directory=directory))
    with pytest.raises(ConfigError, match=f"^{message.format(tmp_path)}; choose another place$"):
        train(experiment, workdir=str(tmp_path / workdir), resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
