"""The held-out split: decided by a hash of each document's identity, the same on any machine and in any order."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from deepseek_jax.data.errors import DataError


def heldout_mask(digests: np.ndarray, fraction: float, minimum: int, name: str) -> np.ndarray:
    """Which documents are held out: those with the smallest digests, max(minimum, ceil(fraction·N)) of them.

    Args:
        digests: uint64 `[N]`, a hash of each document's identity.
        fraction: share to hold out.
        minimum: hold out at least so many.
        name: the source, for messages.

    Returns:
        bool `[N]`.

    Raises:
        DataError: nothing would be left to train on.
    """
    total = len(digests)
    count = max(minimum, math.ceil(Fraction(repr(fraction)) * total))  # 0.1·30 in floating point is above 3
    if count >= total:
        raise DataError(
            f"{name}: has {total} documents, and holding out {count} leaves none for training; "
            "lower data.heldout_min_documents or data.heldout_fraction, or bring more documents"
        )
    if count == 0:
        return np.zeros(total, bool)
    return digests <= np.partition(digests, count - 1)[count - 1]
