"""How processes come together, and end together. Threads stand for processes, but where one must die."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from deepseek_jax.parallel import connection, rendezvous
from deepseek_jax.parallel.cluster import Cluster
from deepseek_jax.parallel.connection import RendezvousError
from deepseek_jax.parallel.rendezvous import meet

VERSIONS = {"python": "3.11.4", "jax": "0.10.2"}
SETTINGS = {"optimizer.peak_lr": 1e-3, "seed": 0}


@pytest.fixture
def port():
    return free_port()


def free_port():
    """A port of which the next is free as well."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("localhost", 0))
            number = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                two.bind(("localhost", number + 1))
                return number


class Process:
    """A process that comes to the rendezvous, in a thread; `left` is the line with which it had to leave."""

    def __init__(self, port, process_id, count, **settings):
        self.left = []
        hosts = tuple(f"gpu{number:03d}" for number in range(count)) if settings.pop("named", True) else None
        cluster = Cluster(f"localhost:{port}", count, process_id, host_names=hosts)
        defaults = {"versions": VERSIONS, "settings": SETTINGS, "timeout": 20.0, "host": f"gpu{process_id:03d}"}
        self._future = concurrent.futures.Future()

        def come():
            try:
                self._future.set_result(meet(cluster, leave=self.left.append, hint="resume it", **defaults | settings))
            except BaseException as error:
                self._future.set_exception(error)

        threading.Thread(target=come, daemon=True).start()

    @property
    def session(self):
        return self._future.result(timeout=30)

    @property
    def error(self):
        error = self._future.exception(timeout=30)
        assert isinstance(error, RendezvousError), error
        assert "\n" not in str(error)
        return str(error)

    def wait_to_leave(self):
        deadline = time.monotonic() + 10
        while not self.left:
            assert time.monotonic() < deadline, "it did not leave"
            time.sleep(0.01)
        return self.left


def close_all(processes):
    """All say goodbye, which each waits for."""
    threads = [threading.Thread(target=process.session.close) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


# --- coming together ------------------------------------------------------------------------------------------------


def test_all_come_in_any_order_and_leave_together(port):
    processes = [Process(port, number, 4) for number in (2, 1, 0, 3)]
    assert all(process.session for process in processes)
    close_all(processes)
    assert [process.left for process in processes] == [[]] * 4


def test_who_has_done_its_part_waits_for_the_others(port):
    """Process 0 writes the report while the others have nothing to do."""
    first, second = Process(port, 0, 2), Process(port, 1, 2)
    assert first.session
    closing = threading.Thread(target=second.session.close)
    closing.start()
    closing.join(0.3)
    assert closing.is_alive()
    first.session.close()
    closing.join(10)
    assert not closing.is_alive()
    assert (first.left, second.left) == ([], [])


def test_everybody_who_is_there_hears_who_is_missing(port):
    here = [Process(port, number, 5, timeout=1.0) for number in (0, 1, 3)]
    expected = f"processes 2 (gpu002), 4 (gpu004) have not arrived at localhost:{port + 1} within 1 s; "
    assert all(process.error.startswith(expected) for process in here)


def test_one_that_is_missing_is_named_by_number_where_its_host_is_not_known(port):
    alone = Process(port, 0, 2, timeout=0.3, named=False)
    assert alone.error.startswith(f"process 1 has not arrived at localhost:{port + 1} within 0.3 s; ")


def test_process_zero_is_missed_as_well(port):
    other = Process(port, 1, 2, timeout=0.5)
    assert re.match(rf"process 0 \(gpu000\) has not arrived: nothing answers at localhost:{port + 1} .*", other.error)


def test_a_port_that_is_taken_is_named(port):
    with socket.create_server(("", port + 1)):
        assert f"process 0 cannot listen at localhost:{port + 1} (" in Process(port, 0, 2).error


def test_strangers_are_sent_away(port):
    first = Process(port, 0, 2)
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"type": "hello"}\n', b"\xff\n", b""):
        with connection.connect(Cluster(f"localhost:{port}", 2, 1), "process 0", 5.0) as stranger:
            stranger.sendall(words)
            if words:
                stranger.settimeout(10)
                assert stranger.recv(10) == b""
    second = Process(port, 1, 2)
    close_all([first, second])


@pytest.mark.parametrize("words", [b"", b'{"type":"goodbye"}\n'], ids=["closes", "speaks"])
def test_a_stranger_that_is_there_when_all_have_come_changes_nothing(port, words):
    """A probe of the port that says nothing until then: the thread that sees processes die must outlive it."""
    first = Process(port, 0, 2)
    with connection.connect(Cluster(f"localhost:{port}", 2, 1), "process 0", 5.0) as stranger:
        time.sleep(0.2)
        second = Process(port, 1, 2)
        with contextlib.suppress(OSError):
            stranger.sendall(words)
    time.sleep(0.2)
    close_all([first, second])


def test_a_stranger_of_another_type_is_sent_away(port):
    first = Process(port, 0, 2)
    with connection.connect(Cluster(f"localhost:{port}", 2, 1), "process 0", 5.0) as stranger:
        stranger.sendall(b'{"type": "x"}\n')
        stranger.settimeout(10)
        assert stranger.recv(10) == b""
    close_all([first, Process(port, 1, 2)])


def test_one_that_died_while_it_waited_may_come_again(port):
    first = Process(port, 0, 3)
    hello = {"process_id": 1, "num_processes": 3, "pid": 1, "host": "a", "versions": {}, "settings": {}}
    with connection.connect(Cluster(f"localhost:{port}", 3, 1), "process 0", 5.0) as dead:
        connection.Link(dead).send({"type": "hello", **hello})
        time.sleep(0.1)
    time.sleep(0.1)
    close_all([first, Process(port, 1, 3), Process(port, 2, 3)])


# --- disagreement ---------------------------------------------------------------------------------------------------


def test_other_versions_are_named_with_hosts_and_values(port):
    other = VERSIONS | {"jax": "0.11.2"}
    processes = [Process(port, 0, 3), Process(port, 1, 3), Process(port, 2, 3, versions=other, settings={})]
    expected = "the hosts differ in jax: 0.10.2 on process 0 (gpu000), 0.11.2 on process 2 (gpu002) (and 2 more fields "
    assert all(process.error.startswith(expected) for process in processes)
    assert "same versions" in processes[0].error


def test_other_configs_are_named_by_their_path(port):
    other = SETTINGS | {"optimizer.peak_lr": 2e-3}
    processes = [Process(port, 0, 4), *(Process(port, number, 4, settings=other) for number in (1, 2, 3))]
    expected = (
        "the hosts differ in optimizer.peak_lr: 0.001 on process 0 (gpu000), 0.002 on process 1 (gpu001) and 2 more; "
        "start all with the same arguments"
    )
    assert [process.error for process in processes] == [expected] * 4


def test_a_field_that_only_one_has(port):
    processes = [Process(port, 0, 2), Process(port, 1, 2, settings=SETTINGS | {"extra": True})]
    assert "differ in extra: nothing on process 0 (gpu000), True on process 1 (gpu001);" in processes[0].error


def test_a_number_that_came_twice(port):
    processes = [Process(port, 0, 3), Process(port, 1, 3), Process(port, 1, 3, host="other")]
    for process in processes:
        assert process.error.startswith("two processes say that they are number 1: process 1 (")
        assert {"(gpu001, pid", "(other, pid"} == set(re.findall(r"\(\w+, pid", process.error))


def test_another_number_of_processes(port):
    processes = [Process(port, 0, 3), Process(port, 1, 2)]
    assert all("process 1 (gpu001, pid" in p.error and "as one of 2 processes" in p.error for p in processes)


# --- ending ---------------------------------------------------------------------------------------------------------


def drop(process):
    """What the others see when a process dies."""
    process.session._link.connection.shutdown(socket.SHUT_RDWR)


def test_when_one_is_gone_all_others_leave(port):
    processes = [Process(port, number, 4) for number in range(4)]
    assert all(process.session for process in processes)
    drop(processes[2])
    for process in (processes[0], processes[1], processes[3]):
        (line,) = process.wait_to_leave()
        assert re.fullmatch(r"process 2 \(gpu002, pid \d+\) is gone: this run cannot go on; resume it", line)


def test_one_that_dies_while_others_wait_for_the_end(port):
    processes = [Process(port, number, 3) for number in range(3)]
    assert all(process.session for process in processes)
    closing = [threading.Thread(target=process.session.close) for process in processes[:2]]
    for thread in closing:
        thread.start()
    time.sleep(0.1)
    drop(processes[2])
    assert [len(process.wait_to_leave()) for process in processes[:2]] == [1, 1]
    for thread in closing:
        thread.join(10)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_is_told_to_the_others(port, monkeypatch, failing):
    monkeypatch.setattr(rendezvous, "ERROR_GRACE_SECONDS", 0.2)
    processes = [Process(port, number, 3) for number in range(3)]
    assert all(process.session for process in processes)
    processes[failing].session.fail("the disk\nis full")
    for number in {0, 1, 2} - {failing}:
        (line,) = processes[number].wait_to_leave()
        assert re.fullmatch(rf"process {failing} \(gpu00{failing}, pid \d+\) failed: the disk is full; resume it", line)


def test_what_all_fail_of_each_reports_itself(port, monkeypatch):
    """A loss that is not finite is so on all of them."""
    monkeypatch.setattr(rendezvous, "ERROR_GRACE_SECONDS", 0.3)
    processes = [Process(port, number, 3) for number in range(3)]
    assert all(process.session for process in processes)
    threads = [threading.Thread(target=process.session.fail, args=("the same",)) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    time.sleep(0.5)
    assert [process.left for process in processes] == [[]] * 3


def test_a_failure_that_another_death_caused_reports_that(port):
    """The collective's error reaches the main thread first; the line that says why comes within the grace."""
    processes = [Process(port, number, 3) for number in range(3)]
    assert all(process.session for process in processes)
    failing = threading.Thread(target=processes[1].session.fail, args=("connection reset by peer",))
    failing.start()
    drop(processes[2])
    failing.join(10)
    assert ["process 2" in line for line in processes[1].wait_to_leave()] == [True]
    assert ["process 2" in line for line in processes[0].wait_to_leave()] == [True]


CHILD = """
import sys, time
from deepseek_jax.parallel.cluster import Cluster
from deepseek_jax.parallel.rendezvous import meet
meet(Cluster(f"localhost:{sys.argv[1]}", 3, int(sys.argv[2])), versions={}, settings={}, hint="resume it")
print("there", flush=True)
print("unflushed")
while True:
    pass
"""


@pytest.mark.parametrize("dying", [0, 1])
def test_real_processes_end_with_code_1_and_the_line_while_their_main_thread_is_busy(port, dying):
    command = [sys.executable, "-c", CHILD, str(port)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": buffered}
    children = [subprocess.Popen([*command, str(number)], **pipes) for number in range(3)]
    try:
        for child in children:
            assert child.stdout.readline() == "there\n"
        time.sleep(0.2)  # they print another line
        children[dying].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        for number in {0, 1, 2} - {dying}:
            out, errors = children[number].communicate(timeout=20)
            assert children[number].returncode == 1
            assert re.fullmatch(rf"error: process {dying} \([^\n]*\) is gone: [^\n]*; resume it\n", errors)
            assert out == "unflushed\n"
        assert time.monotonic() - begin < 10
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_two_thousand_processes(port):
    """As many as DeepSeek-V3's GPUs: one thread reads and answers the messages of all."""
    count = 2048
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2 * count + 300:
        pytest.skip("this process may not open as many files: both ends of every connection are in it")
    connection.allow_open_files(2 * count + 300)
    settings = {f"field.{number}": number for number in range(150)}
    first = Process(port, 0, count, settings=settings, timeout=60.0)
    hello = {"type": "hello", "settings": settings, "versions": VERSIONS, "num_processes": count, "host": "a"}
    links = []
    for number in range(1, count):
        links.append(connection.Link(connection.connect(Cluster(f"localhost:{port}", count, number), "0", 20.0)))
        links[-1].send({**hello, "process_id": number, "pid": number})
    assert first.session
    assert all(link.read()[0]["type"] == "go" for link in links)
    links[77].connection.close()
    assert first.wait_to_leave()[0].startswith("process 78 (a, pid 78) is gone")
    assert all(link.read()[0]["type"] == "gone" for link in links if link is not links[77])
    for link in links:
        link.connection.close()
