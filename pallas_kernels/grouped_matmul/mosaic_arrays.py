"""The Hopper kernels of grouped matmuls of bfloat16 arrays; `mosaic_gpu.py` says what they compute and cost.

The pipeline is that of `block_scaled_matmul/pipeline.py`, in steps of 64 along K. Nothing has to be scaled, so sums
stay in the accumulator of the tensor cores from the first step of a visit to its last:

    consumer w    wait full[stage] ──► wgmma: acc += a[64 rows] @ b ──► wait for the step before ──► its empty[stage]

- Operands are read as they lie: `wgmma` takes 16-bit operands with either axis contiguous.
- With groups along K (Wgrad) a step starts at a multiple of 8 rows at or before the group's first row, and may end
  behind its last. What it then holds of others is overwritten by zeros in shared memory, in both operands, since zero
  times NaN is NaN: every consumer does so for its own part, and waits for the others (`masked`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.block_scaled_matmul import pipeline
from pallas_kernels.block_scaled_matmul.config import ROWS, Groups
from pallas_kernels.block_scaled_matmul.mosaic_gpu import (
    INTERPRETED_WHOLE,
    columns_of_a_row,
    launch,
    padded,
    swizzled,
)
from pallas_kernels.grouped_matmul.config import STEP, ArrayConfig


@dataclasses.dataclass(frozen=True)
class _Operands:
    """Which way a and b lie, in global and in shared memory alike."""

    a_transposed: bool
    """a is `[K, M]`, not `[M, K]`."""
    b_transposed: bool
    """b is `[G, N, K]`, not `[G, K, N]`."""


@functools.partial(jax.jit, static_argnames=("out_dtype", "config", "groups", "b_transposed", "sms", "interpret"))
def product(
    a: Array,
    b: Array,
    out_dtype: jnp.dtype,
    config: ArrayConfig,
    groups: Groups,
    b_transposed: bool,
    tables: tuple[Array, ...],
    sms: int,
    interpret: Any,
) -> Array:
    """Lays the operands out as the kernel reads them, and runs it; none of the sizes is zero.

    Args:
      a: bfloat16 `[M, K]` with groups of rows, `[K, M]` with groups along K.
      b: bfloat16 `[G, K, N]` with groups of rows, or `[G, N, K]` if `b_transposed`; `[K, N]` with groups along K.
      out_dtype: bfloat16 or float32.
      config: How the work is cut.
      groups: What groups there are.
      b_transposed: See b.
      tables: What `pipeline.ByRows` or `pipeline.AlongDepth` reads of the groups.
      sms: Blocks of threads.
      interpret: Pallas' `InterpretGPUParams`; None for the GPU.

    Returns:
      `[M, N]` of `out_dtype`; `[G, M, N]` with groups along K.
    """
    along_depth = groups.along == "depth"
    k, m = a.shape if along_depth else a.shape[::-1]
    n = b.shape[-2 if b_transposed else -1]
    rows, columns = m + -m % 8, n + -n % columns_of_a_row(config.tile_n, out_dtype)
    if interpret is not None:  # It refuses to write beyond an array, where TMA writes what lies within.
        rows, columns = rows + -rows % config.tile_m, columns + -columns % config.tile_n
    a, b = (padded(x, x.shape[-2] + -x.shape[-2] % 8, x.shape[-1] + -x.shape[-1] % STEP) for x in (a, b))
    results = (groups.count,) if along_depth else ()
    out = jax.ShapeDtypeStruct((*results, rows, columns), out_dtype)
    kernel = _kernel(config, k, groups, _Operands(along_depth, b_transposed), out, sms, interpret)
    return kernel(a, b if b.ndim == 3 else b[None], *tables)[..., :m, :n]


def _kernel(config, k, groups, lie, out, sms, interpret):
    """The kernel for one size, of a, b `[G, …]` and tables."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    bf16 = jnp.bfloat16
    stages, tiles = config.stages, swizzled(bf16, STEP)
    a = (stages, STEP, config.tile_m) if lie.a_transposed else (stages, config.tile_m, STEP)
    b = (stages, config.tile_n, STEP) if lie.b_transposed else (stages, STEP, config.tile_n)
    scratch: dict[str, Any] = {
        "a": plgpu.SMEM(a, bf16, transforms=tiles),
        "b": plgpu.SMEM(b, bf16, transforms=tiles),
    }
    if groups.along == "depth":
        scratch["masked"] = plgpu.Barrier(num_arrivals=config.consumers, num_barriers=stages)
    emulate = interpret is not None and not INTERPRETED_WHOLE

    def body(*refs, **ring):
        a, b, *tables, out = refs
        kind = pipeline.kind_of(groups, -(-k // STEP), STEP, tables)
        work = pipeline.work_of(config, kind, *out.shape[-2:])
        load = functools.partial(_load, config, lie, a, b, ring)
        pipeline.run(work, load, functools.partial(_multiply, work, lie, ring, emulate), ring, out)

    body.__name__ = f"grouped_matmul_{groups.along}_bf16"  # For profiles.
    return launch(body, config, out, scratch, 2, sms, interpret)


def _load(config, lie, a, b, ring, tile, visit, step, stage):
    """Starts the copies of one step of 64 along K."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    depth = pl.ds(visit.first + step * STEP, STEP)
    rows, columns = pl.ds(tile.row * config.tile_m, config.tile_m), pl.ds(tile.column * config.tile_n, config.tile_n)
    full, shared = ring["full"].at[stage], "cluster" if config.cluster > 1 else None
    a = a.at[depth, rows] if lie.a_transposed else a.at[rows, depth]
    b = b.at[visit.matrix, columns, depth] if lie.b_transposed else b.at[visit.matrix, depth, columns]
    plgpu.copy_gmem_to_smem(a, ring["a"].at[stage], full, collective_axes=shared)
    plgpu.copy_gmem_to_smem(b, ring["b"].at[stage], full)


def _multiply(work, lie, ring, emulate, visit, stage, warpgroup):
    """The stage after a visit, and this warpgroup's rows of its product."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shape = (ROWS, work.config.tile_n)
    mine = pl.ds(warpgroup * ROWS, ROWS)
    steps = np.int32(visit.steps) if isinstance(visit.steps, int) else visit.steps

    def ready(k, stage):
        """a's part and b of a stage, when they are there."""
        plgpu.barrier_wait(ring["full"].at[stage])
        if visit.begin is not None and lie.a_transposed:
            _mask(work, ring, visit, k, stage, warpgroup)
        a = ring["a"].at[stage, :, mine] if lie.a_transposed else ring["a"].at[stage, mine]
        return a, ring["b"].at[stage]

    def emulated(k, carry):
        stage, total = carry
        a, b = (x[...].astype(jnp.float32) for x in ready(k, stage))
        a, b = a.T if lie.a_transposed else a, b.T if lie.b_transposed else b
        plgpu.barrier_arrive(ring["empty"].at[stage])
        return work.after(stage), total + jnp.dot(a, b)

    def accumulate(sums):
        def step(k, carry):
            last, stage = carry
            a, b = ready(k, stage)
            a = plgpu.transpose_ref(a, (1, 0)) if lie.a_transposed else a
            plgpu.wgmma(sums, a, plgpu.transpose_ref(b, (1, 0)) if lie.b_transposed else b)
            plgpu.wgmma_wait(1)

            @pl.when(k > 0)
            def _():
                plgpu.barrier_arrive(ring["empty"].at[last])  # The step before has read it.

            return stage, work.after(stage)

        last, after = lax.fori_loop(np.int32(0), steps, step, (stage, stage))
        plgpu.wgmma_wait(0)

        @pl.when(steps > 0)
        def _():
            plgpu.barrier_arrive(ring["empty"].at[last])

        return after, sums[...]

    if emulate:
        return lax.fori_loop(np.int32(0), steps, emulated, (stage, jnp.zeros(shape, jnp.float32)))
    return pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))


def _mask(work, ring, visit, step, stage, warpgroup):
    """Overwrites by zeros what a stage of `[64, tile_m]` and `[64, tile_n]` holds of other groups, if anything."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    config = work.config
    first = visit.first + step * STEP

    @pl.when((first < visit.begin) | (first + STEP > visit.end))
    def _():
        row = lax.broadcasted_iota(jnp.int32, (STEP, ROWS), 0) + first
        real = (row >= visit.begin) & (row < visit.end)

        def keep_real(part):
            part[...] = jnp.where(real, part[...], jnp.zeros(part.shape, jnp.bfloat16))

        keep_real(ring["a"].at[stage, :, pl.ds(warpgroup * ROWS, ROWS)])
        for i in range(config.tile_n // ROWS):
            part = ring["b"].at[stage, :, i * ROWS : (i + 1) * ROWS]
            pl.when(warpgroup == i % config.consumers)(functools.partial(keep_real, part))
        plgpu.commit_smem()
        plgpu.barrier_arrive(ring["masked"].at[stage])
        plgpu.barrier_wait(ring["masked"].at[stage])
