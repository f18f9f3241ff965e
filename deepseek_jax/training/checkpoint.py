"""Checkpoints on disk: one entry per layer and parameter, under its canonical name and with its global shape.

A checkpoint is a flat dictionary of arrays and a few JSON documents. It knows nothing of meshes, stacks or models:
whoever saves maps run-time state to canonical names, and whoever restores says on which sharding each entry should
land, so a checkpoint written by one mesh restores on any other, straight to the devices that need it.

    checkpoints/
      1200/                      one directory per step; it exists under this name only once it is complete
        arrays/                  Orbax (TensorStore OCDBT): `layers.3.attention.kv_a.weight`, `optimizer.0.mu/layers.3…`
        documents/documents.json config, data iterator state, meta: whatever JSON the run handed over
        index/index.json         shape and dtype of every entry, and the metric
      1300.orbax-checkpoint-tmp/ a save in flight, or what a killed process left behind; never read

Nothing is ever pickled.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from deepseek_jax.paths import user_path
from deepseek_jax.training.checkpoint_checks import (
    CheckpointError,
    check_compatible,
    check_entries,
    first_line,
)
from deepseek_jax.training.checkpoint_orbax import Index, StreamedArray, array_handler, open_array, save_args
from deepseek_jax.wording import first_few

__all__ = ["CheckpointError", "CheckpointStore", "check_compatible", "check_entries"]

FORMAT = 1
# Orbax writes this file last, locally just before the rename and on object stores instead of it. Deleting removes it
# first, so a directory that has it is whole whichever way the process died.
_COMMITTED = "commit_success.txt"
_TEMPORARY = re.compile(r"\d+\.orbax-checkpoint-tmp.*")
_COMMIT_TIMEOUT_SECONDS = 3600


class CheckpointStore:
    """The checkpoints of one run: saves in the background, restores anywhere, keeps the last and the best few.

    Every process of a run makes one, on the same directory, and calls `save` and `restore` together; arrays stay
    where they are, and each process writes and reads only its own shards. Every method but `save` waits for the save
    in flight, and raises `CheckpointError` if that one failed; so does leaving the store as a context manager.
    """

    def __init__(self, directory: epath.PathLike, *, keep_last: int = 3, keep_best: int = 1):
        """Opens `directory`, which need not exist before the first save.

        Args:
          directory: a local path, `gs://…` or `s3://…`.
          keep_last: newest checkpoints to keep, at least 1.
          keep_best: checkpoints of lowest metric to keep besides.

        Raises:
          CheckpointError: a count is out of range.
          ConfigError: the backend of a cloud path is not installed.
        """
        if keep_last < 1:
            raise CheckpointError(f"keep_last must be at least 1, not {keep_last}: the newest checkpoint always stays")
        if keep_best < 0:
            raise CheckpointError(f"keep_best cannot be negative: {keep_best}")
        self.directory = user_path(directory, "the checkpoint folder").absolute()
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._writer: ocp.AsyncCheckpointer | None = None
        self._finishing: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._indexes: dict[int, dict[str, Any]] = {}

    # --- what is there ---

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints in the directory, ascending."""
        self.wait()
        return self._complete()

    def _complete(self) -> list[int]:
        if not self.directory.exists():
            return []
        folders = (path for path in self.directory.iterdir() if path.name.isdigit())
        return sorted(int(path.name) for path in folders if (path / _COMMITTED).exists())

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The checkpoint of lowest metric (of equals the newest), or None where none has a metric."""
        return next(iter(self._by_metric(self.steps())), None)

    def metric(self, step: int) -> float | None:
        """The metric saved with `step`; None where there was none, or it was not finite."""
        self.wait()
        return self._index(step)["metric"]

    def documents(self, step: int) -> dict[str, Any]:
        """The JSON documents saved with `step`; JSON has no tuples and no integer keys, so neither has this."""
        self.wait()
        return self._read_json(step, "documents")

    def entries(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Global shape and dtype of every entry of `step`, without reading any array."""
        self.wait()
        entries = self._index(step)["entries"]
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in entries.items()}

    # --- saving ---

    def save(
        self,
        step: int,
        arrays: Mapping[str, jax.Array | StreamedArray],
        documents: Mapping[str, Any],
        *,
        metric: float | None = None,
        wait: bool = False,
    ) -> None:
        """Starts to save a checkpoint; it counts once all of it is on disk.

        Returns when the arrays are on the host, so the caller may donate them. A save still in flight is waited for
        first: none is ever skipped. Older checkpoints are deleted only after this one is complete.

        Args:
          step: not negative, and not saved before.
          arrays: entries by canonical name, of any shape (scalars too), dtype and sharding; their devices may differ.
            A `StreamedArray` is read while it is written, so what it reads from must stay until `wait` has returned.
          documents: JSON values by name. With several processes those of process 0 are written.
          metric: held-out bits per byte, or anything of which lower is better.
          wait: return only when the checkpoint is complete.

        Raises:
          CheckpointError: this save or the one before failed (a full disk, say); the step exists; an entry is not a
            non-empty array; a document is not JSON. The previous checkpoints are untouched.
        """
        self.wait()
        _check_savable(step, arrays, documents)
        if step in self._complete():
            raise CheckpointError(
                f"step {step} is already saved in {self.directory}, and a checkpoint is never overwritten: "
                f"`delete({step})` it first, or save to another directory"
            )
        entries = {name: (list(array.shape), str(array.dtype)) for name, array in arrays.items()}
        finite = float(metric) if metric is not None and math.isfinite(metric) else None
        index = {"format": FORMAT, "step": step, "metric": finite, "entries": entries}
        writer = self._open_writer()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            writer.save(
                self.directory / str(step),
                args=ocp.args.Composite(
                    arrays=ocp.args.PyTreeSave(dict(arrays), save_args=save_args(arrays)),
                    documents=ocp.args.JsonSave(dict(documents)),
                    index=ocp.args.JsonSave(index),
                ),
            )
        except Exception as error:
            raise self._failed(step, error) from error
        self._finishing = threading.Thread(target=self._finish, args=(writer, step), name=f"checkpoint {step}")
        self._finishing.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when no save is in flight.

        Raises:
          CheckpointError: the save that was in flight failed. Raised once; the store can be used again after it.
        """
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def delete(self, step: int) -> None:
        """Deletes one checkpoint, such as the ones after the step from which a run is started again."""
        self.wait()
        self._require(step)
        if jax.process_index() == 0:
            self._remove(step)

    def close(self) -> None:
        """Waits for the save in flight and frees the writer's threads."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    # --- restoring ---

    def restore(
        self, step: int, templates: Mapping[str, jax.ShapeDtypeStruct], *, skip: Iterable[str] = ()
    ) -> dict[str, jax.Array]:
        """Reads entries of `step`, each straight onto its template's sharding.

        Args:
          step: a step of `steps()`.
          templates: global shape, dtype and sharding by name; no sharding means this process's first device.
          skip: prefixes of names that may stay on disk, such as `("optimizer.",)` for weights without moments, or
            `("",)` for just the named entries. Any other entry without a template is an error.

        Returns:
          The entries named by `templates`, bit for bit as they were saved.

        Raises:
          CheckpointError: the step is absent or unreadable, or its entries are not those of `templates` (of another
            architecture): names missing, left over, or of another shape or dtype.
        """
        self.wait()
        check_entries(self.entries(step), templates, skip=skip, source=f"checkpoint {step} in {self.directory}")
        if not templates:
            return {}
        local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        restore_args = {
            name: ocp.ArrayRestoreArgs(
                restore_type=jax.Array,
                sharding=template.sharding or local,
                global_shape=template.shape,
                dtype=template.dtype,
            )
            for name, template in templates.items()
        }
        request = ocp.args.PyTreeRestore(dict(templates), restore_args=restore_args, partial_restore=True)
        try:
            with ocp.Checkpointer(array_handler()) as reader:
                return reader.restore(self.directory / str(step) / "arrays", args=request)
        except Exception as error:
            raise self._unreadable(step, error) from error

    def reader(self, step: int, name: str) -> Callable[[Index], np.ndarray]:
        """A function that reads parts of one entry from the disk."""
        self._require(step)
        if name not in self._index(step)["entries"]:
            raise CheckpointError(f"checkpoint {step} in {self.directory} has no entry {name}")
        try:
            array = open_array(self.directory / str(step) / "arrays", name)
        except Exception as error:
            raise self._unreadable(step, error) from error

        def read(index: Index) -> np.ndarray:
            try:
                return (array if index is None else array[index]).read().result()
            except Exception as error:
                raise self._unreadable(step, error) from error

        return read

    # --- inside ---

    def _open_writer(self) -> ocp.AsyncCheckpointer:
        """The Orbax writer, made at the first save: a store that only reads starts no threads."""
        if self._writer is None:
            registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
            registry.add("arrays", ocp.args.PyTreeSave, array_handler())
            for name in ("documents", "index"):
                registry.add(name, ocp.args.JsonSave, ocp.JsonCheckpointHandler(filename=f"{name}.json"))
            self._writer = ocp.AsyncCheckpointer(
                ocp.CompositeCheckpointHandler(handler_registry=registry),
                async_options=ocp.options.AsyncOptions(timeout_secs=_COMMIT_TIMEOUT_SECONDS),
            )
        return self._writer

    def _finish(self, writer: ocp.AsyncCheckpointer, step: int) -> None:
        """Runs beside the training: waits for the commit, then deletes what need not be kept."""
        try:
            writer.wait_until_finished()
        except Exception as error:
            self._failure = self._failed(step, error)
            self._failure.__cause__ = error
            return
        # One process deletes; on the others `steps()` may show an old step a moment longer.
        if jax.process_index() == 0:
            try:
                self._prune(step)
            except Exception as error:
                self._failure = CheckpointError(
                    f"step {step} is saved in {self.directory}, but older checkpoints there cannot be deleted: "
                    f"{first_line(error)}"
                )
                self._failure.__cause__ = error

    def _prune(self, newest: int) -> None:
        """Deletes checkpoints beyond the last and the best, and leftovers of killed processes."""
        steps = self._complete()
        keep = {newest, *steps[-self._keep_last :], *self._by_metric(steps)[: self._keep_best]}
        for step in steps:
            if step not in keep:
                self._remove(step)
        for path in self.directory.iterdir():
            abandoned = path.name.isdigit() and not (path / _COMMITTED).exists()
            if abandoned or _TEMPORARY.fullmatch(path.name):
                path.rmtree(missing_ok=True)

    def _remove(self, step: int) -> None:
        folder = self.directory / str(step)
        (folder / _COMMITTED).unlink()
        folder.rmtree()
        self._indexes.pop(step, None)

    def _by_metric(self, steps: list[int]) -> list[int]:
        """Those of `steps` that have a metric, best first, of equals the newest first."""
        metrics = {step: self._index(step)["metric"] for step in steps}
        return sorted((step for step in steps if metrics[step] is not None), key=lambda step: (metrics[step], -step))

    def _index(self, step: int) -> dict[str, Any]:
        if step not in self._indexes:
            index = self._read_json(step, "index")
            if index.get("format") != FORMAT:
                raise CheckpointError(
                    f"checkpoint {step} in {self.directory} has format {index.get('format')!r}; this version of "
                    f"deepseek_jax reads format {FORMAT}"
                )
            self._indexes[step] = index
        return self._indexes[step]

    def _read_json(self, step: int, name: str) -> dict[str, Any]:
        self._require(step)
        try:
            return json.loads((self.directory / str(step) / name / f"{name}.json").read_text())
        except (OSError, ValueError) as error:
            raise self._unreadable(step, error) from error

    def _require(self, step: int) -> None:
        """Raises unless `step` is there, saying what is."""
        steps = self._complete()
        if not steps:
            raise CheckpointError(f"no checkpoint to restore in {self.directory}: {self._state_of_directory()}")
        if step not in steps:
            raise CheckpointError(
                f"no checkpoint of step {step} in {self.directory}; there are steps {first_few(steps)}"
            )

    def _state_of_directory(self) -> str:
        if not self.directory.exists():
            return "the directory does not exist"
        if any(_TEMPORARY.fullmatch(path.name) for path in self.directory.iterdir()):
            return "it holds only a save that never completed"
        return "it holds none"

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        latest = max(self._complete(), default=None)
        remains = "no earlier checkpoint exists" if latest is None else f"the checkpoint of step {latest} is intact"
        return CheckpointError(f"saving step {step} to {self.directory} failed: {first_line(error)}; {remains}")

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        others = [other for other in self._complete() if other != step]
        advice = f"other steps there: {first_few(others)}" if others else "there is no other step"
        return CheckpointError(
            f"checkpoint {step} in {self.directory} is damaged or unreadable: {first_line(error)}; {advice}"
        )


def _check_savable(step: int, arrays: Mapping[str, jax.Array | StreamedArray], documents: Mapping[str, Any]) -> None:
    """Raises before any device work what Orbax would find out half-way."""
    if step < 0:
        raise CheckpointError(f"a checkpoint's step cannot be negative: {step}")
    if not arrays:
        raise CheckpointError(f"nothing to save at step {step}: no arrays were given")
    for name, array in arrays.items():
        known = isinstance(array, jax.Array | StreamedArray)
        if not known or jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            kind = "a typed random key" if known else f"a {type(array).__name__}"
            raise CheckpointError(f"entry {name} is {kind}; entries are jax.Array of plain numbers")
        if array.size == 0:
            raise CheckpointError(f"entry {name} has shape {array.shape}: an empty array cannot be saved, leave it out")
    for name, document in documents.items():
        try:
            json.dumps(document)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"document {name} cannot be written as JSON: {error}") from error
