"""Safetensors folders are read bit for bit, by us and by the package, and only where that is asked for."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from tensor_files import assert_holds, assert_same, every_dtype, write

from deepseek_jax.interop import safetensors as ours
from deepseek_jax.interop.safetensors import INDEX, TensorFolder
from deepseek_jax.interop.safetensors_format import DTYPES


@pytest.mark.parametrize("shard_bytes", [10_000, 150])
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path, shard_bytes):
    arrays = every_dtype()
    write(tmp_path / "model", arrays, shard_bytes=shard_bytes)
    assert_holds(tmp_path / "model", arrays)
    with TensorFolder(tmp_path / "model") as tensors:
        assert tensors.metadata == {"format": "pt"}
        assert tensors.total_bytes == sum(array.nbytes for array in arrays.values())
        assert len(tensors) == len(arrays)
        assert "BF16.3x5" in tensors
        assert "other" not in tensors
        info = tensors["BF16.3x5"]
        assert (info.name, info.shape, info.dtype, info.nbytes) == ("BF16.3x5", (3, 5), ml_dtypes.bfloat16, 30)
        data = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
        assert data == arrays["BF16.3x5"].tobytes()


@pytest.mark.parametrize("shard_bytes", [10_000, 150])
def test_the_safetensors_package_reads_what_is_written_here(tmp_path, shard_bytes):
    package = pytest.importorskip("safetensors")
    arrays = every_dtype()
    write(tmp_path / "model", arrays, shard_bytes=shard_bytes)
    found = {}
    for path in (tmp_path / "model").glob("*.safetensors"):
        found |= dict(package.deserialize(path.read_bytes()))
        with package.safe_open(path, "np") as file:
            assert file.metadata() == {"format": "pt"}
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert DTYPES[found[name]["dtype"]] == array.dtype
        assert tuple(found[name]["shape"]) == array.shape
        assert bytes(found[name]["data"]) == array.tobytes()


def test_what_the_safetensors_package_writes_is_read_here(tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    arrays = every_dtype()
    tensors = {}
    for name, array in arrays.items():
        data = torch.tensor(np.frombuffer(array.tobytes(), np.uint8))
        dtype = getattr(torch, array.dtype.name)
        tensors[name] = data.view(dtype).reshape(array.shape) if array.size else torch.empty(array.shape, dtype=dtype)
    save_file(tensors, tmp_path / "any name.safetensors", {"by": "größer"})
    assert_holds(tmp_path, arrays)
    assert TensorFolder(tmp_path).metadata == {"by": "größer"}


def test_the_package_reads_tensors_that_are_not_aligned_into_pytorch(tmp_path):
    pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    arrays = {"odd": np.arange(3, dtype=np.uint8), "even": np.arange(5, dtype=np.float32)}
    write(tmp_path, arrays)
    found = load_file(tmp_path / "model.safetensors")
    for name, array in arrays.items():
        assert_same(found[name].numpy(), array)


def test_a_read_array_is_new_and_may_be_written_to(tmp_path):
    write(tmp_path, {"a": np.arange(6.0)})
    with TensorFolder(tmp_path) as tensors:
        tensors.read("a")[:] = 0
        assert_same(tensors.read("a"), np.arange(6.0))


@pytest.mark.parametrize(
    "rows", [slice(None), slice(2, 5), slice(3), slice(-2, None), slice(5, 2), slice(4, 99), slice(0, 0)]
)
def test_rows_are_a_range_of_the_first_dimension(tmp_path, rows):
    arrays = {"before": np.arange(3.0), "a": np.arange(42, dtype=np.int16).reshape(7, 3, 2)}
    write(tmp_path, arrays)
    with TensorFolder(tmp_path) as tensors:
        assert_same(tensors.read("a", rows), arrays["a"][rows])


def test_rows_with_steps_and_of_a_scalar_are_refused(tmp_path):
    write(tmp_path, {"a": np.arange(6), "scalar": np.array(1.0)})
    with TensorFolder(tmp_path) as tensors:
        with pytest.raises(ValueError, match="a range without steps"):
            tensors.read("a", slice(0, 4, 2))
        with pytest.raises(ValueError, match="'scalar' is a scalar and has no rows"):
            tensors.read("scalar", slice(0, 1))


def test_calls_that_move_few_bytes_are_repeated(tmp_path, monkeypatch):
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr("os.pwrite", lambda file, data, position: pwrite(file, data[:7], position))
    monkeypatch.setattr("os.preadv", lambda file, buffers, position: preadv(file, [buffers[0][:5]], position))
    arrays = {"a": np.arange(30.0), "b": np.arange(8, dtype=np.int16)}
    write(tmp_path, arrays)
    assert_holds(tmp_path, arrays)


def test_no_call_moves_more_than_the_system_allows(tmp_path, monkeypatch):
    preadv, pwrite = os.preadv, os.pwrite
    sizes = []
    monkeypatch.setattr(ours, "_IO_BYTES", 64)
    monkeypatch.setattr("os.pwrite", lambda f, data, at: sizes.append(len(data)) or pwrite(f, data, at))
    monkeypatch.setattr("os.preadv", lambda f, buffers, at: sizes.append(len(buffers[0])) or preadv(f, buffers, at))
    arrays = {"a": np.arange(30.0)}
    write(tmp_path, arrays)
    assert_holds(tmp_path, arrays)
    assert max(sizes) == 64


def test_several_threads_read_at_once(tmp_path):
    arrays = {f"t{i}": np.full(1000 + i, i, np.int32) for i in range(40)}
    write(tmp_path, arrays, shard_bytes=20_000)
    with TensorFolder(tmp_path) as tensors, ThreadPoolExecutor(8) as pool:
        for name, array in zip(arrays, pool.map(tensors.read, arrays), strict=True):
            assert_same(array, arrays[name])


def test_nothing_is_opened_before_it_is_read_and_nothing_stays_open(tmp_path, monkeypatch):
    opened = []
    real = os.open
    monkeypatch.setattr("os.open", lambda path, *rest: opened.append(real(path, *rest)) or opened[-1])
    write(tmp_path, {"a": np.zeros(4), "b": np.zeros(4), "c": np.zeros(4)}, shard_bytes=32)
    opened.clear()
    with TensorFolder(tmp_path) as tensors:
        assert opened == []
        for name in ("a", "b", "a"):
            tensors.read(name)
        assert len(opened) == 2
    for file in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)
    with pytest.raises(ValueError, match="read after it was closed"):
        tensors.read("a")


def test_shards_that_are_links_into_a_cache_are_read(tmp_path):
    write(tmp_path / "blobs", {"a": np.arange(4), "b": np.arange(5)}, shard_bytes=32)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert_holds(tmp_path / "snapshot", {"a": np.arange(4), "b": np.arange(5)})


def test_with_an_index_other_files_are_left_alone_and_hidden_ones_always(tmp_path):
    arrays = {"a": np.arange(4), "b": np.arange(5)}
    write(tmp_path, arrays, shard_bytes=32)
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    (tmp_path / "._model.safetensors").write_bytes(b"")
    assert_holds(tmp_path, arrays)
    for name in (INDEX, "consolidated.safetensors"):
        (tmp_path / name).unlink()
    assert_holds(tmp_path, arrays)
