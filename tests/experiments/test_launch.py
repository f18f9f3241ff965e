"""Several processes started, stopped and killed: they train as one does, and end together with one clear line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from array_digest import digest
from tiny_run import LENGTH, assert_same_arrays, checkpoint, checkpoints, compile_flags, records, write_texts

from deepseek_jax.config_io import override_all
from experiments import launch, run, tiny

ROOT = Path(__file__).parents[2]
KILLED_AFTER = 9
"""A step; the checkpoint of step 4 is whole by then, since that of step 8 waited for it."""
STEPS = 12


def environment(folder):
    """Of a process that finds the recipe `launch_recipes.small`, whose texts are in `folder`."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "experiments")))
    settings = {"PYTHONPATH": path, "DEEPSEEK_JAX_TEST_TEXTS": str(folder / "texts"), "XLA_FLAGS": compile_flags()}
    names = ("XLA_FLAGS", "NPROC", "JAX_PLATFORMS")
    return {name: value for name, value in os.environ.items() if name not in names} | settings


def command(*arguments):
    return [sys.executable, "-m", "experiments.run", "launch_recipes.small", *map(str, arguments)]


def finish(folder, *arguments, **more):
    """Exit code, stdout and stderr of the command line."""
    done = subprocess.run(
        command(*arguments), env=environment(folder) | more, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def pair(folder, *arguments, second=()):
    """Two processes, started as by hand on two hosts; they are over at the end. `second` are for process 1 alone."""
    together = [*arguments, f"--coordinator=localhost:{launch._free_port()}", "--num_processes=2"]
    commands = [command(*together, "--process_id=0"), command(*together, *second, "--process_id=1")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment(folder)}
    children = [subprocess.Popen(words, **pipes) for words in commands]
    watch = threading.Timer(300, lambda: [child.kill() for child in children])
    watch.start()
    try:
        yield children
    finally:
        watch.cancel()
        for child in children:
            child.kill()
            child.communicate()


def wait_for_step(child, step):
    for line in child.stdout:
        if line.startswith(f"step {step} "):
            return
    raise AssertionError(f"it ended before step {step}: {child.stderr.read()}")


def left_alone(folder, workdir, *arguments, hit, number=signal.SIGKILL):
    """How a process ended after the other one of its pair, process `hit`, got a signal in the midst of training.

    Its exit code and errors, the seconds that it took to end, and the pid of the process that was hit.
    """
    endless = ["--workdir", workdir, "--set", "schedule.total_tokens=10**7", "--virtual_devices=1"]
    with pair(folder, *endless, *arguments) as children:
        wait_for_step(children[0], KILLED_AFTER)
        children[hit].send_signal(number)
        begin = time.monotonic()
        other = children[1 - hit]
        _, errors = other.communicate()
        seconds = time.monotonic() - begin
        return types.SimpleNamespace(code=other.returncode, errors=errors, seconds=seconds, pid=children[hit].pid)


# --- two processes for real -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    write_texts(folder / "texts")
    return folder


@pytest.fixture(scope="module")
def killed(home):
    """Two processes, started by hand, of which one is killed on the way: how the other ended."""
    return left_alone(home, home / "pair", hit=1)


def test_when_one_process_is_killed_the_other_ends_with_a_clear_line(home, killed):
    assert killed.code == 1, killed.errors
    assert killed.seconds < 10
    assert "Traceback" not in killed.errors
    (line,) = [line for line in killed.errors.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(
        rf"error: process 1 \([^ ]+, pid {killed.pid}\) is gone: this run cannot go on; "
        rf"--resume --workdir {home}/pair continues from the last checkpoint",
        line,
    )


def test_the_killed_run_goes_on_and_its_losses_are_those_of_one_process(home, killed):
    """On the same global batches, 1e-5: in the steps before the kill, and in those that one process goes on with."""
    code, output, errors = finish(home, "--resume", "--workdir", home / "pair", "--virtual_devices=2")
    assert code == 0, errors
    assert re.search(r"^resumed from step [48] ", output, re.MULTILINE)
    assert errors.startswith("resuming with schedule.total_tokens = 3072, was 10000000\n")
    code, _, errors = finish(home, "--workdir", home / "alone", "--virtual_devices=2")
    assert code == 0, errors
    both, alone = (records(home / name, "train") for name in ("pair", "alone"))
    assert [line["step"] for line in both] == [line["step"] for line in alone] == list(range(1, STEPS + 1))
    for name in ("loss", "loss_main", "loss_mtp"):
        np.testing.assert_allclose([x[name] for x in both], [x[name] for x in alone], rtol=1e-5, err_msg=name)


def test_hosts_with_different_configs_end_before_anything_is_written(home, tmp_path):
    arguments = ["--workdir", tmp_path / "run", "--virtual_devices=1", "--set", "seed=1"]
    with pair(home, *arguments, second=["--set", "seed=2"]) as children:
        errors = [child.communicate()[1] for child in children]
    assert [child.returncode for child in children] == [1, 1]
    expected = (
        r"error: the hosts differ in seed: 1 on process 0 \([^ ]+\), 2 on process 1 \([^ ]+\); start all [^\n]*\n"
    )
    assert [bool(re.fullmatch(expected, line)) for line in errors] == [True, True], errors
    assert not (tmp_path / "run").exists()


def test_a_host_that_never_arrives_is_named(home, tmp_path):
    address = f"--coordinator=localhost:{launch._free_port()}"
    code, _, errors = finish(
        home, "--workdir", tmp_path / "run", address, "--num_processes=2", "--process_id=0", "--host_timeout=1"
    )
    assert code == 1
    assert re.fullmatch(r"error: process 1 has not arrived at localhost:\d+ within 1 s; [^\n]*\n", errors)


@pytest.mark.slow
def test_when_process_zero_is_killed_the_other_ends_with_a_clear_line(home, tmp_path):
    """And not with the stack trace of jax's client, whose service died with process 0."""
    ended = left_alone(home, tmp_path / "run", hit=0)
    assert ended.seconds < 10
    assert ended.code == 1
    assert re.search(rf"^error: process 0 \([^ ]+, pid {ended.pid}\) is gone: ", ended.errors, re.MULTILINE)


@pytest.mark.slow
def test_a_run_moves_between_hosts_and_meshes_with_every_bit(home, tmp_path):
    """8 devices on two hosts, then 2 on one, then 4 on two: the state that goes on is the one that was saved."""
    folder, tokens = tmp_path / "moved", 8 * 32
    parts = [
        (4, ["--simulate_hosts=2", "--virtual_devices=8"]),
        (8, ["--virtual_devices=2", "--resume"]),
        (12, ["--simulate_hosts=2", "--virtual_devices=4", "--resume"]),
    ]
    for steps, arguments in parts:
        restored = tmp_path / f"restored.{steps}.json"
        total = f"schedule.total_tokens={steps * tokens}"
        code, _, errors = finish(
            home, "--workdir", folder, "--set", total, *arguments, DEEPSEEK_JAX_TEST_RESTORED=str(restored)
        )
        assert code == 0, errors
        if "--resume" in arguments:
            arrays, _ = checkpoint(folder, steps - 4)
            saved = {name: digest(array) for name, array in arrays.items()}
            assert json.loads(restored.read_text()) == saved
    assert checkpoints(folder) == [4, 8, 12]
    assert [line["step"] for line in records(folder, "train")] == list(range(1, 13))


@pytest.mark.slow
def test_a_killed_run_under_dualpipe_is_the_uninterrupted_one_bit_for_bit(home, tmp_path):
    """Twenty steps on four devices; SIGKILL at step 10 leaves the checkpoint of step 4 or 8, from which it goes on."""
    changes = ["--virtual_devices=4", "--set=parallel.pipe=2", "--set=parallel.expert=2"]
    changes.append(f"--set=schedule.total_tokens={20 * 8 * LENGTH}")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment(home)}
    child = subprocess.Popen(command("--workdir", tmp_path / "killed", *changes), **pipes)
    try:
        wait_for_step(child, 10)
    finally:
        child.kill()
        child.communicate()
    for folder, more in (("killed", ["--resume"]), ("whole", [])):
        code, _, errors = finish(home, "--workdir", tmp_path / folder, *changes, *more)
        assert code == 0, errors
    assert records(tmp_path / "killed", "train") == records(tmp_path / "whole", "train")
    assert len(records(tmp_path / "whole", "train")) == 20
    (arrays, documents), (expected, theirs) = (checkpoint(tmp_path / name, 20) for name in ("killed", "whole"))
    assert_same_arrays(arrays, expected)
    assert documents["data"] == theirs["data"]


@pytest.mark.slow
def test_processes_of_different_pipeline_stages_train_as_one(home, tmp_path):
    """DualPipe over two processes, one per stage, which both read every row; resumed, it goes on as one process does.

    The losses are those of one process with as many devices, and so is the place in the data.
    """
    mesh = {"parallel.pipe": 2, "parallel.data": 2, "parallel.expert": 2}
    batch = {"schedule.batch_rows.phases.0.value": 16, "schedule.batch_rows.start": 16}
    changes = [f"--set={name}={value}" for name, value in {**mesh, **batch, "checkpoint.every_steps": 3}.items()]

    def until(step, folder, *arguments):
        total = f"--set=schedule.total_tokens={step * 16 * LENGTH}"
        code, _, errors = finish(
            home, "--workdir", tmp_path / folder, "--virtual_devices=8", *changes, total, *arguments
        )
        assert code == 0, errors

    until(3, "two", "--simulate_hosts=2")
    until(5, "two", "--simulate_hosts=2", "--resume")
    until(5, "one")
    two, one = (records(tmp_path / name, "train") for name in ("two", "one"))
    assert [line["step"] for line in two] == [line["step"] for line in one] == list(range(1, 6))
    for name in ("loss", "loss_main", "loss_mtp", "grad_norm"):
        np.testing.assert_allclose([x[name] for x in two], [x[name] for x in one], rtol=1e-5, err_msg=name)
    assert [line["load"] for line in two] == [line["load"] for line in one]
    both, alone = (checkpoint(tmp_path / name, 5)[1]["data"] for name in ("two", "one"))
    assert both == alone


@pytest.mark.slow
def test_a_run_that_hangs_is_found_within_twice_the_limit(home, tmp_path):
    """A process that is stopped does not die: the other waits in a collective, and its watchdog says where."""
    limit = 10
    changes = ["--set", f"logging.watchdog_seconds={limit}", "--set", "checkpoint.every_steps=10**6"]
    ended = left_alone(home, tmp_path / "run", *changes, hit=1, number=signal.SIGSTOP)
    assert ended.seconds < 2 * limit
    assert ended.code == 1
    assert re.search(
        rf"^error: process 0 \(.*\) has made no step for {limit} s, since step \d+: ", ended.errors, re.MULTILINE
    )
    assert "in process_allgather" in ended.errors


# --- the command line -----------------------------------------------------------------------------------------------


def refused(capsys, *argv):
    code = run.main(["tiny.pretrain", *argv])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return code, captured.err.strip()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--simulate_hosts=1"], "--simulate_hosts=1 cannot share 8 virtual devices evenly"),
        (["--simulate_hosts=3"], "--simulate_hosts=3 cannot share 8 virtual devices evenly"),
        (["--simulate_hosts=2", "--virtual_devices=3"], "--simulate_hosts=2 cannot share 3 virtual devices evenly"),
        (["--simulate_hosts=2", "--process_id=0"], "starts all processes itself: leave out --coordinator"),
        (["--process_id=0"], "--coordinator and --num_processes are missing"),
        (["--coordinator=a:1"], "--coordinator alone says nothing"),
    ],
)
def test_what_names_no_run_of_several_processes_is_refused(capsys, argv, message):
    code, line = refused(capsys, *argv)
    assert code == run.EXIT_USAGE
    assert message in line


def test_the_devices_of_all_hosts_share_the_batch(capsys):
    """The config is one for all processes: what it prints is what each of them runs."""
    for arguments, devices in (
        (["--simulate_hosts=2"], 8),
        (["--simulate_hosts=2", "--virtual_devices=4"], 4),
        (["--virtual_devices=2", "--num_processes=3", "--process_id=1", "--coordinator=a:1"], 6),
    ):
        prepared = os.environ.copy()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "prepare_environment", lambda environment, virtual_devices: None)
            assert run.main(["tiny.pretrain", "--print_config", *arguments]) == 0
        assert os.environ == prepared
        assert re.search(rf"^\* +data +{devices} +default 1", capsys.readouterr().out, re.MULTILINE)


def test_hosts_compare_versions_code_and_every_field_of_the_config():
    versions = launch._versions()
    assert {"python", "jax", "jaxlib", "flax", "deepseek_jax's code"} <= versions.keys()
    options = run._options()
    options(["run", "--resume"])
    one, other = (
        launch._settings(override_all(tiny.pretrain(), change), "runs/a", options)
        for change in ([], ["optimizer.peak_lr=1e-4", "data.sources.0=Jsonl(path=a.jsonl)"])
    )
    assert one["--resume"] is True
    assert {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)} >= {
        "optimizer.peak_lr",
        "data.sources.0.type",
        "data.sources.0.path",
    }
    json.dumps([one, other])


def test_settings_that_hosts_compare_are_named_as_on_the_command_line():
    nested = {"optimizer": {"peak_lr": 0.1}, "sources": [{"type": "Jsonl", "path": "a"}], "empty": [], "none": None}
    expected = {"optimizer.peak_lr": 0.1, "sources.0.type": "Jsonl", "sources.0.path": "a", "empty": [], "none": None}
    assert launch._flat(nested, "") == expected


# --- processes side by side, without jax ----------------------------------------------------------------------------


def together(*codes, send=None):
    """Exit code, stdout and stderr of programs that run side by side; `send` is a signal to their parent's group."""
    commands = [[sys.executable, "-c", code] for code in codes]
    parent = f"import sys; from experiments import launch; sys.exit(launch.run_together({commands!r}))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, start_new_session=True, **pipes)
    try:
        if send is not None:
            assert process.stdout.readline() == "[1] there\n"
            os.killpg(process.pid, send)  # as a terminal does: to all that are in its foreground
        out, errors = process.communicate(timeout=60)
        return process.returncode, out, errors
    finally:
        process.kill()


def test_the_first_speaks_as_it_is_and_the_others_with_their_number():
    # One write per line: `print` makes two where PYTHONUNBUFFERED is set, and the other's line may come between them.
    first = "import os; os.write(1, b'a\\n')"
    code, out, errors = together(first, "import sys; print('b'); print('c\\nd', file=sys.stderr)")
    assert code == 0
    assert sorted(out.splitlines()) == ["[1] b", "a"]
    assert errors == "[1] c\n[1] d\n"


def test_the_first_failure_is_the_exit_code():
    assert together("import time; time.sleep(1); exit(4)", "exit(3)")[0] == 3
    assert together("import os; os.kill(os.getpid(), 9)", "pass")[0] == 137


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_to_all_once(number):
    """A run takes a second one as a wish to stop without saving."""
    wait = """
import signal, sys, time
came = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: came.append(number))
{say}
while not came:
    time.sleep(0.05)
time.sleep(0.5)
sys.exit(128 + came[0] if len(came) == 1 else 99)
"""
    first = wait.format(say="")
    code, _, _ = together(first, wait.format(say="time.sleep(1); print('there', flush=True)"), send=number)
    assert code == 128 + number


def test_who_does_not_end_after_anothers_failure_is_ended(monkeypatch):
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.3)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    begin = time.monotonic()
    assert (
        launch.run_together(
            [[sys.executable, "-c", code] for code in (stubborn, "import time; time.sleep(1); exit(5)")]
        )
        == 5
    )
    assert time.monotonic() - begin < 20


def test_ports_come_in_pairs():
    port = launch._free_port()
    for number in (port, port + 1):
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("", number))
