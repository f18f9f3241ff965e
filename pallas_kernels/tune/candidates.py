"""Ways to cut a product's work that are worth timing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from pallas_kernels.block_scaled_matmul.config import MOST_STAGES, MatmulConfig, TileConfig
from pallas_kernels.grouped_matmul.config import ArrayConfig
from pallas_kernels.tune.products import Product

SWATHS = (2, 4, 16, 32)
"""Besides the default."""
FEWEST_STAGES = 2


def candidates(product: Product, sms: int, count: int) -> list[TileConfig]:
    """The default, and those tiles and clusters that the design's model finds fastest; at most `count` in all."""
    others = sorted(set(_tilings(product, sms)), key=lambda config: (product.cycles(config, sms), repr(config)))
    return list(dict.fromkeys((product.default(sms), *others)))[:count]


def variants(config: TileConfig) -> list[TileConfig]:
    """The same tiles in other orders, and with a stage less in flight."""
    found = [dataclasses.replace(config, swath=swath) for swath in SWATHS if swath != config.swath]
    if config.stages > FEWEST_STAGES + 1:
        found.append(dataclasses.replace(config, stages=config.stages - 1))
    return found


def _tilings(product: Product, sms: int) -> Iterator[TileConfig]:
    """Every one that registers and shared memory suffice for, with as many stages as fit."""
    kind = type(product.default(sms))
    for tile_m in (192, 128):
        for tile_n in kind.TILE_N:
            for cluster in (1, 2)[:sms]:
                try:
                    config = _config(kind, tile_m, tile_n, cluster, product)
                except ValueError:  # Too many registers.
                    continue
                stages = min(config.most_stages(product.result[2]), MOST_STAGES)
                if stages >= FEWEST_STAGES:
                    yield dataclasses.replace(config, stages=stages)


def _config(kind: type[TileConfig], tile_m: int, tile_n: int, cluster: int, product: Product) -> TileConfig:
    if kind is MatmulConfig:
        return MatmulConfig(tile_m, tile_n, cluster=cluster, b_tile=product.b_tile)
    return ArrayConfig(tile_m, tile_n, cluster=cluster)
