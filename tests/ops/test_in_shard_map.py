"""All ops as the train step runs them: inside jit, shard_map with check_vma, and a scan over layers."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from deepseek_jax import ops

AXES = ("pipe", "data", "node", "expert")


def loss(params, x, labels):
    """Sum over tokens, so that splitting the batch changes nothing."""
    mix, experts, head = params
    flat_labels = labels.reshape(-1)

    def layer(x, _):
        q = (x @ mix).reshape(*x.shape[:-1], 2, 8)
        attended = ops.attention(q, q, q[..., :4], scale=0.3, segment_ids=labels % 2)
        rows = (x + jnp.concatenate([attended, attended], -1).reshape(x.shape)).reshape(-1, 16)
        order = jnp.argsort(flat_labels % 3)
        sizes = (flat_labels[:, None] % 3 == jnp.arange(3)).sum(0, dtype=jnp.int32)
        rows = rows.at[order].add(ops.grouped_matmul(rows[order], experts, sizes))
        return rows.reshape(x.shape), None

    x, _ = lax.scan(layer, x, None, length=2)
    hidden, weights = x.reshape(-1, 16), (flat_labels % 2).astype(x.dtype)
    two_passes = ops.cross_entropy(hidden, head, flat_labels, chunk=64).sum()
    return two_passes + ops.cross_entropy_sum(hidden, head, flat_labels, weights, chunk=64)


def over_devices():
    """Loss and gradients on all devices, and the same without a mesh."""
    count = jax.device_count()
    shape = (1, 1, 1, 1) if count == 1 else (2, 2, 1, 2)
    mesh = jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)

    def per_device(params, x, labels):
        params = jax.tree.map(lambda p: lax.pcast(p, AXES, to="varying"), params)
        return lax.psum(jax.value_and_grad(loss)(params, x, labels), AXES)

    rng = np.random.default_rng(0)
    shapes = ((16, 16), (3, 16, 16), (16, 50))
    params = tuple(jnp.asarray(0.2 * rng.standard_normal(s), jnp.float32) for s in shapes)
    x = jnp.asarray(rng.standard_normal((8, 150, 16)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 50, (8, 150)), jnp.int32)
    # The batch goes over every axis, so that nothing is computed twice and the sums need no weights.
    f = jax.shard_map(per_device, mesh=mesh, in_specs=(P(), P(AXES), P(AXES)), out_specs=P(), check_vma=True)
    return jax.block_until_ready((jax.jit(f)(params, x, labels), jax.jit(jax.value_and_grad(loss))(params, x, labels)))


def assert_same(got, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3), got, wanted)


def test_on_one_device():
    if jax.device_count() == 1:
        assert_same(*over_devices())


def test_on_eight_virtual_devices():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    # NPROC: with fewer threads than devices, a collective's participant may never arrive.
    env = dict(os.environ, NPROC="32", XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    run = subprocess.run([sys.executable, Path(__file__)], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "8 devices agree" in run.stdout


if __name__ == "__main__":
    assert_same(*over_devices())
    print(f"{jax.device_count()} devices agree")
