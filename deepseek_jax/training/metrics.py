"""One writer for what a run measures: JSON lines always, TensorBoard by default, Weights & Biases on request."""

from __future__ import annotations

import importlib
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import numpy as np

from deepseek_jax.config import ConfigError, require
from deepseek_jax.paths import local_path, write_aside

JSONL_NAME = "metrics.jsonl"
WANDB_ID_NAME = "wandb_id.txt"
_RESERVED = ("step", "tokens", "kind")
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""JSON has no such numbers; they are written as these strings."""

Kind = Literal["train", "eval"]
Value = float | str | list
"""What a metric is once it left the device: a number, a list per layer or expert, or a text such as a sample."""


class MetricsWriter:
    """Writes metrics to `directory/metrics.jsonl` and to the other sinks; a context manager.

    `resume_step=s` continues an older run's files: what it wrote after step s is dropped, so each step stands once.
    Process 0 writes; on the others every call is a no-op, and arguments are not read.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        tensorboard: bool = True,
        wandb: str | None = None,
        resume_step: int | None = None,
        config: Mapping[str, Any] | None = None,
        enabled: bool | None = None,
    ):
        """`wandb` is the project's name, `config` what it shows of the run; `enabled=None`: on process 0 only."""
        self._sinks: list[_Sink] = []
        if not (_is_first_process() if enabled is None else enabled):
            return
        directory = Path(local_path(directory, "the folder of the metrics"))
        directory.mkdir(parents=True, exist_ok=True)
        _require_own(directory / JSONL_NAME, resume_step)
        # What can be missing comes first: a run without its W&B must not leave an empty file behind.
        if wandb is not None:
            self._sinks.append(_WandbSink(wandb, directory, resume_step, config))
        self._sinks.append(_JsonlSink(directory / JSONL_NAME, resume_step))
        if tensorboard:
            self._sinks.append(_TensorBoardSink(directory / "tensorboard", resume_step))

    def write(self, step: int, values: Mapping[str, Any], *, tokens: int, kind: Kind = "train") -> None:
        """Records `values` of one step: scalars, arrays or texts by name; `tokens` is how many the run has seen."""
        if not self._sinks:
            return
        if clash := [name for name in _RESERVED if name in values]:
            raise ValueError(f"metric names {', '.join(clash)} are taken by the line itself")
        plain = {name: _plain(value) for name, value in values.items()}
        for sink in self._sinks:
            sink.write(int(step), int(tokens), kind, plain)

    def close(self, *, failed: bool = False) -> None:
        """Flushes and closes every sink; writing after it does nothing. `failed`: the run ended by an exception."""
        for sink in self._sinks:
            sink.close(failed)
        self._sinks = []

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self.close(failed=kind is not None)


def read_metrics(path: str | os.PathLike, kind: Kind | None = None) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, or of the one in the folder `path`; with `kind`, only the lines of that kind.

    A last line cut short by the end of its process is left out; a broken one before it is an error.
    """
    path = Path(path)
    path = path / JSONL_NAME if path.is_dir() else path
    require(path.exists(), f"no metrics at {path}")
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line else None
        except ValueError as error:
            if number == len(lines):  # a whole line ends in a newline, so this one is torn
                break
            raise ConfigError(f"{path}, line {number}: not JSON: {error}") from error
        if record is not None and kind in (None, record["kind"]):
            records.append({name: _restored(value) for name, value in record.items()})
    return records


class _Sink(Protocol):
    def write(self, step: int, tokens: int, kind: Kind, values: Mapping[str, Value]) -> None: ...
    def close(self, failed: bool) -> None: ...


class _JsonlSink:
    def __init__(self, path: Path, resume_step: int | None):
        if resume_step is not None and path.exists():
            _drop_after(path, resume_step)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, step: int, tokens: int, kind: Kind, values: Mapping[str, Value]) -> None:
        record = {"step": step, "tokens": tokens, "kind": kind} | {n: _json_safe(v) for n, v in values.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()  # one line per logged step is little, and a killed run keeps its curve

    def close(self, failed: bool) -> None:
        self._file.close()


class _TensorBoardSink:
    def __init__(self, directory: Path, resume_step: int | None):
        from tensorboardX import SummaryWriter

        # The readers hide what an older file holds from purge_step on.
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def write(self, step: int, tokens: int, kind: Kind, values: Mapping[str, Value]) -> None:
        for name, value in {"tokens": float(tokens), **values}.items():
            tag = f"{kind}/{name}"
            if isinstance(value, str):
                self._writer.add_text(tag, value, step)
            elif isinstance(value, list):
                finite = np.asarray(value, np.float64).ravel()
                finite = finite[np.isfinite(finite)]
                if finite.size:
                    self._writer.add_histogram(tag, finite, step)
            else:
                self._writer.add_scalar(tag, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class _WandbSink:
    def __init__(self, project: str, directory: Path, resume_step: int | None, config: Mapping[str, Any] | None):
        self._wandb = _import_wandb()
        # The id ties a resumed run to the curve it continues; a fresh one never gets that of another run.
        path = directory / WANDB_ID_NAME
        resumed = resume_step is not None and path.exists()
        run_id = path.read_text(encoding="utf-8").strip() if resumed else secrets.token_hex(8)
        try:
            self._run = self._wandb.init(project=project, dir=str(directory), id=run_id, resume="allow", config=config)
        except Exception as error:  # no key, no network, no such project: each version has classes of its own
            raise ConfigError(
                f"Weights & Biases refused: {_first_line(error)}; `wandb login` sets a key, WANDB_MODE=offline needs "
                "no network, and logging.wandb=none goes without"
            ) from error
        write_aside(path, run_id + "\n")

    def write(self, step: int, tokens: int, kind: Kind, values: Mapping[str, Value]) -> None:
        shown = {f"{kind}/{n}": self._wandb.Histogram(v) if isinstance(v, list) else v for n, v in values.items()}
        self._run.log({f"{kind}/tokens": tokens, **shown}, step=step)

    def close(self, failed: bool) -> None:
        if failed:
            self._run.finish(exit_code=1)
        else:
            self._run.finish()


def check_wandb(project: str | None) -> None:
    """Raises `ConfigError` where a `MetricsWriter` would find no working package to log to this project with."""
    if project is not None and _is_first_process():
        _import_wandb()


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except Exception as error:  # a package that does not fit its own dependencies fails in any way
        if isinstance(error, ModuleNotFoundError) and error.name == "wandb":
            raise ConfigError(
                "logging to Weights & Biases needs its package: pip install 'deepseek_jax[wandb]', or "
                "logging.wandb=none"
            ) from None
        raise ConfigError(
            f"the package wandb is installed, but broken: {_first_line(error)}; install it again, or logging.wandb=none"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def _is_first_process() -> bool:
    import jax  # reading metrics needs no jax

    return jax.process_index() == 0


def _require_own(path: Path, resume_step: int | None) -> None:
    """Raises `ConfigError` where a fresh run would append to the JSONL of another one."""
    require(
        resume_step is not None or not path.exists() or path.stat().st_size == 0,
        f"{path} holds another run's metrics; resume that run or use another folder",
    )


def _drop_after(path: Path, step: int) -> None:
    """Rewrites the JSONL at `path` without the lines after `step`, atomically."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue  # torn by the end of the process that wrote it
    write_aside(path, "".join(kept))


def _plain(value: Any) -> Value:
    """A Python number, list or text of a number, array or text."""
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.dtype.kind in "biu":
        return array.tolist()
    # The shortest decimal that reads back as the same number of its own dtype: 3.21, not 3.2100000381469727.
    numbers = [float(str(x)) for x in array.ravel()]
    return np.asarray(numbers, np.float64).reshape(array.shape).tolist()


def _json_safe(value: Value) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_json_safe(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(v) for v in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
