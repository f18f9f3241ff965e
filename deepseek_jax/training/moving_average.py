"""The moving average of the weights, kept in host memory and updated beside the training (section 3.2.3).

After a step its weights are copied to the host while the next step runs, and a thread takes them into the average. So
it costs no device memory, and a step waits only where the host is slower than a step. It is the average of the whole
model, router biases included, and is saved with every checkpoint under `moving_average/<canonical name>`.

The paper says neither how slowly the average decays nor how it begins. Here the weights w₀ that a run begins with are
its first term, and all terms are weighted by age alone: with the decay d, after t updates

    a_t = Σ_i d^(t-i) w_i / Σ_i d^(t-i)
        = a_(t-1) + r_t (w_t - a_(t-1)),    r_t = (1 - d) / (1 - d^(t+1))

This is Adam's correction of the bias: while t is small, a_t is the plain mean of all weights so far, and the first ones
do not count for more than others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from deepseek_jax.parallel.placement import KINDS, ParameterLayout
from deepseek_jax.training.canonical import MOVING_AVERAGE
from deepseek_jax.training.checkpoint import CheckpointStore
from deepseek_jax.training.checkpoint_checks import first_line
from deepseek_jax.training.experiment import MovingAverageConfig
from deepseek_jax.training.step import Trainer, TrainState
from deepseek_jax.tree import Tree, flatten, unflatten

DOCUMENT = "moving_average"
"""What a checkpoint's meta says of it: how many updates it has had."""
HOST_MEMORY = "pinned_host"
_BLOCK = 1 << 18
"""Numbers updated at a time: a block and its change stay in a core's cache."""

Span = tuple[tuple[int, int], ...]
"""A part of an array: where it begins and ends along each dimension."""


class MovingAverageError(RuntimeError):
    """The average could not be updated; the message is one line."""


class MovingAverage:
    """The average of one run's weights; every process of the run has one, of what its devices hold.

    Each part of an array is there once, however many devices of this process have a copy.
    """

    def __init__(self, config: MovingAverageConfig, trainer: Trainer):
        """All zeros; `begin` or `restore` comes next."""
        self.config = config
        self.updates = 0
        """How often it has moved since it began; `wait` first."""
        self._trainer = trainer
        self._layouts = (trainer.params_layout, trainer.bias_layout)
        self._parts = {
            name: {span: np.zeros([stop - start for start, stop in span], like.dtype) for span in _spans(like)}
            for layout in self._layouts
            for name, like in flatten(layout.abstract()).items()
        }
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moving average")
        self._pending: Future[None] | None = None
        self._pending_step = 0

    @property
    def nbytes(self) -> int:
        """Bytes of it in this process."""
        return sum(part.nbytes for parts in self._parts.values() for part in parts.values())

    # --- while the run trains ---

    def begin(self, state: TrainState) -> None:
        """Begins with the weights of `state`."""
        for part, weights in self._on_host(state):
            np.copyto(part, weights)
        self.updates = 0

    def update(self, step: int, state: TrainState) -> None:
        """Takes the weights after step `step` into the average, if one is due; `state` may be donated afterwards.

        Returns when the copies to the host are under way. An update that is still at work is waited for first: none
        is left out, or a run that is resumed would not be the same.

        Raises:
          MovingAverageError: an update before this one failed.
        """
        if step % self.config.every_steps:
            return
        self.wait()
        self._pending = self._thread.submit(self._add, self._on_host(state))
        self._pending_step = step

    def wait(self) -> None:
        """Returns when no update is at work; raises `MovingAverageError` if the last one failed."""
        if self._pending is None:
            return
        try:
            self._pending.result()
        except jax.errors.JaxRuntimeError:  # of the step that made the weights, which says what it was
            raise
        except Exception as error:
            raise MovingAverageError(
                f"the moving average of the weights could not take in step {self._pending_step}: {first_line(error)}; "
                "resume from the last checkpoint, or without an average: moving_average=none"
            ) from error

    def close(self) -> None:
        """Ends the thread, after the update that is at work."""
        self._thread.shutdown()

    # --- what is made of it ---

    def in_place_of(self, state: TrainState) -> TrainState:
        """`state` with the average for its weights and router biases, on the devices, to evaluate it."""
        self.wait()
        params, router_bias = (self._placed(layout) for layout in self._layouts)
        return dataclasses.replace(state, params=params, router_bias=router_bias)

    def entries(self) -> dict[str, jax.Array]:
        """The average as entries of a checkpoint, copied, in host memory: `moving_average/<canonical name>`."""
        self.wait()
        places = self._places()

        def array(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
            # Copies, because on a CPU a jax.Array may share the memory of the NumPy array that it is made of.
            return jax.make_array_from_callback(
                like.shape, like.sharding, lambda index: self._layer(places[name], _span(index, like.shape)).copy()
            )

        return {MOVING_AVERAGE + name: array(name, like) for name, like in self._templates().items()}

    def restore(self, store: CheckpointStore, step: int, updates: int) -> None:
        """Continues the average of a checkpoint, of any mesh and schedule; it had so many `updates`.

        Raises `CheckpointError` if the entries are not those of this model, or cannot be read.
        """
        wanted = {MOVING_AVERAGE + name: like for name, like in self._templates().items()}
        places = self._places()
        for name, array in store.restore(step, wanted, skip=("",)).items():
            for shard in array.addressable_shards:
                self._layer(places[name.removeprefix(MOVING_AVERAGE)], _span(shard.index, array.shape))[...] = (
                    shard.data
                )
        self.updates = updates

    # --- inside ---

    def _on_host(self, state: TrainState) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Starts to copy the weights of `state`; gives each part of the average with its weights, as they arrive."""
        parts, shards = [], []
        for name, array in (flatten(state.params) | flatten(state.router_bias)).items():
            of_span = {_span(shard.index, array.shape): shard for shard in array.addressable_shards}
            for span, shard in of_span.items():
                parts.append(self._parts[name][span])
                shards.append(shard)
        # Arrays of their own: what `copy_to_host_async` makes belongs to the array on the device, which the next step
        # is given to overwrite, and is lost with it or keeps it from being overwritten. The runtime lets no step write
        # over an array before the copies that were begun earlier have read it.
        copies = jax.device_put(
            [shard.data for shard in shards],
            [SingleDeviceSharding(shard.device, memory_kind=HOST_MEMORY) for shard in shards],
        )
        copies.reverse()
        # Each copy is given up as soon as it is used.
        return ((part, np.asarray(copies.pop())) for part in parts)

    def _add(self, arriving: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
        """One update, in the thread."""
        rate = update_rate(self.config.decay, self.updates + 1)
        for part, weights in arriving:
            _move(part, weights, rate)
        self.updates += 1

    def _placed(self, layout: ParameterLayout) -> Tree:
        """The part of the average that belongs to a layout, as its run-time arrays."""

        def array(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.make_array_from_callback(
                like.shape, like.sharding, lambda index: self._parts[name][_span(index, like.shape)].copy()
            )

        return unflatten({name: array(name, like) for name, like in flatten(layout.abstract()).items()})

    def _templates(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding, in host memory, of every canonical array."""
        return {
            name: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding.with_memory_kind(HOST_MEMORY))
            for layout in self._layouts
            for name, like in layout.canonical().items()
        }

    def _places(self) -> Mapping[str, tuple[str, tuple[int, int] | None]]:
        """Per canonical array the run-time array that it lies in, and its rank and slot there if that is a stack."""
        places: dict[str, tuple[str, tuple[int, int] | None]] = {}
        for layout in self._layouts:
            for name in flatten(layout.specs):
                kind, _, path = name.partition(".")
                if kind in KINDS:
                    found = layout.placement.arrays(kind, [path])
                    places |= {canonical: (name, (rank, slot)) for rank, slot, _, canonical in found}
                else:
                    places[name] = (name, None)
        return places

    def _layer(self, place: tuple[str, tuple[int, int] | None], span: Span) -> np.ndarray:
        """A part of a canonical array, as a view."""
        name, where = place
        if where is None:
            return self._parts[name][span]
        rank, slot = where
        slots = (0, self._trainer.placement.stack_size(name.partition(".")[0]))
        return self._parts[name][((rank, rank + 1), slots, *span)][0, slot]


def start_average(
    config: MovingAverageConfig | None, trainer: Trainer, state: TrainState, store: CheckpointStore, step: int | None
) -> tuple[MovingAverage | None, str | None]:
    """The average of a run that goes on from `state`, and a line that says what it begins with.

    Args:
      config: of the run; None: it keeps none.
      trainer: of the run.
      state: what it goes on from.
      store: its checkpoints.
      step: the one that `state` is of; None where the run begins.

    Raises:
      CheckpointError: the checkpoint's average is not of this model, or cannot be read.
    """
    saved = None if step is None else store.documents(step)["meta"].get(DOCUMENT)
    if config is None:
        ignored = f"the moving average of the weights in checkpoint {step} is left there: moving_average is none"
        return None, None if saved is None else ignored
    average = MovingAverage(config, trainer)
    if saved is not None:
        assert step is not None
        average.restore(store, step, saved["updates"])
        origin = f"after {saved['updates']:,} updates"
    else:
        average.begin(state)
        origin = "new" if step is None else f"checkpoint {step} holds none, so it begins with the weights of that step"
    every = "step" if config.every_steps == 1 else f"{config.every_steps} steps"
    return average, (
        f"moving average of the weights with decay {config.decay:g} every {every}, {average.nbytes / 1e6:,.1f} MB of "
        f"host memory: {origin}"
    )


def update_rate(decay: float, update: int) -> float:
    """How far update number `update`, counted from 1, moves the average towards the weights."""
    return (1 - decay) / (1 - decay ** (update + 1))


def _move(average: np.ndarray, weights: np.ndarray, rate: float) -> None:
    """`average += rate · (weights - average)`, in place; a thread beside it may run, for NumPy frees Python's lock."""
    old, new = average.reshape(-1), np.ascontiguousarray(weights).reshape(-1)
    for start in range(0, old.size, _BLOCK):
        block = old[start : start + _BLOCK]
        change = new[start : start + _BLOCK] - block
        change *= rate
        block += change


def _spans(like: jax.ShapeDtypeStruct) -> set[Span]:
    """The parts of an array that this process holds."""
    indices = like.sharding.addressable_devices_indices_map(like.shape)
    return {_span(index, like.shape) for index in indices.values()}


def _span(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Span:
    assert index is not None  # None would be a device without any part of it
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
