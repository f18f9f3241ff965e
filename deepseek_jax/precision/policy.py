"""Which dtype each part of training uses."""

from __future__ import annotations

import dataclasses
from typing import Literal

from deepseek_jax.config import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionPolicy:
    """Master weights and gradient accumulation are always float32; activations and matmuls are `compute`.

    Norms, router and softmax are float32 whatever `compute` is.
    """

    compute: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self):
        require(
            self.compute in ("float32", "bfloat16"),
            f"precision.compute must be float32 or bfloat16, not {self.compute!r}",
        )


FLOAT32 = PrecisionPolicy(compute="float32")
