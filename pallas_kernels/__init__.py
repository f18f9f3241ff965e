"""FP8 and grouped matmuls for JAX: kernels that stand alone, each in a folder of its own. See README.md."""
