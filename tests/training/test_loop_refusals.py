"""What a run refuses: in the user's terms, before any array is made or read, and with every file left as it was."""

from __future__ import annotations

import dataclasses
import signal
import sys

import pytest
from etils import epath
from tiny_run import after_step, checkpoints, experiment, kill, quick_runs, records, train, write_texts

from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.config_io import load_config, save_config
from deepseek_jax.data import DataError, TextFiles, train_tokenizer
from deepseek_jax.training.checkpoint import CheckpointError, CheckpointStore
from deepseek_jax.training.experiment import CheckpointConfig, Experiment, LoggingConfig
from deepseek_jax.training.metrics import MetricsWriter
from deepseek_jax.training.start import check_folder
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
    with pytest.raises(CheckpointError, match=r"moments in bfloat16 .* go on with optimizer.moment_dtype=bfloat16"):
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


def test_a_resume_in_the_same_process_notices_that_its_texts_have_changed(base, tmp_path):
    texts = write_texts(tmp_path / "texts")
    config = dataclasses.replace(base, data=dataclasses.replace(base.data, sources=(TextFiles(path=str(texts)),)))
    with after_step(2, kill(signal.SIGTERM)):
        train(config, tmp_path / "run")
    for path in texts.iterdir():
        path.rename(path.with_stem(f"other_{path.stem}"))
    with pytest.raises(DataError, match="the training documents was"):
        train(config, tmp_path / "run", resume=True)


# --- checkpoints out of sight ---------------------------------------------------------------------------------------


def saving(base, every, directory=None):
    return dataclasses.replace(
        base, checkpoint=CheckpointConfig(every_steps=every, directory=directory and str(directory))
    )


def test_a_resume_that_does_not_see_its_checkpoints_leaves_the_curve(base, tmp_path):
    """A disk that is not mounted is an empty folder or none; beginning again would erase what was measured."""
    folder, elsewhere = tmp_path / "run", tmp_path / "disk"
    config = saving(base, 1, elsewhere)
    with after_step(2, kill(signal.SIGTERM)):
        train(config, folder)
    before = files_of(folder)
    elsewhere.rename(tmp_path / "unmounted")
    message = rf"metrics.jsonl reaches step 2 and was saved every 1 steps, but there is no checkpoint in {elsewhere}: "
    for there in (False, True):
        if there:
            elsewhere.mkdir()
        for resumed in (config, saving(base, 1000, elsewhere)):  # what counts is how often it did save itself
            with pytest.raises(CheckpointError, match=message):
                train(resumed, folder, resume=True)
    assert files_of(folder) == before
    elsewhere.rmdir()
    (tmp_path / "unmounted").rename(elsewhere)
    with after_step(3, kill(signal.SIGTERM)):
        assert train(config, folder, resume=True)[0].step == 3


@pytest.mark.parametrize(
    ("reached", "left", "is_lost"),
    [
        (10, None, False),  # a line is written before the save of its step begins
        (11, None, True),
        (11, "10.orbax-checkpoint-tmp", False),  # died while it saved for the first time
        (20, "10.orbax-checkpoint-tmp", False),
        (21, "10.orbax-checkpoint-tmp", True),  # the save of step 20 waited for that of step 10
    ],
)
def test_a_run_that_died_before_its_first_checkpoint_was_whole_may_begin_again(base, tmp_path, reached, left, is_lost):
    config, folder, store = saving(base, 10), epath.Path(tmp_path), CheckpointStore(tmp_path / "checkpoints")
    save_config(config, folder / "config.json")
    with MetricsWriter(folder, tensorboard=False) as writer:
        writer.write(reached, {"loss": 1.0}, tokens=reached)
    if left:
        (store.directory / left).mkdir(parents=True)
    if is_lost:
        with pytest.raises(CheckpointError, match=f"reaches step {reached} and was saved every 10 steps"):
            check_folder(config, folder, store, resume=True)
    else:
        check_folder(config, folder, store, resume=True)


def test_a_folder_that_holds_no_run_is_not_resumed(base, tmp_path):
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/tyop holds no run to resume; name its folder"):
        train(base, tmp_path / "tyop", resume=True)
    assert list(tmp_path.iterdir()) == []


def test_a_saved_config_finds_its_checkpoints_from_any_folder(base, tmp_path, monkeypatch):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    with after_step(2, kill(signal.SIGTERM)):
        train(saving(base, 1000, "saved"), tmp_path / "run")
    monkeypatch.chdir(tmp_path / "second")
    config = load_config(Experiment, tmp_path / "run" / "config.json")
    assert config.checkpoint.directory == str(tmp_path / "first" / "saved")
    with after_step(3, kill(signal.SIGTERM)):
        assert train(config, tmp_path / "run", resume=True)[0].step == 3
    assert [line["step"] for line in records(tmp_path / "run", "train")] == [1, 2, 3]
    assert list((tmp_path / "second").iterdir()) == []


# --- a model of a user's own ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnModel(ModelConfig):
    """A user's config with a field more."""

    remark: str = "none"


def test_a_model_config_of_a_class_of_its_own_resumes_and_its_fields_are_compared(base, tmp_path):
    def with_remark(remark):
        fields = {field.name: getattr(base.model, field.name) for field in dataclasses.fields(base.model)}
        return dataclasses.replace(base, model=OwnModel(**fields, remark=remark))

    with after_step(2, kill(signal.SIGTERM)):
        train(with_remark("one"), tmp_path)
    with pytest.raises(CheckpointError, match=r"meta.model.remark is 'one' there and 'two' here"):
        train(with_remark("two"), tmp_path, resume=True)
    with after_step(3, kill(signal.SIGTERM)):
        assert train(with_remark("one"), tmp_path, resume=True)[0].step == 3


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
