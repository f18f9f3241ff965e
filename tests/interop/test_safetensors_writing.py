"""Tensors are written into shards as they come; what is not whole is said."""

from __future__ import annotations

import errno
import json
import os

import ml_dtypes
import numpy as np
import pytest
from tensor_files import assert_holds, assert_same, write

from deepseek_jax.interop import safetensors as ours
from deepseek_jax.interop.errors import InteropError
from deepseek_jax.interop.safetensors import INDEX, FolderWriter, TensorFolder


def test_shards_are_filled_in_order_and_the_index_names_them(tmp_path):
    arrays = {n: np.zeros(size, np.uint8) for n, size in {"d": 6, "c": 4, "b": 1, "a": 30, "e": 10, "f": 0}.items()}
    write(tmp_path, arrays, shard_bytes=10)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert index == {
        "metadata": {"total_size": 51},
        "weight_map": {"a": shards[2], "b": shards[1], "c": shards[0], "d": shards[0], "e": shards[3], "f": shards[3]},
    }
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [*shards, INDEX]
    for path in tmp_path.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert length % 8 == 0
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__")
        assert list(header) == [name for name in arrays if index["weight_map"][name] == path.name]


def test_a_single_shard_has_the_plain_name_and_no_index(tmp_path):
    write(tmp_path, {"größer": np.arange(3)}, metadata={})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_holds(tmp_path, {"größer": np.arange(3)})
    assert TensorFolder(tmp_path).metadata == {}


def test_tensors_may_come_in_any_order_and_a_shard_has_its_size_from_the_first(tmp_path, monkeypatch):
    arrays = {name: np.full(8, ord(name), np.int32) for name in "abcdef"}
    opened = []
    real = os.open
    monkeypatch.setattr("os.open", lambda path, *rest: opened.append(real(path, *rest)) or opened[-1])
    with FolderWriter(tmp_path, {n: (a.dtype, a.shape) for n, a in arrays.items()}, shard_bytes=64) as writer:
        writer.write("d", arrays["d"])
        (first,) = tmp_path.iterdir()
        assert first.name == "model-00002-of-00003.safetensors"
        size = first.stat().st_size
        writer.write("a", arrays["a"])
        writer.write("c", arrays["c"])
        assert first.stat().st_size == size
        with pytest.raises(OSError, match="Bad file descriptor"):  # it is complete, so it is closed
            os.fstat(opened[0])
        for name in "bfe":
            writer.write(name, arrays[name])
    assert_holds(tmp_path, arrays)


@pytest.mark.parametrize("copy_bytes", [16, 64, 100, 1 << 20])
def test_arrays_that_are_not_contiguous_are_written_in_small_copies(tmp_path, monkeypatch, copy_bytes):
    base = np.arange(2 * 6 * 10, dtype=np.int32).reshape(2, 6, 10)
    arrays = {
        "transposed": base.T,
        "wide": base.transpose(0, 2, 1),
        "stepped": base[:, ::2, ::3],
        "reversed": base[::-1],
        "flat": base.reshape(-1)[::7],
        "repeated": np.broadcast_to(np.arange(3, dtype=np.int8), (5, 3)),
        "fortran": np.asfortranarray(base.astype(ml_dtypes.bfloat16)),
        "empty": base.T[:, :0],
    }
    copies = []
    real = np.ascontiguousarray
    monkeypatch.setattr(ours, "_COPY_BYTES", copy_bytes)
    monkeypatch.setattr("numpy.ascontiguousarray", lambda array: copies.append(array.nbytes) or real(array))
    write(tmp_path, arrays)
    assert 0 < max(copies) <= copy_bytes
    assert_holds(tmp_path, arrays)


def test_rows_may_come_in_parts(tmp_path):
    array = np.arange(40, dtype=np.float32).reshape(10, 4)
    forms = {"before": (np.uint8, (3,)), "a": (np.float32, (10, 4)), "none": (np.float32, (0, 2))}
    with FolderWriter(tmp_path, forms) as writer:
        writer.write_rows("a", 6, array[6:])
        writer.write("before", np.arange(3, dtype=np.uint8))
        writer.write_rows("none", 0, np.zeros((0, 2), np.float32))
        writer.write_rows("a", 0, array[:4])
        with pytest.raises(ValueError, match="a row of 3 to 6 was written before"):
            writer.write_rows("a", 3, array[3:6])
        with pytest.raises(ValueError, match="'a' has 10 rows, and not 8 to 12"):
            writer.write_rows("a", 8, array[:4])
        with pytest.raises(ValueError, match="'a' was written in part before"):
            writer.write("a", array)
        with pytest.raises(ValueError, match=r"'a' is float32\[10, 4\], and float32\[2, 2\] came"):
            writer.write_rows("a", 4, array[4:6, :2])
        writer.write_rows("a", 4, array[4:6])
        with pytest.raises(ValueError, match="'a' was written before"):
            writer.write_rows("a", 4, array[4:6])
    assert_same(TensorFolder(tmp_path).read("a"), array)


def test_an_array_that_was_not_announced_so_is_refused(tmp_path):
    writer = FolderWriter(tmp_path, {"a": ("float32", (2, 3)), "s": ("float32", ()), "b": ("int8", (1,))})
    for name, array, message in (
        ("c", np.zeros(2), "'c' is none of the tensors to write"),
        ("a", np.zeros((2, 3)), r"'a' is float32\[2, 3\], and float64\[2, 3\] came"),
        ("a", np.zeros((2, 3), ">f4"), r"'a' is float32\[2, 3\], and >f4\[2, 3\] came"),
        ("a", np.zeros((3, 2), np.float32), r"'a' is float32\[2, 3\], and float32\[3, 2\] came"),
        ("s", np.zeros((1,), np.float32), r"'s' is float32\[\], and float32\[1\] came"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.write(name, array)
    assert list(tmp_path.iterdir()) == []
    writer.write("s", np.zeros((), np.float32))
    with pytest.raises(ValueError, match="'s' was written before"):
        writer.write("s", np.zeros((), np.float32))
    with pytest.raises(ValueError, match="'s' is a scalar"):
        FolderWriter(tmp_path, {"s": ("float32", ())}).write_rows("s", 0, np.zeros((), np.float32))
    with pytest.raises(InteropError, match=r"2 of 3 tensors were never written: 'a', 'b'$"):
        writer.close()


def test_tensors_that_never_came_are_named_and_counted(tmp_path):
    writer = FolderWriter(tmp_path, {f"t{i}": (np.int8, (2,)) for i in range(9)}, shard_bytes=4)
    writer.write("t1", np.zeros(2, np.int8))
    writer.write_rows("t2", 0, np.zeros(1, np.int8))
    with pytest.raises(
        InteropError, match=r"8 of 9 tensors were never written: 't0', 't2', 't3', 't4', 't5' and 3 more$"
    ):
        writer.close()
    assert not (tmp_path / INDEX).exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": (np.complex64, (2,))}, "tensor 'a' is complex64, which safetensors files cannot hold"),
        ({"a": (ml_dtypes.int4, (2,))}, "tensor 'a' is int4, which safetensors files cannot hold"),
        ({"a": (">f4", (2,))}, "tensor 'a' is >f4, which safetensors files cannot hold"),
        ({"__metadata__": (np.int8, (2,))}, "a tensor cannot be named '__metadata__'"),
    ],
)
def test_what_the_format_does_not_have_is_refused_before_anything_is_written(tmp_path, tensors, message):
    with pytest.raises(InteropError, match=message):
        FolderWriter(tmp_path, tensors)


def test_an_error_inside_is_kept_and_closes_the_files(tmp_path, monkeypatch):
    opened = []
    real = os.open
    monkeypatch.setattr("os.open", lambda path, *rest: opened.append(real(path, *rest)) or opened[-1])

    def interrupted() -> None:
        with FolderWriter(tmp_path, {"a": (np.int8, (2,)), "b": (np.int8, (2,))}) as writer:
            writer.write("a", np.zeros(2, np.int8))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (file,) = opened
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_a_full_disk_shows_before_the_data_is_written(tmp_path, monkeypatch):
    def full(file, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with FolderWriter(tmp_path, {"a": (np.int8, (2,))}) as writer:
        with pytest.raises(OSError, match="No space left") as told:
            writer.write("a", np.zeros(2, np.int8))
        assert told.value.errno == errno.ENOSPC
        assert list(tmp_path.iterdir()) == []
        monkeypatch.undo()
        writer.write("a", np.ones(2, np.int8))
    assert_holds(tmp_path, {"a": np.ones(2, np.int8)})


@pytest.mark.parametrize("number", [None, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_reserves_no_space_gives_the_size_at_least(tmp_path, monkeypatch, number):
    def unable(file, offset, size):
        raise OSError(number, "no")

    if number is None:
        monkeypatch.delattr("os.posix_fallocate", raising=False)
    else:
        monkeypatch.setattr("os.posix_fallocate", unable, raising=False)
    with FolderWriter(tmp_path, {"a": (np.int8, (200,)), "b": (np.int8, (300,))}) as writer:
        writer.write("a", np.ones(200, np.int8))
        assert (tmp_path / "model.safetensors").stat().st_size > 500
        writer.write("b", np.ones(300, np.int8))
    assert_holds(tmp_path, {"a": np.ones(200, np.int8), "b": np.ones(300, np.int8)})


def test_no_file_is_written_over(tmp_path):
    (tmp_path / "model.safetensors").write_text("there")
    writer = FolderWriter(tmp_path, {"a": (np.int8, (2,))})
    with pytest.raises(FileExistsError):
        writer.write("a", np.zeros(2, np.int8))
    assert (tmp_path / "model.safetensors").read_text() == "there"
