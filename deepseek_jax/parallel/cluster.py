"""Which processes make up a run: from flags, from SLURM, or from a Kubernetes job. Imports no jax.

`find_cluster` reads, in this order:

- flags: `--coordinator HOST:PORT --num_processes N --process_id I`, all three;
- SLURM: a step of several tasks that `srun` started (SLURM_STEP_NUM_TASKS, SLURM_PROCID, SLURM_LOCALID,
  SLURM_STEP_NODELIST or SLURM_JOB_NODELIST). Process 0 is on the first node; its port comes from SLURM_JOB_ID;
- Kubernetes: an indexed Job (JOB_COMPLETION_INDEX) with DEEPSEEK_JAX_COORDINATOR=HOST:PORT and
  DEEPSEEK_JAX_NUM_PROCESSES=N in the environment of every pod.

`--coordinator` alone changes only the address of what SLURM or Kubernetes say. None of it: one process.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from deepseek_jax.config import ConfigError, require

COORDINATOR = "DEEPSEEK_JAX_COORDINATOR"
NUM_PROCESSES = "DEEPSEEK_JAX_NUM_PROCESSES"
_INDEX = "JOB_COMPLETION_INDEX"
"""Kubernetes sets it in the pods of an indexed Job."""

_FIRST_PORT, _PORT_PAIRS = 61_000, 2_000
"""Above the ports that Linux hands out by itself; each job takes two."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The place of this process among those of a run."""

    coordinator: str
    """`host:port` of process 0 for `jax.distributed`; the rendezvous listens on the next port."""
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None
    """The host's devices that are this process's; None: all that it sees."""
    host_names: tuple[str, ...] | None = None
    """The host of every process, where the scheduler says so."""

    def __post_init__(self):
        host, port = split_address(self.coordinator)
        require(bool(host), f"the coordinator {self.coordinator!r} names no host: write HOST:PORT")
        require(1 <= port < 65_535, f"port {port} of {self.coordinator} must be from 1 to 65534: the next is used too")
        require(
            0 <= self.process_id < self.num_processes,
            f"process_id must be from 0 to {self.num_processes - 1} for {self.num_processes} processes, "
            f"not {self.process_id}",
        )

    @property
    def rendezvous_address(self) -> tuple[str, int]:
        """Host and port where process 0 awaits the others: the coordinator's host, its port + 1."""
        host, port = split_address(self.coordinator)
        return host, port + 1


def split_address(address: str) -> tuple[str, int]:
    """`("gpu001", 6000)` of `gpu001:6000`, `("::1", 6000)` of `[::1]:6000`."""
    host, _, port = address.rpartition(":")
    if not port.isascii() or not port.isdecimal():
        raise ConfigError(f"the coordinator {address!r} must read HOST:PORT, for example gpu001:6000")
    return host.removeprefix("[").removesuffix("]"), int(port)


def find_cluster(
    environ: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Cluster | None:
    """The cluster that the flags or else `environ` describe; None for one process.

    Raises:
      ConfigError: what is given is incomplete or contradicts itself.
    """
    if num_processes is not None or process_id is not None:
        return _from_flags(coordinator, num_processes, process_id)
    found = _from_slurm(environ) or _from_kubernetes(environ)
    if coordinator is None:
        return found
    if found is None:
        raise ConfigError(
            "--coordinator alone says nothing outside of SLURM and Kubernetes: give --num_processes and --process_id"
        )
    return dataclasses.replace(found, coordinator=coordinator)


def _from_flags(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Cluster | None:
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    if num_processes == 1 and process_id in (None, 0):
        return None
    absent = [flag for flag, value in given.items() if value is None]
    if coordinator is None or num_processes is None or process_id is None:
        raise ConfigError(f"{_listed(absent)} missing: a run of several processes needs {', '.join(given)}")
    return Cluster(coordinator, num_processes, process_id)


def _from_slurm(environ: Mapping[str, str]) -> Cluster | None:
    """The step that `srun` started. A batch script or an interactive shell is no step of several tasks."""
    is_step = "SLURM_STEP_NODELIST" in environ
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS") or (_number(environ, "SLURM_NTASKS") if is_step else None)
    if tasks is None or tasks == 1:
        return None
    process_id, local_id = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID")
    job, nodes_text = _number(environ, "SLURM_JOB_ID"), environ.get("SLURM_STEP_NODELIST")
    nodes_text = nodes_text or environ.get("SLURM_JOB_NODELIST")
    needed = {
        "SLURM_PROCID": process_id,
        "SLURM_LOCALID": local_id,
        "SLURM_JOB_ID": job,
        "SLURM_STEP_NODELIST": nodes_text,
    }
    absent = [name for name, value in needed.items() if value is None]
    if process_id is None or local_id is None or job is None or not nodes_text:
        raise ConfigError(
            f"SLURM says that this is one of {tasks} tasks, but {_listed(absent)} missing: start it with srun"
        )
    nodes = expand_nodes(nodes_text)
    per_node = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE"))
    port = _FIRST_PORT + 2 * (job % _PORT_PAIRS)
    return Cluster(
        f"{nodes[0]}:{port}",
        tasks,
        process_id,
        local_device_ids=_local_devices(environ, local_id, tasks, len(nodes)),
        host_names=_host_names(nodes, per_node, tasks, environ.get("SLURM_DISTRIBUTION", "block")),
    )


def _local_devices(environ: Mapping[str, str], local_id: int, tasks: int, nodes: int) -> tuple[int, ...] | None:
    """The GPU of a task that shares its node with others; None where it sees no other's.

    With `--gpus-per-task` SLURM shows each task its own GPU alone, which is then number 0.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    sees_one = visible is not None and "," not in visible
    return None if tasks <= nodes or sees_one else (local_id,)


def _host_names(nodes: list[str], per_node: list[int] | None, tasks: int, distribution: str) -> tuple[str, ...] | None:
    """The node of every task where tasks fill one node after the other, as `srun` has them by itself."""
    if per_node is None and tasks % len(nodes) == 0:
        per_node = [tasks // len(nodes)] * len(nodes)
    known = per_node is not None and len(per_node) == len(nodes) and sum(per_node) == tasks
    if per_node is None or not known or not distribution.startswith("block"):
        return None
    return tuple(node for node, count in zip(nodes, per_node, strict=True) for _ in range(count))


def _tasks_per_node(text: str | None) -> list[int] | None:
    """`[8, 8, 4]` of SLURM's `8(x2),4`; None where it reads otherwise."""
    counts: list[int] = []
    for part in (text or "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def expand_nodes(text: str) -> list[str]:
    """The names in SLURM's list of nodes: `gpu[001-003,007],login2` has five.

    Raises:
      ConfigError: the list does not read as one.
    """
    names = [name for part in _split_outside_brackets(text) for name in _expand(part, text)]
    require(all(names), f"cannot read SLURM's list of nodes {text!r}: a name is empty")
    return names


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += {"[": 1, "]": -1}.get(character, 0)
        require(depth in (0, 1), f"cannot read SLURM's list of nodes {text!r}: its brackets do not match")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    require(depth == 0, f"cannot read SLURM's list of nodes {text!r}: its brackets do not match")
    return parts


def _expand(part: str, whole: str) -> list[str]:
    """`["a01b", "a02b"]` of `a[01-02]b`; several brackets multiply."""
    match = re.fullmatch(r"([^\[\]]*)\[([^\[\]]*)\](.*)", part)
    if match is None:
        return [part]
    rest = _expand(match[3], whole)
    names = []
    for item in match[2].split(","):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if bounds is None or int(bounds[2] or bounds[1]) < int(bounds[1]):
            raise ConfigError(f"cannot read SLURM's list of nodes {whole!r}: {item!r} is no number or range")
        numbers = range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1)
        names += [f"{match[1]}{number:0{len(bounds[1])}d}{tail}" for number in numbers for tail in rest]
    return names


def _from_kubernetes(environ: Mapping[str, str]) -> Cluster | None:
    index, coordinator = _number(environ, _INDEX), environ.get(COORDINATOR)
    processes = _number(environ, NUM_PROCESSES)
    if (index is None and coordinator is None and processes is None) or processes == 1:
        return None
    given = {_INDEX: index, COORDINATOR: coordinator, NUM_PROCESSES: processes}
    absent = [name for name, value in given.items() if value is None]
    if index is None or coordinator is None or processes is None:
        raise ConfigError(
            f"{_listed(absent)} missing: a run of several pods needs an indexed Job whose pods have {COORDINATOR}="
            f"HOST:PORT and {NUM_PROCESSES}; {NUM_PROCESSES}=1 makes each pod a run of its own"
        )
    return Cluster(coordinator, processes, index)


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    require(text.isascii() and text.isdecimal(), f"the environment variable {name} must be a number, not {text!r}")
    return int(text)


def _listed(names: list[str]) -> str:
    """`A is` or `A and B are`, as a sentence begins."""
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"
