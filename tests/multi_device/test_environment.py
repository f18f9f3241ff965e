"""The virtual devices that the other files of this folder rely on."""

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax import compat
from deepseek_jax.parallel.mesh import mesh_of


def test_eight_devices_exchange_data():
    assert jax.device_count() == 8
    mesh = mesh_of(np.array(jax.devices()).reshape(1, 2, 1, 4))

    def both_sums(x):
        return jax.lax.psum(x, "expert"), jax.lax.psum(x, ("data", "expert"))

    specs = jax.P(("data", "expert"))
    within, over_all = jax.jit(jax.shard_map(both_sums, mesh=mesh, in_specs=specs, out_specs=(jax.P("data"), jax.P())))(
        jnp.arange(8.0)
    )
    np.testing.assert_array_equal(within, [0 + 1 + 2 + 3, 4 + 5 + 6 + 7])
    np.testing.assert_array_equal(over_all, [28])


def test_to_varying_casts_only_what_does_not_vary():
    mesh = mesh_of(np.array(jax.devices()).reshape(1, 2, 1, 4))

    def body(x, weight):
        varying = compat.to_varying({"x": x, "w": weight, "new": jnp.ones(())}, ("data", "expert"))
        assert {name: compat.varying_axes(leaf) for name, leaf in varying.items()} == dict.fromkeys(
            varying, frozenset({"data", "expert"})
        )
        again = compat.to_varying(varying["x"], "data")
        return jax.lax.psum(again * varying["w"] + varying["new"], "expert")

    specs = (jax.P("data"), jax.P())
    out = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=jax.P("data")))(jnp.arange(4.0), 2.0)
    np.testing.assert_array_equal(out, 4 * (2 * np.arange(4) + 1))
