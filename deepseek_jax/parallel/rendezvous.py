"""How the processes of a run find each other before jax starts, and notice when one of them is gone. Imports no jax.

Every process opens one TCP connection to process 0, at the port after the coordinator's. Messages are lines of JSON.

- A process says hello: who it is, its versions and its settings. When all have come and agree, process 0 answers go.
  Otherwise every process that is there ends with one line, which names who is missing or who differs in what.
- The connections stay open. One that closes without a goodbye is a process that died, which would leave the others
  in a collective for good: process 0 tells them, and each ends with one line and exit code 1.
- At the end each says goodbye and waits for the others, so that a process that has less to do closes nothing early.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from deepseek_jax.parallel.cluster import Cluster
from deepseek_jax.parallel.connection import Link, RendezvousError, allow_open_files, connect, listen_at
from deepseek_jax.wording import first_few

ERROR_GRACE_SECONDS = 2.0
"""How long a process that failed waits before it tells the others and ends. In that time it may hear that another's
death is the cause, which is then what it reports; and others that fail of the same cause come to their own errors."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """A process of the run, as it introduced itself."""

    process_id: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.process_id} ({self.host}, pid {self.pid})"

    @property
    def short(self) -> str:
        return f"process {self.process_id} ({self.host})"


class Session:
    """The open connections of a run. Made by `meet`; ended by `close` or `fail`, or by the end of the process.

    Another process's death ends this one: a line on stderr, and exit code 1 from a thread, since the main thread may
    be in a collective that never returns. `leave(message)` does that; tests put another function in its place.
    """

    def __init__(self, me: Peer, *, hint: str, leave: Callable[[str], None]):
        self.me, self._hint, self._leave = me, hint, leave
        self._failing = threading.Event()
        """This process has failed by itself."""
        self._ended = threading.Event()
        """All have said goodbye, or there is nobody left to wait for."""
        self._thread = threading.Thread(target=self._listen, name="rendezvous", daemon=True)

    def close(self) -> None:
        """Says goodbye and waits until all processes have. Whoever dies meanwhile still ends this one."""
        self._goodbye()
        self._ended.wait()
        self._thread.join()

    def fail(self, message: str) -> None:
        """Tells the others that this process ends with an error, after a moment in which its cause may show."""
        self._failing.set()
        if not self._ended.wait(ERROR_GRACE_SECONDS):
            self._report_failure(f"{self.me} failed: {' '.join(message.split())}; {self._hint}")

    def _listen(self) -> None:
        raise NotImplementedError

    def _goodbye(self) -> None:
        raise NotImplementedError

    def _report_failure(self, message: str) -> None:
        raise NotImplementedError

    def _gone(self, peer: Peer | str) -> str:
        return f"{peer} is gone: this run cannot go on; {self._hint}"

    def _end(self, message: str) -> None:
        self._leave(message)
        self._ended.set()  # only where `leave` returns

    def _end_after_failure(self, message: str) -> None:
        """Ends this process for another's failure, unless it has failed by itself meanwhile, perhaps of the same."""
        if not self._failing.is_set():
            self._end(message)


def meet(
    cluster: Cluster,
    *,
    versions: dict[str, str],
    settings: dict[str, Any],
    timeout: float = 300.0,
    hint: str = "start it again",
    host: str | None = None,
    leave: Callable[[str], None] | None = None,
) -> Session:
    """Waits until all processes of `cluster` are there, with the same versions and settings.

    Args:
      cluster: this process and how many there are.
      versions: of Python and of libraries, by name.
      settings: the resolved config, flat: a value that JSON holds by dotted path.
      timeout: seconds until it is clear that a process does not come.
      hint: what to do after a process died, for the end of that line.
      host: this host's name; None asks the system.
      leave: called with a line when another process is gone; None writes it to stderr and ends this process.

    Raises:
      RendezvousError: a process is missing after `timeout`, came twice, or differs from process 0.
    """
    me = Peer(cluster.process_id, host or socket.gethostname(), os.getpid())
    kind = _Leader if cluster.process_id == 0 else _Follower
    return kind(me, cluster, versions, settings, timeout, hint=hint, leave=leave or leave_at_once)


def leave_at_once(message: str) -> None:
    """Writes one line to stderr and ends the process with code 1, whatever its other threads are in."""
    os.write(2, f"error: {message}\n".encode())
    # The main thread may hold a stream's lock for good.
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(0.5)
    os._exit(1)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


# --- process 0 ------------------------------------------------------------------------------------------------------


class _Leader(Session):
    """Process 0: one thread serves all connections, up to a few thousand."""

    def __init__(self, me, cluster, versions, settings, timeout, *, hint, leave):
        super().__init__(me, hint=hint, leave=leave)
        self._cluster = cluster
        self._selector = selectors.DefaultSelector()
        self._links: dict[int, Link] = {}
        """By process."""
        self._waiting = set(range(cluster.num_processes))
        """Processes that have not said goodbye."""
        self._lock = threading.Lock()
        allow_open_files(cluster.num_processes + 256)
        listener = listen_at(cluster)
        try:
            message = self._gather(listener, versions, settings, timeout)
        finally:
            self._selector.unregister(listener)
            listener.close()
        if message is not None:
            self._send_all({"type": "refuse", "message": message})
            self._close_all()
            raise RendezvousError(message)
        self._send_all({"type": "go", "leader": str(me)})
        # A pair by which this process's own goodbye reaches its thread.
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._thread.start()

    def _gather(self, listener: socket.socket, versions: dict, settings: dict, timeout: float) -> str | None:
        """Accepts everybody; returns what is wrong, or None."""
        mine = {"versions": versions, "settings": settings}
        differences: dict[int, dict[tuple[str, str], tuple[Any, Any]]] = {}
        deadline = time.monotonic() + timeout
        self._selector.register(listener, selectors.EVENT_READ, None)
        while len(self._links) < self._cluster.num_processes - 1:
            left = deadline - time.monotonic()
            if left <= 0:
                return self._missing(timeout)
            for key, _ in self._selector.select(left):
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    link = Link(connection)
                    self._selector.register(connection, selectors.EVENT_READ, link)
                    continue
                link = key.data
                hello = next(iter(link.read()), None)
                stranger = hello is not None and link.peer is None and hello["type"] != "hello"
                if link.closed or stranger:  # it died, or was no process of ours; if it comes again, it is welcome
                    self._drop(link)
                elif hello is not None:
                    if (wrong := self._welcome(link, hello)) is not None:
                        link.send({"type": "refuse", "message": wrong})
                        return wrong
                    differences[hello["process_id"]] = _differences(mine, hello)
        self._send_strangers_away()
        return self._disagreement({process: found for process, found in differences.items() if found})

    def _send_strangers_away(self) -> None:
        """Drops connections that never said who they are, such as a probe of the port's: all of ours are there."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, Link) and key.data.peer is None:
                self._drop(key.data)

    def _welcome(self, link: Link, hello: dict) -> str | None:
        """Notes who is at the other end of `link`; returns what is wrong with that, or None."""
        link.peer = peer = Peer(hello["process_id"], hello["host"], hello["pid"])
        total = self._cluster.num_processes
        if hello["num_processes"] != total:
            return f"{peer} was started as one of {hello['num_processes']} processes, {self.me} as one of {total}"
        known = self.me if peer.process_id == 0 else self._links.get(peer.process_id, link).peer
        if known is not peer:
            return f"two processes say that they are number {peer.process_id}: {known} and {peer}; give each its own"
        self._links[peer.process_id] = link
        return None

    def _missing(self, timeout: float) -> str:
        missing = [i for i in range(1, self._cluster.num_processes) if i not in self._links]
        names = self._cluster.host_names
        shown = first_few(f"{i} ({names[i]})" if names else i for i in missing)
        host, port = self._cluster.rendezvous_address
        one = len(missing) == 1
        return (
            f"process{'' if one else 'es'} {shown} {'has' if one else 'have'} not arrived at {host}:{port} within "
            f"{timeout:g} s; see whether {'it was' if one else 'they were'} started and can reach that port, or set "
            "--host_timeout"
        )

    def _disagreement(self, differences: dict[int, dict[tuple[str, str], tuple[Any, Any]]]) -> str | None:
        """One line for the first field that is not the same everywhere: versions first, then settings."""
        fields = list(dict.fromkeys(field for found in differences.values() for field in found))
        if not fields:
            return None
        fields.sort(key=lambda field: field[0] != "versions")
        kind, name = fields[0]
        apart = [process for process, found in differences.items() if fields[0] in found]
        ours, theirs = differences[apart[0]][fields[0]]
        same = [process for process in apart if differences[process][fields[0]][1] == theirs]
        first, *others = sorted(same)
        peers = str(self._links[first].peer.short) + (f" and {len(others)} more" if others else "")
        more = f" (and {len(fields) - 1} more fields differ)" if len(fields) > 1 else ""
        remedy = "install the same versions everywhere" if kind == "versions" else "start all with the same arguments"
        return f"the hosts differ in {name}: {ours} on {self.me.short}, {theirs} on {peers}{more}; {remedy}"

    def _listen(self) -> None:
        while self._waiting:
            for key, _ in self._selector.select():
                if key.data is None:
                    self._woken.recv(1)
                    self._waiting.discard(0)
                    continue
                link = key.data
                for message in link.read():
                    if message["type"] == "goodbye":
                        self._waiting.discard(link.peer.process_id)
                    elif message["type"] == "failed":
                        self._send_all(message)
                        self._end_after_failure(message["message"])
                        return
                if link.closed:
                    self._drop(link)
                    if link.peer.process_id in self._waiting:
                        message = self._gone(link.peer)
                        self._send_all({"type": "gone", "message": message})
                        self._end(message)
                        return
        self._send_all({"type": "end"})
        self._close_all()
        self._wake.close()
        self._woken.close()
        self._ended.set()

    def _goodbye(self) -> None:
        self._wake.send(b"\n")

    def _report_failure(self, message: str) -> None:
        self._send_all({"type": "failed", "message": message})

    def _send_all(self, message: dict) -> None:
        with self._lock:
            for link in list(self._links.values()):
                link.send(message)

    def _drop(self, link: Link) -> None:
        self._selector.unregister(link.connection)
        link.connection.close()
        if link.peer is not None and self._links.get(link.peer.process_id) is link:
            del self._links[link.peer.process_id]

    def _close_all(self) -> None:
        for link in list(self._links.values()):
            self._drop(link)
        self._selector.close()


def _differences(ours: dict, theirs: dict) -> dict[tuple[str, str], tuple[Any, Any]]:
    """`{("settings", "optimizer.peak_lr"): (0.1, 0.2)}`: where a hello differs from process 0's."""
    absent = "nothing"
    return {
        (kind, name): (ours[kind].get(name, absent), theirs[kind].get(name, absent))
        for kind in ("versions", "settings")
        for name in [*ours[kind], *(theirs[kind].keys() - ours[kind].keys())]
        if ours[kind].get(name, absent) != theirs[kind].get(name, absent)
    }


# --- the others -----------------------------------------------------------------------------------------------------


class _Follower(Session):
    """Any other process: one connection to process 0."""

    def __init__(self, me, cluster, versions, settings, timeout, *, hint, leave):
        super().__init__(me, hint=hint, leave=leave)
        host = cluster.host_names[0] if cluster.host_names else cluster.rendezvous_address[0]
        self._leader = f"process 0 ({host})"
        self._link = Link(connect(cluster, self._leader, timeout))
        hello = {**dataclasses.asdict(me), "type": "hello", "num_processes": cluster.num_processes}
        self._link.send({**hello, "versions": versions, "settings": settings})
        # Without a limit of its own: process 0 began to wait before or after this one, and answers at its timeout.
        self._incoming = self._messages()
        answer = next(self._incoming, None)
        if answer is None:
            raise RendezvousError(f"{self._leader} ended before all processes had come: see what it says")
        if answer["type"] != "go":
            raise RendezvousError(answer["message"])
        self._leader = answer["leader"]
        self._thread.start()

    def _messages(self) -> Iterator[dict]:
        while not self._link.closed:
            yield from self._link.read()

    def _listen(self) -> None:
        for message in self._incoming:
            if message["type"] == "end":
                self._ended.set()
                return
            if message["type"] == "failed":
                self._end_after_failure(message["message"])
                return
            if message["type"] == "gone":
                self._end(message["message"])
                return
        self._end(self._gone(self._leader))

    def _goodbye(self) -> None:
        self._link.send({"type": "goodbye"})

    def _report_failure(self, message: str) -> None:
        self._link.send({"type": "failed", "message": message})
