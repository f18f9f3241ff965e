"""Several processes train as one: they agree on when to stop, and one checkpoint holds the data of all."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from host_children import STOPPED_AT, one_epoch, pair
from jax.experimental import multihost_utils
from tiny_run import (
    after_step,
    checkpoint,
    checkpoints,
    compile_flags,
    experiment,
    kill,
    quick_runs,
    records,
    train,
    write_texts,
)

from deepseek_jax.config import ConfigError
from deepseek_jax.config_io import save_config
from deepseek_jax.data import Tokenizer, merge_states, train_rows, train_tokenizer
from deepseek_jax.parallel import hosts
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.parallel.readers import reader_of
from deepseek_jax.training import loop, start
from deepseek_jax.training.checkpoint import CheckpointError, CheckpointStore
from deepseek_jax.training.schedules import Curve, Phase, ScheduleConfig, constant
from deepseek_jax.training.signals import Signals

HOSTS = 3


class Together:
    """Threads in the place of processes: `process_allgather` stacks what they bring, which must be of one shape."""

    def __init__(self, monkeypatch):
        self._rank = threading.local()
        self._barrier = threading.Barrier(HOSTS, timeout=60)
        self._brought: list = [None] * HOSTS
        self.shapes: set[tuple[int, ...]] = set()
        monkeypatch.setattr(jax, "process_count", lambda: HOSTS)
        monkeypatch.setattr(jax, "process_index", lambda: self._rank.value)
        monkeypatch.setattr(multihost_utils, "process_allgather", self._gather)

    def _gather(self, array):
        self._brought[self._rank.value] = np.asarray(array)
        self._barrier.wait()
        stacked = np.stack(self._brought)
        self._barrier.wait()
        self.shapes.add(stacked.shape)
        return stacked

    def each(self, function) -> list:
        """`function(rank)` of every rank, at the same time."""
        results: list = [None] * HOSTS

        def of(rank):
            self._rank.value = rank
            try:
                results[rank] = function(rank)
            except (ValueError, StopIteration) as error:
                results[rank] = error

        threads = [threading.Thread(target=of, args=(rank,)) for rank in range(HOSTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.fixture
def together(monkeypatch):
    return Together(monkeypatch)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer((path.read_text() for path in sorted(texts.iterdir())), vocab_size=300)


@pytest.fixture
def data(texts):
    return dataclasses.replace(experiment(texts).data, virtual_shards=6, epochs=1)


# --- what is sent ---------------------------------------------------------------------------------------------------


def test_every_process_gets_what_each_has(together):
    values = [{"row": 7, "text": "größer"}, None, list(range(50))]
    assert together.each(lambda rank: hosts.gather(values[rank])) == [values] * HOSTS
    assert together.each(lambda rank: hosts.highest([2, 15, 0][rank])) == [15] * HOSTS


def test_texts_of_nearly_one_length_are_sent_by_one_program(together):
    for length in (70, 80, 90, 120):
        together.each(lambda rank, length=length: hosts.gather("x" * (length + rank)))
    assert together.shapes == {(HOSTS,), (HOSTS, 128)}


def test_a_process_that_is_alone_sends_nothing(monkeypatch):
    def sends(*arguments, **settings):
        raise AssertionError("a lone process waited for others")

    monkeypatch.setattr(multihost_utils, "process_allgather", sends)
    value = object()
    assert hosts.gather(value) == [value]
    assert hosts.highest(3) == 3


# --- data -----------------------------------------------------------------------------------------------------------


def test_gathered_and_merged_states_are_those_of_all_rows(together, data, tokenizer):
    """The state that a lone host has after the same rows, on every host, so any of them may write it."""
    alone = train_rows(data, tokenizer, seed=0)
    alone.next_batch(2 * HOSTS)

    def state_of(rank):
        rows = train_rows(data, tokenizer, seed=0, host_index=rank, host_count=HOSTS)
        rows.next_batch(2 * HOSTS)
        state = merge_states(hosts.gather(rows.get_state()))
        rows.close()
        return state

    expected = json.loads(json.dumps(alone.get_state()))  # no tuples, as in a file
    assert together.each(state_of) == [expected] * HOSTS
    alone.close()


def test_the_data_ends_for_all_with_the_last_row_of_any(together, data, tokenizer):
    """And a run that is resumed at the end takes no step of padding."""
    run = types.SimpleNamespace(data=data)

    def steps_of(rank):
        rows = train_rows(data, tokenizer, seed=0, host_index=rank, host_count=HOSTS)
        watch = types.SimpleNamespace(rows=rows, experiment=run)
        exhausted_at, labels, steps, is_last = None, 0, 0, False
        while not is_last:
            batch = rows.next_batch(HOSTS)
            steps, labels = steps + 1, int(batch["loss_mask"].sum())
            is_last = loop._Run._is_last(watch, batch)
            if exhausted_at is None and rows.exhausted:
                exhausted_at = steps
        again = train_rows(data, tokenizer, seed=0, host_index=rank, host_count=HOSTS)
        again.set_state(merge_states(hosts.gather(rows.get_state())))
        watch.rows = again
        try:
            loop._Run._is_last(watch, again.next_batch(HOSTS))
        except StopIteration:
            return exhausted_at, steps, labels
        finally:
            rows.close()
            again.close()
        raise AssertionError("a step of padding alone")

    exhausted_at, steps, labels = zip(*together.each(steps_of), strict=True)
    assert len(set(steps)) == 1
    assert len(set(exhausted_at)) > 1, "hosts whose data ends at the same step prove nothing"
    assert max(exhausted_at) == steps[0]
    assert sum(labels) > 0, "the last step has a row for somebody"


def test_of_processes_that_read_the_same_rows_one_says_where_it_is():
    """As of two pipeline stages: a state is as large as the run has virtual shards, and is sent to every process."""
    rows = types.SimpleNamespace(get_state=lambda: "here")
    for first, sent in ((True, "here"), (False, None)):
        run = types.SimpleNamespace(rows=rows, reader=types.SimpleNamespace(first=first))
        assert loop._Run._data_state(run) == sent


def test_a_checkpoint_holds_the_data_of_all_processes_and_is_not_looked_for_again(texts, tmp_path, monkeypatch):
    """Each process knows by itself what was saved: their views of a folder differ, and then one would wait forever."""

    def with_another(value):
        return [value, {**value, "shards": {"other": "its state"}}] if isinstance(value, dict) else [value]

    looked = []
    real = CheckpointStore.latest_step
    monkeypatch.setattr(CheckpointStore, "latest_step", lambda store: looked.append(store) or real(store))
    monkeypatch.setattr(hosts, "gather", with_another)
    with quick_runs(), after_step(2, kill(signal.SIGTERM)):
        train(experiment(texts), tmp_path / "run")
    _, documents = checkpoint(tmp_path / "run", 2)
    assert sorted(documents["data"]["shards"]) == ["0", "1", "other"]
    assert documents["data"]["shards"]["other"] == "its state"
    assert len(looked) == 1


# --- agreement ------------------------------------------------------------------------------------------------------


def test_a_signal_to_one_process_stops_all(together):
    def stop(rank):
        signals, run = Signals(), types.SimpleNamespace()
        before = loop._Run._agree_to_stop(run, signals)
        signals.received = 15 if rank == 1 else None
        return before, loop._Run._agree_to_stop(run, signals), run.stopped_by

    assert together.each(stop) == [(None, 15, 15)] * HOSTS


def test_processes_that_see_different_checkpoints_are_refused(together, tmp_path):
    def newest(rank):
        store = CheckpointStore(tmp_path / ("here" if rank else "there"))
        store.latest_step = lambda: None if rank else 20
        return start.latest_step(store)

    errors = together.each(newest)
    assert [type(error) for error in errors] == [CheckpointError] * HOSTS
    assert r"see different newest checkpoints in" in str(errors[0])
    assert "[20, None, None]" in str(errors[2])


def test_process_zero_alone_writes_the_beginnings(together, texts, tokenizer, tmp_path):
    folders = [epath.Path(tmp_path / str(rank)) for rank in range(HOSTS)]
    for folder in folders:
        folder.mkdir()
    together.each(lambda rank: start.save_beginnings(experiment(texts), tokenizer, folders[rank]))
    written = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert written == [["config.json", "tokenizer.json"], [], []]


def test_containers_with_one_process_number_write_to_files_of_their_own(texts, tmp_path, monkeypatch):
    written = []
    real = type(epath.Path(tmp_path)).write_bytes

    def write_bytes(path, *arguments, **settings):
        written.append(path.name)
        return real(path, *arguments, **settings)

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", write_bytes)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    for _ in range(2):
        save_config(experiment(texts), epath.Path(tmp_path / "config.json"))
    assert len(set(written)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# --- batch sizes ----------------------------------------------------------------------------------------------------

RAMP = Curve(start=2, phases=(Phase(until=100, value=8, shape="linear"),))


def schedule(curve: Curve, multiple: int = 1) -> ScheduleConfig:
    return ScheduleConfig(total_tokens=200, learning_rate=constant(1.0), batch_rows=curve, batch_multiple=multiple)


def test_a_batch_that_hosts_cannot_share_is_refused_at_the_start():
    with pytest.raises(ConfigError) as error:
        start.check_batches(schedule(RAMP, multiple=3), 2)
    assert str(error.value) == (
        "schedule.batch_rows comes to 3 sequences, which 2 hosts cannot share evenly: set schedule.batch_multiple=6"
    )
    with pytest.raises(ConfigError, match="comes to 3 sequences and 2 more sizes, which 2 hosts"):
        start.check_batches(schedule(RAMP), 2)
    with pytest.raises(ConfigError, match="comes to 5 sequences"):
        start.check_batches(schedule(constant(5)), 2)
    start.check_batches(schedule(RAMP), 1)
    start.check_batches(schedule(RAMP, multiple=2), 2)
    later = Curve(phases=(Phase(until=150, value=4), Phase(until=300, value=7)))
    with pytest.raises(ConfigError, match="comes to 7 sequences"):
        start.check_batches(schedule(later), 4)
    start.check_batches(dataclasses.replace(schedule(later), total_tokens=150), 4)


def test_a_run_checks_its_batches_before_it_reads_anything(texts, tmp_path, monkeypatch):
    def too_late(*arguments, **settings):
        raise AssertionError("the data was read first")

    monkeypatch.setattr(start, "make_tokenizer", too_late)
    monkeypatch.setattr(loop, "reader_of", lambda mesh: dataclasses.replace(reader_of(mesh), count=2))
    with quick_runs(), pytest.raises(ConfigError, match=r"comes to 3 sequences, which 2 hosts .*batch_multiple=2$"):
        train(experiment(texts), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# --- two processes for real -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes ran what `host_children` says, and how each says that it ended."""
    folder = tmp_path_factory.mktemp("two")
    write_texts(folder / "texts")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parents[1]}:{here.parent}", "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = compile_flags()  # one device each
    command = [sys.executable, str(here / "host_children.py"), str(folder), str(port)]
    outputs = [folder / f"output.{rank}.txt" for rank in range(2)]
    deadline = time.monotonic() + 600
    with outputs[0].open("w") as first, outputs[1].open("w") as second:
        children = [
            subprocess.Popen([*command, str(rank)], env=environment, stdout=file, stderr=file)
            for rank, file in enumerate((first, second))
        ]
        try:
            codes = [child.wait(deadline - time.monotonic()) for child in children]
        finally:
            for child in children:
                child.kill()
    assert codes == [0, 0], "\n".join(path.read_text() for path in outputs)
    ended = [json.loads((folder / f"ended.{rank}.json").read_text()) for rank in range(2)]
    return types.SimpleNamespace(folder=folder, ended=ended)


def rows_of(run, folder, count):
    """Where the data of one host is after `count` rows."""
    rows = train_rows(run.data, Tokenizer.load(folder / "tokenizer.json"), seed=run.seed)
    rows.next_batch(count)
    rows.close()
    return json.loads(json.dumps(rows.get_state()))


@pytest.mark.slow
def test_two_processes_stop_at_the_signal_to_one(two):
    assert two.ended[0] == two.ended[1]
    assert two.ended[0]["stopped"]["status"] == "interrupted"
    assert (two.ended[0]["stopped"]["step"], two.ended[0]["stopped"]["signal"]) == (STOPPED_AT, 15)
    assert checkpoints(two.folder / "copy") == [STOPPED_AT]
    assert not list(two.folder.rglob("*.partial"))


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_on_two_and_on_one(two):
    """In the same rows, to the bit; and in the losses, up to the order of sums."""
    run = pair(two.folder / "texts")
    _, documents = checkpoint(two.folder / "copy", STOPPED_AT)
    assert documents["data"] == rows_of(run, two.folder / "copy", documents["data"]["row"])
    alone = dataclasses.replace(run, parallel=ParallelConfig(microbatch_rows=1))
    with quick_runs() as patch:
        patch.setattr(loop, "finish_run", lambda *arguments, heldout, **settings: heldout)
        result, _ = train(alone, two.folder / "copy", resume=True)
    assert (result.status, result.step) == ("done", two.ended[0]["ended"]["step"])
    (arrays, documents), (expected, theirs) = (checkpoint(two.folder / f, result.step) for f in ("copy", "run"))
    assert documents["data"] == theirs["data"] == rows_of(run, two.folder / "copy", documents["data"]["row"])
    assert sorted(arrays) == sorted(expected)
    ours, both = (records(two.folder / name, "train") for name in ("copy", "run"))
    assert [line["step"] for line in ours] == [line["step"] for line in both] == list(range(1, result.step + 1))
    np.testing.assert_allclose([x["loss"] for x in ours], [x["loss"] for x in both], rtol=1e-4)
    assert (two.folder / "run" / "report.html").exists()


@pytest.mark.slow
def test_two_processes_end_with_the_data_of_the_last(two):
    folder = two.folder / "epoch"
    result = two.ended[0]["spent"]
    assert result["status"] == "done"
    assert two.ended[0]["again"]["step"] == result["step"], "a resume of the finished run took a step of padding"
    lines = records(folder, "train")
    assert lines[-1]["step"] == result["step"]
    _, documents = checkpoint(folder, result["step"])
    rows = sum(line["batch_rows"] for line in lines)
    assert documents["data"]["row"] == rows
    # One host ends with the same batch: the one that holds the last row.
    run = one_epoch(two.folder / "texts")
    alone = train_rows(run.data, Tokenizer.load(folder / "tokenizer.json"), seed=run.seed)
    for number, line in enumerate(lines, start=1):
        assert not alone.exhausted, f"the data had ended before step {number}"
        alone.next_batch(line["batch_rows"])
    assert alone.exhausted
    alone.close()
