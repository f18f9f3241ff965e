"""The command line: what it starts, what it refuses, and how it exits."""

from __future__ import annotations

import dataclasses
import os
import platform
import signal
import subprocess
import sys
import types

import pytest

from deepseek_jax.config import ModelConfig
from deepseek_jax.config_io import load_config, save_config
from deepseek_jax.parallel.mesh import ParallelConfig
from experiments import run
from experiments.cores import devices_to_train_on, usable_cores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    steps: int = 10


RECIPES = '''
"""Recipes for the tests of the command line."""
import dataclasses
from tests_experiment import Experiment
from deepseek_jax.config import ConfigError

def small() -> Experiment:
    """A small one.

    More about it.
    """
    return Experiment(steps=3)

def broken() -> "Experiment":
    raise ConfigError("the recipe\\ncannot work")

def bug() -> Experiment:
    raise RuntimeError("a bug")

def helper(x) -> Experiment: ...
def other() -> int: ...
def _private() -> Experiment: ...
def scaled(*, factor: int = 1) -> Experiment: ...
'''


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Stands in for the training loop: what `train` was called with; recipes are in `fake_recipes`."""
    recorded = []
    result = types.SimpleNamespace(status="done")

    def train(experiment, **settings):
        recorded.append((experiment, settings))
        if isinstance(result.status, BaseException):
            raise result.status
        return result

    modules = {
        "deepseek_jax.training.loop": {"train": train},
        "deepseek_jax.training.experiment": {"Experiment": Experiment},
        "tests_experiment": {"Experiment": Experiment},
    }
    for name, members in modules.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))
    monkeypatch.delitem(sys.modules, "fake_recipes", raising=False)
    (tmp_path / "fake_recipes.py").write_text(RECIPES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return types.SimpleNamespace(recorded=recorded, result=result)


def refused(capsys, *argv):
    """The one line that says why `argv` is refused."""
    code = run.main(argv)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return code, captured.err.strip()


# --- what is run ----------------------------------------------------------------------------------------------------


def test_a_recipe_runs_with_overrides(calls):
    argv = ["fake_recipes.small", "--set", "steps=2**5", "--set=model.num_layers=7", "--profile=10:15"]
    assert run.main(argv) == 0
    expected = Experiment(steps=32, model=ModelConfig(num_layers=7))
    assert calls.recorded == [(expected, {"workdir": "runs/fake_recipes.small", "resume": False, "profile": (10, 15)})]


def test_flags_may_come_first(calls, tmp_path):
    assert run.main(["--workdir", str(tmp_path / "w"), "fake_recipes.small"]) == 0
    assert calls.recorded[0][1]["workdir"] == str(tmp_path / "w")
    assert calls.recorded[0][1]["profile"] is None


def test_print_config_runs_nothing(calls, capsys):
    assert run.main(["fake_recipes.small", "--print_config", "--set", "model.num_layers=7"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "  Experiment"
    assert [line.split() for line in out if line.startswith("*")] == [
        ["*", "num_layers", "7", "default", "61"],
        ["*", "steps", "3", "default", "10"],
    ]
    assert calls.recorded == []


def test_a_saved_config_starts_again(calls, tmp_path):
    save_config(Experiment(steps=77), tmp_path / "old" / "config.json")
    assert run.main(["--config", "old/config.json", "--workdir", "new", "--set", "model.num_layers=7"]) == 0
    assert calls.recorded[0][0] == Experiment(steps=77, model=ModelConfig(num_layers=7))
    assert calls.recorded[0][1]["resume"] is False


def test_resume_takes_the_config_of_the_run(calls, tmp_path, capsys):
    save_config(Experiment(steps=77), tmp_path / "old" / "config.json")
    assert run.main(["--resume", "--workdir", "old"]) == 0
    assert calls.recorded == [(Experiment(steps=77), {"workdir": "old", "resume": True, "profile": None})]
    assert capsys.readouterr().err == ""


def test_resume_says_what_it_changes(calls, tmp_path, capsys):
    save_config(Experiment(steps=77), tmp_path / "old" / "config.json")
    assert run.main(["fake_recipes.small", "--resume", "--workdir", "old"]) == 0
    assert capsys.readouterr().err == "resuming with steps = 3, was 77\n"
    assert load_config(Experiment, tmp_path / "old" / "config.json").steps == 77


@pytest.mark.parametrize(
    "argv", [["--resume", "--workdir", "old"], ["--config", "old/config.json", "--workdir", "new"]]
)
def test_a_config_of_an_older_version_lacks_what_has_a_default(calls, tmp_path, capsys, argv):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text('{"model": {"num_layers": 7}, "steps": 3}')
    assert run.main(argv) == 0
    assert calls.recorded[0][0] == Experiment(steps=3, model=ModelConfig(num_layers=7))
    assert capsys.readouterr().err == ""


def test_a_config_of_a_newer_version_is_no_config_but_a_recipe_goes_on(calls, tmp_path, capsys):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text('{"step": 3}')
    reason = "old/config.json: the config has no field step; did you mean steps?"
    assert refused(capsys, "--resume", "--workdir", "old") == (2, f"error: {reason}")
    assert refused(capsys, "--config", "old/config.json", "--workdir", "new") == (2, f"error: {reason}")
    assert run.main(["fake_recipes.small", "--resume", "--workdir", "old"]) == 0
    assert capsys.readouterr().err == f"cannot compare with the run's config: {reason}\n"


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(None, 130, "SIGINT"), (signal.SIGINT, 130, "SIGINT"), (signal.SIGTERM, 143, "SIGTERM")],
)
def test_an_interrupted_run_says_how_to_go_on(calls, capsys, number, code, name):
    calls.result.status, calls.result.signal = "interrupted", number
    assert run.main(["fake_recipes.small"]) == code
    assert capsys.readouterr().err == f"stopped by {name}; --resume --workdir runs/fake_recipes.small goes on\n"


def test_an_interrupt_before_the_loop_is_one_line(calls, capsys):
    calls.result.status = KeyboardInterrupt()
    assert refused(capsys, "fake_recipes.small") == (130, "error: interrupted before there was anything to save")


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fake_recipes.smal"], "no recipe fake_recipes.smal. "),
        (["nowhere.recipe"], "no recipe nowhere.recipe. "),
        (["small"], "no recipe small. "),
        (["--resume"], "name a recipe, such as tiny.pretrain; --list shows them all"),
        (["fake_recipes.small", "steps=3"], "values are changed with --set path=value"),
        (["fake_recipes.small", "--set", "step=3"], "the config has no field step; did you mean steps?"),
        (["fake_recipes.small", "--set", "steps=x"], "steps=x: 'x' is not a whole number"),
        (
            ["fake_recipes.small", "--set", "model.moe.num_experts=33"],
            "after model.moe.num_experts=33: moe.num_experts",
        ),
        (["fake_recipes.small", "--profile=9"], "profile=9 must be first:last, two step numbers such as 10:15"),
        (["fake_recipes.small", "--config", "c.json"], "give the recipe fake_recipes.small or --config, not both"),
        (["--config", "c.json"], "--config needs --workdir, the folder of the new run"),
        (["--config", "c.json", "--workdir", "w"], "no config at c.json"),
        (["fake_recipes.small", "--resume"], "--resume: runs/fake_recipes.small holds no run to continue"),
        (["--resume", "--workdir", "w"], "no config at w/config.json"),
        (["fake_recipes.small", "--worksdir=w"], "Unknown command line flag 'worksdir'. Did you mean: workdir"),
        (["fake_recipes.small", "--virtual_devices=x"], "flag --virtual_devices=x"),
        (["fake_recipes.broken"], "the recipe cannot work"),
    ],
)
def test_what_cannot_be_carried_out_is_one_line(calls, capsys, argv, message):
    code, error = refused(capsys, *argv)
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert calls.recorded == []


@pytest.mark.parametrize("argv", [["fake_recipes.small"], ["fake_recipes.small", "--resume"], ["--resume"]])
def test_a_workdir_in_the_cloud_is_refused(calls, capsys, argv):
    error = "error: the workdir must be on a local or mounted disk, which gs://bucket/run is not"
    assert refused(capsys, *argv, "--workdir", "gs://bucket/run") == (2, error)
    assert calls.recorded == []


@pytest.mark.parametrize("mark", ["config.json", "metrics.jsonl", "checkpoints"])
def test_a_run_is_not_started_over(calls, capsys, tmp_path, mark):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / mark).mkdir()
    assert refused(capsys, "fake_recipes.small", "--workdir", "w") == (
        2,
        f"error: w already holds a run ({mark}): pass --resume to continue it, or another --workdir to start anew",
    )
    assert calls.recorded == []


def test_an_error_of_the_run_exits_with_1(calls, capsys):
    from deepseek_jax.data.errors import DataError

    calls.result.status = DataError("a.jsonl, line 3: not JSON")
    assert refused(capsys, "fake_recipes.small") == (1, "error: a.jsonl, line 3: not JSON")
    assert run.main(["fake_recipes.small", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda file: (file / "x").mkdir(), "Not a directory: '{file}/x'"),
        (lambda file: file.mkdir(), "File exists: '{file}'"),
        (lambda file: file.parent.read_text(), "Is a directory: '{folder}'"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_one_line(calls, capsys, tmp_path, use, message):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match="Errno") as raised:
        use(file)
    calls.result.status = raised.value
    code, error = refused(capsys, "fake_recipes.small", "--workdir", "w")
    assert code == 1
    assert error.endswith(message.format(file=file, folder=tmp_path))
    code, error = refused(capsys, "--config", "file/config.json", "--workdir", "w")
    assert (code, error) == (2, "error: [Errno 20] Not a directory: 'file/config.json'")


@pytest.mark.parametrize("bug", [ValueError("inside"), TypeError("inside"), KeyError("inside")])
def test_a_bug_keeps_its_traceback(calls, bug):
    calls.result.status = bug
    with pytest.raises(type(bug)):
        run.main(["fake_recipes.small"])
    with pytest.raises(RuntimeError, match="a bug"):
        run.main(["fake_recipes.bug"])


# --- recipes, help, environment -------------------------------------------------------------------------------------


def test_recipes_are_found_without_importing_them(calls, tmp_path):
    assert run.recipes(tmp_path) == {
        "fake_recipes.small": "A small one.",
        "fake_recipes.broken": "",
        "fake_recipes.bug": "",
        "fake_recipes.scaled": "",
    }
    assert "fake_recipes" not in sys.modules


def test_an_unknown_recipe_gets_the_nearest_and_the_list(monkeypatch, capsys):
    monkeypatch.setattr(run, "recipes", lambda: {"tiny.pretrain": "The first.", "small.pretrain": "", "tiny.sft": ""})
    assert refused(capsys, "experiments.tiny.pretran") == (
        2,
        "error: no recipe experiments.tiny.pretran. Did you mean tiny.pretrain? "
        "There are: tiny.pretrain, small.pretrain, tiny.sft",
    )
    assert run.main(["--list"]) == 0
    assert capsys.readouterr().out == "tiny.pretrain   The first.\nsmall.pretrain\ntiny.sft\n"


def test_every_recipe_of_the_project_has_a_line_and_makes_a_config():
    for name, line in run.recipes().items():
        assert line, f"{name} needs a docstring: --list shows its first line"
        run.find_recipe(name)()


def test_help_and_list_do_not_import_jax():
    code = "import sys; from experiments import run; print(run.main(sys.argv[1:]), 'jax' in sys.modules)"
    for flag in ("--help", "-h", "--list"):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("0 False\n"), done.stdout


def test_help_names_every_flag(capsys):
    assert run.main(["--help"]) == 0
    usage = capsys.readouterr().out
    for name in set(run._options()) - {"help", "h"}:
        assert f"--{name}" in usage
    assert len(usage.splitlines()) < 24
    assert run.main([]) == 0


def test_virtual_devices_set_what_jax_reads(monkeypatch):
    monkeypatch.setattr(run, "usable_cores", lambda: 4)
    environment = {"XLA_FLAGS": "--xla_cpu_collective_call_terminate_timeout_seconds=5 --other", "PATH": "p"}
    run.prepare_environment(environment, virtual_devices=16)
    assert environment == {
        "XLA_FLAGS": "--xla_cpu_collective_call_terminate_timeout_seconds=5 --other "
        "--xla_force_host_platform_device_count=16 --xla_cpu_multi_thread_eigen=false",
        "JAX_PLATFORMS": "cpu",
        "NPROC": "64",
        "PATH": "p",
    }
    untouched = {"XLA_FLAGS": "--other"}
    run.prepare_environment(untouched)
    assert untouched == {"XLA_FLAGS": "--other"}
    small = {}
    run.prepare_environment(small, virtual_devices=2)
    assert small["NPROC"] == "2"
    run.prepare_for_stages(small, virtual_devices=2)
    assert small["NPROC"] == "32"
    assert small["XLA_FLAGS"].startswith("--xla_force_host_platform_device_count=2 --xla_cpu_collective")


KEEPS = """
import mmap, resource
from experiments.run import keep_freed_memory
if {keep}:
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(), faults()
print(faults() * mmap.PAGESIZE)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told to keep memory")
def test_freed_memory_is_kept_and_not_asked_of_the_kernel_again():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}

    def fresh_bytes(keep: bool, **more: str) -> int:
        command = [sys.executable, "-c", KEEPS.format(keep=keep)]
        done = subprocess.run(command, env=environment | more, check=True, stdout=subprocess.PIPE, text=True)
        return int(done.stdout)

    assert fresh_bytes(keep=True) < 2**20
    assert fresh_bytes(keep=False) > 2**25
    # A user who tuned malloc is left alone.
    assert fresh_bytes(keep=True, MALLOC_TOP_PAD_="131072") > 2**25


def test_cores_are_those_that_a_container_may_use(tmp_path):
    files = [tmp_path / name for name in ("cpu.max", "quota", "period")]
    unified, quota, period = files

    def cores() -> int:
        return usable_cores(tuple(map(str, files)))

    everything = cores()
    assert everything == (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    for text, wanted in (("max 100000", everything), ("100000 100000", 1), ("50000 100000", 1), ("900000 1000", None)):
        unified.write_text(text)
        assert cores() == (everything if wanted is None else wanted), text
    unified.unlink()
    quota.write_text("100000")
    period.write_text("100000")
    assert cores() == 1
    quota.write_text("-1")
    assert cores() == everything


def test_a_run_trains_on_a_power_of_two_devices():
    assert [devices_to_train_on(cores) for cores in (1, 2, 3, 4, 7, 64)] == [1, 2, 2, 4, 4, 8]
