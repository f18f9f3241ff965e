"""Arrays that are the same to the bit, told by text that processes can exchange."""

from __future__ import annotations

import hashlib

import numpy as np


def digest(array: np.ndarray) -> str:
    """Of shape, dtype and bits."""
    return f"{array.shape} {array.dtype} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"
