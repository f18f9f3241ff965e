"""Block-scaled FP8 matmuls for Hopper, in Pallas' Mosaic GPU: Fprop, Dgrad and Wgrad (section 3.3.2 of the report).

What they compute is the reference's sum, block by block of 128 along K:

    out[m, n] = Σ_k  (Σ_j a[m, 128 k + j] · b[128 k + j, n]) · a_scale[m, k] · b_scale[k, n]

where 128 columns share b_scale in Fprop and Dgrad, and none in Wgrad. The inner sum is made by the tensor cores, which
keep about 14 bits of it (`matmul_14_bits`); the outer one is made by the CUDA cores in float32 registers, so that no
more than 128 products share an accumulator: the report's promotion.

Warpgroups are a producer and consumers around a ring of `stages` in shared memory (`pipeline.py`). A stage is one step:

    TMA ──►  a codes [tile_m, 128]   a scales [tile_m]        of rows
             b codes [tile_n, 128]   b scales [32 or more]    of this tile's columns, or of their block and some more

    consumer w        wgmma:  part  = a codes [64 w : 64 w + 64] @ b codes.T       E4M3, 4 instructions of 32 along K
                      FFMA:   acc  += part * (a_scale[row] * b_scale)              float32 registers
                      Wgrad:  acc  += part * b_scale[column] * a_scale[row]        an instruction more

- A consumer issues the products of `steps_at_once` steps, then scales the first while the tensor cores make the next.
  With two consumers of 64 x 128 there are registers for two steps: 64 of a thread hold sums and 128 partial ones, of
  232. Three consumers have 160 and room for one step; there the others multiply while one scales. The scales of 128
  columns take 32 registers of their own, so Wgrad has half as many steps at once, and no tiles of 192 x 128.
- A stage is empty once its products and scales are in registers, before they are added up.
- A partial sum is set to zero first, by half an instruction for each of its registers: Mosaic's wgmma always adds.
- Tiles are taken in swaths of `swath` rows of tiles, columns of a swath one after another, so that the tiles that run
  at one time share rows of a and columns of b in the L2 cache.
- In a cluster of two blocks, which take neighbouring tiles of a row, each reads half of a's codes for both (TMA
  multicast): 29% less to read from the L2 cache for tiles of 192 x 128. A stage is then empty when the consumers
  of both blocks say so.

**Layout.** Both operands of an FP8 wgmma lie in shared memory with K contiguous; 8-bit types cannot be transposed on
the way. So a is read as `[M, K]` and b `[K, N]` as its transpose, `[N, K]`, row by row; the wrapper asks for
`b.codes.mT`:

- Dgrad, `dy @ w.T`, has it for nothing: the transpose of `w.T` is w as it is stored, and XLA removes the pair.
- Fprop, `x @ w`, does not: XLA then copies the codes at every call (1 byte read and written for each of K·N). Whoever
  multiplies by one weight often keeps `w.T` in FP8 too, made once per optimizer step, and passes `transposed.T`:
  again a pair that XLA removes. The copy costs memory, 1 byte per weight.
- Wgrad, `x.T @ dy`, sums over tokens, along which neither operand is contiguous: XLA copies both, transposed.

a's scales `[M, ⌈K/128⌉]` are laid out `[⌈K/128⌉, ⌈M/64⌉, 64]`, since TMA wants 16 contiguous bytes; they are 1/32 of a.
Scales of Wgrad lie so already.

**Ragged sizes.** TMA fills what it reads beyond an array with zeros and drops what it would write there, so M and N
need not be multiples of the tile: rows beyond the end are zeros, with zero scales. A row or a column of NaN stays in
its row or column. The tiles of shared memory do constrain the arrays: M and N to multiples of 8, K of 128. Operands of
other sizes are padded with zeros first, which copies them; so is a result whose rows are no multiple of 128 bytes. None
of V3's sizes needs either.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.block_scaled_matmul import pipeline
from pallas_kernels.block_scaled_matmul.config import BLOCK, ROWS, Groups, MatmulConfig, TileConfig, config_for
from pallas_kernels.implementation import not_hopper, one_at_a_time
from pallas_kernels.quantize import Quantized
from pallas_kernels.target import target

B_TILES = ((BLOCK, BLOCK), (BLOCK, 1))
INTERPRETED_WHOLE = jax.__version_info__ >= (0, 11, 2)
"""Pallas' interpreter runs the kernel as it is; in 0.10.2 it lacked clusters and wgmma with a transposed operand."""


def supported(a: Quantized, b: Quantized) -> str | None:
    """Why the kernel cannot multiply a `[M, K]` by b `[K, N]` where the code runs; None if it can."""
    return not_hopper() or unsupported_operands(a, b)


def unsupported_operands(a: Quantized, b: Quantized) -> str | None:
    """Why the kernel cannot multiply a by b, or by each of several, wherever it runs; None if it can."""
    if {a.codes.dtype, b.codes.dtype} != {jnp.dtype(jnp.float8_e4m3fn)}:
        return f"it needs codes of float8_e4m3fn, not {a.codes.dtype} and {b.codes.dtype}"
    if a.tile != (1, BLOCK) or b.tile not in B_TILES:
        return f"it needs a in tiles of 1×128 and b of 128×128 or 128×1, not {a.tile} and {b.tile}"
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
    """a `[M, K]` in tiles of 1×128 times b `[K, N]` in tiles of 128×128 or 128×1, both E4M3: `[M, N]` of `out_dtype`.

    Args:
      a: Activations, or gradients of them; transposed for Wgrad.
      b: A weight, or gradients; see the module on how its codes should lie in memory.
      out_dtype: bfloat16 or float32.
      config: How the work is cut; None for what was measured on this device, or the default of this size.
      sms: Blocks of threads, one for each SM; None for as many as the device has.
      interpret: Pallas' `InterpretGPUParams`, to run on a CPU; None for the GPU.

    Raises:
      ValueError: if the operands are not of that kind, the config is for other tiles or exceeds shared memory, or has
        clusters and is to be interpreted by a jax that cannot.
    """
    obstacle = unsupported_operands(a, b)
    if obstacle is not None:
        raise ValueError(f"block_scaled_matmul: implementation 'mosaic_gpu' cannot run here: {obstacle}")
    (m, k), n = a.shape, b.shape[1]
    if 0 in (m, k, n):
        return jnp.zeros((m, n), out_dtype)
    sms = sms or target().sms
    config = config or config_for(m, n, k, out_dtype, sms, b_tile=b.tile)
    check_tile("block_scaled_matmul", config, b)
    check_config("block_scaled_matmul", config, out_dtype, interpret)
    return scaled_product(a, b, out_dtype, config, None, (), sms, interpret)


def check_config(op: str, config: TileConfig, out_dtype: jnp.dtype, interpret: Any) -> None:
    """Raises ValueError unless it fits in shared memory, and can be interpreted if it is to be."""
    config.check_memory(out_dtype)
    if interpret is not None and config.cluster > 1 and not INTERPRETED_WHOLE:
        raise ValueError(f"{op}: this jax's interpreter has no clusters; choose a config with cluster=1")


def check_tile(op: str, config: MatmulConfig, b: Quantized) -> None:
    """Raises ValueError unless the config is for b's tiles."""
    if config.b_tile != b.tile:
        raise ValueError(f"{op}: {config} is for b in tiles of {config.b_tile}, not {b.tile}; set its b_tile")


@functools.partial(jax.jit, static_argnames=("out_dtype", "config", "groups", "sms", "interpret"))
def scaled_product(
    a: Quantized,
    b: Quantized,
    out_dtype: jnp.dtype,
    config: MatmulConfig,
    groups: Groups | None,
    tables: tuple[Array, ...],
    sms: int,
    interpret: Any,
) -> Array:
    """Lays the operands out as the kernel reads them, and runs it; none of the sizes is zero.

    Args:
      a: `[M, K]`.
      b: `[K, N]`; `[G, K, N]` with groups of rows.
      out_dtype: bfloat16 or float32.
      config: How the work is cut.
      groups: What groups there are.
      tables: What `pipeline.ByRows` or `pipeline.AlongDepth` reads of them.
      sms: Blocks of threads.
      interpret: Pallas' `InterpretGPUParams`; None for the GPU.

    Returns:
      `[M, N]` of `out_dtype`; `[G, M, N]` with groups along K.
    """
    m, n = a.shape[0], b.shape[-1]
    rows, columns = m + -m % 8, n + -n % columns_of_a_row(config.tile_n, out_dtype)
    depth, row_groups = a.scales.shape[1], -(-m // ROWS)
    a_codes = padded(a.codes, rows, depth * BLOCK)
    b_codes = padded(b.codes.mT, n + -n % 8, depth * BLOCK)
    a_scales = padded(a.scales.T, depth, row_groups * ROWS).reshape(depth, row_groups, ROWS)
    b_scales = padded(b.scales, depth, b.scales.shape[-1] + -b.scales.shape[-1] % 4)
    if b.codes.ndim == 2:
        b_codes, b_scales = b_codes[None], b_scales[None]
    if interpret is not None:  # It refuses to write beyond an array, where TMA writes what lies within.
        rows, columns = rows + -rows % config.tile_m, columns + -columns % config.tile_n
    results = (groups.count,) if groups is not None and groups.along == "depth" else ()
    out = jax.ShapeDtypeStruct((*results, rows, columns), out_dtype)
    kernel = _kernel(config, depth, groups, out, sms, interpret)
    return kernel(a_codes, a_scales, b_codes, b_scales, *tables)[..., :m, :n]


def columns_of_a_row(tile_n: int, out_dtype: jnp.dtype) -> int:
    """Columns of the result that fill 128 bytes, or a tile's whole row: the width of a tile of shared memory."""
    return min(tile_n, 128 // jnp.dtype(out_dtype).itemsize)


def padded(x: Array, rows: int, columns: int) -> Array:
    """x `[..., M, N]` with zeros after its rows and columns; x itself where there are as many."""
    extra = (rows - x.shape[-2], columns - x.shape[-1])
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, e) for e in extra]) if any(extra) else x


def swizzled(dtype: Any, columns: int) -> tuple[Any, Any]:
    """Tiles of shared memory: 8 rows of up to 128 bytes together, swizzled so that no two share a bank."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(8 * size * columns)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def launch(body: Any, config: TileConfig, out: Any, scratch: dict[str, Any], copies: int, sms: int, interpret: Any):
    """The kernel of a pipeline: its grid, its warpgroups, and what every ring has besides its stages.

    Args:
      body: What runs, of arrays in global memory and, by name, shared memory.
      config: How the work is cut.
      out: Shape and dtype of the result.
      scratch: The stages.
      copies: How many copies fill a stage.
      sms: Blocks of threads.
      interpret: Pallas' `InterpretGPUParams`; None for the GPU.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    stages, consumers = config.stages, config.consumers
    empty: Any
    result = plgpu.SMEM((consumers, ROWS, config.tile_n), out.dtype, transforms=swizzled(out.dtype, config.tile_n))
    full = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    if config.cluster > 1:  # A stage is empty when the consumers of both blocks are done: each writes to the other's.
        empty = plgpu.ClusterBarrier(collective_axes=("cluster",), num_barriers=stages, num_arrivals=consumers)
        cluster: dict[str, Any] = {"cluster": (config.cluster,), "cluster_names": ("cluster",)}
    else:
        empty, cluster = plgpu.Barrier(num_arrivals=consumers, num_barriers=stages), {}
    kernel = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch | {"result": result, "full": full, "empty": empty},
        grid=(sms // config.cluster,),
        grid_names=("sms",),
        **cluster,
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    return one_at_a_time(kernel, body.__name__)


def _kernel(config, depth, groups, out, sms, interpret):
    """The kernel for one size: of a codes `[M, K]`, scales `[depth, M/64, 64]`, b's `[G, N, K]` and `[G, depth, …]`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    e4m3 = jnp.float8_e4m3fn
    stages, codes = config.stages, swizzled(e4m3, BLOCK)
    scratch = {
        "a_codes": plgpu.SMEM((stages, config.tile_m, BLOCK), e4m3, transforms=codes),
        "a_scales": plgpu.SMEM((stages, config.consumers, ROWS), jnp.float32),
        "b_codes": plgpu.SMEM((stages, config.tile_n, BLOCK), e4m3, transforms=codes),
        "b_scales": plgpu.SMEM((stages, config.b_scales), jnp.float32),
    }
    emulate = interpret is not None and not INTERPRETED_WHOLE

    def body(*refs, **ring):
        *operands, out = refs
        operands, tables = operands[:4], operands[4:]
        work = pipeline.work_of(config, pipeline.kind_of(groups, depth, BLOCK, tables), *out.shape[-2:])
        load = functools.partial(_load, config, operands, ring)
        pipeline.run(work, load, functools.partial(_multiply, work, ring, emulate), ring, out)

    body.__name__ = "block_scaled_matmul" if groups is None else f"grouped_matmul_{groups.along}"  # For profiles.
    return launch(body, config, out, scratch, 4, sms, interpret)


def _load(config, operands, ring, tile, visit, step, stage):
    """Starts the copies of one step of 128 along K."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    a, a_scales, b, b_scales = operands
    k = lax.div(visit.first, np.int32(BLOCK)) + step
    codes = pl.ds(k * BLOCK, BLOCK)  # A product, in which Mosaic sees that it starts at a tile of shared memory.
    column = tile.column * config.tile_n
    scale = column if config.column_scales else lax.div(column, np.int32(BLOCK))
    shared = "cluster" if config.cluster > 1 else None
    rows = a.at[pl.ds(tile.row * config.tile_m, config.tile_m), codes]
    plgpu.copy_gmem_to_smem(rows, ring["a_codes"].at[stage], ring["full"].at[stage], collective_axes=shared)
    for source, name in (
        (b.at[visit.matrix, pl.ds(column, config.tile_n), codes], "b_codes"),
        (a_scales.at[k, pl.ds(tile.row * config.consumers, config.consumers)], "a_scales"),
        (b_scales.at[visit.matrix, k, pl.ds(scale, config.b_scales)], "b_scales"),
    ):
        plgpu.copy_gmem_to_smem(source, ring[name].at[stage], ring["full"].at[stage])


def _multiply(work, ring, emulate, visit, stage, warpgroup):
    """The stage after a visit, and this warpgroup's rows of its product."""
    at_once = work.config.steps_at_once

    def steps(count, carry):
        stage, total = carry
        stages = [stage]
        for _ in range(count - 1):
            stages.append(work.after(stages[-1]))
        return work.after(stages[-1]), _add_steps(work.config, ring, stages, warpgroup, total, emulate)

    carry = stage, jnp.zeros((ROWS, work.config.tile_n), jnp.float32)
    if isinstance(visit.steps, int):
        turns, left = divmod(visit.steps, at_once)
        carry = lax.fori_loop(np.int32(0), np.int32(turns), lambda _, carry: steps(at_once, carry), carry)
        return steps(left, carry) if left else carry
    turns = lax.div(visit.steps, np.int32(at_once))
    carry = lax.fori_loop(np.int32(0), turns, lambda _, carry: steps(at_once, carry), carry)
    if at_once == 1:
        return carry
    return lax.fori_loop(turns * at_once, visit.steps, lambda _, carry: steps(1, carry), carry)


def _add_steps(config, ring, stages, warpgroup, total, emulate):
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
            scales.append(_scales(config, ring, stage, warpgroup))
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
            for scale, axis in scales[i]:
                product = product * lax.broadcast_in_dim(scale, total.shape, (axis,))
            scaled = scaled + product
        return scaled

    if emulate:
        return run(*stages)
    return pl.run_scoped(run, *(plgpu.ACC(total.shape, jnp.float32) for _ in stages))


def _scales(config, ring, stage, warpgroup):
    """What a step's product `[64, tile_n]` is multiplied by, and along which axis it lies."""
    of_rows = ring["a_scales"][stage, warpgroup]
    if config.column_scales:
        return (ring["b_scales"][stage, : config.tile_n], 1), (of_rows, 0)
    return ((of_rows * ring["b_scales"][stage, 0], 0),)
