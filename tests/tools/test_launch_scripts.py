"""What the launcher asks of SLURM, with `srun`, `scontrol` and `scancel` played by scripts; and what its files name."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from setuptools import find_packages

from deepseek_jax.parallel.cluster import COORDINATOR, NUM_PROCESSES, find_cluster

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tools" / "launch"

SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$STUBS/srun.args"
env > "$STUBS/srun.env"
echo $$ > "$STUBS/srun.pid.new" && mv "$STUBS/srun.pid.new" "$STUBS/srun.pid"
trap 'exit 143' TERM
[[ $SRUN_ENDS != after_signal ]] || while true; do sleep 0.05; done
exit "$SRUN_ENDS"
"""
SCANCEL = """#!/usr/bin/env bash
echo "$@" >> "$STUBS/scancel.args"
kill -TERM "$(cat "$STUBS/srun.pid")"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$STUBS/scontrol.args"
"""


@pytest.fixture
def slurm(tmp_path):
    """A SLURM of scripts, and the function that runs a job in it."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL}.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    there = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "XLA", "NCCL"))}
    there |= {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "STUBS": str(stubs),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "mine",
    }

    def run(*arguments, ends, signals=(), **settings):
        command = ["bash", str(FOLDER / "slurm.sh"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        job = subprocess.Popen(command, cwd=tmp_path, env=there | {"SRUN_ENDS": str(ends)} | settings, **pipes)
        for number in signals:
            while not (stubs / "srun.pid").exists():
                time.sleep(0.02)
            job.send_signal(number)
            time.sleep(0.2)  # the shell takes two that are pending as one
        output, _ = job.communicate(timeout=30)

        def said(name):
            return (stubs / name).read_text().splitlines() if (stubs / name).exists() else []

        environment = dict(line.split("=", 1) for line in said("srun.env") if "=" in line)
        return types.SimpleNamespace(
            code=job.returncode,
            output=output,
            srun=said("srun.args"),
            environment=environment,
            scancel=said("scancel.args"),
            requeued=said("scontrol.args"),
        )

    run.folder = tmp_path
    return run


def program(job):
    """The command that `srun` was to run."""
    return job.srun[next(i for i, word in enumerate(job.srun) if not word.startswith("--")) :]


# --- what is started ------------------------------------------------------------------------------------------------


def test_a_first_start_runs_the_recipe(slurm):
    job = slurm("tiny.pretrain", "--set", "a.b=c d", ends=0)
    assert (job.code, job.requeued) == (0, [])
    expected = ["tiny.pretrain", "--set", "a.b=c d", "--workdir", f"{slurm.folder}/runs/mine"]
    assert program(job) == [".venv/bin/python", "-m", "experiments.run", *expected]
    assert "--gpu-bind=none" in job.srun


def test_a_run_that_is_there_is_resumed_by_its_own_config(slurm):
    (slurm.folder / "there").mkdir()
    (slurm.folder / "there" / "config.json").write_text("{}")
    job = slurm("tiny.pretrain", ends=0, WORKDIR="there", VENV="/venv")
    expected = ["--resume", "--workdir", f"{slurm.folder}/there"]
    assert program(job) == ["/venv/bin/python", "-m", "experiments.run", *expected]


def test_a_container_has_the_project_and_the_runs_folder(slurm):
    job = slurm("tiny.pretrain", ends=0, CONTAINER="image.sqsh", WORKDIR="/scratch/none/run", MOUNTS="/data:/data")
    assert program(job)[0] == "python"
    assert "--container-image=image.sqsh" in job.srun
    mounts = f"--container-mounts={slurm.folder}:{slurm.folder},/scratch/none:/scratch/none,/data:/data"
    assert mounts in job.srun


def test_what_the_user_sets_comes_last(slurm):
    job = slurm("a.b", ends=0, XLA_FLAGS="--xla_mine=1", NCCL_DEBUG="INFO", SLURM_CPUS_PER_TASK="3")
    assert job.environment["XLA_FLAGS"].endswith(" --xla_mine=1")
    assert job.environment["NCCL_DEBUG"] == "INFO"
    assert job.environment["SRUN_CPUS_PER_TASK"] == "3"


# --- how it ends ----------------------------------------------------------------------------------------------------


def test_before_the_time_limit_the_run_saves_and_is_queued_again(slurm):
    job = slurm("a.b", ends="after_signal", signals=[signal.SIGUSR1])
    assert job.scancel == ["--signal=TERM 77"]
    assert job.requeued == ["requeue 77"]
    assert job.code == 0


def test_a_run_that_fails_is_not_queued_again(slurm):
    job = slurm("a.b", ends=1)
    assert (job.code, job.requeued) == (1, [])


def test_one_that_is_cancelled_is_not_queued_again(slurm):
    """Its processes end by SIGTERM too, but no time was up."""
    job = slurm("a.b", ends=143)
    assert (job.code, job.requeued) == (143, [])


def test_one_that_fails_while_it_saves_is_not_queued_again(slurm):
    (slurm.folder / "stubs" / "srun").write_text(SRUN.replace("exit 143", "exit 1"))
    job = slurm("a.b", ends="after_signal", signals=[signal.SIGUSR1])
    assert (job.code, job.requeued) == (1, [])


def test_a_second_signal_does_not_stop_the_saving(slurm):
    (slurm.folder / "stubs" / "srun").write_text(SRUN.replace("exit 143", "sleep 1; exit 143"))
    job = slurm("a.b", ends="after_signal", signals=[signal.SIGUSR1, signal.SIGUSR1])
    assert job.scancel == ["--signal=TERM 77"]
    assert job.requeued == ["requeue 77"]


# --- what the files name --------------------------------------------------------------------------------------------


def flags_of(name):
    return set(re.findall(r"--(xla_\w+)", (FOLDER / name).read_text()))


def variables_of(name):
    return set(re.findall(r"\b((?:NCCL|XLA_PYTHON)_[A-Z_]+)\b", (FOLDER / name).read_text()))


@pytest.mark.parametrize("name", ["slurm.sh", "kubernetes.yaml"])
def test_the_readme_explains_every_flag(name):
    assert flags_of(name)
    assert flags_of(name) <= flags_of("README.md") | set(re.findall(r"`(xla_\w+)", (FOLDER / "README.md").read_text()))
    assert variables_of(name) <= variables_of("README.md")


def test_xla_knows_every_flag():
    """It refuses to start otherwise, on a machine that was hard to get."""
    flags = " ".join(re.findall(r"--xla_\w+=\w+", (FOLDER / "slurm.sh").read_text()))
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_both_ways_use_the_same_flags():
    assert flags_of("slurm.sh") == flags_of("kubernetes.yaml")


def test_the_pods_find_their_cluster():
    text = (FOLDER / "kubernetes.yaml").read_text()
    environ = dict(re.findall(r"- name: (\w+)\n +value: \"?([^\n\"]+)", text))
    found = find_cluster(environ | {"JOB_COMPLETION_INDEX": "1"})
    assert {COORDINATOR, NUM_PROCESSES} <= environ.keys()
    assert (found.num_processes, found.process_id) == (int(re.search(r"completions: (\d+)", text)[1]), 1)
    assert found.coordinator == "deepseek-jax-0.deepseek-jax:6000"
    for port in (6000, found.rendezvous_address[1]):
        assert f"containerPort: {port}" in text


def test_the_image_holds_every_package_and_what_setup_reads():
    copied = {
        word
        for line in re.findall(r"^COPY (.*) \S+$", (FOLDER / "Dockerfile").read_text(), re.M)
        for word in line.split()
    }
    assert all((ROOT / name).exists() for name in copied)
    packages = find_packages(str(ROOT), include=["deepseek_jax*", "pallas_kernels*", "experiments*", "tools*"])
    assert {name.split(".")[0] for name in packages} <= copied
    assert {"README.md", "LICENSE", "constraints.txt", "setup.py", "pyproject.toml"} <= copied
