"""The training loop: it resumes bit for bit, stops when asked, notices what goes wrong, and waits only when it logs."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import threading
import types
from typing import Any

import jax
import numpy as np
import pytest
from tiny_run import (
    LENGTH,
    STEPS,
    TOKENS,
    after_step,
    assert_same_arrays,
    checkpoint,
    checkpoints,
    experiment,
    judge,
    kill,
    quick_runs,
    records,
    train,
    write_texts,
)

from deepseek_jax.data import Tokenizer
from deepseek_jax.training import canonical, loop
from deepseek_jax.training.checkpoint import CheckpointStore
from deepseek_jax.training.experiment import CheckpointConfig, EvaluationConfig, LoggingConfig
from deepseek_jax.training.finish import HeldoutEvaluator
from deepseek_jax.training.profiling import StepTrace
from deepseek_jax.training.progress import TrainingClock
from deepseek_jax.training.signals import StoppedAtOnce
from deepseek_jax.training.stability import NonFiniteLossError
from deepseek_jax.training.step import Trainer
from deepseek_jax.training.step_metrics import StepMetrics

ROWS = [2] * 8 + [3] * 6 + [4] * 6


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    """What the runs of this file share, and their experiment."""
    texts = write_texts(tmp_path_factory.mktemp("texts"))
    evaluation = EvaluationConfig(batch_rows=4, every_steps=5)
    with quick_runs() as patch:
        patch.setattr(loop, "finish_run", lambda *arguments, heldout, **settings: heldout)
        base = experiment(texts, evaluation=evaluation, checkpoint=CheckpointConfig(every_steps=10, keep_last=9))
        yield types.SimpleNamespace(base=base, folder=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs):
    """Twenty steps in one go."""
    folder = runs.folder / "whole"
    result, printed = train(runs.base, folder)
    return types.SimpleNamespace(folder=folder, result=result, printed=printed)


@pytest.fixture(scope="module")
def resumed(runs):
    """Ten steps, SIGTERM, and the rest by `resume`; steps 11 to 13 were already logged by a run that then died."""
    folder = runs.folder / "resumed"
    with after_step(10, kill(signal.SIGTERM)):
        first, first_printed = train(runs.base, folder)
    found = types.SimpleNamespace(
        folder=folder, first=first, first_printed=first_printed, first_records=records(folder, "train")
    )
    with after_step(13, power_cut), pytest.raises(PowerCutError):
        train(runs.base, folder, resume=True)
    found.second_records = records(folder, "train")
    found.result, found.printed = train(runs.base, folder, resume=True)
    return found


class PowerCutError(Exception):
    """Ends a run without a word."""


def power_cut(state):
    raise PowerCutError


# --- resume ---------------------------------------------------------------------------------------------------------


def test_the_runs_of_this_file_exercise_what_resuming_could_lose(whole):
    lines = records(whole.folder, "train")
    assert [line["batch_rows"] for line in lines] == ROWS, "a batch that ramps, in microbatches of two rows"
    assert {line["mtp_weight"] for line in lines} == {0.3, 0.1}
    arrays, documents = checkpoint(whole.folder, 10)
    moments = [name for name in arrays if name.startswith("optimizer.0.mu/")]
    assert {arrays[name].dtype.name for name in moments} == {"bfloat16"}
    biases = [arrays[name] for name in arrays if name.endswith("router.bias") and "optimizer" not in name]
    assert len(biases) == 2
    assert any(np.abs(bias).max() > 0.01 for bias in biases)
    assert documents["data"]["row"] == sum(ROWS[:10])
    assert whole.result == loop.RunResult(
        "done", STEPS, TOKENS, str(whole.folder), heldout_bits_per_byte=whole.result.heldout_bits_per_byte
    )


def test_ten_steps_and_ten_more_equal_twenty_bit_for_bit(whole, resumed):
    """Weights, router biases, both moments, their count, and where the data is."""
    (arrays, documents), (expected, expected_documents) = checkpoint(resumed.folder, 20), checkpoint(whole.folder, 20)
    assert_same_arrays(arrays, expected)
    assert documents["data"] == expected_documents["data"]
    for name in ("step", "tokens", "seed", "model", "tokenizer_fingerprint"):
        assert documents["meta"][name] == expected_documents["meta"][name], name
    before, _ = checkpoint(whole.folder, 10)
    moved = {name for name in expected if before[name].tobytes() != expected[name].tobytes()}
    assert {"optimizer.0.count", "optimizer.0.mu/head.weight", "optimizer.0.nu/head.weight", "head.weight"} < moved
    assert any(name.endswith("router.bias") for name in moved), "a bias that rests proves nothing"


def test_a_resumed_run_logs_each_step_once_and_the_same(whole, resumed):
    assert [line["step"] for line in resumed.first_records] == list(range(1, 11))
    assert [line["step"] for line in resumed.second_records] == list(range(1, 13)), "what died had logged two steps"
    assert records(resumed.folder, "train") == records(whole.folder, "train")
    assert [line["step"] for line in records(whole.folder, "train")] == list(range(1, STEPS + 1))
    assert records(resumed.folder, "eval") == records(whole.folder, "eval")
    assert [line["step"] for line in records(whole.folder, "eval")] == [5, 10, 15, 20]
    losses = [line["loss_main"] for line in records(whole.folder, "train")]
    assert losses[-1] < losses[0] - 0.5


def test_a_resumed_run_says_from_where(resumed, whole):
    assert "resumed from step 10" in resumed.printed
    assert "1.15k tokens to go" in resumed.printed
    assert "resumed" not in whole.printed


def test_the_time_of_a_run_includes_what_came_before_it(resumed):
    seconds = [checkpoint(resumed.folder, step)[1]["meta"]["seconds"] for step in (10, 20)]
    assert 0 < seconds[0] < seconds[1]


def test_a_run_that_died_before_its_first_checkpoint_starts_again(runs, whole):
    folder = runs.folder / "died"
    with after_step(4, power_cut), pytest.raises(PowerCutError):
        train(runs.base, folder)
    assert checkpoints(folder) == []
    assert [line["step"] for line in records(folder, "train")] == [1, 2, 3]
    result, printed = train(runs.base, folder, resume=True)
    assert result.step == STEPS
    assert f"no checkpoint yet, so from the beginning ({folder}/checkpoints)" in printed
    assert records(folder, "train") == records(whole.folder, "train")
    assert_same_arrays(checkpoint(folder, 20)[0], checkpoint(whole.folder, 20)[0])


def test_a_finished_run_resumes_to_its_end(runs, whole):
    before = records(whole.folder, "train")
    result, _ = train(runs.base, whole.folder, resume=True)
    assert result.status == "done"
    assert result.step == STEPS
    assert records(whole.folder, "train") == before


def test_more_tokens_go_on_from_the_last_checkpoint(runs, whole, resumed):
    longer = dataclasses.replace(runs.base.schedule, total_tokens=TOKENS + 2 * 4 * LENGTH)
    result, printed = train(dataclasses.replace(runs.base, schedule=longer), resumed.folder, resume=True)
    assert result.step == STEPS + 2
    assert f"\nwarning: {longer.mismatch()}\nresumed from step 20" in printed
    assert "warning" not in whole.printed + resumed.printed
    assert records(resumed.folder, "train")[:STEPS] == records(whole.folder, "train")


# --- signals --------------------------------------------------------------------------------------------------------


def test_sigterm_saves_and_leaves_with_a_clear_line(resumed):
    tokens = sum(ROWS[:10]) * LENGTH
    expected = loop.RunResult("interrupted", 10, tokens, str(resumed.folder), signal.SIGTERM)
    assert dataclasses.replace(resumed.first, heldout_bits_per_byte=None) == expected
    last = resumed.first_printed.splitlines()[-1]
    assert last == f"SIGTERM: saved step 10 (704 tokens) to {resumed.folder}/checkpoints"


def test_sigint_between_checkpoints_saves_too_and_the_handlers_go_back(runs, capfd):
    folder = runs.folder / "sigint"
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with after_step(3, kill(signal.SIGINT)):
        result, _ = train(runs.base, folder)
    assert (result.status, result.step, result.signal) == ("interrupted", 3, signal.SIGINT)
    assert checkpoints(folder) == [3]
    assert capfd.readouterr().err == "SIGINT: saving after this step; once more stops at once\n"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_stops_at_once_and_saves_nothing(runs):
    folder = runs.folder / "twice"

    def twice(state):
        kill(signal.SIGTERM)(state)
        kill(signal.SIGTERM)(state)
        raise AssertionError("the second signal was ignored")

    with after_step(12, twice), pytest.raises(StoppedAtOnce, match="SIGTERM again: stopped at once") as stopped:
        train(runs.base, folder)
    assert stopped.value.signal == signal.SIGTERM
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert checkpoints(folder) == [10]
    assert train(runs.base, folder, resume=True)[0].step == STEPS


def test_a_signal_before_the_first_step_saves_nothing_and_says_so(runs, monkeypatch):
    folder = runs.folder / "early"
    monkeypatch.setattr(loop._Run, "_announce", lambda self, step, tokens: kill(signal.SIGINT)(None))
    result, printed = train(runs.base, folder)
    assert (result.status, result.step) == ("interrupted", 0)
    assert printed == "SIGINT: nothing to save before a step\n"
    assert checkpoints(folder) == []
    monkeypatch.undo()
    assert train(runs.base, folder, resume=True)[0].step == STEPS


def test_outside_the_main_thread_a_run_leaves_signals_alone(runs):
    folder, results = runs.folder / "thread", []
    # `redirect_stdout` is for the whole process, so the thread trains without it.
    thread = threading.Thread(target=lambda: results.append(loop.train(runs.base, workdir=str(folder))))
    thread.start()
    thread.join()
    assert [result.status for result in results] == ["done"]


# --- losses that are not finite -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(runs):
    """A run that logs every fourth step, in which a weight becomes NaN after step 5: so step 6 is the first bad one."""
    folder = runs.folder / "poisoned"

    def poison(state):
        norm = jax.tree.map(lambda scale: scale.at[3].set(np.nan), state.params["final_norm"])
        return dataclasses.replace(state, params={**state.params, "final_norm": norm})

    config = dataclasses.replace(
        runs.base,
        logging=LoggingConfig(every_steps=4, tensorboard=False),
        checkpoint=CheckpointConfig(every_steps=3),
        evaluation=EvaluationConfig(batch_rows=4),
    )
    with after_step(5, poison), pytest.raises(NonFiniteLossError) as caught:
        train(config, folder)
    return types.SimpleNamespace(folder=folder, error=caught.value, config=config)


def test_a_loss_that_is_not_finite_names_its_step(poisoned):
    assert str(poisoned.error) == (
        f"step 6: loss nan, gradient norm nan; its batch is saved in {poisoned.folder}/nonfinite_step_6.npz, the "
        "checkpoints before it are as they were: lower optimizer.peak_lr, or resume and look at the data"
    )


def test_its_batch_is_saved(poisoned, whole):
    saved = dict(np.load(poisoned.folder / "nonfinite_step_6.npz"))
    assert sorted(saved) == ["loss_mask", "positions", "segment_ids", "tokens"]
    assert {array.shape for array in saved.values()} == {(2, LENGTH + 1)}
    # The very rows: what the data gives after ten of them.
    state = checkpoint(whole.folder, 10)[1]["data"]
    tokenizer = Tokenizer.load(whole.folder / "tokenizer.json")
    rows = loop.train_rows(poisoned.config.data, tokenizer, seed=poisoned.config.seed)
    assert state["identity"]["seed"] == poisoned.config.seed
    for _ in range(5):
        rows.next_batch(2)
    expected = rows.next_batch(2)
    rows.close()
    for name, array in expected.items():
        np.testing.assert_array_equal(saved[name], array, err_msg=name)


def test_no_checkpoint_follows_it_and_the_one_before_restores(poisoned, whole):
    assert checkpoints(poisoned.folder) == [3]
    assert [line["step"] for line in records(poisoned.folder, "train")] == [1, 4]
    result, _ = train(poisoned.config, poisoned.folder, resume=True)
    assert result.step == STEPS
    assert_same_arrays(checkpoint(poisoned.folder, 20)[0], checkpoint(whole.folder, 20)[0])


@pytest.mark.parametrize("due", ["checkpoint", "evaluation"])
def test_neither_a_checkpoint_nor_an_evaluation_is_made_of_it(runs, due, tmp_path):
    """Each is due at the poisoned step itself, and nothing is logged there."""
    config = dataclasses.replace(
        runs.base,
        logging=LoggingConfig(every_steps=1000, tensorboard=False),
        checkpoint=CheckpointConfig(every_steps=4 if due == "checkpoint" else 1000),
        evaluation=EvaluationConfig(batch_rows=4, every_steps=4 if due == "evaluation" else 0),
    )
    real = Trainer.step

    def infinite(self, state, batch, hyper):
        state, metrics = real(self, state, batch, hyper)
        return state, metrics._replace(grad_norm=metrics.grad_norm * np.inf) if int(state.step) == 4 else metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", infinite)
        with pytest.raises(NonFiniteLossError, match=r"step 4: .* gradient norm inf"):
            train(config, tmp_path)
    assert checkpoints(tmp_path) == []
    assert records(tmp_path, "eval") == []


def test_weights_that_are_not_finite_are_never_saved(runs, tmp_path):
    """Step 6 is saved and its own loss is fine."""

    def poison(state):
        head = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(np.inf), state.params["head"])
        return dataclasses.replace(state, params={**state.params, "head": head})

    config = dataclasses.replace(runs.base, checkpoint=CheckpointConfig(every_steps=3))
    with after_step(6, poison), pytest.raises(NonFiniteLossError, match=r"^step 6: params.head.* not finite after it"):
        train(config, tmp_path)
    assert checkpoints(tmp_path) == [3]
    assert (tmp_path / "nonfinite_step_6.npz").exists()


# --- evaluation and logging -----------------------------------------------------------------------------------------


def test_evaluation_on_the_way_equals_the_one_on_the_restored_state(runs, whole):
    store = CheckpointStore(whole.folder / "checkpoints")
    trainer = loop.make_trainer(runs.base)
    evaluator = HeldoutEvaluator(runs.base, trainer, Tokenizer.load(whole.folder / "tokenizer.json"))
    lines = {line["step"]: line for line in records(whole.folder, "eval")}
    for step in (10, 20):
        state = canonical.from_canonical(trainer, store.restore(step, canonical.templates(trainer)), step)
        result = judge(evaluator, state)
        assert result.bits_per_byte == lines[step]["heldout_bits_per_byte"] == store.metric(step)
        assert result.loss == lines[step]["heldout_loss"]
    assert whole.result.heldout_bits_per_byte == lines[20]["heldout_bits_per_byte"]
    assert lines[20]["heldout_bits_per_byte"] < lines[5]["heldout_bits_per_byte"] - 0.1
    assert store.best_step() == 20


def test_checkpoints_are_compared_by_the_text_that_every_evaluation_reads(runs, tmp_path):
    """With `max_bytes`, the last evaluation reads more than the others did, and is no measure beside them."""
    evaluation = EvaluationConfig(batch_rows=4, every_steps=10, max_bytes=100)
    config = dataclasses.replace(runs.base, evaluation=evaluation)
    result, printed = train(config, tmp_path)
    store = CheckpointStore(tmp_path / "checkpoints")
    trainer = loop.make_trainer(config)
    evaluator = HeldoutEvaluator(config, trainer, Tokenizer.load(tmp_path / "tokenizer.json"))
    parts = {}
    for step in (10, 20):
        state = canonical.from_canonical(trainer, store.restore(step, canonical.templates(trainer)), step)
        parts[step] = judge(evaluator, state, complete=False).bits_per_byte
        assert store.metric(step) == parts[step]
    everything = judge(evaluator, state)
    assert result.heldout_bits_per_byte == everything.bits_per_byte != parts[20]
    read = [line["heldout_bits_per_byte"] for line in records(tmp_path, "eval")]
    assert read == [parts[10], everything.bits_per_byte]
    assert f"over {everything.bytes:,} bytes" in printed


def test_rates_are_of_training_time_alone(runs, tmp_path, monkeypatch):
    """A second per step; hours for what else a run does: compiling for 2 and for 4 rows, evaluations, checkpoints."""
    time = [0.0]

    def takes(seconds, owner, name):
        real = getattr(owner, name)

        def slow(*arguments, **settings):
            time[0] += seconds(*arguments) if callable(seconds) else seconds
            return real(*arguments, **settings)

        monkeypatch.setattr(owner, name, slow)

    seen = set()

    def compilation(state, batch, hyper, setting):
        new = batch.tokens.shape not in seen
        seen.add(batch.tokens.shape)
        return 3600 * new

    takes(1, loop._Run, "next_batch")
    logging = LoggingConfig(every_steps=3, tensorboard=False)
    config = dataclasses.replace(runs.base, logging=logging)
    takes(compilation, loop.make_trainer(config), "_step")
    takes(3600, HeldoutEvaluator, "__call__")
    takes(3600, CheckpointStore, "save")
    monkeypatch.setattr(loop, "TrainingClock", lambda: TrainingClock(lambda: time[0]))
    _, printed = train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    assert time[0] > 8 * 3600
    then = {"step": 0, "tokens": 0}
    for line in lines:
        rate = (line["tokens"] - then["tokens"]) / (line["step"] - then["step"])
        assert line["tokens_per_second"] == pytest.approx(rate), line["step"]
        then = line
    assert [line["step"] for line in lines] == [1, 3, 6, 9, 12, 15, 18, 20]
    assert re.findall(r"eta (.*)$", printed, re.MULTILINE) == ["28s", "26s", "23s", "19s", "13s", "8s", "3s"]


@pytest.mark.parametrize(("every", "metric"), [(0, False), (10, True)])
def test_the_end_is_saved_before_all_held_out_text_is_read(runs, tmp_path, monkeypatch, every, metric):
    """Where checkpoints are compared by a part of it, only that part is read first."""
    real = HeldoutEvaluator.__call__

    def killed(self, state, *, complete):
        if complete:
            raise PowerCutError
        return real(self, state, complete=complete)

    evaluation = EvaluationConfig(batch_rows=4, every_steps=every, max_bytes=100 if every else None)
    config = dataclasses.replace(runs.base, evaluation=evaluation)
    monkeypatch.setattr(HeldoutEvaluator, "__call__", killed)
    with pytest.raises(PowerCutError):
        train(config, tmp_path)
    assert checkpoints(tmp_path) == [10, 20]
    assert (CheckpointStore(tmp_path / "checkpoints").metric(20) is not None) == metric


class Watched:
    """A value of a step; when somebody waits for it, it notes how many steps were started by then."""

    def __init__(self, array, started, read_at):
        self.array, self.started, self.read_at = array, started, read_at

    def __array__(self, dtype=None, copy=None):
        self.read_at.append(self.started[0])
        return np.asarray(self.array, dtype)

    def __float__(self):
        return float(np.asarray(self))


@pytest.mark.parametrize(("every", "waits"), [(4, [1, 4, 8, 10, 12]), (1000, [1, 10, 12])])
def test_a_run_waits_for_the_device_only_where_it_logs_saves_or_stops(runs, tmp_path, monkeypatch, every, waits):
    """Step 10 is saved, step 12 interrupted; where a step is compiled, it waits for the one before."""
    started: list[int] = [0]
    blocked_at: list[int] = []
    read_at: list[int] = []
    gets: list[int] = []
    real, real_get = Trainer.step, jax.device_get

    def watched(self, state, batch, hyper):
        state, metrics = real(self, state, batch, hyper)
        started[0] += 1
        if started[0] == 12:
            kill(signal.SIGTERM)(None)
        watched_metrics: list[Any] = [Watched(array, started, read_at) for array in metrics]
        return state, StepMetrics(*watched_metrics)

    def device_get(tree):
        gets.append(started[0])
        return real_get(tree)

    monkeypatch.setattr(Trainer, "step", watched)

    def block_until_ready(tree):
        blocked_at.append(started[0])
        return tree

    monkeypatch.setattr(jax, "device_get", device_get)
    monkeypatch.setattr(jax, "block_until_ready", block_until_ready)
    config = dataclasses.replace(
        runs.base,
        logging=LoggingConfig(every_steps=every, tensorboard=False),
        evaluation=EvaluationConfig(batch_rows=4),
    )
    result, _ = train(config, tmp_path)
    assert result.step == 12
    assert sorted(set(read_at)) == waits
    assert set(gets) <= set(waits)
    assert sorted(set(blocked_at)) == [0, 8]
    assert [line["step"] for line in records(tmp_path, "train")] == [step for step in waits if step in (1, 4, 8, 12)][
        : None if every == 4 else 1
    ]


def test_a_trace_calls_a_step_by_its_number(runs, tmp_path, monkeypatch):
    seen = []
    real_trace, real_step = StepTrace.step, Trainer.step

    def traced(self, number):
        seen.append(("trace", number))
        return real_trace(self, number)

    def step(self, state, batch, hyper):
        state, metrics = real_step(self, state, batch, hyper)
        seen.append(("step", int(state.step)))
        return state, metrics

    monkeypatch.setattr(StepTrace, "step", traced)
    monkeypatch.setattr(Trainer, "step", step)
    for end in (2, 4):
        with after_step(end, kill(signal.SIGTERM)):
            train(runs.base, tmp_path, resume=end > 2)
    assert seen == [(kind, number) for number in (1, 2, 3, 4) for kind in ("trace", "step")]


# --- ends and folders -------------------------------------------------------------------------------------------------


def test_a_run_ends_with_its_data_and_says_so(runs, tmp_path):
    config = dataclasses.replace(
        runs.base,
        data=dataclasses.replace(runs.base.data, epochs=1),
        schedule=dataclasses.replace(runs.base.schedule, total_tokens=10**6),
        logging=LoggingConfig(every_steps=1000, tensorboard=False),
        evaluation=EvaluationConfig(batch_rows=4),
    )
    result, printed = train(config, tmp_path)
    assert result.status == "done"
    assert 10 < result.step < 100
    assert f"the data ended after {result.tokens / 1000:.3g}k of 1M tokens: data.epochs is 1" in printed
    assert [line["step"] for line in records(tmp_path, "train")] == [1, result.step]
    (evaluated,) = records(tmp_path, "eval")
    assert evaluated["step"] == result.step
    assert evaluated["heldout_bits_per_byte"] == result.heldout_bits_per_byte
    assert checkpoints(tmp_path)[-1] == result.step
    again, _ = train(config, tmp_path, resume=True)
    assert (again.status, again.step) == ("done", result.step)


def test_a_resumed_run_keeps_its_tokenizer_even_if_the_file_it_came_from_is_gone(runs, whole, tmp_path):
    named = tmp_path / "named.json"
    Tokenizer.load(whole.folder / "tokenizer.json").save(named)
    config = dataclasses.replace(runs.base, tokenizer=dataclasses.replace(runs.base.tokenizer, path=str(named)))
    with after_step(2, kill(signal.SIGTERM)):
        train(config, tmp_path / "run")
    named.unlink()
    with after_step(4, kill(signal.SIGTERM)):
        assert train(config, tmp_path / "run", resume=True)[0].step == 4
    assert records(tmp_path / "run", "train") == records(whole.folder, "train")[:4]
