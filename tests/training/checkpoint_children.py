"""What `test_checkpoint.py` runs in processes of their own: a save that is killed, and meshes of virtual devices."""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.training.checkpoint import CheckpointStore


def child_killed(folder: Path) -> None:
    store = CheckpointStore(folder)
    store.save(1, {"x": jnp.ones(2)}, {}, wait=True)
    store.save(2, {"x": jnp.ones(2**25)}, {})
    while not any(path.name.startswith("2.") for path in folder.iterdir()):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


def place(value: np.ndarray, devices, spec, memory: str | None = None) -> jax.Array:
    """`value` on some devices, or in their host's `memory`, made of this process's shards alone."""
    sharding = jax.NamedSharding(jax.sharding.Mesh(np.array(devices), ("x",)), spec, memory_kind=memory)
    local = [
        jax.device_put(value[index], jax.sharding.SingleDeviceSharding(device, memory_kind=memory))
        for device, index in sharding.addressable_devices_indices_map(value.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(value.shape, sharding, local, dtype=value.dtype)


def assert_shards(arrays: dict[str, jax.Array], values: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), values[name][shard.index])


def child_stages(folder: Path) -> None:
    """Four stages of two devices; restored on one device, on all eight, and on other stages."""
    devices = jax.devices()
    specs = [jax.P("x"), jax.P(None, "x"), jax.P(), jax.P("x", None)]
    values = {f"layers.{i}.weight": np.arange(64, dtype=np.float32).reshape(8, 8) + i for i in range(8)}
    arrays = {
        name: place(value, devices[2 * (i % 4) :][:2], specs[i % 4]) for i, (name, value) in enumerate(values.items())
    }
    arrays["alone"] = jax.device_put(values.setdefault("alone", np.arange(5)), devices[5])
    with CheckpointStore(folder / "checkpoints") as store:
        store.save(1, arrays, {}, wait=True)
        plain = store.entries(1)
        assert_shards(store.restore(1, plain), values)
        layers = {name: form for name, form in plain.items() if name != "alone"}
        for group, spec in ((devices, jax.P(None, "x")), (devices[3:7], jax.P("x")), (devices[::-1], jax.P())):
            sharding = jax.NamedSharding(jax.sharding.Mesh(np.array(group), ("x",)), spec)
            wanted = {n: jax.ShapeDtypeStruct(f.shape, f.dtype, sharding=sharding) for n, f in layers.items()}
            got = store.restore(1, wanted, skip=("alone",))
            assert all(array.sharding == sharding for array in got.values())
            assert_shards(got, values)


def child_processes(folder: Path, port: str, rank: str) -> None:
    """Two stages, each all of one process's devices; restored with the stages swapped."""
    jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
    devices = jax.devices()
    stages = [devices[:4], devices[4:]]
    values = {f"layers.{i}.weight": np.arange(64, dtype=np.float32).reshape(8, 8) + i for i in range(4)}
    arrays = {
        name: place(value, stages[i % 2], [jax.P("x"), jax.P(None, "x"), jax.P(), jax.P("x")][i])
        for i, (name, value) in enumerate(values.items())
    }
    values["embedding"] = np.arange(32, dtype=np.float32).reshape(8, 4)
    values["norm"] = np.arange(3, dtype=np.float32)
    values["across"] = np.arange(16, dtype=np.float32)
    arrays["embedding"] = place(values["embedding"], devices, jax.P("x"))
    arrays["norm"] = place(values["norm"], devices, jax.P())
    arrays["across"] = place(values["across"], devices[2:6], jax.P("x"))
    values["on_hosts"] = np.arange(24, dtype=np.float32)
    arrays["on_hosts"] = place(values["on_hosts"], devices, jax.P("x"), "pinned_host")
    with CheckpointStore(folder / "checkpoints", keep_last=1, keep_best=0) as store:
        store.save(1, arrays, {}, wait=True)
        store.save(2, arrays, {}, wait=True)
        wanted = {}
        for i, (name, form) in enumerate(store.entries(2).items()):
            group = stages[(i + 1) % 2] if name.startswith("layers") else devices
            spec = jax.P() if name == "norm" else jax.P("x")
            memory = "pinned_host" if name == "on_hosts" else None
            sharding = jax.NamedSharding(jax.sharding.Mesh(np.array(group), ("x",)), spec, memory_kind=memory)
            wanted[name] = jax.ShapeDtypeStruct(form.shape, form.dtype, sharding=sharding)
        got = store.restore(2, wanted)
        assert sum(bool(array.addressable_shards) for array in got.values()) == 6
        assert_shards(got, values)


if __name__ == "__main__":
    role, folder, *rest = sys.argv[1:]
    {"killed": child_killed, "stages": child_stages, "processes": child_processes}[role](
        Path(folder), *(rest if role == "processes" else [])
    )
