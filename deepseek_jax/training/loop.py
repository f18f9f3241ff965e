"""The training loop, read from top to bottom: mesh, tokenizer and data, model, state, steps, last words."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.config_io import to_dict
from deepseek_jax.data import check_vocab, merge_states, train_rows
from deepseek_jax.data.corpus import forget_corpora
from deepseek_jax.model.targets import Microbatch
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel import hosts
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.placement import place
from deepseek_jax.parallel.readers import reader_of
from deepseek_jax.paths import check_writable, local_path
from deepseek_jax.planning.flops import training_flops_per_token
from deepseek_jax.training import canonical
from deepseek_jax.training.checkpoint import CheckpointStore
from deepseek_jax.training.compile_cache import use_compile_cache
from deepseek_jax.training.experiment import Experiment
from deepseek_jax.training.finish import HeldoutEvaluator, finish_run
from deepseek_jax.training.init_from import first_state
from deepseek_jax.training.metrics import MetricsWriter, check_wandb
from deepseek_jax.training.moving_average import DOCUMENT, start_average
from deepseek_jax.training.opening import opening_lines
from deepseek_jax.training.profiling import StepTrace, measure_matmul_peak
from deepseek_jax.training.progress import Progress, TrainingClock, human_count
from deepseek_jax.training.signals import Signals, name_of
from deepseek_jax.training.stability import NonFiniteGuard
from deepseek_jax.training.start import (
    check_batches,
    check_folder,
    check_pipeline,
    find_tokenizer,
    latest_step,
    restore,
    save_beginnings,
    with_absolute_paths,
)
from deepseek_jax.training.step import Hyperparameters, Trainer, TrainState
from deepseek_jax.training.step_config import step_config
from deepseek_jax.training.step_metrics import StepMetrics
from deepseek_jax.training.step_record import dispatch_record, step_record
from deepseek_jax.training.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    status: Literal["done", "interrupted"]
    step: int
    tokens: int
    workdir: str
    signal: int | None = None
    """The signal that interrupted it."""
    heldout_bits_per_byte: float | None = None


def make_trainer(experiment: Experiment) -> Trainer:
    """The trainer of an experiment on this process's devices."""
    parallel = experiment.parallel
    return Trainer(
        Transformer(experiment.model, experiment.precision.fp8),
        place(experiment.model, parallel.layers_per_stage, stage_map=parallel.schedule_choice.stage_map),
        make_mesh(experiment.parallel),
        experiment.optimizer.make,
        step_config(experiment),
    )


def train(
    experiment: Experiment,
    *,
    workdir: str,
    resume: bool = False,
    profile: tuple[int, int] | None = None,
) -> RunResult:
    """Trains `experiment` in the folder `workdir`, from nothing or, with `resume`, from its last checkpoint.

    SIGINT and SIGTERM end it after the step at hand, with a checkpoint; a second one at once, without. Where there
    are several processes (`jax.distributed`), all call this with the same arguments and folders that all of them
    reach: each reads the rows that its devices work on, process 0 writes, and a signal to one ends all.

    Args:
      experiment: the run.
      workdir: gets config.json, tokenizer.json, metrics.jsonl, checkpoints, result.json and report.html.
      resume: continue bit for bit from the newest checkpoint.
      profile: first and last step of an XProf trace.

    Raises:
      ConfigError, DataError, CheckpointError: before any training, in the user's terms.
      NonFiniteLossError: a loss, gradient or weight was not finite; its batch is saved, no checkpoint is.
      StoppedAtOnce: a second signal came.
    """
    started = time.monotonic()
    folder = local_path(workdir, "the workdir")
    use_compile_cache(exact_names=profile is not None)
    forget_corpora()  # an earlier run of this process may have read other files under these names

    # --- mesh and model: abstract, so that a wrong config costs nothing ---
    experiment.check_runs()
    trainer = make_trainer(experiment)
    canonical.templates(trainer)  # an optimizer whose state cannot be saved is refused here
    store = CheckpointStore(
        experiment.checkpoint.directory or folder / "checkpoints",
        keep_last=experiment.checkpoint.keep_last,
        keep_best=experiment.checkpoint.keep_best,
    )
    experiment = with_absolute_paths(experiment, store)
    check_writable(folder, "the workdir")
    check_writable(store.directory, "the checkpoint folder")
    check_wandb(experiment.logging.wandb)
    assert isinstance(trainer.mesh, Mesh)  # an abstract one has no devices to train on
    reader = reader_of(trainer.mesh)
    check_batches(experiment.schedule, reader.count)
    check_pipeline(experiment, trainer)
    check_folder(experiment, folder, store, resume=resume)

    # --- tokenizer and data ---
    tokenizer = find_tokenizer(experiment, folder, resume=resume)
    check_vocab(tokenizer, experiment.model.vocab_size)
    rows = train_rows(
        experiment.data,
        tokenizer,
        seed=experiment.seed,
        host_index=reader.index,
        host_count=reader.count,
    )
    evaluator = HeldoutEvaluator(experiment, trainer, tokenizer)

    # --- state: from the newest checkpoint, or from what the run begins with, as where it died before its first one ---
    identity = {"model": to_dict(experiment.model), "tokenizer_fingerprint": tokenizer.fingerprint()}
    latest = latest_step(store)  # before that, every process has checked the folder
    if latest is not None:
        state, step, tokens, seconds = restore(store, latest, trainer, rows, identity, type(experiment.model))
    else:
        state, step, tokens, seconds = first_state(experiment, trainer), 0, 0, 0.0
    average, average_line = start_average(experiment.moving_average, trainer, state, store, latest)
    started -= seconds

    # --- steps: only now, when nothing of it can be wrong any more, does the folder change ---
    run = _Run(
        experiment, trainer, reader, rows, store, identity, evaluator, folder, started, step if resume else None,
        average, average_line,
    )  # fmt: skip
    save_beginnings(experiment, tokenizer, folder)
    with store, Signals() as signals, StepTrace(folder / "profile", profile) as trace, run:
        state, step, tokens, last = run.steps(state, step, tokens, signals, trace)
        if run.stopped_by is not None:
            return RunResult("interrupted", step, tokens, workdir, run.stopped_by, last)
        signals.answer = "training is over and saved, the report is being written"
        result = finish_run(
            experiment, trainer, state, tokenizer, evaluator, folder,
            step=step, tokens=tokens, seconds=time.monotonic() - started, heldout=last, log=run.progress.log,
            average=average, heldout_average=run.heldout_average,
        )  # fmt: skip
    return RunResult("done", step, tokens, workdir, heldout_bits_per_byte=result)


class _Run:
    """The inner loop and what it writes to."""

    def __init__(
        self, experiment, trainer, reader, rows, store, identity, evaluator, folder, started, resume_step,
        average, average_line,
    ):  # fmt: skip
        self.experiment, self.trainer, self.store = experiment, trainer, store
        self.average, self.average_line = average, average_line
        self.reader, self.rows = reader, rows
        self.identity, self.evaluator, self.started, self.resume_step = identity, evaluator, started, resume_step
        self.saved_step = resume_step or 0
        self.stopped_by: int | None = None
        """The signal that came, to this process or another."""
        self.heldout_average: float | None = None
        """Held-out bits per byte of the moving average, as they were written last."""
        self.writer = MetricsWriter(
            folder,
            tensorboard=experiment.logging.tensorboard,
            wandb=experiment.logging.wandb,
            resume_step=resume_step,
            config=to_dict(experiment),
        )
        self.guard = NonFiniteGuard(folder)
        self.peak_flops = measure_matmul_peak(experiment.precision.compute) * jax.process_count()
        self.flops_per_token = training_flops_per_token(experiment.model, experiment.data.sequence_length)
        self.clock = TrainingClock()
        limit = experiment.logging.watchdog_limit(jax.process_count())
        self.watchdog = Watchdog(limit, process=jax.process_index())
        trainer.compiling = self._no_step
        self.progress: Progress

    def __enter__(self):
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self.rows.close()
        if self.average is not None:
            self.average.close()
        self.writer.close(failed=kind is not None)

    def steps(self, state: TrainState, step: int, tokens: int, signals: Signals, trace: StepTrace):
        """Steps until the tokens are spent, the data ends or a signal comes; returns the state and where it is."""
        experiment, schedule = self.experiment, self.experiment.schedule
        metric, heldout, logged = None, None, (self.clock(), tokens)
        last = tokens >= schedule.total_tokens
        quiet = jax.process_index() != 0
        self.progress = Progress(schedule.total_tokens, start_tokens=tokens, quiet=quiet, clock=self.clock)
        with self.progress, self.watchdog:
            self._announce(step, tokens)
            while not last and self._agree_to_stop(signals) is None:
                try:
                    batch = self.next_batch(schedule.rows(tokens))
                except StopIteration:  # a finished run, resumed
                    break
                hyper = self._hyperparameters(tokens)
                with trace.step(step + 1):
                    state, metrics = self.trainer.step(state, batch.device, hyper)
                step, tokens = step + 1, tokens + batch.tokens
                if self.average is not None:
                    self.average.update(step, state)
                self.guard.watch(step, metrics, batch.host)
                self.progress.advance(tokens)
                self.watchdog.beat(step)
                last = tokens >= schedule.total_tokens or batch.is_last
                if step % experiment.logging.every_steps == 0 or last or step == 1:
                    logged = self._log(step, tokens, metrics, hyper, batch, logged)
                metric = self._metric_if_due(state, step, tokens, last)
                if step % experiment.checkpoint.every_steps == 0 or last:
                    self.save(state, step, tokens, metric)
                if last:  # beside the writing, so that what kills a run in a long evaluation finds its end saved
                    heldout = self._evaluate_all(state, step, tokens, metric)
            if step != self.saved_step:
                self.save(state, step, tokens, metric)
            if (number := self._agree_to_stop(signals)) is not None:
                with self._no_step():
                    self.store.wait()
                done = f"saved step {step} ({human_count(tokens)} tokens) to {self.store.directory}"
                self.progress.log(f"{name_of(number)}: {done if step else 'nothing to save before a step'}")
            elif tokens < schedule.total_tokens:
                ended = f"the data ended after {human_count(tokens)} of {human_count(schedule.total_tokens)} tokens"
                self.progress.log(f"{ended}: data.epochs is {experiment.data.epochs}")
        return state, step, tokens, heldout

    @contextlib.contextmanager
    def _no_step(self) -> Iterator[None]:
        """What happens within is no training: its time does not count, and it may take longer than a step."""
        with self.clock.paused(), self.watchdog.slow():
            yield

    def _agree_to_stop(self, signals: Signals) -> int | None:
        """The signal that came to any process: the processes leave after the same step, or they would wait forever."""
        self.stopped_by = hosts.highest(signals.received or 0) or None
        return self.stopped_by

    def next_batch(self, rows: int) -> _Batch:
        """The next `rows` sequences on the devices, padded with empty ones to what the mesh and microbatches need."""
        host = self.rows.next_batch(rows)
        is_last = self._is_last(host)
        missing = self.trainer.padded_rows(rows) // self.reader.count - host["tokens"].shape[0]
        padded = {name: np.pad(array, ((0, missing), (0, 0))) for name, array in host.items()}
        on_host = Microbatch(**{name: padded[name] for name in Microbatch._fields})
        device = jax.tree.map(self.reader.place, on_host)
        return _Batch(on_host, device, rows, rows * self.experiment.data.sequence_length, is_last)

    def _is_last(self, batch: dict[str, np.ndarray]) -> bool:
        """Whether no process has a row after this batch; raises `StopIteration` where none has one in it either.

        Processes come to the end of their data at different steps, and go on with padding until all have.
        """
        if jax.process_count() == 1 or self.experiment.data.epochs is None:
            return self.rows.exhausted
        left = hosts.highest(int(batch["loss_mask"].any()) if self.rows.exhausted else 2)
        if left == 0:
            raise StopIteration("the last epoch is over")
        return left == 1

    def save(self, state: TrainState, step: int, tokens: int, metric: float | None) -> None:
        """Starts a checkpoint; a non-finite loss since the last check, or a non-finite state, raises instead."""
        self.guard.check()
        with self._no_step():
            self.guard.check_state(state)
            self._save(state, step, tokens, metric)

    def _save(self, state: TrainState, step: int, tokens: int, metric: float | None) -> None:
        place = {"step": step, "tokens": tokens, "seconds": round(time.monotonic() - self.started, 1)}
        documents = {
            "meta": {**self.identity, **place, "seed": self.experiment.seed, "room": self.trainer.room.get_state()},
            "data": merge_states([state for state in hosts.gather(self._data_state()) if state is not None]),
            "config": to_dict(self.experiment),
        }
        arrays = canonical.to_canonical(self.trainer, state)
        if self.average is not None:
            arrays |= self.average.entries()
            documents["meta"][DOCUMENT] = {"updates": self.average.updates}
        self.store.save(step, arrays, documents, metric=metric)
        self.saved_step = step

    def _data_state(self) -> dict[str, Any] | None:
        """Where this process is in its data; nothing if another says so already."""
        return self.rows.get_state() if self.reader.first else None

    def _hyperparameters(self, tokens: int) -> Hyperparameters:
        schedule = self.experiment.schedule
        return Hyperparameters(
            learning_rate=np.float32(self.experiment.optimizer.peak_lr * schedule.learning_rate(tokens)),
            mtp_weight=np.float32(schedule.mtp_weight(tokens)),
            bias_rate=np.float32(schedule.bias_rate(tokens)),
        )

    def _log(self, step, tokens, metrics: StepMetrics, hyper, batch, logged) -> tuple[float, int]:
        """Waits for the step and writes what it measured."""
        self.guard.check()
        values = jax.device_get(metrics)
        now = self.clock()
        rate = (tokens - logged[1]) / max(now - logged[0], 1e-9)
        record = {
            **step_record(values, hyper),
            **dispatch_record(values, self.trainer, batch.device.tokens.shape),
            "batch_rows": batch.rows,
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / self.peak_flops,
        }
        if self.experiment.force_balanced_routing:
            record["forced_balance"] = True
        self.writer.write(step, record, tokens=tokens)
        shown = {"loss": record["loss_main"], "lr": record["learning_rate"], "grad": record["grad_norm"]}
        if values.max_vio.size:
            shown["MaxVio"] = float(values.max_vio.mean())
        if self.trainer.room.reruns:
            shown["reruns"] = self.trainer.room.reruns
        shown["MFU"] = record["mfu"]
        self.progress.report(step, tokens, shown)
        return self.clock(), tokens

    def _metric_if_due(self, state: TrainState, step: int, tokens: int, last: bool) -> float | None:
        """Held-out bits per byte on the text of every evaluation, where due: what checkpoints are compared by."""
        evaluation = self.experiment.evaluation
        if not evaluation.every_steps or not (last or step % evaluation.every_steps == 0):
            return None
        is_all = evaluation.max_bytes is None  # if not, the last step shows its complete evaluation
        return self._evaluate(state, step, tokens, complete=False, show=is_all or not last)

    def _evaluate_all(self, state: TrainState, step: int, tokens: int, metric: float | None) -> float | None:
        """Bits per byte on all held-out text; `metric` is that already where evaluations read no less."""
        if metric is not None and self.experiment.evaluation.max_bytes is None:
            return metric
        return self._evaluate(state, step, tokens, complete=True)

    def _evaluate(
        self, state: TrainState, step: int, tokens: int, *, complete: bool, show: bool = True
    ) -> float | None:
        """Held-out bits per byte; shown, and written as the step's, unless `show` is off."""
        self.guard.check()
        with self._no_step():
            result = self.evaluator(state, complete=complete)
            if result is None:
                return None
            if show:
                values = {"heldout_bits_per_byte": result.bits_per_byte, "heldout_loss": result.loss}
                line = f"step {step} | held-out {result.bits_per_byte:.4f} bits per byte over {result.bytes:,} bytes"
                averaged = self.evaluator.of_average(self.average, state, complete=complete)
                if averaged is not None:
                    self.heldout_average = averaged.bits_per_byte
                    values["heldout_average_bits_per_byte"] = averaged.bits_per_byte
                    values["heldout_average_loss"] = averaged.loss
                    line += f"; moving average {averaged.bits_per_byte:.4f}"
                self.writer.write(step, values, tokens=tokens, kind="eval")
                self.progress.log(line)
            return result.bits_per_byte

    def _announce(self, step: int, tokens: int) -> None:
        for line in opening_lines(
            self.experiment,
            self.trainer,
            tokens=tokens,
            flops_per_token=self.flops_per_token,
            peak_flops=self.peak_flops,
        ):
            self.progress.log(line)
        if self.average_line is not None:
            self.progress.log(self.average_line)
        if self.resume_step is not None:
            where = f"resumed from step {step}" if step else "no checkpoint yet, so from the beginning"
            self.progress.log(f"{where} ({self.store.directory})")


@dataclasses.dataclass(frozen=True)
class _Batch:
    host: Microbatch
    device: Microbatch
    rows: int
    tokens: int
    is_last: bool
    """Whether the data has no row left."""
