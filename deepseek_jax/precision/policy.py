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
    dispatch: Literal["float32", "bfloat16"] | None = None
    """dtype in which tokens travel to experts on other devices, their outputs back, and the gradients of both; none:
    that of `compute`."""

    def __post_init__(self):
        require(
            self.compute in ("float32", "bfloat16"),
            f"precision.compute must be float32 or bfloat16, not {self.compute!r}",
        )
        require(
            self.dispatch in (None, "float32", "bfloat16"),
            f"precision.dispatch must be float32, bfloat16 or none, not {self.dispatch!r}",
        )


FLOAT32 = PrecisionPolicy(compute="float32")
