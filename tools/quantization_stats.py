"""What FP8 does to the tensors of a run: underflow, clipping and error of everything that is quantised, layer by layer.

    python -m tools.quantization_stats runs/tiny [--step N] [--rows 4]
    python -m tools.quantization_stats runs/tiny --batch runs/tiny/nonfinite_step_120.npz

Restores a checkpoint on one device and runs one batch forward and backward, one layer at a time, with the run's own FP8
(DeepSeek-V3's where it has none). Prints a table and writes `quantization.json` into the run's folder, which its report
draws: `python -m tools.report RUN`. Gradients have the size that they have in the run, whatever the number of rows.

Looks for NaN and infinities on its way, in the order of work, and names the first tensor that has one, with its layer.
`--batch` takes the batch that a run saved when it stopped for one, and writes no file.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from deepseek_jax.config import ConfigError, require
from deepseek_jax.config_io import load_config
from deepseek_jax.data import DataError, Tokenizer, train_rows
from deepseek_jax.evaluation.report import QUANTIZATION_NAME
from deepseek_jax.model.parameters import ParameterSpec, RouterBias, parameter_specs
from deepseek_jax.model.quantized import quantize_weights
from deepseek_jax.model.staged import staged_model
from deepseek_jax.model.targets import Microbatch, targets
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.parallel.pipeline.protocol import LossScales, StagedModel
from deepseek_jax.parallel.pipeline.stage import merge
from deepseek_jax.parallel.placement import KINDS
from deepseek_jax.paths import local_path, write_aside
from deepseek_jax.precision.fp8 import weight_tile
from deepseek_jax.precision.policy import Fp8Config
from deepseek_jax.precision.probe import Reading, collecting, report
from deepseek_jax.training.canonical import MOVING_AVERAGE, OPTIMIZER
from deepseek_jax.training.checkpoint import CheckpointError, CheckpointStore
from deepseek_jax.training.compile_cache import use_compile_cache
from deepseek_jax.training.experiment import Experiment
from deepseek_jax.training.loop import make_trainer
from deepseek_jax.training.start import CONFIG_NAME, TOKENIZER_NAME
from deepseek_jax.training.step import Trainer
from deepseek_jax.tree import Tree, flatten, unflatten
from pallas_kernels.quantize import Quantized

_STEP = flags.DEFINE_integer("step", None, "which checkpoint; default: the newest")
_ROWS = flags.DEFINE_integer("rows", 4, "sequences to run, those that the run would take next", lower_bound=1)
_BATCH = flags.DEFINE_string("batch", None, "a batch that a run saved (nonfinite_step_N.npz), instead of --rows")

_BACKWARD = ("x for Wgrad", "dy for Dgrad", "dy for Wgrad")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A reading with the place where it was made."""

    layer: str
    """Canonical name, such as layers.3 or mtp.0."""
    name: str
    """Canonical name of the weight within the layer; several where their shapes are alike."""
    reading: Reading

    def record(self) -> dict[str, Any]:
        """A line of `quantization.json`: shares are of the values that are not zero."""
        counts, tile = self.reading.counts, self.reading.tile
        nonzero = max(int(counts.nonzero), 1)
        return {
            "layer": self.layer,
            "tensor": self.name,
            "role": self.reading.role,
            "tile": "whole" if tile is None else f"{tile[0]}×{tile[1]}",
            "format": self.reading.format,
            "nonzero": int(counts.nonzero),
            "underflow": int(counts.underflow) / nonzero,
            "clipped": int(counts.clipped) / nonzero,
            "relative_error": counts.relative_error,
        }


@dataclasses.dataclass(frozen=True)
class Study:
    """What one batch showed."""

    tensors: list[Tensor]
    loss: float
    """As in the run's step, scaled to the run's own batch."""
    first_not_finite: str | None
    """The first tensor in the order of work that has a NaN or an infinity."""


class LayerByLayer:
    """A model on one device whose layers run one at a time, those of a kind by the same compiled program."""

    def __init__(self, experiment: Experiment, trainer: Trainer, entries: dict[str, jax.Array]):
        """`entries`: weights and router biases by canonical name, in full precision."""
        model = trainer.model
        assert model.fp8 is not None
        self.model, self.fp8, self.entries = model, model.fp8, entries
        self.compute_dtype = trainer.config.compute_dtype
        self.staged: StagedModel = staged_model(
            model,
            compute_dtype=self.compute_dtype,
            mask_documents=experiment.mask_documents,
            balance_from_routed=experiment.balance_from_routed,
        )
        specs = {name: spec for name, spec in trainer.params_layout.specs.items() if name not in KINDS}
        self.ends = unflatten(self._cast("", flatten(specs)))
        main = [f"layers.{i}" for i in range(model.config.num_layers)]
        self.names = (*main, *(f"mtp.{k}" for k in range(model.config.mtp_depth)))
        self.last = len(main) - 1
        """Index of the main model's last layer, behind which MTP modules follow."""
        self._prepare = jax.jit(self._prepared, static_argnums=0)
        self._forward = jax.jit(self._layer, static_argnums=0)
        self._backward = jax.jit(self._pull, static_argnums=0)

    def run(self, batch: Microbatch, scales: LossScales) -> Study:
        """One batch `[B, S + 1]` forward and backward."""
        batch = jax.tree.map(jnp.asarray, batch)
        ctx, streams = jax.jit(lambda ends: (self.staged.context(batch), self.staged.embed(ends, batch)))(self.ends)
        hidden = [streams.hidden]
        for name in self.names:
            params, fixed, _ = self._weights(name)
            hidden.append(self._forward(self._kind(name), params, fixed, hidden[-1], streams.embedding, ctx)[0])
        finish = jax.jit(lambda ends, hidden: self.staged.finish(ends, hidden, batch, scales)[0])
        loss, pull = jax.vjp(finish, self.ends, tuple(hidden[self.last + 1 :]))
        of_ends, of_hidden = pull(jnp.ones_like(loss))

        forward, backward, tensors = {}, [], {}
        gradient = jnp.zeros_like(hidden[-1])
        for i, name in reversed(list(enumerate(self.names))):
            if i >= self.last:
                gradient = gradient + of_hidden[i - self.last]
            backward.append((f"{name}: the gradient of its output", _is_finite(gradient)))
            params, fixed, weights = self._weights(name)
            gradient, of_params, readings = self._backward(
                self._kind(name), params, fixed, hidden[i], streams.embedding, ctx, gradient, scales.balance
            )
            names = collections.defaultdict(list)
            for path, reading in weights.items():
                names[reading.matrix].append(path)
            found = [Tensor(name, ", ".join(names[reading.matrix]), reading) for reading in readings]
            forward[name] = [_check(tensor) for tensor in found if tensor.reading.role not in _BACKWARD]
            backward += [_check(tensor) for tensor in found if tensor.reading.role in _BACKWARD]
            backward += [(f"{name}: the gradient of {path}", ok) for path, ok in flatten(of_params).items()]
            tensors[name] = [*(Tensor(name, path, reading) for path, reading in weights.items()), *found]

        checks = [(name, _is_finite(array)) for name, array in self.entries.items()]
        checks.append(("the embedding's output", _is_finite(hidden[0])))
        for name, output in zip(self.names, hidden[1:], strict=True):
            checks += [*forward[name], (f"{name}: its output", _is_finite(output))]
        checks.append(("the loss", _is_finite(loss)))
        checks += [(f"the gradient of {path}", _is_finite(array)) for path, array in flatten(of_ends).items()]
        checks += [*backward, ("the gradient of the embedding's output", _is_finite(gradient))]
        first = next((what for what, finite in checks if not finite), None)
        return Study([tensor for name in self.names for tensor in tensors[name]], float(loss), first)

    def _layer(self, kind: str | int, params: Tree, fixed: Tree, x: jax.Array, embedding: Any, ctx: Any):
        """A layer's output and balance loss; `kind` is dense, moe, or the number of an MTP module."""
        params = merge(params, fixed)
        if isinstance(kind, str):
            return self.staged.layers[kind](params, x, self.staged.narrow(ctx, True, None))[:2]
        ahead = self.staged.ahead
        assert ahead is not None
        x = ahead.join(kind, params, {name: self.ends[name] for name in self.staged.shared_ends}, x, embedding)
        y, aux, _ = ahead.layer(params["block"], x, self.staged.narrow(ctx, True, (kind + 1, True)))
        return ahead.leave(params, y), aux

    def _pull(self, kind, params, fixed, x, embedding, ctx, gradient, balance):
        """The gradient of a layer's input, whether those of its weights are finite, and its readings."""
        with collecting() as readings:
            run = lambda params, x: self._layer(kind, params, fixed, x, embedding, ctx)  # noqa: E731
            (_, aux), pull = jax.vjp(run, params, x)
            of_params, of_x = pull((gradient, jnp.asarray(balance, aux.dtype)))
        return of_x, jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), of_params), readings

    def _kind(self, name: str) -> str | int:
        part, _, number = name.partition(".")
        if part == "mtp":
            return int(number)
        return "dense" if int(number) < self.model.config.num_dense_layers else "moe"

    def _prepared(self, kind: str | int, arrays: dict[str, jax.Array], biases: dict[str, jax.Array]):
        """A layer's parameters, what it reads besides, and a reading of each weight that is quantised."""
        copies, params = quantize_weights(self._module(kind), unflatten(arrays), self.fp8)
        flat, readings = flatten(copies), {}
        for path, array in arrays.items():
            if f"{path}_codes" in flat:
                copy = Quantized(flat[f"{path}_codes"], flat[f"{path}_scales"], weight_tile(self.fp8))
                with collecting() as found:
                    report("weight", array.shape, array, copy)
                readings[path] = found[0]
        # Weights that have a copy are not read, and have no values; there are gradients of them all the same.
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if _is_abstract(leaf) else leaf, params)
        return params, merge(copies, unflatten(biases)), readings

    def _weights(self, name: str) -> tuple[Tree, Tree, dict[str, Reading]]:
        kind = self._kind(name)
        specs = (flatten(parameter_specs(self._module(kind), of)) for of in (nnx.Param, RouterBias))
        return self._prepare(kind, *(self._cast(f"{name}.", part) for part in specs))

    def _module(self, kind: str | int) -> Any:
        return getattr(self.model, kind if isinstance(kind, str) else "mtp")

    def _cast(self, prefix: str, specs: dict[str, ParameterSpec]) -> dict[str, jax.Array]:
        """The arrays below a canonical prefix, in the dtypes of a step."""
        return {
            path: self.entries[prefix + path].astype(jnp.float32 if spec.full_precision else self.compute_dtype)
            for path, spec in specs.items()
        }


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _is_finite(array: jax.Array) -> bool:
    return bool(np.isfinite(np.asarray(array)).all())  # on the host, where a new shape is no new program


def _check(tensor: Tensor) -> tuple[str, bool]:
    return f"{tensor.layer}: {tensor.reading.role}, {tensor.name}", not int(tensor.reading.counts.not_finite)


# --- a run's checkpoint and batch -------------------------------------------------------------------------------------


def study(run: str, *, step: int | None = None, rows: int = 4, batch: str | None = None) -> tuple[Study, dict]:
    """Runs a batch through a run's checkpoint; returns what it showed, and where that was as a dict.

    Raises:
      ConfigError, CheckpointError, DataError: the run, its checkpoint, its data or the batch cannot be read.
    """
    use_compile_cache()
    folder = Path(local_path(run, "the run"))
    saved = load_config(Experiment, folder / CONFIG_NAME)
    fp8 = saved.precision.fp8 or Fp8Config()
    precision = dataclasses.replace(saved.precision, fp8=fp8)
    experiment = dataclasses.replace(saved, precision=precision, parallel=ParallelConfig())
    store = CheckpointStore(saved.checkpoint.directory or folder / "checkpoints")
    step = store.latest_step() if step is None else step
    require(step is not None, f"{folder} has no checkpoint yet in {store.directory}")
    assert step is not None
    trainer = make_trainer(experiment)
    wanted = {**trainer.params_layout.canonical(), **trainer.bias_layout.canonical()}
    entries = store.restore(step, wanted, skip=(OPTIMIZER, MOVING_AVERAGE))
    documents = store.documents(step)
    tokens = documents["meta"]["tokens"]
    here = _saved_batch(batch) if batch else _next_batch(experiment, folder, documents["data"], rows)
    scales = _scales(experiment, tokens, here)
    found = LayerByLayer(experiment, trainer, entries).run(here, scales)
    place = {"step": step, "rows": len(here.tokens), "own_fp8": saved.precision.fp8 is not None}
    return found, place


def _next_batch(experiment: Experiment, folder: Path, state: dict, rows: int) -> Microbatch:
    """The rows that the run would take next."""
    iterator = train_rows(experiment.data, Tokenizer.load(folder / TOKENIZER_NAME), seed=experiment.seed)
    iterator.set_state(state)
    found = iterator.next_batch(rows)
    iterator.close()
    return Microbatch(*(found[name] for name in Microbatch._fields))


def _saved_batch(path: str) -> Microbatch:
    try:
        with np.load(path) as arrays:
            return Microbatch(*(arrays[name] for name in Microbatch._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"--batch: {path} is no batch that a run saved: {error}") from None


def _scales(experiment: Experiment, tokens: int, batch: Microbatch) -> LossScales:
    """The scales of the run's own step, so that gradients have the size that they have in it."""
    schedule = experiment.schedule
    labels = float(targets(jax.tree.map(jnp.asarray, batch), within_documents=experiment.mask_documents).weights.mean())
    sequences = schedule.rows(tokens)
    main = 1 / max(labels * sequences * experiment.data.sequence_length, 1)
    mtp = schedule.mtp_weight(tokens) / max(experiment.model.mtp_depth, 1) * main
    return LossScales(*(jnp.float32(scale) for scale in (main, mtp, schedule.balance_weight / sequences)))


def table(tensors: Sequence[Tensor]) -> str:
    """The readings in Markdown, a line each."""
    lines = ["| layer | tensor | role | tile | format | underflow | clipped | relative error |", "|---" * 8 + "|"]
    for tensor in tensors:
        record = tensor.record()
        shares = " | ".join(f"{record[name]:.3%}" for name in ("underflow", "clipped", "relative_error"))
        lines.append("| " + " | ".join(record[name] for name in ("layer", "tensor", "role", "tile", "format")))
        lines[-1] += f" | {shares} |"
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Prints the table, and what is not finite."""
    if len(argv) != 2:
        print("usage: python -m tools.quantization_stats RUN_FOLDER [--step=N] [--batch=FILE]", file=sys.stderr)
        return 2
    try:
        found, place = study(argv[1], step=_STEP.value, rows=_ROWS.value, batch=_BATCH.value)
        if found.first_not_finite is None and not _BATCH.value:
            document = {**place, "tensors": [tensor.record() for tensor in found.tensors]}
            write_aside(Path(argv[1]) / QUANTIZATION_NAME, json.dumps(document, indent=1) + "\n")
    except (ConfigError, CheckpointError, DataError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(table(found.tensors))
    whose = "its own FP8" if place["own_fp8"] else "DeepSeek-V3's FP8, which this run does not train with"
    print(f"\nstep {place['step']}, {place['rows']} rows, {whose}")
    if found.first_not_finite is not None:
        print(f"not finite: {found.first_not_finite} is the first tensor with a NaN or an infinity", file=sys.stderr)
        return 1
    print("every tensor is finite")
    return 0


if __name__ == "__main__":
    app.run(main)
