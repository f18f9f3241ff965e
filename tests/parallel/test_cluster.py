"""Which processes make up a run, as flags, SLURM and Kubernetes say it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.cluster import Cluster, expand_nodes, find_cluster

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_NTASKS": "20",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[001-002,007]",
    "SLURM_JOB_NODELIST": "gpu[001-002,007],login2",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
}
POD = {
    "JOB_COMPLETION_INDEX": "2",
    "DEEPSEEK_JAX_COORDINATOR": "train-0.train:6000",
    "DEEPSEEK_JAX_NUM_PROCESSES": "4",
}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


# --- flags ----------------------------------------------------------------------------------------------------------


def test_nothing_set_is_one_process():
    assert find_cluster({}) is None


def test_flags_say_it_all_and_come_before_the_environment():
    found = find_cluster(STEP | POD, coordinator="a:6000", num_processes=2, process_id=1)
    assert found == Cluster("a:6000", 2, 1)
    assert found.rendezvous_address == ("a", 6001)


def test_one_process_by_flags_needs_no_coordinator():
    assert find_cluster(STEP, num_processes=1) is None
    assert find_cluster(STEP, num_processes=1, process_id=0) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_processes": 2}, "--coordinator and --process_id are missing"),
        ({"coordinator": "a:1", "process_id": 0}, "--num_processes is missing"),
        ({"coordinator": "a:1"}, "--coordinator alone says nothing"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "'a' must read HOST:PORT"),
        ({"coordinator": ":12", "num_processes": 2, "process_id": 0}, "names no host"),
        ({"coordinator": "a:65535", "num_processes": 2, "process_id": 0}, "must be from 1 to 65534"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "from 0 to 1 for 2 processes, not 2"),
    ],
)
def test_incomplete_flags_are_one_line(flags, message):
    with pytest.raises(ConfigError) as error:
        find_cluster({}, **flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_address_may_be_an_ipv6_one():
    assert find_cluster({}, coordinator="[::1]:6000", num_processes=2, process_id=0).rendezvous_address == ("::1", 6001)


# --- SLURM ----------------------------------------------------------------------------------------------------------


def test_a_step_of_srun():
    hosts = ("gpu001",) * 8 + ("gpu002",) * 8 + ("gpu007",) * 4
    assert find_cluster(STEP) == Cluster("gpu001:62422", 20, 17, local_device_ids=(1,), host_names=hosts)


def test_jobs_have_ports_of_their_own():
    ports = {find_cluster(STEP | {"SLURM_JOB_ID": str(job)}).coordinator for job in range(100, 200)}
    assert len(ports) == 100
    assert all(61_000 <= int(address.split(":")[1]) < 65_534 for address in ports)


def test_a_task_alone_on_its_node_or_with_a_gpu_of_its_own_takes_what_it_sees():
    alone = STEP | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x3)"}
    assert find_cluster(alone).local_device_ids is None
    assert find_cluster(STEP | {"CUDA_VISIBLE_DEVICES": "0"}).local_device_ids is None
    assert find_cluster(STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).local_device_ids == (1,)


def test_hosts_are_named_only_where_they_are_sure():
    assert find_cluster(STEP | {"SLURM_DISTRIBUTION": "cyclic"}).host_names is None
    assert find_cluster(without(STEP, "SLURM_STEP_TASKS_PER_NODE")).host_names is None
    even = without(STEP, "SLURM_STEP_TASKS_PER_NODE") | {"SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "0"}
    assert find_cluster(even).host_names == ("gpu001", "gpu001", "gpu002", "gpu002", "gpu007", "gpu007")


@pytest.mark.parametrize(
    "environ",
    [
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        # What a batch script or an interactive shell has: the job's tasks, but no step.
        without(STEP, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"),
        {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a", "SLURM_NTASKS": "1"},
    ],
)
def test_a_single_task_or_a_shell_is_one_process(environ):
    assert find_cluster(environ) is None


def test_the_coordinator_alone_changes_slurms_address():
    assert find_cluster(STEP, coordinator="gpu001:7000").coordinator == "gpu001:7000"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (without(STEP, "SLURM_PROCID", "SLURM_LOCALID"), "SLURM_PROCID and SLURM_LOCALID are missing"),
        (STEP | {"SLURM_PROCID": "20"}, "from 0 to 19 for 20 processes, not 20"),
        (STEP | {"SLURM_PROCID": "x"}, "SLURM_PROCID must be a number, not 'x'"),
        (STEP | {"SLURM_STEP_NODELIST": "gpu[1-"}, "brackets do not match"),
    ],
)
def test_a_broken_step_is_one_line(environ, message):
    with pytest.raises(ConfigError, match=message):
        find_cluster(environ)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu[001-003,007],login2", ["gpu001", "gpu002", "gpu003", "gpu007", "login2"]),
        ("a", ["a"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("r[1-2]n[01-02]-x,b", ["r1n01-x", "r1n02-x", "r2n01-x", "r2n02-x", "b"]),
    ],
)
def test_lists_of_nodes(text, names):
    assert expand_nodes(text) == names


@pytest.mark.parametrize("text", ["a[1-2", "a]1[", "a[[1]]", "a[2-1]", "a[x]", "a,,b", ""])
def test_broken_lists_of_nodes(text):
    with pytest.raises(ConfigError, match="cannot read SLURM's list of nodes"):
        expand_nodes(text)


# --- Kubernetes -----------------------------------------------------------------------------------------------------


def test_a_pod_of_an_indexed_job():
    assert find_cluster(POD) == Cluster("train-0.train:6000", 4, 2)


def test_pods_that_are_runs_of_their_own():
    assert find_cluster({"JOB_COMPLETION_INDEX": "2", "DEEPSEEK_JAX_NUM_PROCESSES": "1"}) is None


@pytest.mark.parametrize("name", POD)
def test_a_pod_that_knows_half_of_it_is_refused(name):
    """Otherwise each of several pods would train alone into one folder."""
    with pytest.raises(ConfigError, match=f"^{name} is missing"):
        find_cluster(without(POD, name))


def test_neither_jax_nor_numpy_is_imported():
    """A command line is answered, and the environment that jax reads is set, before that."""
    code = "import sys, deepseek_jax.parallel.rendezvous; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
