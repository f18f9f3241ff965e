"""How even the loads of experts and devices are: NumPy on the host, for `metrics.jsonl` and for tools.

Every function takes loads whose last axis is what shares the tokens, experts or devices, and gives a number for each
row. A row to which nothing was routed counts as even, as it does for `balance.max_violation`.
"""

from __future__ import annotations

import numpy as np

LOAD_BINS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)
"""Upper ends of the bins of `load_histogram`, in units of the mean load; they belong to their bins.

0 (dead experts), (0, 0.25], (0.25, 0.5], (0.5, 0.75], (0.75, 1], (1, 1.25], (1.25, 1.5], (1.5, 2], (2, 4], above 4.
"""


def load_metrics(load: np.ndarray, device_load: np.ndarray) -> dict[str, np.ndarray]:
    """What a step's loads add to `metrics.jsonl` besides `load` and `max_vio`, per layer.

    Args:
      load: integers `[layers, experts]`, the tokens of each expert over the whole global batch.
      device_load: integers `[layers, devices]`, the tokens that the experts of each device computed.

    Returns:
      `load_entropy` float64 `[layers]`, `dead_experts` int64 `[layers]`, `load_histogram` int64 `[layers, bins]`;
      of the devices `device_load`, each one's share, float64 `[layers, devices]`, and `device_load_max`, the busiest
      one's tokens over the mean, float64 `[layers]`. Fractions are rounded to six digits, as shares in `load` are.
    """
    total = device_load.sum(axis=-1, keepdims=True)
    return {
        "load_entropy": np.round(load_entropy(load), 6),
        "dead_experts": dead_experts(load),
        "load_histogram": load_histogram(load),
        "device_load": np.round(device_load / np.maximum(total, 1), 6),
        "device_load_max": np.round(1 + max_violation(device_load), 6),
    }


def max_violation(load: np.ndarray) -> np.ndarray:
    """MaxVio `[...]` of loads or shares `[..., N]`: (largest - mean) / mean (arXiv 2408.15664)."""
    mean = load.mean(axis=-1)
    return np.where(mean > 0, load.max(axis=-1) / np.where(mean > 0, mean, 1) - 1, 0.0)


def load_entropy(load: np.ndarray) -> np.ndarray:
    """Entropy `[...]` of the shares of loads `[..., N]`, over log N: 1 where all are even, 0 where one takes all."""
    total = load.sum(axis=-1, keepdims=True)
    size = load.shape[-1]
    if size == 1:
        return np.ones(load.shape[:-1])
    share = np.where(total > 0, load / np.where(total > 0, total, 1), 1 / size)
    return (share * np.log(1 / np.where(share > 0, share, 1))).sum(axis=-1) / np.log(size)


def dead_experts(load: np.ndarray) -> np.ndarray:
    """Experts without a token: int64 `[...]` of loads `[..., N]`."""
    return (load == 0).sum(axis=-1)


def load_histogram(load: np.ndarray) -> np.ndarray:
    """Experts in each bin of load over mean load: int64 `[..., bins]` of integer loads `[..., N]`; see `LOAD_BINS`.

    All experts of a row without tokens are in the first bin: they are dead.
    """
    # Exact in integers: load / mean <= edge where 4 N load <= 4 edge total; every edge is a multiple of 1/4.
    quarters = 4 * load.shape[-1] * load.astype(np.int64)
    ends = (4 * np.array(LOAD_BINS)).astype(np.int64) * load.sum(axis=-1, keepdims=True, dtype=np.int64)
    up_to = (quarters[..., None, :] <= ends[..., :, None]).sum(axis=-1)
    all_of_them = np.full((*load.shape[:-1], 1), load.shape[-1])
    return np.diff(np.concatenate([up_to, all_of_them], axis=-1), axis=-1, prepend=0)
