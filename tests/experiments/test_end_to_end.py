"""The command line with a real run behind it: start, start again, trace, stop, and every refusal in one line."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import types

import jax
import orbax.checkpoint as ocp
import pytest
from tiny_run import (
    LENGTH,
    after_step,
    assert_same_arrays,
    checkpoint,
    checkpoints,
    experiment,
    quick_runs,
    records,
    write_texts,
)

from deepseek_jax.config_io import diff, from_dict, leaves, load_config, save_config, to_dict
from deepseek_jax.data import Tokenizer, train_documents, train_tokenizer
from deepseek_jax.training import loop
from deepseek_jax.training.experiment import CheckpointConfig, Experiment
from deepseek_jax.training.metrics import MetricsWriter
from deepseek_jax.training.schedules import constant
from experiments import run, small, tiny

STEPS = 6


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with texts and a saved config of six steps; what runs there is compiled once."""
    folder = tmp_path_factory.mktemp("home")
    base = experiment(write_texts(folder / "texts"))
    schedule = dataclasses.replace(
        base.schedule, total_tokens=STEPS * 4 * LENGTH, batch_rows=constant(4.0), learning_rate=constant(1.0)
    )
    # Unlike the other files' runs, so that its step is compiled here: the trace shows the names of what was compiled.
    optimizer = dataclasses.replace(base.optimizer, moment_dtype="float32")
    base = dataclasses.replace(
        base, schedule=schedule, optimizer=optimizer, checkpoint=CheckpointConfig(every_steps=2, keep_last=9)
    )
    save_config(base, folder / "config.json")
    with quick_runs() as patch:
        patch.setattr(loop, "finish_run", lambda *arguments, heldout, **settings: heldout)
        yield types.SimpleNamespace(folder=folder, base=base, config=str(folder / "config.json"))


@pytest.fixture(scope="module")
def first(home):
    """A run of the command line, traced."""
    folder = home.folder / "first"
    assert run.main(["--config", home.config, "--workdir", str(folder), "--profile=2:3"]) == 0
    jax.config.update("jax_compilation_cache_include_metadata_in_key", False)  # as a traced run leaves it on
    return folder


@pytest.fixture
def stopped(home, tmp_path):
    """A run that was stopped after three steps."""
    with after_step(3, kill(signal.SIGTERM)):
        assert run.main(["--config", home.config, "--workdir", str(tmp_path / "stopped")]) == 143
    return tmp_path / "stopped"


def kill(number, times=1):
    def action(state):
        for _ in range(times):
            os.kill(os.getpid(), number)

    return action


def refused(capsys, *argv, code=1):
    """The one line that says why."""
    capsys.readouterr()
    assert run.main([str(argument) for argument in argv]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("resuming with ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


# --- a run and what it leaves ---------------------------------------------------------------------------------------


def test_a_run_leaves_its_config_tokenizer_curve_and_checkpoints(home, first):
    assert {path.name for path in first.iterdir()} == {
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "profile",
        "tokenizer.json",
    }
    assert load_config(Experiment, first / "config.json") == home.base
    assert [line["step"] for line in records(first, "train")] == list(range(1, STEPS + 1))
    assert checkpoints(first) == [2, 4, 6]
    _, documents = checkpoint(first, STEPS)
    assert from_dict(Experiment, documents["config"]) == home.base, "a checkpoint says of what run it is"


def test_a_saved_config_starts_the_same_run_again(first, home):
    folder = home.folder / "again"
    assert run.main(["--config", str(first / "config.json"), "--workdir", str(folder)]) == 0
    assert records(folder, "train") == records(first, "train")
    assert records(folder, "eval") == records(first, "eval")
    assert_same_arrays(checkpoint(folder, STEPS)[0], checkpoint(first, STEPS)[0])


def test_another_seed_is_another_run(first, home):
    folder = home.folder / "seed"
    argv = ["--config", str(first / "config.json"), "--workdir", str(folder), "--set", "seed=1"]
    assert run.main(argv) == 0
    one, other = (records(f, "train") for f in (first, folder))
    assert all(a["loss"] != b["loss"] for a, b in zip(one, other, strict=True))


def test_print_config_shows_the_resolved_config_and_runs_nothing(first, home, capsys):
    before = sorted(path.name for path in home.folder.iterdir())
    argv = ["--config", str(first / "config.json"), "--print_config", "--set", "optimizer.peak_lr=0.5"]
    assert run.main(argv) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["*", "peak_lr", "0.5", "default"] in [line[:4] for line in shown]
    assert ["*", "hidden_size", "32", "default", "7_168"] in shown
    names = {line[1] if line[0] == "*" else line[0] for line in shown}
    assert {path.rpartition(".")[2] for path in leaves(home.base)} <= names
    assert sorted(path.name for path in home.folder.iterdir()) == before


def test_the_trace_shows_the_steps_and_names_the_model(first):
    """Operations carry the scopes of the model's code, forward and backward, and steps their numbers."""
    from jax.profiler import ProfileData

    (file,) = (first / "profile").rglob("*.xplane.pb")
    lines = [line for plane in ProfileData.from_file(str(file)).planes for line in plane.lines]
    events = [event for line in lines for event in line.events]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert steps == [2, 3]
    stats = [dict(event.stats) for event in events if "hlo_op" in dict(event.stats)]
    executed = {stat["hlo_op"] for stat in stats if "step" in stat["hlo_module"]}
    assert len(executed) > 100
    names = set(re.findall(rb"jit\([a-z_]*step\)/[ -~]*?(?=[^ -~])", file.read_bytes()))
    for scope in (b"attention", b"ffn", b"router", b"dispatch", b"routed_experts", b"shared_experts", b"combine"):
        having = [name for name in names if re.search(rb"\b%s\b" % scope, name)]
        assert any(b"transpose" not in name for name in having), f"no forward operation of {scope!r}"
        if scope != b"dispatch":
            assert any(b"transpose" in name for name in having), f"no backward operation of {scope!r}"


# --- stopping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_its_exit_code_and_the_way_to_go_on(home, tmp_path, capsys, number, code):
    folder, name = tmp_path / "run", signal.Signals(number).name
    with after_step(3, kill(number)):
        assert run.main(["--config", home.config, "--workdir", str(folder)]) == code
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == f"{name}: saved step 3 (384 tokens) to {folder}/checkpoints"
    assert captured.err == f"stopped by {name}; --resume --workdir {folder} goes on\n"
    assert checkpoints(folder) == [2, 3]


def test_the_way_to_go_on_names_the_devices_that_the_run_needs(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "prepare_environment", lambda environment, virtual_devices: None)
    argv = ["--config", home.config, "--workdir", str(tmp_path / "run"), "--virtual_devices=1"]
    with after_step(1, kill(signal.SIGINT)):
        assert run.main(argv) == 130
    expected = f"stopped by SIGINT; --resume --workdir {tmp_path}/run --virtual_devices 1 goes on\n"
    assert capsys.readouterr().err == expected


def test_what_it_says_does_go_on(home, first, stopped):
    assert run.main(["--resume", "--workdir", str(stopped)]) == 0
    assert records(stopped, "train") == records(first, "train")
    assert_same_arrays(checkpoint(stopped, STEPS)[0], checkpoint(first, STEPS)[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_is_one_line_too(home, tmp_path, capsys, number, code):
    with after_step(3, kill(number, times=2)):
        line = refused(capsys, "--config", home.config, "--workdir", tmp_path / "run", code=code)
    assert line == f"{signal.Signals(number).name} again: stopped at once; what no checkpoint holds is lost"
    assert checkpoints(tmp_path / "run") == [2]


@pytest.mark.slow
def test_a_process_of_its_own_stops_and_goes_on(home, first, tmp_path):
    """As a person does it: another process, a signal from outside, `--resume`. More steps than it will take."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.run"]
    start = [*command, "--config", home.config, "--workdir", str(folder), "--set", "schedule.total_tokens=100_000_000"]
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        waited = time.monotonic() + 500
        while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < 4:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < waited
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
    assert process.returncode == 143, err
    (step,) = re.findall(r"SIGTERM: saved step (\d+) ", out)
    assert checkpoints(folder)[-1] == int(step)
    assert err.splitlines() == [
        "SIGTERM: saving after this step; once more stops at once",
        f"stopped by SIGTERM; --resume --workdir {folder} goes on",
    ]
    end = (int(step) + 2) * 4 * LENGTH
    resume = [*command, "--resume", "--workdir", str(folder), "--set", f"schedule.total_tokens={end}"]
    done = subprocess.run(resume, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in records(folder, "train")] == list(range(1, int(step) + 3))
    assert (folder / "report.html").exists()


# --- what is refused, one line each ---------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(home, tmp_path, capsys):
    """Through the command line with no hook at all: a learning rate that no model survives."""
    folder = tmp_path / "run"
    line = refused(
        capsys, "--config", home.config, "--workdir", folder, "--set", "optimizer.peak_lr=1e30", "--set",
        "logging.every_steps=1000",
    )  # fmt: skip
    (step,) = map(int, re.findall(r"^step (\d+): loss \S+, gradient norm \S+; its batch is saved in ", line))
    assert (folder / f"nonfinite_step_{step}.npz").exists()
    assert all(saved < step for saved in checkpoints(folder))


def test_a_tokenizer_that_does_not_match_the_checkpoint(stopped, capsys):
    before = (stopped / "config.json").read_bytes()
    other = train_tokenizer(["another text, and another again"] * 9, vocab_size=280)
    other.save(stopped / "other.json")
    named = refused(capsys, "--resume", "--workdir", stopped, "--set", f"tokenizer.path={stopped}/other.json")
    fingerprint = Tokenizer.load(stopped / "tokenizer.json").fingerprint()
    expected = (
        f"checkpoint 3 in {stopped}/checkpoints was made with another tokenizer: "
        f"meta.tokenizer_fingerprint is '{fingerprint}' there and '{other.fingerprint()}' here"
    )
    assert named == expected
    (stopped / "other.json").replace(stopped / "tokenizer.json")
    assert refused(capsys, "--resume", "--workdir", stopped) == expected
    assert (stopped / "config.json").read_bytes() == before


def test_a_checkpoint_of_another_architecture(stopped, capsys, first):
    before = (stopped / "config.json").read_bytes()
    line = refused(capsys, "--resume", "--workdir", stopped, "--set", "model.hidden_size=48")
    assert line == (
        f"checkpoint 3 in {stopped}/checkpoints does not fit this run: meta.model.hidden_size is 32 there and 48 here"
    )
    assert (stopped / "config.json").read_bytes() == before, "a refused resume must not change what the next one reads"
    assert run.main(["--resume", "--workdir", str(stopped)]) == 0
    assert records(stopped, "train") == records(first, "train")


def rewrite(path, change):
    """Changes a JSON file with the function `change`."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_run_of_an_older_version_goes_on(stopped, first):
    """One that was saved before some fields existed: in its config, and in its checkpoint's architecture."""

    def older(config):
        del config["model"]["tie_embeddings"], config["data"]["sources"][0]["on_error"], config["evaluation"]["samples"]

    rewrite(stopped / "config.json", older)
    rewrite(stopped / "checkpoints/3/documents/documents.json", lambda saved: saved["meta"]["model"].pop("mtp_depth"))
    assert run.main(["--resume", "--workdir", str(stopped)]) == 0
    assert records(stopped, "train") == records(first, "train")
    assert_same_arrays(checkpoint(stopped, STEPS)[0], checkpoint(first, STEPS)[0])
    assert load_config(Experiment, stopped / "config.json") == load_config(Experiment, first / "config.json")


def test_a_checkpoint_of_a_newer_version(home, stopped, capsys):
    documents = stopped / "checkpoints/3/documents/documents.json"
    rewrite(documents, lambda saved: saved["meta"]["model"].update(mtp_width=3))
    line = refused(capsys, "--resume", "--workdir", stopped)
    assert line == (
        f"checkpoint 3 in {stopped}/checkpoints is of an architecture that this version does not know: "
        "the config has no field mtp_width; did you mean mtp_depth?"
    )


def test_a_missing_data_folder(home, stopped, tmp_path, capsys):
    change = ["--set", "data.sources.0.path=/no/such/folder"]
    for argv in (["--config", home.config, "--workdir", tmp_path / "new"], ["--resume", "--workdir", stopped]):
        assert "/no/such/folder" in refused(capsys, *argv, *change)
    assert not (tmp_path / "new").exists(), "so that the corrected command need not name another folder"


def test_a_mesh_that_does_not_match_the_devices(home, tmp_path, capsys):
    argv = ["--config", home.config, "--workdir", tmp_path / "new", "--set", "parallel.data=3"]
    line = refused(capsys, *argv)
    assert line.startswith("the mesh pipe 1 x data 3 x node 1 x expert 1 needs 3 devices, there are 1; ")
    assert not (tmp_path / "new").exists()


def test_a_vocabulary_larger_than_the_models(home, tmp_path, capsys):
    texts = (document.text for document in train_documents(home.base.data))
    train_tokenizer(texts, vocab_size=320).save(tmp_path / "large.json")
    argv = ["--config", home.config, "--workdir", tmp_path / "new"]
    line = refused(capsys, *argv, "--set", f"tokenizer.path={tmp_path}/large.json")
    assert f"{tmp_path}/large.json has 320 tokens, and model.vocab_size is 300; raise model.vocab_size" in line
    line = refused(capsys, *argv, "--set", "tokenizer.vocab_size=320", code=2)
    assert "tokenizer.vocab_size (320) exceeds model.vocab_size (300)" in line
    assert not (tmp_path / "new").exists()


@pytest.fixture
def full_disk(monkeypatch):
    """`full_disk(step)`: the checkpoint of that step finds no room; it is written while the steps go on."""

    def fill(step):
        real = ocp.PyTreeCheckpointHandler.finalize

        def finalize(self, directory):
            if f"/{step}.orbax-checkpoint-tmp" in str(directory):
                raise OSError(errno.ENOSPC, "No space left on device")
            real(self, directory)

        monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", finalize)

    return fill


def test_a_disk_that_is_full_when_a_checkpoint_is_saved(home, first, tmp_path, capsys, full_disk, monkeypatch):
    """The store's own tests fill a real one; here the run that meets it ends, and goes on from the one before."""
    folder = tmp_path / "run"
    full_disk(4)
    line = refused(capsys, "--config", home.config, "--workdir", folder)
    assert line == (
        f"saving step 4 to {folder}/checkpoints failed: [Errno 28] No space left on device; "
        "the checkpoint of step 2 is intact"
    )
    assert checkpoints(folder) == [2]
    monkeypatch.undo()
    assert run.main(["--resume", "--workdir", str(folder)]) == 0
    assert checkpoints(folder) == [2, 4, 6]
    assert records(folder, "train") == records(first, "train")


def test_a_disk_that_is_full_when_the_last_checkpoint_is_saved(home, tmp_path, capsys, full_disk):
    full_disk(STEPS)
    line = refused(capsys, "--config", home.config, "--workdir", tmp_path / "run")
    assert "saving step 6 " in line
    assert checkpoints(tmp_path / "run") == [2, 4]


def test_a_disk_that_is_full_when_a_step_is_logged(home, tmp_path, capsys, monkeypatch):
    def no_space(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    with after_step(3, lambda state: monkeypatch.setattr(MetricsWriter, "write", no_space)):
        line = refused(capsys, "--config", home.config, "--workdir", tmp_path / "run")
    assert line == "[Errno 28] No space left on device"
    assert checkpoints(tmp_path / "run") == [2]


def test_a_run_is_not_started_over(home, stopped, capsys):
    line = refused(capsys, "--config", home.config, "--workdir", stopped, code=2)
    assert line.startswith(f"{stopped} already holds a run (config.json, metrics.jsonl, checkpoints): pass --resume")


# --- the recipes ----------------------------------------------------------------------------------------------------

PRETRAINING = ("tiny.pretrain", "tiny.pretrain_without_bias", "small.pretrain")


def test_the_recipes_are_listed():
    assert set(PRETRAINING) <= set(run.recipes())


@pytest.mark.parametrize("name", PRETRAINING)
def test_a_recipe_is_complete_and_survives_saving(name, tmp_path, capsys):
    recipe = run.find_recipe(name)()
    assert isinstance(recipe, Experiment)
    save_config(recipe, tmp_path / "config.json")
    assert load_config(Experiment, tmp_path / "config.json") == recipe
    assert from_dict(Experiment, json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert run.main([name, "--print_config"]) == 0
    shown = [line.lstrip("* ").split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["hidden_size", str(recipe.model.hidden_size)] in shown
    assert recipe.tokenizer.vocab_size == recipe.model.vocab_size
    assert [type(source).__name__ for source in recipe.data.sources] == ["StandardLibrary"], "no download"


@pytest.mark.parametrize("recipe", [tiny.pretrain, small.pretrain])
def test_the_recipes_follow_the_paper(recipe):
    """Sections 4.1 and 4.2: sizes are smaller, rules and constants are not."""
    made = recipe()
    optimizer, schedule, data = made.optimizer, made.schedule, made.data
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert optimizer.clip_norm == 1.0
    assert data.fim_rate == 0.1, "prefix, suffix, middle at a rate of 0.1"
    assert schedule.balance_weight == 1e-4, "alpha of the balance loss"
    assert not made.balance_from_routed
    assert not made.mask_documents, "no masking across samples in pre-training"
    assert (data.heldout_fraction, data.heldout_min_documents) == (0.05, 40)
    total = schedule.total_tokens

    def after(trillions):
        return math.ceil(trillions / 14.8 * total)

    assert schedule.bias_rate(0) == schedule.bias_rate(after(14.3) - 2) == 0.001
    assert schedule.bias_rate(after(14.3)) == schedule.bias_rate(total - 1) == 0, "gamma, 0 for the last 500B tokens"
    assert schedule.mtp_weight(0) == schedule.mtp_weight(after(10) - 2) == 0.3
    assert schedule.mtp_weight(after(10)) == schedule.mtp_weight(total - 1) == 0.1, "lambda, for the last 4.8T tokens"
    rate = schedule.learning_rate
    assert rate(0) == 0
    assert rate(after(10) - 2) == 1
    assert abs(rate(after((10 + 14.3) / 2)) - 0.55) < 0.001, "cosine to a tenth over 4.3T tokens"
    assert rate(after(14.3)) == rate(after(14.8 - 0.167) - 2) == 0.1
    assert rate(total - 1) == 7.3 / 220
    model = made.model
    assert model.mtp_depth == 1
    assert model.moe.score_function == "sigmoid"
    assert model.moe.use_bias
    assert model.moe.num_shared_experts == 1
    assert model.moe.groups_per_token < model.moe.num_groups
    assert model.attention.q_lora_rank is not None


def test_without_the_bias_only_the_bias_differs():
    differing = diff(tiny.pretrain(), tiny.pretrain_without_bias())
    assert differing
    assert all(path.startswith("schedule.bias_rate") for path, *_ in differing)
    schedule = tiny.pretrain_without_bias().schedule
    assert {schedule.bias_rate(tokens) for tokens in range(0, schedule.total_tokens, 1000)} == {0.0}
