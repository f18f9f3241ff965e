"""The moving average of the weights: its formula, its thread, what checkpoints keep of it, and how it is judged."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import types

import jax
import numpy as np
import pytest
from small_model import initial_state, small, trainer
from tiny_run import (
    STEPS,
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

from deepseek_jax.config import ConfigError
from deepseek_jax.data import Tokenizer
from deepseek_jax.training import canonical, loop, moving_average
from deepseek_jax.training.canonical import MOVING_AVERAGE
from deepseek_jax.training.checkpoint import CheckpointError
from deepseek_jax.training.experiment import CheckpointConfig, EvaluationConfig, MovingAverageConfig
from deepseek_jax.training.finish import HeldoutEvaluator
from deepseek_jax.training.moving_average import MovingAverage, MovingAverageError
from deepseek_jax.training.weights import CheckpointWeights
from experiments import tiny, v3
from tools import convert

DECAY, EVERY = 0.8, 3


def weights_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n: a for n, a in arrays.items() if not n.startswith((canonical.OPTIMIZER, MOVING_AVERAGE))}


def average_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n.removeprefix(MOVING_AVERAGE): a for n, a in arrays.items() if n.startswith(MOVING_AVERAGE)}


def weighted_mean(terms: list[np.ndarray], decay: float) -> np.ndarray:
    """Σ d^(t-i) w_i / Σ d^(t-i), in float64."""
    ages = decay ** np.arange(len(terms) - 1, -1, -1.0)
    return np.tensordot(ages, np.asarray(terms, np.float64), axes=1) / ages.sum()


# --- the average by itself ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runner():
    return trainer(small(num_layers=4, num_dense_layers=2, mtp_depth=1))


@pytest.fixture
def begun(runner):
    """An average that has begun, and the state that it began with."""
    state = initial_state(runner)
    average = MovingAverage(MovingAverageConfig(decay=DECAY), runner)
    average.begin(state)
    yield average, state
    average.close()


def moved(state, seed: int):
    """The state with other weights and biases, in new arrays."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jax.device_put(rng.standard_normal(leaf.shape).astype(leaf.dtype), leaf.sharding)

    params, router_bias = jax.tree.map(draw, (state.params, state.router_bias))
    return dataclasses.replace(state, params=params, router_bias=router_bias)


@pytest.mark.parametrize(("decay", "every"), [(DECAY, 1), (0.999, 1), (DECAY, 2), (0.0, 1)])
def test_it_is_the_mean_of_the_weights_weighted_by_age(runner, decay, every):
    """a_t = Σ d^(t-i) w_i / Σ d^(t-i), of the first weights and those after every `every_steps` steps."""
    state = initial_state(runner)
    average = MovingAverage(MovingAverageConfig(decay=decay, every_steps=every), runner)
    average.begin(state)
    terms = [canonical.to_canonical(runner, state)]
    for step in range(1, 7):
        state = moved(state, step)
        average.update(step, state)
        if step % every == 0:
            terms.append(canonical.to_canonical(runner, state))
    entries = average.entries()
    average.close()
    assert average.updates == 6 // every == len(terms) - 1
    assert {name.removeprefix(MOVING_AVERAGE) for name in entries} == set(terms[0]), "weights and router biases"
    for name, array in entries.items():
        expected = weighted_mean([np.asarray(term[name.removeprefix(MOVING_AVERAGE)]) for term in terms], decay)
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_weights_may_be_donated_as_soon_as_an_update_has_begun(runner, begun):
    """As the next step does: the copies are of the values before, also where that step has not yet been run."""
    average, state = begun
    step = jax.jit(lambda tree: jax.tree.map(lambda x: 3 * x + 1, tree), donate_argnums=0)
    expected = [canonical.to_canonical(runner, state)]
    expected = [{name: np.array(array) for name, array in expected[0].items()}]
    for number in range(1, 5):
        before = state
        state = step(state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params)), "or nothing is donated"
        average.update(number, state)
        expected.append({name: 3 * array + 1 for name, array in expected[-1].items()})
    state = step(state)
    for name, array in average_of(average.entries()).items():
        np.testing.assert_allclose(array, weighted_mean([e[name] for e in expected], DECAY), rtol=1e-5, err_msg=name)


def test_an_update_waits_for_the_one_before_and_none_is_left_out(begun, monkeypatch):
    """Asynchronous: the first returns at once. Bounded: the second does not before the first is done."""
    average, state = begun
    gate, real = threading.Event(), moving_average._move
    monkeypatch.setattr(moving_average, "_move", lambda *arguments: (gate.wait(60), real(*arguments)))
    average.update(1, moved(state, 1))
    second = threading.Thread(target=average.update, args=(2, moved(state, 2)))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert average.updates == 0
    gate.set()
    second.join(60)
    average.wait()
    assert average.updates == 2


def on_devices() -> int:
    """Bytes of all arrays in device memory."""
    return sum(a.nbytes for a in jax.live_arrays() if a.sharding.memory_kind != moving_average.HOST_MEMORY)


def test_it_keeps_nothing_on_the_devices(runner, begun, monkeypatch):
    """Neither between updates nor during one; afterwards the copies on the host are gone too."""
    average, state = begun
    gate, real = threading.Event(), moving_average._move
    monkeypatch.setattr(moving_average, "_move", lambda *arguments: (gate.wait(60), real(*arguments)))
    held, all_arrays = on_devices(), len(jax.live_arrays())
    average.update(1, state)
    assert on_devices() == held
    assert len(jax.live_arrays()) > all_arrays, "the copies, on the host"
    gate.set()
    average.wait()
    assert on_devices() == held
    assert len(jax.live_arrays()) == all_arrays
    entries = average.entries()
    assert on_devices() == held
    assert {array.sharding.memory_kind for array in entries.values()} == {moving_average.HOST_MEMORY}
    assert average.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.router_bias)))


def test_what_was_made_of_it_does_not_change_with_it(begun):
    average, state = begun
    entries, placed = average.entries(), average.in_place_of(state)
    before = [np.array(array) for array in jax.tree.leaves((entries, placed.params, placed.router_bias))]
    average.update(1, moved(state, 1))
    average.wait()
    for array, old in zip(jax.tree.leaves((entries, placed.params, placed.router_bias)), before, strict=True):
        np.testing.assert_array_equal(array, old)
    assert placed.opt_state is state.opt_state


# --- in a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    """Twenty steps that keep an average, of the weights that their checkpoints have."""
    texts = write_texts(tmp_path_factory.mktemp("texts"))
    with quick_runs():
        base = experiment(
            texts,
            evaluation=EvaluationConfig(batch_rows=4, every_steps=9),
            checkpoint=CheckpointConfig(every_steps=EVERY, keep_last=99),
            moving_average=MovingAverageConfig(decay=DECAY, every_steps=EVERY),
        )
        yield types.SimpleNamespace(base=base, folder=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs):
    folder = runs.folder / "whole"
    result, printed = train(runs.base, folder)
    assert result.step == STEPS
    return types.SimpleNamespace(folder=folder, printed=printed)


@pytest.fixture(scope="module")
def saved(whole):
    """The arrays of every checkpoint, by step."""
    return {step: checkpoint(whole.folder, step)[0] for step in (*range(EVERY, STEPS, EVERY), STEPS)}


def without(run, **changes):
    return dataclasses.replace(run, moving_average=None, **changes)


def test_a_run_averages_the_weights_after_its_steps(runs, whole, saved):
    """Of what the steps really made, which each next step was given to overwrite."""
    began = initial_state(loop.make_trainer(runs.base), seed=runs.base.seed)
    first = canonical.to_canonical(loop.make_trainer(runs.base), began)
    for name, array in average_of(saved[STEPS]).items():
        terms = [np.asarray(first[name]), *(saved[step][name] for step in range(EVERY, STEPS, EVERY))]
        np.testing.assert_allclose(array, weighted_mean(terms, DECAY), rtol=1e-5, atol=1e-6, err_msg=name)
    assert checkpoint(whole.folder, STEPS)[1]["meta"]["moving_average"] == {"updates": STEPS // EVERY}
    assert any(np.abs(a).max() > 0 for n, a in average_of(saved[STEPS]).items() if n.endswith("router.bias"))


def test_every_checkpoint_has_it_under_the_names_of_the_weights(saved):
    for arrays in saved.values():
        weights, average = weights_of(arrays), average_of(arrays)
        assert {n: (a.shape, a.dtype) for n, a in average.items()} == {
            n: (a.shape, a.dtype) for n, a in weights.items()
        }


def test_a_stopped_run_goes_on_bit_for_bit(runs, whole, saved):
    """Stopped between two updates: the average, the number of its updates, and what evaluations found."""
    folder = runs.folder / "parts"
    with after_step(10, kill(signal.SIGTERM)):
        assert train(runs.base, folder)[0].step == 10
    result, printed = train(runs.base, folder, resume=True)
    assert result.step == STEPS
    assert "host memory: after 3 updates\n" in printed
    assert_same_arrays(checkpoint(folder, STEPS)[0], saved[STEPS])
    assert records(folder, "eval") == records(whole.folder, "eval")
    for name, array in average_of(saved[STEPS]).items():
        assert (array != saved[9][MOVING_AVERAGE + name]).any(), f"{name} rests, which proves nothing"


def test_it_does_not_change_the_run(runs, whole, saved):
    folder = runs.folder / "without"
    _, printed = train(without(runs.base), folder)
    assert "average" not in printed
    arrays, documents = checkpoint(folder, STEPS)
    assert not average_of(arrays)
    assert "moving_average" not in documents["meta"]
    assert_same_arrays(arrays, {n: a for n, a in saved[STEPS].items() if not n.startswith(MOVING_AVERAGE)})
    assert records(folder, "train") == records(whole.folder, "train")


def test_a_checkpoint_that_has_none_begins_one_with_its_weights(runs):
    folder = runs.folder / "late"
    with after_step(10, kill(signal.SIGTERM)):
        train(without(runs.base), folder)
    _, printed = train(runs.base, folder, resume=True)
    assert "host memory: checkpoint 10 holds none, so it begins with the weights of that step\n" in printed
    arrays, documents = checkpoint(folder, STEPS)
    assert documents["meta"]["moving_average"] == {"updates": 3}
    parts = [checkpoint(folder, step)[0] for step in (10, 12, 15, 18)]
    for name, array in average_of(arrays).items():
        expected = weighted_mean([part[name] for part in parts], DECAY)
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_run_that_keeps_none_leaves_it_in_the_checkpoint(runs, saved):
    folder = runs.folder / "left"
    with after_step(10, kill(signal.SIGTERM)):
        train(runs.base, folder)
    _, printed = train(without(runs.base), folder, resume=True)
    assert "the moving average of the weights in checkpoint 10 is left there: moving_average is none\n" in printed
    arrays, _ = checkpoint(folder, STEPS)
    assert not average_of(arrays)
    assert_same_arrays(weights_of(arrays), weights_of(saved[STEPS]))


def test_what_goes_wrong_beside_the_run_ends_it_in_a_line(runs, monkeypatch):
    real = moving_average._move

    def full(average, weights, rate):
        if rate < 0.35:  # the third update
            raise MemoryError("cannot allocate 8 bytes\nand more")
        real(average, weights, rate)

    monkeypatch.setattr(moving_average, "_move", full)
    with pytest.raises(MovingAverageError) as caught:
        train(runs.base, runs.folder / "full")
    assert str(caught.value) == (
        "the moving average of the weights could not take in step 9: cannot allocate 8 bytes; resume from the last "
        "checkpoint, or without an average: moving_average=none"
    )
    assert checkpoints(runs.folder / "full") == [3, 6], "none of a half-made average"


def test_an_entry_that_is_missing_is_told(runs):
    folder = runs.folder / "missing"
    with after_step(2, kill(signal.SIGTERM)):
        train(without(runs.base), folder)
    path = folder / "checkpoints" / "2" / "documents" / "documents.json"
    documents = json.loads(path.read_text())
    documents["meta"]["moving_average"] = {"updates": 1}
    path.write_text(json.dumps(documents))
    with pytest.raises(CheckpointError, match=r"missing: moving_average/embedding\.weight"):
        train(runs.base, folder, resume=True)


# --- how it is judged -----------------------------------------------------------------------------------------------


def test_it_is_evaluated_beside_the_weights(runs, whole, saved):
    """As a model with these weights is, on the same text; in metrics, result, last words and report."""
    run = loop.make_trainer(runs.base)
    evaluator = HeldoutEvaluator(runs.base, run, Tokenizer.load(whole.folder / "tokenizer.json"))
    lines = {line["step"]: line for line in records(whole.folder, "eval")}
    assert sorted(lines) == [9, 18, 20]
    for step, line in lines.items():
        arrays = {name: jax.numpy.asarray(array) for name, array in saved[step].items()}
        averaged = canonical.from_canonical(run, arrays | average_of(arrays), step)
        result = judge(evaluator, averaged)
        assert line["heldout_average_bits_per_byte"] == result.bits_per_byte != line["heldout_bits_per_byte"]
        assert line["heldout_average_loss"] == result.loss
        assert f"; moving average {result.bits_per_byte:.4f}\n" in whole.printed
    final = lines[STEPS]["heldout_average_bits_per_byte"]
    assert json.loads((whole.folder / "result.json").read_text())["heldout_average_bits_per_byte"] == final
    assert f"of the moving average   {final:.4f}\n" in whole.printed
    assert "Average: the moving average of the weights." in (whole.folder / "report.html").read_text()


def test_a_finished_run_that_is_resumed_judges_it_again(runs, whole):
    before = (whole.folder / "result.json").read_text()
    (whole.folder / "result.json").unlink()
    train(runs.base, whole.folder, resume=True)
    result = json.loads((whole.folder / "result.json").read_text())
    assert result["heldout_average_bits_per_byte"] == json.loads(before)["heldout_average_bits_per_byte"]


def test_it_can_be_taken_instead_of_the_weights(whole, saved, tmp_path, capsys):
    """As a checkpoint, from which a run may start."""
    target = tmp_path / "averaged"
    assert convert.main(["to-checkpoint", str(whole.folder), str(target), "--average", "--verify"]) == 0
    assert_same_arrays(checkpoint(target, 0)[0], average_of(saved[STEPS]))
    source = CheckpointWeights(whole.folder)
    entry = source.entries["head.weight"]
    (head,) = source.values(entry, 0)
    np.testing.assert_array_equal(entry.from_theirs([head]), saved[STEPS]["head.weight"], "the weights are the default")
    assert convert.main(["to-checkpoint", str(target), str(tmp_path / "again"), "--average"]) == 1
    assert "holds no moving average" in capsys.readouterr().err


# --- its config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay": 1.0}, r"moving_average.decay must lie in \[0, 1\), not 1.0"),
        ({"decay": -0.1}, r"moving_average.decay must lie in \[0, 1\), not -0.1"),
        ({"every_steps": 0}, "moving_average.every_steps must be at least 1, not 0"),
    ],
)
def test_its_numbers_are_checked(changes, message):
    with pytest.raises(ConfigError, match=message):
        MovingAverageConfig(**changes)


def test_the_papers_recipe_keeps_one_after_every_step():
    """Section 3.2.3; on the quickstart it would cost a reader's patience."""
    assert v3.pretrain().moving_average == MovingAverageConfig(every_steps=1)
    assert tiny.pretrain().moving_average is None
