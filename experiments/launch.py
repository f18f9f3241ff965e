"""Runs of several processes: which they are, how they meet and part, and how to simulate them on one machine.

Importing this module imports neither jax nor the library: the environment that jax reads is prepared later.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from absl import flags

if TYPE_CHECKING:
    from deepseek_jax.parallel.cluster import Cluster

SIMULATED_DEVICES = 8
"""Virtual devices of all simulated hosts together, unless --virtual_devices says otherwise."""

_COMPARED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
"""Packages of which all hosts must have the same versions."""

_CONNECT_SECONDS, _HEARTBEAT_SECONDS, _SHUTDOWN_SECONDS = 120, 100, 60
"""Limits of jax's own service. All processes are there when it starts, and end together when it stops; that one is
gone is noticed by the rendezvous long before a heartbeat is missed."""

_GRACE_SECONDS = 15.0
"""What simulated hosts get to end by themselves when one has failed, and again after SIGTERM."""


def define_flags(options: flags.FlagValues) -> None:
    """Adds the flags of this module to `options`."""
    flags.DEFINE_string("coordinator", None, "", flag_values=options)
    flags.DEFINE_integer("num_processes", None, "", lower_bound=1, flag_values=options)
    flags.DEFINE_integer("process_id", None, "", lower_bound=0, flag_values=options)
    flags.DEFINE_float("host_timeout", 300.0, "", lower_bound=1.0, flag_values=options)
    flags.DEFINE_integer("simulate_hosts", 0, "", lower_bound=0, flag_values=options)


def find(options: flags.FlagValues, environ: Mapping[str, str]) -> Cluster | None:
    """The processes that this one belongs to, by the command line or the environment; None where it is alone."""
    from deepseek_jax.parallel.cluster import find_cluster

    if options.simulate_hosts:
        return None
    given = {name: getattr(options, name) for name in ("coordinator", "num_processes", "process_id")}
    return find_cluster(environ, **given)


def total_virtual_devices(options: flags.FlagValues, cluster: Cluster | None) -> int:
    """Virtual devices of the whole run; 0 where there are none."""
    if options.simulate_hosts:
        return options.virtual_devices or SIMULATED_DEVICES
    return options.virtual_devices * (cluster.num_processes if cluster else 1)


# --- one of several processes ---------------------------------------------------------------------------------------

_failed = threading.Event()
"""This process was one of several and failed."""


@contextlib.contextmanager
def joined(cluster: Cluster | None, experiment: Any, workdir: str, options: flags.FlagValues) -> Iterator[None]:
    """Within, this process is one of the run's and jax sees the devices of all; at the end it waits for the others.

    An error within is told to the others, which end as well. Does nothing where there is no `cluster`.

    Raises:
      RendezvousError: before anything began, a process is missing, or hosts differ in versions or settings.
    """
    if cluster is None:
        yield
        return
    from deepseek_jax.parallel.rendezvous import meet

    session = meet(
        cluster,
        versions=_versions(),
        settings=_settings(experiment, workdir, options),
        timeout=options.host_timeout,
        hint=f"--resume --workdir {workdir} continues from the last checkpoint",
    )
    try:
        _hold_aborts()
        _initialize_jax(cluster)
        yield
    except BaseException as error:
        _failed.set()
        session.fail(str(error) or type(error).__name__)
        raise
    session.close()


def leave(code: int) -> NoReturn:
    """Ends this process with `code`; one of several that failed at once, or jax would wait for the others' end."""
    if _failed.is_set():
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _initialize_jax(cluster: Cluster) -> None:
    import jax

    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        local_device_ids=cluster.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=_CONNECT_SECONDS,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )


def _hold_aborts() -> None:
    """Lets a process that aborts sleep for six seconds first, on the thread that does.

    When process 0 dies, jax's client aborts every other process, with a stack trace of C++ that helps nobody. The
    rendezvous sees the same at the same moment, and has the time to end the process with a line that does.
    """
    libc = ctypes.CDLL(None)
    # The handler gets the signal's number, which is 6 for SIGABRT: sleep(6). One in Python would run too late.
    libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))


def _versions() -> dict[str, str]:
    """What must be the same on all hosts, by name."""
    import deepseek_jax

    found = {"python": platform.python_version()}
    for package in _COMPARED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    # Not its version, which does not change with every line.
    digest = hashlib.sha256()
    folder = Path(deepseek_jax.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes() + b"\0")
    return {**found, "deepseek_jax's code": digest.hexdigest()[:12]}


def _settings(experiment: Any, workdir: str, options: flags.FlagValues) -> dict[str, Any]:
    """The config and what else decides what a process does, flat."""
    from deepseek_jax.config_io import to_dict

    rest = {"--workdir": workdir, "--resume": options.resume, "--profile": options.profile}
    return {**_flat(to_dict(experiment), ""), **rest}


def _flat(value: Any, path: str) -> dict[str, Any]:
    """`{"data.sources.0.path": "a"}` of nested dictionaries and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: dict[str, Any] = {}
    for name, inner in items:
        found |= _flat(inner, f"{path}.{name}" if path else str(name))
    return found or {path: value}


# --- simulated hosts ------------------------------------------------------------------------------------------------


def simulate(argv: Sequence[str], options: flags.FlagValues) -> int:
    """Runs the command line `argv` as `options.simulate_hosts` processes, as `run_together` does.

    Raises:
      ConfigError: the devices cannot be shared evenly, or the command line names a real cluster as well.
    """
    from deepseek_jax.config import ConfigError

    hosts, devices = options.simulate_hosts, total_virtual_devices(options, None)
    if hosts < 2 or devices % hosts:
        raise ConfigError(
            f"--simulate_hosts={hosts} cannot share {devices} virtual devices evenly: give at least 2 hosts, and a "
            "--virtual_devices that they divide"
        )
    if options.coordinator or options.num_processes is not None or options.process_id is not None:
        raise ConfigError("--simulate_hosts starts all processes itself: leave out --coordinator and its like")
    shared = ["--simulate_hosts=0", f"--virtual_devices={devices // hosts}", f"--num_processes={hosts}"]
    shared.append(f"--coordinator=localhost:{_free_port()}")
    command = [sys.executable, "-m", "experiments.run", *argv, *shared]
    return run_together([[*command, f"--process_id={number}"] for number in range(hosts)])


def run_together(commands: Sequence[Sequence[str]]) -> int:
    """Runs `commands` side by side; returns the first exit code that is not 0, or 0.

    The first writes to this terminal; what the others write comes with their number before each line. SIGINT, SIGTERM
    and SIGHUP are passed on to all. Where one fails, the others have some seconds to end by themselves.
    """
    children = [_start(command, number) for number, command in enumerate(commands)]
    with _passing_on(children):
        return _wait(children)


@dataclasses.dataclass(frozen=True)
class _Child:
    process: subprocess.Popen
    pumps: tuple[threading.Thread, ...]
    """Copy what it writes."""

    @property
    def code(self) -> int | None:
        """Its exit code as a shell has it; None while it runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code


def _start(command: Sequence[str], number: int) -> _Child:
    # Each in a session of its own, or a terminal's Ctrl-C would come twice: from there, and passed on.
    pipes: dict[str, Any] = {} if number == 0 else {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL, **pipes)
    streams = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    pumps = [
        threading.Thread(target=_pump, args=(source, target, f"[{number}] "), daemon=True)
        for source, target in streams
        if source is not None
    ]
    for pump in pumps:
        pump.start()
    return _Child(process, tuple(pumps))


def _pump(source: IO[bytes], target: IO[str], prefix: str) -> None:
    for line in source:
        target.write(prefix + line.decode(errors="replace"))
        target.flush()


@contextlib.contextmanager
def _passing_on(children: list[_Child]) -> Iterator[None]:
    """Sends the signals that this process gets to all `children`, and ends all of them at the end."""

    def send(number: int, frame: Any) -> None:
        del frame
        for child in children:
            child.process.send_signal(number)  # does nothing to one that has ended

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, send) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for child in children:
            child.process.kill()


def _wait(children: list[_Child]) -> int:
    """The first exit code of `children` that is not 0. After it the others end by themselves, or are ended."""
    first, deadline, asked = 0, float("inf"), False
    while any(child.code is None for child in children):
        first = first or next((child.code for child in children if child.code), 0)
        if first and deadline == float("inf"):
            deadline = time.monotonic() + _GRACE_SECONDS
        if time.monotonic() > deadline:
            for child in children:
                child.process.kill() if asked else child.process.terminate()
            deadline, asked = time.monotonic() + _GRACE_SECONDS, True
        time.sleep(0.05)
    for child in children:
        for pump in child.pumps:
            pump.join(5.0)
    return first or next((child.code for child in children if child.code), 0)


def _free_port() -> int:
    """A port of this machine that is free, and the next as well."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("", 0))
            port = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                two.bind(("", port + 1))
                return port
