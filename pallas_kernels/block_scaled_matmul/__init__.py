from pallas_kernels.block_scaled_matmul.api import block_scaled_matmul
from pallas_kernels.block_scaled_matmul.tensor_core import matmul_14_bits

__all__ = ["block_scaled_matmul", "matmul_14_bits"]
