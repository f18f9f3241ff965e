"""What a run checks, reads and leaves in its folder before its first step."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from deepseek_jax.config import ConfigError, ModelConfig, require
from deepseek_jax.config_io import from_dict, load_config, save_config, to_dict
from deepseek_jax.data import RowIterator, Tokenizer, make_tokenizer
from deepseek_jax.parallel import hosts
from deepseek_jax.parallel.pipeline.choice import SUFFIX
from deepseek_jax.paths import local_path, user_path
from deepseek_jax.training import canonical
from deepseek_jax.training.canonical import MOVING_AVERAGE, OPTIMIZER
from deepseek_jax.training.checkpoint import CheckpointError, CheckpointStore, check_compatible
from deepseek_jax.training.experiment import Experiment
from deepseek_jax.training.metrics import JSONL_NAME, read_metrics
from deepseek_jax.training.schedules import ScheduleConfig
from deepseek_jax.training.step import Trainer, TrainState

CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer.json"


def with_absolute_paths(experiment: Experiment, store: CheckpointStore) -> Experiment:
    """The experiment as it can go on from any current folder."""
    if experiment.checkpoint.directory is not None:
        checkpoint = dataclasses.replace(experiment.checkpoint, directory=str(store.directory))
        experiment = dataclasses.replace(experiment, checkpoint=checkpoint)
    if experiment.parallel.schedule.endswith(SUFFIX):
        schedule = str(local_path(experiment.parallel.schedule, "the schedule").absolute())
        experiment = dataclasses.replace(
            experiment, parallel=dataclasses.replace(experiment.parallel, schedule=schedule)
        )
    return experiment


def check_batches(schedule: ScheduleConfig, readers: int) -> None:
    """Raises `ConfigError` unless every batch size divides over so many groups of hosts that read rows of their own."""
    uneven = [size for size in batch_sizes(schedule) if size % readers]
    more = f" and {len(uneven) - 1} more sizes" if len(uneven) > 1 else ""
    require(
        not uneven,
        f"schedule.batch_rows comes to {uneven and uneven[0]} sequences{more}, which {readers} hosts cannot share "
        f"evenly: set schedule.batch_multiple={math.lcm(schedule.batch_multiple, readers)}",
    )


def batch_sizes(schedule: ScheduleConfig) -> list[int]:
    """Every batch size, in sequences, that the course passes through, the least first."""
    sizes: set[int] = set()
    ends = [phase.until for phase in schedule.batch_rows.phases if phase.until < schedule.total_tokens]
    for begin, end in itertools.pairwise([0, *ends, schedule.total_tokens]):
        low, high = sorted((schedule.rows(begin), schedule.rows(end - 1)))
        sizes.update(range(low, high + 1, schedule.batch_multiple))
    return sorted(sizes)


def check_pipeline(experiment: Experiment, trainer: Trainer) -> None:
    """Raises `ConfigError` unless the schedule over pipeline ranks can have the run's batches.

    Those of a ramp that are too small are padded. Where the largest is, every step would work on empty rows.
    """
    parallel, choice = experiment.parallel, trainer.schedule
    if choice.ranks == 1:
        return
    rows, at_once, least = batch_sizes(experiment.schedule)[-1], parallel.rows_at_once or 1, choice.fitting(1)
    share = -(-rows // parallel.batch_shards)
    microbatches = -(-share // at_once)
    if microbatches < least:
        try:
            choice.make(microbatches)
        except ConfigError as error:
            ways = [f"raise schedule.batch_rows to {least * parallel.batch_shards * at_once}"]
            ways += [f"lower parallel.microbatch_rows to {share // least}"] if share >= least else []
            raise ConfigError(
                f"{error}; the largest batch is {rows} rows over {parallel.batch_shards} devices in microbatches of "
                f"{at_once}: {', '.join(ways)} or choose another parallel.schedule"
            ) from None
    trainer.padded_rows(rows)
    try:
        trainer.padded_rows(experiment.evaluation.batch_rows)
    except ConfigError as error:
        raise ConfigError(f"evaluation.batch_rows={experiment.evaluation.batch_rows}: {error}") from None


def check_folder(experiment: Experiment, folder: epath.Path, store: CheckpointStore, *, resume: bool) -> None:
    """Raises where a new run would mix with another one, or a resumed one would begin again by mistake."""
    saved = bool(store.steps())
    path = folder / JSONL_NAME
    written = path.exists() and path.stat().length > 0
    if not resume:
        found = path if written else store.directory if saved else None
        require(found is None, f"{found} holds another run's data; resume that run or use another folder")
    elif not saved:
        is_run = path.exists() or (folder / CONFIG_NAME).exists()
        require(is_run, f"{folder} holds no run to resume; name its folder, or start a new run there without resume")
        before = _saved_experiment(folder)
        require(
            before is None or before.init_from == experiment.init_from,
            f"{folder} began from {before and before.init_from} and has no checkpoint yet: resume it with --resume "
            "--workdir alone, which takes its own config",
        )
        if written:
            every = (before or experiment).checkpoint.every_steps
            _check_unsaved(every, path, store.directory)


def _check_unsaved(every: int, metrics: epath.Path, directory: epath.Path) -> None:
    """Raises `CheckpointError` where a run came too far to have no checkpoint: they are elsewhere, and not lost yet."""
    reached = max((record["step"] for record in read_metrics(metrics)), default=0)
    # A save is begun before the next step, in its folder, and is whole before the next save begins. So a run that
    # died while it was at its first one is told from one whose checkpoints are out of sight.
    begun = directory.exists() and any(directory.iterdir())
    if reached > every * (2 if begun else 1):
        raise CheckpointError(
            f"{metrics} reaches step {reached} and was saved every {every} steps, but there is no checkpoint in "
            f"{directory}: mount that folder or set checkpoint.directory to where they are; if they are lost, start "
            "anew in another folder"
        )


def _saved_experiment(folder: epath.Path) -> Experiment | None:
    """The run in `folder` as it was; None where its config is gone, or another version's."""
    try:
        return load_config(Experiment, folder / CONFIG_NAME)
    except ConfigError:
        return None


def find_tokenizer(experiment: Experiment, folder: epath.Path, *, resume: bool) -> Tokenizer:
    """The run's tokenizer: the one it names, the one saved with it, or one trained now."""
    saved, named = folder / TOKENIZER_NAME, experiment.tokenizer.path
    # A named one comes first, so that another name is noticed; if its file is gone, the copy is as good.
    if resume and saved.exists() and (named is None or not user_path(named, "the tokenizer").exists()):
        return Tokenizer.load(saved)
    return make_tokenizer(experiment.tokenizer, experiment.data)


def latest_step(store: CheckpointStore) -> int | None:
    """The newest checkpoint, of which every process of the run must see the same. All processes call it together."""
    steps = hosts.gather(store.latest_step())
    if any(step != steps[0] for step in steps):
        raise CheckpointError(
            f"the processes of this run see different newest checkpoints in {store.directory}: {steps}; they need a "
            "checkpoint.directory on a disk that all of them reach"
        )
    return steps[0]


def restore(
    store: CheckpointStore, step: int, trainer: Trainer, rows: RowIterator, identity: dict, model: type[ModelConfig]
) -> tuple[TrainState, int, int, float]:
    """A checkpoint's state, step, tokens and seconds of training; `rows` is set to where it was.

    A moving average that it may hold is read by `moving_average.start_average`.

    Raises `CheckpointError` or `DataError` if it is of another `identity` or data, or its `model` cannot be read.
    """
    documents = store.documents(step)
    meta, source = documents["meta"], f"checkpoint {step} in {store.directory}"
    saved = {**meta, "model": _saved_model(meta["model"], model, source)}
    check_compatible(saved, json.loads(json.dumps(identity)), source=source)
    rows.set_state(documents["data"])
    if "room" in meta:
        trainer.room.set_state(meta["room"])
    templates = canonical.templates(trainer)
    _check_moments(store.entries(step), templates, source)
    entries = store.restore(step, templates, skip=(MOVING_AVERAGE,))
    state = canonical.from_canonical(trainer, entries, meta["step"])
    return state, meta["step"], meta["tokens"], meta.get("seconds", 0.0)


def _check_moments(saved: Mapping[str, Any], wanted: Mapping[str, Any], source: str) -> None:
    """Raises `CheckpointError` where moments were kept in another dtype: the one precision that a checkpoint has."""
    for name, template in wanted.items():
        if not name.startswith(OPTIMIZER) or name not in saved:
            continue
        then, now = jnp.dtype(saved[name].dtype), jnp.dtype(template.dtype)
        if then != now:
            raise CheckpointError(
                f"{source} has moments in {then} ({name}) and this run keeps them in {now}; go on with "
                f"optimizer.moment_dtype={then} (precision may change: weights are saved in float32 under any)"
            )


def _saved_model(data: dict, model: type[ModelConfig], source: str) -> dict:
    """A checkpoint's architecture with every field that there is now, so that it compares with a run's."""
    try:
        return to_dict(from_dict(model, data))
    except ConfigError as error:
        raise CheckpointError(f"{source} is of an architecture that this version does not know: {error}") from error


def save_beginnings(experiment: Experiment, tokenizer: Tokenizer, folder: epath.Path) -> None:
    """Writes tokenizer.json and config.json, from which a run goes on; process 0 does, for all."""
    if jax.process_index() != 0:
        return
    tokenizer.save(folder / TOKENIZER_NAME)
    save_config(experiment, folder / CONFIG_NAME)
