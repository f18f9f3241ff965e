"""Prints the PTX of the block-scaled FP8 matmul for Hopper, as Mosaic makes it, or what ptxas says of it.

    python -m tools.kernel_ptx 4096 7168 16384 > kernel.ptx
    python -m tools.kernel_ptx 4096 7168 16384 --ptxas

Needs the extra [cuda], but no GPU and no driver. M, N and K are those of a product with bfloat16 results, whose config
is the default of its size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jax.numpy as jnp

from deepseek_jax.config import ConfigError
from pallas_kernels.block_scaled_matmul import mosaic_gpu
from pallas_kernels.block_scaled_matmul.config import BLOCK, default_config
from tools.kernels_aot import SMS, compile_kernel, quantized_on_h200


def kernel_ptx(m: int, n: int, k: int) -> tuple[str, str]:
    """The PTX of the kernel for `[m, k]` by `[k, n]`, and what ptxas says; each kernel once in a process.

    Raises:
      ConfigError: jax cannot compile for GPUs here.
      RuntimeError: this process compiled the same kernel before.
    """
    bfloat16 = jnp.dtype(jnp.bfloat16)
    config = default_config(m, n, bfloat16, SMS)

    def product(a, b):
        return mosaic_gpu.block_scaled_matmul(a, b.T, bfloat16, config=config, sms=SMS)

    b = quantized_on_h200((n, k), (BLOCK, BLOCK))  # As the kernel reads it.
    return compile_kernel(product, quantized_on_h200((m, k), (1, BLOCK)), b)[:2]


def main(argv: Sequence[str]) -> int:
    """Prints one of the two; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_ptx")
    for name in "mnk":
        parser.add_argument(name, metavar=name.upper(), type=int)
    parser.add_argument("--ptxas", action="store_true", help="print what ptxas says of it")
    options = parser.parse_args(argv)
    if min(options.m, options.n, options.k) < 1:
        print("error: M, N and K must be at least 1", file=sys.stderr)
        return 2
    try:
        ptx, ptxas = kernel_ptx(options.m, options.n, options.k)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.stdout.write(ptxas if options.ptxas else ptx)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
