"""What a run writes is what it did: schedules reach the step, and each sink and checkpoint gets what it is promised."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import struct
import sys
import types

import numpy as np
import optax
import pytest
from tensorboardX.proto.event_pb2 import Event
from tiny_run import LENGTH, MODEL, SCHEDULE, checkpoints, experiment, quick_runs, train, write_texts

from deepseek_jax.evaluation.heldout import HeldoutResult
from deepseek_jax.planning.flops import training_flops_per_token
from deepseek_jax.training import loop
from deepseek_jax.training.checkpoint import CheckpointStore
from deepseek_jax.training.experiment import CheckpointConfig, EvaluationConfig, LoggingConfig
from deepseek_jax.training.finish import HeldoutEvaluator
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.training.schedules import Curve, Phase, constant, stepped
from deepseek_jax.training.step import Trainer
from deepseek_jax.tree import flatten

STEPS, ROWS = 8, 2
PER_STEP = ROWS * LENGTH
TOKENS = STEPS * PER_STEP
HALF = TOKENS // 2
PEAK_LR, PEAK_FLOPS = 4e-3, 3.7e9
LEARNING_RATE = Curve(
    phases=(
        Phase(until=3 * PER_STEP, value=1.0, shape="linear"),
        Phase(until=6 * PER_STEP, value=0.25, shape="cosine"),
        Phase(until=TOKENS, value=0.125),
    )
)
BITS = {1: 5.0, 2: 3.0, 3: 1.0, 4: 2.0, 5: 4.0, 6: 4.5, 7: 4.75, 8: 4.9}
"""What held-out text is said to cost after each step: best at step 3."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SignDescent(OptimizerConfig):
    """Every parameter moves by the learning rate or not at all, so that the parameters show it."""

    def make(self, specs) -> optax.GradientTransformation:
        del specs
        return optax.scale_by_sign()


class Watch:
    """What a run did, seen from outside of what it writes."""

    def __init__(self):
        self.compile_cache: list[dict] = []
        self.peaks: list[tuple] = []
        self.hypers: list = []
        self.metrics: list = []
        self.heads: list[np.ndarray] = []
        self.biases: list[dict[str, np.ndarray]] = []
        self.wandb: list = []

    def state(self, state) -> None:
        self.heads.append(np.array(state.params["head"]["weight"]))
        self.biases.append({name: np.array(leaf) for name, leaf in flatten(state.router_bias).items()})

    @contextlib.contextmanager
    def watching(self, patch: pytest.MonkeyPatch):
        real = Trainer.step

        def step(trainer, state, batch, hyper):
            if not self.heads:
                self.state(state)
            state, metrics = real(trainer, state, batch, hyper)
            self.state(state)
            self.hypers.append(hyper)
            self.metrics.append(metrics)
            return state, metrics

        def measure(dtype):
            self.peaks.append((dtype, len(self.hypers)))
            return PEAK_FLOPS

        def evaluate(evaluator, state, *, complete):
            return HeldoutResult(BITS[int(state.step)], loss=1.5, tokens=10, bytes=20)

        run = types.SimpleNamespace(
            log=lambda values, step: self.wandb.append((step, values)),
            finish=lambda **settings: self.wandb.append("finished"),
        )
        fake = types.SimpleNamespace(init=lambda **settings: self.wandb.append(settings) or run, Histogram=list)
        patch.setitem(sys.modules, "wandb", fake)
        patch.setattr(Trainer, "step", step)
        patch.setattr(loop, "measure_matmul_peak", measure)
        patch.setattr(loop, "use_compile_cache", lambda **settings: self.compile_cache.append(settings))
        patch.setattr(HeldoutEvaluator, "__call__", evaluate)
        patch.setattr(loop, "finish_run", lambda *arguments, heldout, **settings: heldout)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Eight steps with every sink open, a checkpoint of each, and what they wrote."""
    schedule = dataclasses.replace(
        SCHEDULE,
        total_tokens=TOKENS,
        learning_rate=LEARNING_RATE,
        batch_rows=constant(ROWS),
        mtp_weight=stepped((HALF, 0.3), final=0.1),
        bias_rate=stepped((HALF, 0.0625), final=0.0),
    )
    config = experiment(
        write_texts(tmp_path_factory.mktemp("texts")),
        schedule=schedule,
        optimizer=SignDescent(peak_lr=PEAK_LR),
        evaluation=EvaluationConfig(batch_rows=4, every_steps=1),
        checkpoint=CheckpointConfig(every_steps=1, keep_last=1, keep_best=2),
        logging=LoggingConfig(every_steps=1, tensorboard=True, wandb="the project"),
    )
    folder, watch = tmp_path_factory.mktemp("runs") / "run", Watch()
    with quick_runs() as patch, watch.watching(patch):
        result, _ = train(config, folder)
    assert (result.status, result.step) == ("done", STEPS)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    of = {kind: [line for line in lines if line["kind"] == kind] for kind in ("train", "eval")}
    assert [line["step"] for line in of["train"]] == [line["step"] for line in of["eval"]] == list(range(1, STEPS + 1))
    return types.SimpleNamespace(config=config, folder=folder, watch=watch, train=of["train"], eval=of["eval"])


# --- schedules ------------------------------------------------------------------------------------------------------


def test_the_learning_rate_of_a_step_is_the_peak_times_the_curve_at_the_tokens_before_it(done):
    """Written, given to the step, and seen in how far the step moves the parameters."""
    assert done.train[0]["learning_rate"] == 0.0, "the warm-up starts at 0"
    moves = [after - before for before, after in itertools.pairwise(done.watch.heads)]
    for line, hyper, move in zip(done.train, done.watch.hypers, moves, strict=True):
        wanted = PEAK_LR * LEARNING_RATE(line["tokens"] - PER_STEP)
        assert line["learning_rate"] == pytest.approx(wanted, rel=1e-6), line["step"]
        assert float(hyper.learning_rate) == pytest.approx(wanted, rel=1e-6), line["step"]
        np.testing.assert_allclose(np.abs(move).max(), wanted, rtol=1e-4, err_msg=f"step {line['step']}")
    assert len({line["learning_rate"] for line in done.train}) >= 6, "a rate that rests proves nothing"


def test_router_biases_move_by_the_rate_and_then_rest(done):
    """Section 4.2: γ until its milestone, then 0."""
    rates = [0.0625] * (STEPS // 2) + [0.0] * (STEPS // 2)
    assert [line["bias_rate"] for line in done.train] == rates
    assert len(done.watch.biases) == STEPS + 1
    for number, rate in enumerate(rates):
        moved = [done.watch.biases[number + 1][name] - bias for name, bias in done.watch.biases[number].items()]
        assert len(moved) == 2, "the MoE layer's and the MTP module's"
        for move in moved:
            assert set(np.abs(move).ravel().tolist()) <= {0.0, rate}, f"step {number + 1}"
            assert np.abs(move).max() == rate, f"step {number + 1}"


def test_the_loss_has_the_mtp_weight_of_the_schedule(done):
    """Equation 25: L = L_main + λ mean(L_MTP), and λ falls at its milestone."""
    assert [line["mtp_weight"] for line in done.train] == [0.3] * (STEPS // 2) + [0.1] * (STEPS // 2)
    for line in done.train:
        balance = done.config.schedule.balance_weight * line["loss_balance"]
        wanted = line["loss_main"] + line["mtp_weight"] * line["loss_mtp"] + balance
        assert line["loss"] == pytest.approx(wanted, rel=1e-5), line["step"]
        assert line["loss_mtp"] > 1


# --- metrics --------------------------------------------------------------------------------------------------------


def test_a_line_has_the_gradient_norm_and_the_losses_of_its_step(done):
    for line, metrics in zip(done.train, done.watch.metrics, strict=True):
        for name in ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm"):
            assert np.float32(line[name]) == np.float32(getattr(metrics, name)), (line["step"], name)
        assert line["grad_norm"] > 0
    assert len({line["grad_norm"] for line in done.train}) == STEPS


def test_max_vio_is_there_for_every_layer_with_experts_and_agrees_with_the_loads(done):
    """MaxVio = max load / mean load - 1, of the MoE layer and of the MTP module."""
    experts = MODEL.moe.num_experts
    for line in done.train:
        load = np.asarray(line["load"])
        assert load.shape == (MODEL.num_layers - MODEL.num_dense_layers + MODEL.mtp_depth, experts)
        np.testing.assert_allclose(load.sum(axis=1), 1, atol=1e-5)
        assert len(line["max_vio"]) == len(load)
        np.testing.assert_allclose(line["max_vio"], load.max(axis=1) * experts - 1, atol=1e-5)
    assert max(max(line["max_vio"]) for line in done.train) > 0.01


def test_mfu_is_the_analytic_work_done_per_second_over_the_measured_peak(done):
    """And the peak is measured once, of the run's dtype, before any step."""
    assert done.watch.peaks == [(done.config.precision.compute, 0)]
    work = training_flops_per_token(MODEL, LENGTH)
    for line in done.train:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * work / PEAK_FLOPS, rel=1e-6), line["step"]
        assert line["mfu"] > 0


def test_a_run_without_a_trace_keeps_its_programs_under_their_short_names(done):
    assert done.watch.compile_cache == [{"exact_names": False}]


# --- sinks ----------------------------------------------------------------------------------------------------------


def events(folder) -> dict[str, dict[int, float]]:
    """Scalars of a TensorBoard folder by tag and step; a vector is told by the number of its values."""
    (file,) = folder.iterdir()
    data, found, at = file.read_bytes(), {}, 0
    while at < len(data):  # a record: length, checksum of it, event, checksum of it
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4
        for value in event.summary.value:
            number = value.histo.num if value.HasField("histo") else value.simple_value
            found.setdefault(value.tag, {})[event.step] = number
    return found


def expected_by_tag(done) -> dict[str, dict[int, object]]:
    """What the lines of metrics.jsonl say, as other sinks name it."""
    found: dict[str, dict[int, object]] = {}
    for line in (*done.train, *done.eval):
        for name in set(line) - {"step", "kind"}:
            found.setdefault(f"{line['kind']}/{name}", {})[line["step"]] = line[name]
    return found


def test_tensorboard_shows_every_value_of_every_step(done):
    shown, wanted = events(done.folder / "tensorboard"), expected_by_tag(done)
    assert shown.keys() == wanted.keys()
    assert {"train/grad_norm", "train/learning_rate", "train/mfu", "eval/heldout_bits_per_byte"} <= shown.keys()
    for tag, by_step in wanted.items():
        assert shown[tag].keys() == by_step.keys(), tag
        for step, value in by_step.items():
            number = np.size(value) if isinstance(value, list) else value
            assert shown[tag][step] == pytest.approx(number, rel=1e-6), (tag, step)


def test_wandb_shows_every_value_of_every_step_and_the_config(done):
    settings, *logged, end = done.watch.wandb
    assert settings["project"] == "the project"
    assert settings["config"]["optimizer"]["peak_lr"] == PEAK_LR
    assert end == "finished"
    shown: dict[str, dict[int, object]] = {}
    for step, values in logged:
        for tag, value in values.items():
            shown.setdefault(tag, {})[step] = value
    assert shown == expected_by_tag(done)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_run_keeps_as_many_of_its_last_and_best_checkpoints_as_it_is_told(done):
    """The last one, and the two of lowest bits per byte, which were early."""
    store = CheckpointStore(done.folder / "checkpoints")
    assert checkpoints(done.folder) == [3, 4, 8]
    assert store.best_step() == 3
    assert {step: store.metric(step) for step in (3, 4, 8)} == {step: BITS[step] for step in (3, 4, 8)}
