"""The connections of a rendezvous: how they are opened, what they carry, and how a dead host is noticed."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import time
from typing import Any

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.cluster import Cluster

_RETRY_SECONDS = 0.2
_LONGEST_LINE = 1 << 24
"""Bytes; what sends more without an end of line is no process of ours."""
_HELLO = {"process_id": int, "num_processes": int, "pid": int, "host": str, "versions": dict, "settings": dict}
"""What the first message of a process has, besides its type."""


class RendezvousError(ConfigError):
    """The processes of a run did not come together; the message says who is missing or differs."""


def listen_at(cluster: Cluster) -> socket.socket:
    """The socket at which process 0 awaits the others. Raises `RendezvousError` where its port is taken."""
    host, port = cluster.rendezvous_address
    try:
        # All addresses of this host: the name that others know it by may not be the one that it knows itself.
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET, backlog=4096,
            dualstack_ipv6=socket.has_dualstack_ipv6(),
        )  # fmt: skip
    except OSError as error:
        raise RendezvousError(
            f"process 0 cannot listen at {host}:{port} ({error.strerror}): choose another port with --coordinator; "
            "that one and the next are used"
        ) from error


def allow_open_files(number: int) -> None:
    """Raises this process's limit of open files to `number`, as far as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number:
        wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connect(cluster: Cluster, leader: str, timeout: float) -> socket.socket:
    """A connection to process 0, as soon as that listens. Raises `RendezvousError` where it does not in `timeout` s."""
    host, port = cluster.rendezvous_address
    deadline = time.monotonic() + timeout
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), timeout=min(left, 10.0))
            connection.settimeout(None)
            return connection
        except OSError as error:  # not there yet, or its name is not known yet
            reason = error.strerror or str(error)
            time.sleep(_RETRY_SECONDS)
    raise RendezvousError(
        f"{leader} has not arrived: nothing answers at {host}:{port} within {timeout:g} s ({reason}); see whether "
        "it was started and whether that port is open, or set --host_timeout"
    )


class Link:
    """A connection that carries lines of JSON, each an object with a `type`."""

    def __init__(self, connection: socket.socket):
        self.connection, self.closed = connection, False
        self.peer: Any = None
        """Who is at the other end, once it has said hello."""
        self._buffer = b""
        _notice_dead_hosts(connection)

    def read(self) -> list[dict]:
        """The messages that have come, after waiting for some bytes. Sets `closed` at the end, and for a stranger's."""
        try:
            data = self.connection.recv(1 << 20)
        except OSError:
            data = b""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        self.closed = not data or len(self._buffer) > _LONGEST_LINE
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if not all(isinstance(message, dict) and self._is_ours(message) for message in messages):
            self.closed = True
            return []
        return messages

    def _is_ours(self, message: dict) -> bool:
        if self.peer is None and message.get("type") == "hello":
            return all(isinstance(message.get(name), kind) for name, kind in _HELLO.items())
        return isinstance(message.get("type"), str)

    def send(self, message: dict) -> None:
        """Sends a message; that nobody is there any more shows when reading."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")


def _notice_dead_hosts(connection: socket.socket) -> None:
    """Closes the connection to a host that lost its power or its network, which says nothing, within half a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
