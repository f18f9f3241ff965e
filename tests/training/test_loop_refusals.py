"""What a run refuses: in the user's terms, before any array is made or read, and with every file left as it was."""

from __future__ import annotations

import dataclasses
import signal
import sys

import pytest
from tiny_run import after_step, checkpoints, experiment, kill, quick_runs, train, write_texts

from deepseek_jax.config import ConfigError
from deepseek_jax.data import TextFiles, train_tokenizer
from deepseek_jax.training.checkpoint import CheckpointError, CheckpointStore
from deepseek_jax.training.experiment import LoggingConfig
from deepseek_jax.training.step import Trainer


@pytest.fixture(scope="module", autouse=True)
def base(tmp_path_factory):
    """The experiment that the tests of this file spoil."""
    with quick_runs():
        yield experiment(write_texts(tmp_path_factory.mktemp("texts")))


@pytest.fixture(scope="module")
def stopped(base, tmp_path_factory):
    """The folder of a run that was stopped after two steps."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with after_step(2, kill(signal.SIGTERM)):
        train(base, folder)
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def nowhere(base):
    return dataclasses.replace(base, data=dataclasses.replace(base.data, sources=(TextFiles(path="/nowhere"),)))


def with_tokenizer(base, path):
    return dataclasses.replace(base, tokenizer=dataclasses.replace(base.tokenizer, path=str(path)))


# --- a start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["checkpoints", "metrics.jsonl"])
def test_a_run_never_starts_over_in_another_ones_folder(base, stopped, tmp_path, left):
    other = tmp_path / "other"
    other.mkdir()
    (other / left).symlink_to(stopped / left)
    with pytest.raises(ConfigError, match=rf"{left} holds another run's data; resume that run or use another folder"):
        train(base, other)
    assert [path.name for path in other.iterdir()] == [left]


def test_a_start_is_refused_before_any_array_is_made_and_leaves_no_folder(base, stopped, tmp_path, monkeypatch):
    def too_late(self, seed):
        raise AssertionError("the weights were drawn first")

    monkeypatch.setattr(Trainer, "initial_state", too_late)
    monkeypatch.setitem(sys.modules, "wandb", None)
    logged = dataclasses.replace(base, logging=LoggingConfig(tensorboard=False, wandb="project"))
    named = with_tokenizer(base, stopped / "tokenizer.json")
    small = dataclasses.replace(named, model=dataclasses.replace(base.model, vocab_size=290))
    for wrong, message in (
        (logged, "logging to Weights & Biases needs its package"),
        (nowhere(base), "/nowhere"),
        (small, "has 300 tokens, and model.vocab_size is 290"),
    ):
        with pytest.raises(ValueError, match=message):
            train(wrong, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


# --- a resume -------------------------------------------------------------------------------------------------------


def test_a_resume_that_is_refused_leaves_the_run_as_it_was(base, stopped, monkeypatch):
    before, kept = files_of(stopped), checkpoints(stopped)
    moments = dataclasses.replace(base, optimizer=dataclasses.replace(base.optimizer, moment_dtype="float32"))
    with pytest.raises(CheckpointError, match=r"optimizer.0.mu/\S+ \(bfloat16.* saved, float32.* wanted\)"):
        train(moments, stopped, resume=True)

    def too_late(self, *arguments, **settings):
        raise AssertionError("the arrays were read first")

    monkeypatch.setattr(CheckpointStore, "restore", too_late)
    wider = dataclasses.replace(base, model=dataclasses.replace(base.model, hidden_size=48))
    for wrong, message in (
        (wider, "does not fit this run: meta.model.hidden_size is 32 there and 48 here"),
        (dataclasses.replace(base, seed=1), "seed was 0 and is now 1"),
        (nowhere(base), "/nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            train(wrong, stopped, resume=True)
    assert files_of(stopped) == before
    assert checkpoints(stopped) == kept


# --- a tokenizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_a_tokenizer_whose_path_cannot_be_used_is_refused(base, stopped, tmp_path, resume):
    """Also where a run has a copy of its own, which takes the place of a file that is gone."""
    before = files_of(stopped)
    with pytest.raises(ConfigError, match=r"^the tokenizer cannot be at ftp://host/tokenizer.json: use a local path"):
        train(with_tokenizer(base, "ftp://host/tokenizer.json"), stopped if resume else tmp_path / "new", resume=resume)
    assert files_of(stopped) == before
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_is_noticed_wherever_it_lies(base, stopped, tmp_path, monkeypatch):
    """A path from the home folder is looked up there, or the run's copy would be taken for it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    train_tokenizer(["another text, and another again"] * 9, vocab_size=290).save(tmp_path / "other.json")
    with pytest.raises(CheckpointError, match="was made with another tokenizer"):
        train(with_tokenizer(base, "~/other.json"), stopped, resume=True)
