"""Checks the kernels on the GPU at hand, times ways to cut their work, and writes the device's table.

python -m pallas_kernels.tune
"""
