"""GPUs to compile for without having any: XLA makes real sm_90a programs from a description of the device."""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh

from deepseek_jax.config import ConfigError, require
from deepseek_jax.parallel.mesh import ParallelConfig, mesh_of

DEVICES_PER_HOST = 8

LATENCY_HIDING = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # A forward pass and a backward pass, each over two kinds of links; by default one exchange at a time.
    "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
    # It makes one kernel of a forward and a backward operation that read one constant, and so each wait for the other.
    "xla_disable_hlo_passes": "multi_output_fusion",
}
"""Compiler options that let exchanges run beside compute and beside each other. XLA's scheduler gives up hiding them
where a program does not fit the device's memory."""

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation"
  name: "NVIDIA H200"
  platform_version: "13.0"
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
"""An H200 as XLA describes a device (a GpuTargetConfigProto in text format)."""


def h200_mesh(parallel: ParallelConfig, *, memory: int = 151_397_597_184) -> Mesh:
    """A mesh of H200s that exist in the description only: programs compile for it, and nothing runs.

    Args:
      parallel: sizes of the axes.
      memory: bytes of a device; more than there are show what the scheduler would do with a program that fits.

    Raises:
      ConfigError: jax has no CUDA plugin here, or the devices do not fill whole hosts of eight.
    """
    # Asked for here, since it loads the plugin.
    from jax.experimental import topologies

    count = int(np.prod(parallel.shape))
    require(
        count < DEVICES_PER_HOST or count % DEVICES_PER_HOST == 0,
        f"{count} devices do not fill hosts of {DEVICES_PER_HOST}; change parallel.data",
    )
    described = H200.replace("{memory}", str(memory))
    hosts, each = max(count // DEVICES_PER_HOST, 1), min(count, DEVICES_PER_HOST)
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=described, topology=f"1x{hosts}x{each}")
    except Exception as error:
        raise ConfigError(
            "compiling for GPUs needs jax's CUDA plugin, which needs no GPU: install the extra [cuda] "
            f"({str(error).splitlines()[0][:200]})"
        ) from error
    return mesh_of(np.asarray(topology.devices).reshape(parallel.shape))
