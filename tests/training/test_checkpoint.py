"""The checkpoint store: round trips, other meshes and processes, what is kept, and every way to fail."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.training.checkpoint import CheckpointError, CheckpointStore, check_compatible

META = {"config": {"model": {"num_layers": 2}}, "meta": {"tokenizer": "a1", "seed": 0}, "data": {"position": 7}}
CHILDREN = Path(__file__).with_name("checkpoint_children.py")


def make_entries(scale: float = 1.0) -> dict[str, jax.Array]:
    """A little of every dtype and shape that a run saves, each bit pattern its own."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((17, 24)).astype(np.float32) * scale
    return {
        "layers.0.attention.kv_a.weight": jnp.asarray(weight),
        "mu/layers.0.attention.kv_a.weight": jnp.asarray(weight, jnp.bfloat16),
        "nu/layers.0.attention.kv_a.weight": jnp.asarray(weight**2, jnp.bfloat16),
        "layers.0.moe.router.bias": jnp.asarray([0.001, -0.0, np.nan, np.inf], jnp.float32),
        "layers.1.cache": jnp.asarray(weight, jnp.float8_e4m3fn),
        "layers.1.gradient": jnp.asarray(weight, jnp.float8_e5m2),
        "rng": jnp.asarray([1, 2**32 - 1], jnp.uint32),
        "loads": jnp.asarray([[-1, 2**31 - 1]], jnp.int32),
        "mask": jnp.asarray([True, False]),
        "tokens": jnp.asarray(3, jnp.int32),
        "scale": jnp.asarray(0.1, jnp.float32),
    }


def templates_of(arrays) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}


def assert_same_bits(got, want):
    assert sorted(got) == sorted(want)
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert got[name].shape == want[name].shape, name
        assert np.asarray(got[name]).tobytes() == np.asarray(want[name]).tobytes(), name


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(tmp_path / "checkpoints", keep_last=3, keep_best=1) as store:
        yield store


# --- round trips ---


def test_every_dtype_and_scalar_restores_bit_for_bit(store):
    arrays = make_entries()
    store.save(10, arrays, META, metric=2.5, wait=True)
    assert_same_bits(store.restore(10, templates_of(arrays)), arrays)
    assert store.documents(10) == META
    assert (store.steps(), store.latest_step(), store.best_step(), store.metric(10)) == ([10], 10, 10, 2.5)


def test_documents_come_back_as_json_has_them(store):
    store.save(1, make_entries(), {"config": {"betas": (0.9, 0.95), "none": None}}, wait=True)
    assert store.documents(1) == {"config": {"betas": [0.9, 0.95], "none": None}}


def test_another_store_reads_what_one_wrote(store):
    arrays = make_entries()
    store.save(3, arrays, META, wait=True)
    assert_same_bits(CheckpointStore(store.directory).restore(3, templates_of(arrays)), arrays)


def test_weights_restore_without_moments(store):
    arrays = make_entries()
    store.save(1, arrays, META, wait=True)
    weights = {name: array for name, array in arrays.items() if "/" not in name}
    assert_same_bits(store.restore(1, templates_of(weights), skip=("mu/", "nu/")), weights)
    one = {"scale": arrays["scale"]}
    assert_same_bits(store.restore(1, templates_of(one), skip=("",)), one)
    assert store.restore(1, {}, skip=("",)) == {}


def test_a_save_returns_before_it_is_done_and_the_arrays_may_be_donated(store):
    step = jax.jit(lambda x: x * 2 - 1, donate_argnums=0)
    state = jnp.arange(2**22, dtype=jnp.float32)
    want = np.array(state)
    store.save(1, {"state": state}, META)
    for _ in range(5):
        state = step(state)
    state.block_until_ready()
    store.wait()
    np.testing.assert_array_equal(store.restore(1, store.entries(1))["state"], want)


def test_no_save_is_skipped_while_another_is_in_flight(store):
    big = {"state": jnp.zeros(2**22)}
    for step in (1, 2, 3):
        store.save(step, big, META)
    assert store.documents(3) == META  # asking what is there waits too
    assert store.steps() == [1, 2, 3]


def test_leaving_the_context_waits(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"state": jnp.zeros(2**22)}, META)
    assert CheckpointStore(tmp_path).steps() == [1]


def test_nothing_is_pickled(store):
    store.save(1, make_entries(), META, wait=True)
    for path in Path(store.directory).rglob("*"):
        assert path.suffix not in (".pkl", ".pickle")
    for name in ("documents", "index"):
        json.loads((store.directory / "1" / name / f"{name}.json").read_text())


def test_a_model_of_twenty_million_parameters_blocks_for_less_than_a_second(store):
    weights = {f"layers.{i // 10}.weight{i % 10}": jnp.ones(133_000) * i for i in range(150)}
    moments = {f"{m}/{name}": w.astype(jnp.bfloat16) for m in ("mu", "nu") for name, w in weights.items()}
    arrays = jax.block_until_ready({**weights, **moments})
    store.save(1, arrays, META, wait=True)
    started = time.perf_counter()
    store.save(2, arrays, META)
    # 0.1 s on an idle machine; the limit leaves room for a busy one, and no room for a synchronous save.
    assert time.perf_counter() - started < 1.0
    store.wait()
    assert_same_bits(store.restore(2, templates_of(arrays)), arrays)


# --- what is kept ---


def test_the_last_and_the_best_are_kept(tmp_path):
    metrics = {1: 5.0, 2: 1.0, 3: 3.0, 4: 2.0, 5: 4.0, 6: None, 7: 6.0, 8: float("nan")}
    with CheckpointStore(tmp_path, keep_last=2, keep_best=2) as store:
        for step, metric in metrics.items():
            store.save(step, {"x": jnp.ones(3)}, META, metric=metric, wait=True)
        assert store.steps() == [2, 4, 7, 8]
        assert store.best_step() == 2
        assert [store.metric(step) for step in store.steps()] == [1.0, 2.0, 6.0, None]
    assert CheckpointStore(tmp_path).best_step() == 2


def test_the_newest_is_never_deleted(tmp_path):
    with CheckpointStore(tmp_path, keep_last=1, keep_best=0) as store:
        for step in (30, 40, 15):  # 15: a run started again from an older step
            store.save(step, {"x": jnp.ones(3) * step}, META, metric=float(step), wait=True)
            assert step in store.steps()
        assert store.steps() == [15, 40]
        store.delete(40)
        assert store.steps() == [15]
        assert float(store.restore(15, store.entries(15))["x"][0]) == 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"keep_last": 0}, "keep_last must be at least 1, not 0"), ({"keep_best": -1}, "keep_best cannot be negative")],
)
def test_counts_are_checked(tmp_path, arguments, message):
    with pytest.raises(CheckpointError, match=message):
        CheckpointStore(tmp_path, **arguments)


# --- paths ---


def test_a_relative_path_and_a_home_are_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with CheckpointStore("runs/tiny/checkpoints") as store:
        store.save(1, {"x": jnp.ones(2)}, {}, wait=True)
    assert (tmp_path / "runs/tiny/checkpoints/1").is_dir()


# --- errors before any device work ---


def test_nothing_to_restore(store):
    with pytest.raises(CheckpointError, match=r"no checkpoint to restore in .*: the directory does not exist"):
        store.restore(1, {})
    store.directory.mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint to restore in .*: it holds none"):
        store.documents(1)
    assert (store.steps(), store.latest_step(), store.best_step()) == ([], None, None)


def test_an_absent_step_lists_what_exists(store):
    for step in (10, 20):
        store.save(step, {"x": jnp.ones(2)}, META)
    store.wait()
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 15 in .*; there are steps 10, 20"):
        store.restore(15, {})


def test_another_architecture_is_told_by_its_entries(store):
    saved = {f"layers.{i}.weight": jnp.ones((4, 2)) for i in range(10)}
    store.save(1, saved, META, wait=True)
    wanted = templates_of(saved)
    wanted["layers.0.weight"] = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    wanted["layers.1.weight"] = jax.ShapeDtypeStruct((4, 2), jnp.bfloat16)
    wanted["mtp.0.weight"] = wanted.pop("layers.9.weight")
    with pytest.raises(CheckpointError) as error:
        store.restore(1, wanted)
    message = str(error.value)
    assert "is of another architecture" in message
    assert "1 missing: mtp.0.weight" in message
    assert "1 left over: layers.9.weight" in message
    assert "2 of another shape or dtype: layers.0.weight (float32[4,2] saved, float32[4,3] wanted)" in message
    assert "layers.1.weight (float32[4,2] saved, bfloat16[4,2] wanted)" in message
    with pytest.raises(CheckpointError, match=r"10 left over: layers.0.weight, .*layers.4.weight and 5 more$"):
        store.restore(1, {})


def test_a_checkpoint_is_never_overwritten(store):
    store.save(1, {"x": jnp.ones(2)}, META)
    with pytest.raises(CheckpointError, match=r"step 1 is already saved in .*`delete\(1\)` it first"):
        store.save(1, {"x": jnp.zeros(2)}, META)
    assert store.restore(1, store.entries(1))["x"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("step", "arrays", "documents", "message"),
    [
        (-1, lambda: {"x": jnp.ones(2)}, {}, "step cannot be negative: -1"),
        (1, dict, {}, "nothing to save at step 1"),
        (1, lambda: {"x": np.ones(2)}, {}, "entry x is a ndarray; entries are jax.Array"),
        (1, lambda: {"x": 3}, {}, "entry x is a int"),
        (1, lambda: {"x": jax.random.key(0)}, {}, "entry x is a typed random key"),
        (1, lambda: {"x": jnp.ones((0, 4))}, {}, r"entry x has shape \(0, 4\)"),
        (1, lambda: {"x": jnp.ones(2)}, {"meta": {"f": print}}, "document meta cannot be written as JSON"),
    ],
)
def test_what_cannot_be_saved_is_refused_first(store, step, arrays, documents, message):
    with pytest.raises(CheckpointError, match=message):
        store.save(step, arrays(), documents)
    assert not store.directory.exists()


def test_compatible_documents_pass_and_differences_are_named():
    saved = {"tokenizer": "a1b2", "model": {"num_layers": 6, "betas": [1, 2]}, "seed": 3}
    check_compatible(saved, {"tokenizer": "a1b2", "model": {"num_layers": 6, "betas": (1, 2)}})
    with pytest.raises(CheckpointError) as error:
        check_compatible(saved, {"tokenizer": "ffff"}, source="runs/tiny, step 10")
    assert str(error.value) == (
        "runs/tiny, step 10 was made with another tokenizer: meta.tokenizer is 'a1b2' there and 'ffff' here"
    )
    with pytest.raises(CheckpointError, match=r"does not fit this run: meta.model.num_layers is 6 there and 8 here"):
        check_compatible(saved, {"model": {"num_layers": 8}})
    with pytest.raises(CheckpointError, match=r"meta.model.mtp is not recorded there and 1 here"):
        check_compatible(saved, {"model": {"mtp": 1}})


# --- damage ---


def test_a_full_disk_leaves_the_previous_checkpoint_good(store):
    arrays = {"x": jnp.arange(2**20, dtype=jnp.float32)}
    store.save(1, arrays, META, wait=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))  # every write past 64 KiB now fails, as on a full disk
    try:
        store.save(2, arrays, META)
        with pytest.raises(
            CheckpointError, match=r"saving step 2 to .* failed: .*; the checkpoint of step 1 is intact"
        ) as error:
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert store.steps() == [1]
    assert_same_bits(store.restore(1, templates_of(arrays)), arrays)
    store.save(2, arrays, META, wait=True)  # with room again, the same store goes on
    assert store.steps() == [1, 2]
    assert sorted(path.name for path in store.directory.iterdir()) == ["1", "2"]


def test_the_next_save_tells_of_the_failed_one(store, monkeypatch):
    def broken(self, path):
        raise OSError(28, "No space left on device")

    store.save(1, {"x": jnp.ones(2)}, META, wait=True)
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.finalize", broken)
        store.save(2, {"x": jnp.ones(2)}, META)
        with pytest.raises(CheckpointError, match=r"saving step 2 .*No space left on device"):
            store.save(3, {"x": jnp.ones(2)}, META)
    store.save(3, {"x": jnp.ones(2)}, META, wait=True)
    assert store.steps() == [1, 3]


def test_a_killed_save_does_not_count(tmp_path):
    child = subprocess.run([sys.executable, CHILDREN, "killed", tmp_path], capture_output=True, text=True, timeout=60)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert {path.name for path in tmp_path.iterdir()} > {"1"}, "the child was killed before its save began"
    with CheckpointStore(tmp_path) as store:
        assert store.steps() == [1]
        assert store.restore(1, store.entries(1))["x"].tolist() == [1, 1]
        store.save(3, {"x": jnp.ones(2) * 3}, META, wait=True)  # clears away what step 2 left
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]
        store.save(2, {"x": jnp.ones(2) * 2}, META, wait=True)
        assert store.restore(2, store.entries(2))["x"].tolist() == [2, 2]


def test_only_a_save_that_never_completed(tmp_path):
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(CheckpointError, match=r"it holds only a save that never completed"):
        CheckpointStore(tmp_path).documents(5)


def test_a_half_deleted_checkpoint_does_not_count(store):
    for step in (1, 2):
        store.save(step, {"x": jnp.ones(2)}, META, metric=float(step), wait=True)
    (store.directory / "1" / "commit_success.txt").unlink()  # deleting removes this first
    assert CheckpointStore(store.directory).steps() == [2]
    assert CheckpointStore(store.directory).best_step() == 2


def biggest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    ("victim", "damage"),
    [
        (lambda step: biggest_file(step / "arrays"), lambda raw: raw[: len(raw) // 2]),
        (lambda step: biggest_file(step / "arrays"), None),
        (lambda step: step / "arrays" / "manifest.ocdbt", lambda raw: raw[:-10]),
        (lambda step: step / "index" / "index.json", lambda raw: raw[:50]),
        (lambda step: step / "documents" / "documents.json", None),
        (lambda step: step / "documents" / "documents.json", lambda raw: b"\xff\xfe" + raw),
    ],
)
def test_damaged_files_are_told(store, victim, damage):
    arrays = {"x": jnp.arange(10_000.0)}
    for step in (1, 2):
        store.save(step, arrays, META, wait=True)
    path = victim(Path(store.directory / "2"))
    raw = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(raw))
    reader = CheckpointStore(store.directory)

    def read():
        reader.documents(2)
        reader.restore(2, templates_of(arrays))

    with pytest.raises(CheckpointError, match=r"checkpoint 2 in .* is damaged or unreadable: .*other steps there: 1"):
        read()
    assert_same_bits(reader.restore(1, templates_of(arrays)), arrays)


# --- other devices and processes ---


def run_children(role: str, folder: Path, *, processes: int, devices: int) -> None:
    """Runs a child program in fresh processes with virtual devices, and expects every one to end well."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "NPROC": "32",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    commands = [[sys.executable, CHILDREN, role, folder, port, str(rank)] for rank in range(processes)]
    logs = [folder / f"{role}.{rank}.log" for rank in range(processes)]
    children = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("w") as out:
            children.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [child.wait(timeout=90) for child in children]
    finally:
        for child in children:
            child.kill()
    assert codes == [0] * processes, "\n".join(log.read_text()[-3000:] for log in logs)


def test_layers_on_the_devices_of_their_stages_restore_on_any_mesh(tmp_path):
    run_children("stages", tmp_path, processes=1, devices=8)


def test_two_processes_of_which_each_holds_one_stage(tmp_path):
    run_children("processes", tmp_path, processes=2, devices=4)
