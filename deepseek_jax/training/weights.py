"""Checkpoints as sources of weights, and weights as checkpoints: one entry at a time, whatever the model's size.

A checkpoint holds the weights of a training run, in float32 and without scales, or what was converted from a Hugging
Face folder: each entry in the folder's dtype, the scales of FP8 entries under `scale_inv/<canonical name>`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from deepseek_jax.config import ModelConfig
from deepseek_jax.config_io import from_dict, to_dict
from deepseek_jax.interop.architecture import rope_interleaved
from deepseek_jax.interop.errors import InteropError
from deepseek_jax.interop.host import contiguous, one_ahead
from deepseek_jax.interop.layout import Entry, entries
from deepseek_jax.interop.progress import ByteProgress
from deepseek_jax.interop.quantization import Quantization, read_quantization
from deepseek_jax.interop.weights import Form, WeightSource, pieces, rows_at_once, source_bytes
from deepseek_jax.paths import local_path
from deepseek_jax.training.canonical import MOVING_AVERAGE, OPTIMIZER
from deepseek_jax.training.checkpoint import CheckpointError, CheckpointStore, check_entries
from deepseek_jax.training.checkpoint_orbax import Index, StreamedArray

CHECKPOINTS = "checkpoints"
SCALES = "scale_inv/"
"""Prefix of the scales of an FP8 entry, which lie as the entry does: `[in/128, out/128]`, stacked where it is."""
CONFIG_DOCUMENT = "huggingface"
"""The document that holds the config.json of the folder that a checkpoint was converted from."""


class CheckpointWeights:
    """The weights of one checkpoint, or their moving average, without its optimizer state."""

    def __init__(self, folder: str | Path, step: int | None = None, *, average: bool = False):
        """Opens the newest checkpoint, or that of `step`, in a run's folder or a folder of checkpoints.

        With `average`, what is read are not the weights but their moving average, router biases included.

        Raises `CheckpointError` where there is none, or it does not hold the model that it says.
        """
        self.path = Path(local_path(folder, "the checkpoint folder"))
        within = self.path / CHECKPOINTS
        self._store = CheckpointStore(within if within.exists() else self.path)
        newest = self._store.latest_step() if step is None else step
        if newest is None:
            raise CheckpointError(f"{self.path} holds no checkpoint; name a run's folder, or one of checkpoints")
        self.step = newest
        documents = self._store.documents(newest)
        if "model" not in documents.get("meta", {}):
            raise CheckpointError(f"checkpoint {newest} in {self.path} does not say which model it holds")
        self.config: Mapping[str, Any] | None = documents.get(CONFIG_DOCUMENT)
        """config.json of the Hugging Face folder that it comes from; None where it was trained here."""
        self.model: ModelConfig = from_dict(ModelConfig, documents["meta"]["model"])
        compute = documents.get("config", {}).get("precision", {}).get("compute")
        self.compute: np.dtype | None = None if compute is None else np.dtype(compute)
        interleaved = self.config is None or rope_interleaved(self.config)
        self.entries: Mapping[str, Entry] = entries(self.model, rope_interleaved=interleaved)
        self._prefix = MOVING_AVERAGE if average else ""
        self._saved = self._store.entries(newest)
        if average:
            self._saved = _within(self._saved, MOVING_AVERAGE)
            if not self._saved:
                raise CheckpointError(
                    f"checkpoint {newest} in {self.path} holds no moving average: take its weights, or keep one in the "
                    "next run (moving_average=MovingAverageConfig())"
                )
        self.quantization: Quantization | None = None
        if any(name.startswith(SCALES) for name in self._saved):
            self.quantization = read_quantization(self.config or {}) or Quantization()
        self._check()
        self._opened: dict[str, Callable[[Index], np.ndarray]] = {}

    def form(self, entry: Entry) -> Form:
        """How the tensors of `entry` are stored."""
        scales = self._saved.get(SCALES + entry.name)
        return Form(np.dtype(self._saved[entry.name].dtype), None if scales is None else np.dtype(scales.dtype))

    def values(self, entry: Entry, row: int, rows: slice | None = None) -> list[np.ndarray]:
        """The tensors `entry.tensors[row]`, or these rows of it, read from the disk."""
        if rows is not None:
            return entry.to_theirs(self._read(entry.name, (slice(None), rows) if entry.transposed else rows))
        return entry.to_theirs(self._read(entry.name, row if entry.stacked else None))

    def scales(self, entry: Entry, row: int) -> list[np.ndarray]:
        """The scales of these tensors, which are FP8."""
        return entry.scales_to_theirs(self._read(SCALES + entry.name, row if entry.stacked else None))

    def _read(self, name: str, index: Index) -> np.ndarray:
        if name not in self._opened:
            self._opened[name] = self._store.reader(self.step, self._prefix + name)
        return self._opened[name](index)

    def _check(self) -> None:
        """Raises `CheckpointError` unless the entries have the names and shapes of the architecture."""
        wanted = {name: entry.spec for name, entry in self.entries.items()}
        others = (OPTIMIZER, MOVING_AVERAGE, SCALES)
        saved = {name: form for name, form in self._saved.items() if not name.startswith(others)}
        check_entries(saved, wanted, source=f"checkpoint {self.step} in {self.path}", dtypes=False)


def _within(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}


def tokenizer_of(folder: Path) -> Path | None:
    """The tokenizer.json that belongs to a Hugging Face folder, a run's or one of checkpoints; None without one."""
    folder = folder.absolute()
    homes = (folder, folder.parent) if folder.name == CHECKPOINTS else (folder,)
    return next((home / "tokenizer.json" for home in homes if (home / "tokenizer.json").exists()), None)


def write_checkpoint(
    source: WeightSource, folder: Path, *, config: Mapping[str, Any] | None = None, progress: bool = True
) -> None:
    """Writes weights into `folder` as a checkpoint of step 0, each as it is stored, scales included.

    Args:
      source: where they are read from, one expert or one matrix at a time.
      folder: an existing folder, which gets `checkpoints/0`.
      config: the config.json to keep with it.
      progress: show a bar, in bytes.

    Raises:
      CheckpointError: the disk is full, or cannot be written.
    """
    stopped = threading.Event()
    total = source_bytes(source)
    documents = {"meta": {"model": to_dict(source.model), "step": 0, "tokens": 0}, CONFIG_DOCUMENT: config}
    with ByteProgress("writing", total, quiet=not progress) as done, CheckpointStore(folder / CHECKPOINTS) as store:
        streams = [_streams(source, entry, done.add, stopped) for entry in source.entries.values()]
        arrays = {name: stream for part in streams for name, stream in part.items()}
        kept = {name: document for name, document in documents.items() if document is not None}
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.FATAL)  # Orbax logs an error with its traceback, and then raises it
        try:
            store.save(0, arrays, kept, wait=True)
        except BaseException as error:  # Ctrl-C too: the writing in the background ends, so that it can be removed
            stopped.set()
            with contextlib.suppress(Exception):
                store.close()
            with contextlib.suppress(CheckpointError):
                store.delete(0)
            if (cause := _cause(error)) is not None:
                raise cause from None
            raise
        finally:
            logging.set_verbosity(verbosity)


def _cause(error: BaseException | None) -> InteropError | None:
    """What went wrong with the source, where that is why a checkpoint could not be written."""
    while error is not None and not isinstance(error, InteropError):
        error = error.__cause__ or error.__context__
    return error


def _streams(
    source: WeightSource, entry: Entry, report: Callable[[int], None], stopped: threading.Event
) -> dict[str, StreamedArray]:
    """An entry, and its scales where it has any, as arrays that are read while they are written, until `stopped`."""
    form = source.form(entry)

    def values() -> Iterator[tuple[Index, np.ndarray]]:
        for row, rows in pieces(entry, form):
            if stopped.is_set():
                return
            block = contiguous(entry.from_theirs(source.values(entry, row, rows)))
            index: Index = row if entry.stacked else None
            if rows is not None:
                index = (slice(None), rows) if entry.transposed else rows
            yield index, block
            report(block.nbytes)

    def scales() -> Iterator[tuple[Index, np.ndarray]]:
        for row in range(len(entry.tensors)):
            yield row if entry.stacked else None, entry.scales_from_theirs(source.scales(entry, row))

    shape, step = entry.spec.shape, rows_at_once(entry, form)
    chunks = None
    if entry.stacked:
        chunks = (1, *shape[1:])
    elif step is not None:
        chunks = (shape[0], step) if entry.transposed else (step, shape[1])
    streams = {entry.name: StreamedArray(shape, form.dtype, lambda: one_ahead(values()), chunks)}
    if form.scale_dtype is not None:
        assert source.quantization is not None
        scales_shape = entry.scales_shape(source.quantization.block)
        chunks = (1, *scales_shape[1:]) if entry.stacked else None
        streams[SCALES + entry.name] = StreamedArray(scales_shape, form.scale_dtype, scales, chunks)
    return streams
