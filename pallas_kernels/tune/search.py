"""The fastest way to cut a product's work: tiles and clusters first, then the order and depth of the best."""

from __future__ import annotations

import logging
from typing import NamedTuple

from pallas_kernels.block_scaled_matmul.config import TileConfig
from pallas_kernels.tune.candidates import candidates, variants
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
    """
    operands = product.make_operands(0)
    timed: dict[TileConfig, Timing] = {}

    def best(configs: list[TileConfig]) -> TileConfig:
        for config in configs:
            if config not in timed:
                try:
                    timed[config] = time_kernels(product.by_kernel(config), *operands, calls=calls)
                except Exception as error:  # A compiler's: that is no way to cut it.
                    if config == default:
                        raise
                    _LOG.warning("%s: %s", config, str(error).splitlines()[:1])
        return min(timed, key=lambda config: timed[config].median)

    default = product.default(sms)
    tiles = best(candidates(product, sms, tilings))
    fastest = best(variants(tiles))
    if timed[fastest].median > GAIN * timed[default].median:
        fastest = default
    portable = time_kernels(product.portable, *operands, calls=calls)
    return Tuned(fastest, timed[fastest], timed[default], portable)
