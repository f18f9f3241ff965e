"""Watching for losses that are not finite, without waiting for the device at every step."""

from __future__ import annotations

import math

import jax
import numpy as np
from etils import epath

from deepseek_jax.model.targets import Microbatch
from deepseek_jax.training.step import StepMetrics


class NonFiniteLossError(ValueError):
    """A loss or gradient norm was NaN or infinite; the message names the step and where its batch is."""


class NonFiniteGuard:
    """Remembers the steps since the last check and looks at all of them when the run waits for the device anyway."""

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._pending: list[tuple[int, jax.Array, jax.Array, Microbatch]] = []

    def watch(self, step: int, metrics: StepMetrics, batch: Microbatch) -> None:
        """Notes a step that was started; costs no wait."""
        self._pending.append((step, metrics.loss, metrics.grad_norm, batch))

    def check(self) -> None:
        """Waits for the noted steps and raises `NonFiniteLossError` for the first that was not finite."""
        pending, self._pending = self._pending, []
        values = jax.device_get([(loss, norm) for _, loss, norm, _ in pending])
        for (step, _, _, batch), (loss, norm) in zip(pending, values, strict=True):
            if math.isfinite(loss) and math.isfinite(norm):
                continue
            host = f"_host_{jax.process_index()}" if jax.process_count() > 1 else ""
            path = self._folder / f"nonfinite_step_{step}{host}.npz"
            with path.open("wb") as file:
                np.savez_compressed(file, **batch._asdict())
            raise NonFiniteLossError(
                f"step {step}: loss {loss}, gradient norm {norm}; its batch is saved in {path}, the checkpoints before "
                "it are as they were: lower optimizer.peak_lr, or resume and look at the data"
            )
