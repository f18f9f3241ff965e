"""The fastest way to cut a product's work: tiles and clusters first, then the order and depth of the best.

None is chosen that does not give the product: what was timed is compared with the portable implementation.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_scaled_matmul.config import TileConfig
from pallas_kernels.tune.candidates import candidates, variants
from pallas_kernels.tune.checks import TENSOR_CORE_BITS, CheckFailed
from pallas_kernels.tune.products import Product
from pallas_kernels.tune.timing import Timing, time_kernels

_LOG = logging.getLogger("pallas_kernels")
GAIN = 0.99
"""A config takes the default's place only if it takes at most so much of its time: less is noise."""


class Tuned(NamedTuple):
    """What was found of a product."""

    config: TileConfig
    """The fastest."""
    chosen: Timing
    """Its time."""
    default: Timing
    """That of the default config."""
    portable: Timing
    """That of the implementation without the kernel."""


def tune(product: Product, sms: int, *, tilings: int = 8, calls: int = 20) -> Tuned:
    """Times a product on the GPU at hand.

    Args:
      product: Its operands are random.
      sms: Streaming multiprocessors of the GPU.
      tilings: How many tiles and clusters are timed.
      calls: How many of each.

    Raises:
      CheckFailed: the default config does not give the product.
    """
    operands = product.make_operands(0)
    right = Right(product, operands)
    timed: dict[TileConfig, Timing] = {}
    default = product.default(sms)

    def best(configs: list[TileConfig]) -> TileConfig:
        for config in configs:
            if config not in timed:
                try:
                    right.require(config)
                    timed[config] = time_kernels(product.by_kernel(config), *operands, calls=calls)
                except Exception as error:  # A compiler's, or wrong results: that is no way to cut it.
                    if config == default:
                        raise
                    _LOG.warning("%s: %s", config, (str(error).splitlines() or [type(error).__name__])[0])
        return min(timed, key=lambda config: timed[config].median)

    fastest = best([default, *candidates(product, sms, tilings)])
    fastest = best(variants(fastest))
    if timed[fastest].median > GAIN * timed[default].median:
        fastest = default
    portable = time_kernels(product.portable, *operands, calls=calls)
    return Tuned(fastest, timed[fastest], timed[default], portable)


class Right:
    """What a product's results have to be, on some operands."""

    def __init__(self, product: Product, operands: tuple[Any, Any]):
        self._product, self._operands = product, operands
        self._wanted = jax.jit(product.portable)(*operands)
        size = jax.jit(product.portable)(*(_magnitude(one) for one in operands))
        rounding = 2.0**-7 if self._wanted.dtype == jnp.bfloat16 else 0.0
        self._error = TENSOR_CORE_BITS * size.astype(jnp.float32) + rounding * jnp.abs(self._wanted.astype(jnp.float32))

    def require(self, config: TileConfig) -> None:
        """Raises CheckFailed unless the kernel, cut like that, gives the product."""
        got = jax.jit(self._product.by_kernel(config))(*self._operands)
        off = jnp.abs(got.astype(jnp.float32) - self._wanted.astype(jnp.float32))
        wrong = int((~(off <= self._error)).sum())
        if wrong:
            raise CheckFailed(f"{wrong} of {got.size} results are wrong, one by {float(off.max()):g}")


def _magnitude(operand: Any) -> Any:
    """The same with every number's magnitude."""
    return jax.tree.map(lambda leaf: jnp.abs(leaf.astype(jnp.float32)).astype(leaf.dtype), operand)
