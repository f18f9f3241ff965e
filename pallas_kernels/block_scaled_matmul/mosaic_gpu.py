"""A block-scaled FP8 matmul for Hopper, in Pallas' Mosaic GPU: Fprop and Dgrad (section 3.3.2 of the report).

What it computes is the reference's sum, block by block of 128 along K:

    out[m, n] = Σ_k  (Σ_j a[m, 128 k + j] · b[128 k + j, n]) · a_scale[m, k] · b_scale[k, n // 128]

The inner sum is made by the tensor cores, which keep about 14 bits of it (`matmul_14_bits`); the outer one is made by
the CUDA cores in float32 registers, so that no more than 128 products share an accumulator: the report's promotion.

One block of threads runs on each SM and stays there (a persistent grid), with warpgroups of two kinds:

    producer          TMA ──►  ring of `stages` in shared memory, each one step of 128 along K
                                 a codes [tile_m, 128]   a scales [tile_m]
                                 b codes [tile_n, 128]   b scales [32]: of this tile's columns, and some more
                               full[stage]  ▼                                   ▲ empty[stage]
    consumer w        wgmma:  part  = a codes [64 w : 64 w + 64] @ b codes.T       E4M3, 4 instructions of 32 along K
                      FFMA:   acc  += part * (a_scale[row] * b_scale)              float32 registers
                      after the last step: acc ──► shared memory ──► TMA ──► out

- The ring never drains between tiles: while consumers write out one tile the producer already loads the next.
- A consumer issues the products of `steps_at_once` steps, then scales the first while the tensor cores make the next.
  With two consumers of 64 x 128 there are registers for two steps: 64 of a thread hold sums and 128 partial ones, of
  232. Three consumers have 160 and room for one step; there the others multiply while one scales.
- A stage is empty once its products and scales are in registers, before they are added up.
- A partial sum starts at zero without being set to zero: ptxas turns the first wgmma into one that does not add.
- Tiles are taken in swaths of `swath` rows of tiles, columns of a swath one after another, so that the tiles that run
  at one time share rows of a and columns of b in the L2 cache.
- In a cluster of two blocks, which take neighbouring tiles of a row, each reads half of a's codes for both (TMA
  multicast): 29% less to read from the L2 cache for tiles of 192 x 128. A stage is then empty when the consumers
  of both blocks say so.

**Layout.** Both operands of an FP8 wgmma lie in shared memory with K contiguous; 8-bit types cannot be transposed on
the way. So b `[K, N]` is read as its transpose, `[N, K]` row by row, and the wrapper asks for `b.codes.mT`:

- Dgrad, `dy @ w.T`, has it for nothing: the transpose of `w.T` is w as it is stored, and XLA removes the pair.
- Fprop, `x @ w`, does not: XLA then copies the codes at every call (1 byte read and written for each of K·N). Whoever
  multiplies by one weight often keeps `w.T` in FP8 too, made once per optimizer step, and passes `transposed.T`:
  again a pair that XLA removes. The copy costs memory, 1 byte per weight.

a's scales `[M, ⌈K/128⌉]` are laid out `[⌈K/128⌉, ⌈M/64⌉, 64]`, since TMA wants 16 contiguous bytes; they are 1/32 of a.

**Ragged sizes.** TMA fills what it reads beyond an array with zeros and drops what it would write there, so M and N
need not be multiples of the tile: rows beyond the end are zeros, with zero scales. A row or a column of NaN stays in
its row or column. The tiles of shared memory do constrain the arrays: M and N to multiples of 8, K of 128. Operands of
other sizes are padded with zeros first, which copies them; so is a result whose rows are no multiple of 128 bytes. None
of V3's sizes needs either.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.block_scaled_matmul.config import BLOCK, ROWS, SCALES_READ, MatmulConfig, default_config
from pallas_kernels.implementation import not_hopper
from pallas_kernels.quantize import Quantized

REGISTERS = {2: (40, 232), 3: (32, 160)}
"""By the number of consumers: registers of a thread of the producer and of a consumer; 512 for all warpgroups."""
INTERPRETED_WHOLE = jax.__version_info__ >= (0, 11, 2)
"""Pallas' interpreter runs the kernel as it is; in 0.10.2 it lacked clusters and wgmma with a transposed operand."""


def supported(a: Quantized, b: Quantized) -> str | None:
    """Why the kernel cannot multiply a `[M, K]` by b `[K, N]` where the code runs; None if it can."""
    return not_hopper() or _unsupported_operands(a, b)


def _unsupported_operands(a: Quantized, b: Quantized) -> str | None:
    if {a.codes.dtype, b.codes.dtype} != {jnp.dtype(jnp.float8_e4m3fn)}:
        return f"it needs codes of float8_e4m3fn, not {a.codes.dtype} and {b.codes.dtype}"
    if (a.tile, b.tile) != ((1, BLOCK), (BLOCK, BLOCK)):
        return f"it needs a in tiles of 1×128 and b of 128×128, not {a.tile} and {b.tile}"
    return None


def block_scaled_matmul(
    a: Quantized,
    b: Quantized,
    out_dtype: jnp.dtype,
    *,
    config: MatmulConfig | None = None,
    sms: int | None = None,
    interpret: Any = None,
) -> Array:
    """a `[M, K]` in tiles of 1×128 times b `[K, N]` in blocks of 128×128, both E4M3: `[M, N]` of `out_dtype`.

    Args:
      a: Activations, or gradients of them.
      b: A weight; see the module on how its codes should lie in memory.
      out_dtype: bfloat16 or float32.
      config: How the work is cut; None for the default of this size.
      sms: Blocks of threads, one for each SM; None for as many as the device has.
      interpret: Pallas' `InterpretGPUParams`, to run on a CPU; None for the GPU.

    Raises:
      ValueError: if the operands are not of that kind, the config exceeds shared memory, or has clusters and is to be
        interpreted by a jax that cannot.
    """
    obstacle = _unsupported_operands(a, b)
    if obstacle is not None:
        raise ValueError(f"block_scaled_matmul: implementation 'mosaic_gpu' cannot run here: {obstacle}")
    (m, k), n = a.shape, b.shape[1]
    if 0 in (m, k, n):
        return jnp.zeros((m, n), out_dtype)
    sms = sms or jax.devices()[0].core_count
    config = config or default_config(m, n, out_dtype, sms)
    config.check_memory(out_dtype)
    if interpret is not None and config.cluster > 1 and not INTERPRETED_WHOLE:
        raise ValueError("block_scaled_matmul: this jax's interpreter has no clusters; choose a config with cluster=1")
    return _multiply_arrays(a, b, out_dtype, config, sms, interpret)


@functools.partial(jax.jit, static_argnames=("out_dtype", "config", "sms", "interpret"))
def _multiply_arrays(a, b, out_dtype, config, sms, interpret):
    """Lays the operands out as the kernel reads them, and runs it."""
    (m, _), n = a.shape, b.shape[1]
    rows, columns = m + -m % 8, n + -n % _columns_of_a_row(config, out_dtype)
    depth, groups = a.scales.shape[1], -(-m // ROWS)
    a_codes = _padded(a.codes, rows, depth * BLOCK)
    b_codes = _padded(b.codes.mT, n + -n % 8, depth * BLOCK)
    a_scales = _padded(a.scales.T, depth, groups * ROWS).reshape(depth, groups, ROWS)
    b_scales = _padded(b.scales, depth, b.scales.shape[1] + -b.scales.shape[1] % 4)
    if interpret is not None:  # It refuses to write beyond an array, where TMA writes what lies within.
        rows, columns = rows + -rows % config.tile_m, columns + -columns % config.tile_n
    out = jax.ShapeDtypeStruct((rows, columns), out_dtype)
    return _kernel(config, depth, out, sms, interpret)(a_codes, a_scales, b_codes, b_scales)[:m, :n]


def _columns_of_a_row(config, out_dtype):
    """Columns of the result that fill 128 bytes, or a tile's whole row: the width of a tile of shared memory."""
    return min(config.tile_n, 128 // jnp.dtype(out_dtype).itemsize)


def _padded(x, rows, columns):
    """x `[M, N]` with zeros after its rows and columns; x itself where there are as many."""
    extra = (rows - x.shape[0], columns - x.shape[1])
    return jnp.pad(x, [(0, e) for e in extra]) if any(extra) else x


def _kernel(config, depth, out, sms, interpret):
    """The kernel for one size: of a codes `[M, K]`, scales `[depth, M/64, 64]`, b codes `[N, K]`, `[depth, N/128]`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def tiled(dtype, columns):  # 8 rows of up to 128 bytes together, swizzled so that no two share a bank.
        size = jnp.dtype(dtype).itemsize
        swizzle = plgpu.find_swizzle(8 * size * columns)
        return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)

    codes = tiled(jnp.float8_e4m3fn, BLOCK)
    stages, consumers = config.stages, config.consumers
    scratch: dict[str, Any] = {
        "a_codes": plgpu.SMEM((stages, config.tile_m, BLOCK), jnp.float8_e4m3fn, transforms=codes),
        "a_scales": plgpu.SMEM((stages, consumers, ROWS), jnp.float32),
        "b_codes": plgpu.SMEM((stages, config.tile_n, BLOCK), jnp.float8_e4m3fn, transforms=codes),
        "b_scales": plgpu.SMEM((stages, SCALES_READ), jnp.float32),
        "result": plgpu.SMEM((consumers, ROWS, config.tile_n), out.dtype, transforms=tiled(out.dtype, config.tile_n)),
        "full": plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    }
    cluster = {}
    if config.cluster > 1:  # A stage is empty when the consumers of both blocks are done: each writes to the other's.
        scratch["empty"] = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_barriers=stages, num_arrivals=consumers
        )
        cluster = {"cluster": (config.cluster,), "cluster_names": ("cluster",)}

    def block_scaled_matmul(*refs, **ring):  # What profiles call it.
        _body(*refs, config=config, depth=depth, emulate=interpret is not None and not INTERPRETED_WHOLE, **ring)

    return plgpu.kernel(
        block_scaled_matmul,
        out_type=out,
        scratch_types=scratch,
        grid=(sms // config.cluster,),
        grid_names=("sms",),
        **cluster,
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )


def _body(a, a_scales_of, b, b_scales_of, out, *, config, depth, emulate, **ring):
    """What every warpgroup of every block does: the last one loads, the others multiply."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    warpgroup, this, count = lax.axis_index("warpgroup"), lax.axis_index("sms"), lax.axis_size("sms")
    m_tiles, n_tiles = -(-out.shape[0] // config.tile_m), -(-out.shape[1] // (config.tile_n * config.cluster))

    def tile(i):
        row, column = tile_at(this + i * count, m_tiles, n_tiles, config.swath)
        return row, column if config.cluster == 1 else column * config.cluster + lax.axis_index("cluster")

    mine = lax.div(m_tiles * n_tiles - this + count - 1, np.int32(count))  # this, this + count, this + 2 count, …
    work = _Work(config, depth, mine, tile)
    for_producer, for_consumer = REGISTERS[config.consumers]

    @pl.when(warpgroup == config.consumers)
    def _():
        plgpu.set_max_registers(for_producer, action="decrease")
        _produce(work, a, a_scales_of, b, b_scales_of, ring)

    @pl.when(warpgroup != config.consumers)
    def _():
        plgpu.set_max_registers(for_consumer, action="increase")
        _consume(work, warpgroup, out, ring, emulate)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What the warpgroups of a block agree on."""

    config: MatmulConfig
    depth: int
    """Steps of 128 along K."""
    tiles: Any
    """How many tiles this block makes."""
    tile: Any
    """i -> (row, column) of the block's i-th tile, counted in tiles."""

    def after(self, stage):
        """The stage that follows: a counter rather than a remainder, which costs registers."""
        return lax.select(stage == self.config.stages - 1, np.int32(0), stage + 1)


def tile_at(index: Array, m_tiles: int, n_tiles: int, swath: int) -> tuple[Array, Array]:
    """(row, column) of the index-th tile of `m_tiles` x `n_tiles`, all int32: down each column of a swath of rows."""
    group = lax.div(index, np.int32(swath * n_tiles))
    within = index - group * (swath * n_tiles)
    height = lax.min(m_tiles - group * swath, np.int32(swath))
    return group * swath + lax.rem(within, height), lax.div(within, height)


def _produce(work, a, a_scales_of, b, b_scales_of, ring):
    """Fills one stage after another, each when all consumers are done with what it held."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    config, depth = work.config, work.depth
    full, empty = ring["full"], ring["empty"]

    def load_tile(i, stage):
        row, column = work.tile(i)
        block = lax.div(column * config.tile_n, np.int32(BLOCK))

        def load_step(k, stage):
            @pl.when(i * depth + k >= config.stages)
            def _():
                plgpu.barrier_wait(empty.at[stage])

            codes = pl.ds(k * BLOCK, BLOCK)
            shared = "cluster" if config.cluster > 1 else None
            rows = a.at[pl.ds(row * config.tile_m, config.tile_m), codes]
            plgpu.copy_gmem_to_smem(rows, ring["a_codes"].at[stage], full.at[stage], collective_axes=shared)
            for source, name in (
                (b.at[pl.ds(column * config.tile_n, config.tile_n), codes], "b_codes"),
                (a_scales_of.at[k, pl.ds(row * config.consumers, config.consumers)], "a_scales"),
                (b_scales_of.at[k, pl.ds(block, SCALES_READ)], "b_scales"),
            ):
                plgpu.copy_gmem_to_smem(source, ring[name].at[stage], full.at[stage])
            return work.after(stage)

        return lax.fori_loop(np.int32(0), np.int32(depth), load_step, stage)

    last = lax.fori_loop(np.int32(0), work.tiles, load_tile, np.int32(0))

    def wait(_, stage):
        plgpu.barrier_wait(empty.at[stage])
        return work.after(stage)

    # Every arrival is waited for, that of the last steps too, since a barrier counts them by turns.
    steps = work.tiles * depth
    left = lax.min(steps, np.int32(config.stages))
    lax.fori_loop(np.int32(0), left, wait, lax.select(steps < config.stages, np.int32(0), last))


def _consume(work, warpgroup, out, ring, emulate):
    """Multiplies 64 rows of each tile, step by step, and writes them out."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    config, at_once = work.config, work.config.steps_at_once

    def steps(count, carry):
        stage, total = carry
        stages = [stage]
        for _ in range(count - 1):
            stages.append(work.after(stages[-1]))
        return work.after(stages[-1]), _multiply(ring, stages, warpgroup, total, emulate)

    def tile(i, stage):
        row, column = work.tile(i)
        carry = stage, jnp.zeros((ROWS, config.tile_n), jnp.float32)
        turns, left = divmod(work.depth, at_once)
        carry = lax.fori_loop(np.int32(0), np.int32(turns), lambda _, carry: steps(at_once, carry), carry)
        stage, total = steps(left, carry) if left else carry
        result = ring["result"].at[warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # The last tile has been read, and may be overwritten.
        result[...] = total.astype(out.dtype)
        plgpu.commit_smem()
        rows = pl.ds(row * config.tile_m + warpgroup * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(result, out.at[rows, pl.ds(column * config.tile_n, config.tile_n)])
        return stage

    lax.fori_loop(np.int32(0), work.tiles, tile, np.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _multiply(ring, stages, warpgroup, total, emulate):
    """`total` `[64, tile_n]` and what the stages add to it: a's rows of this warpgroup times b's transpose, scaled.

    The products of all stages are issued before the first is scaled. With `emulate` the codes are read and multiplied,
    for an interpreter without a transposed operand of wgmma.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(*parts):
        products, scales = [], []
        for stage, part in zip(stages, parts, strict=True):
            a, b = ring["a_codes"], ring["b_codes"]
            plgpu.barrier_wait(ring["full"].at[stage])
            scales.append(ring["a_scales"][stage, warpgroup] * ring["b_scales"][stage, 0])
            if emulate:
                rows = lax.dynamic_slice_in_dim(a[stage].astype(jnp.float32), warpgroup * ROWS, ROWS)
                products.append(lax.dot_general(rows, b[stage].astype(jnp.float32), (((1,), (1,)), ((), ()))))
            else:
                rows = a.at[stage, pl.ds(warpgroup * ROWS, ROWS)]
                plgpu.wgmma(part, rows, plgpu.transpose_ref(b.at[stage], (1, 0)))
        # The scales were read by ordinary loads, and only a fence orders TMA, which writes the next ones there, after
        # such. It costs no time: the tensor cores are at work.
        plgpu.commit_smem()
        scaled = total
        for i, (stage, part) in enumerate(zip(stages, parts, strict=True)):
            later = len(stages) - 1 - i
            product = products[i] if emulate else plgpu.wgmma_accumulator_load(part, wait_n=later)
            plgpu.barrier_arrive(ring["empty"].at[stage])  # All that was in the stage is in registers.
            scaled = scaled + product * lax.broadcast_in_dim(scales[i], total.shape, (0,))
        return scaled

    if emulate:
        return run(*stages)
    return pl.run_scoped(run, *(plgpu.ACC(total.shape, jnp.float32) for _ in stages))
