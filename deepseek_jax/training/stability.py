"""Watching for losses and weights that are not finite, without waiting for the device at every step."""

from __future__ import annotations

import math
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from deepseek_jax.model.targets import Microbatch
from deepseek_jax.training.step import TrainState
from deepseek_jax.training.step_metrics import StepMetrics


class NonFiniteLossError(ValueError):
    """A loss, gradient norm or weight was NaN or infinite; the message names the step and where its batch is."""


class NonFiniteGuard:
    """Remembers the steps since the last check and looks at all of them when the run waits for the device anyway."""

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self._pending: list[tuple[int, jax.Array, jax.Array, Microbatch]] = []
        self._latest: tuple[int, Microbatch] | None = None

    def watch(self, step: int, metrics: StepMetrics, batch: Microbatch) -> None:
        """Notes a step that was started; costs no wait."""
        self._pending.append((step, metrics.loss, metrics.grad_norm, batch))
        self._latest = step, batch

    def check(self) -> None:
        """Waits for the noted steps and raises `NonFiniteLossError` for the first that was not finite."""
        pending, self._pending = self._pending, []
        values = jax.device_get([(loss, norm) for _, loss, norm, _ in pending])
        for (step, _, _, batch), (loss, norm) in zip(pending, values, strict=True):
            if math.isfinite(loss) and math.isfinite(norm):
                continue
            self._stop(step, batch, f"loss {loss}, gradient norm {norm}")

    def check_state(self, state: TrainState) -> None:
        """Waits for `state`, left by the latest step, and raises `NonFiniteLossError` if any of its arrays is bad.

        The loss and gradients of a step say nothing of what its update made of the weights.
        """
        found, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(_are_finite(state)))
        bad = [jax.tree_util.keystr(path, simple=True, separator=".") for path, is_finite in found if not is_finite]
        if bad:
            assert self._latest is not None, "a state that no step has made"
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            self._stop(*self._latest, f"{bad[0]}{more} not finite after it")

    def _stop(self, step: int, batch: Microbatch, what: str) -> NoReturn:
        host = f"_host_{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._folder / f"nonfinite_step_{step}{host}.npz"
        self._folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez_compressed(file, **batch._asdict())
        raise NonFiniteLossError(
            f"step {step}: {what}; its batch is saved in {path}, the checkpoints before it are as they were: lower "
            "optimizer.peak_lr, or resume and look at the data"
        )


@jax.jit
def _are_finite(tree):
    """For each array of `tree` whether all of it is finite."""
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)
