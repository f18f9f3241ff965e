"""Safetensors folders that are damaged or do not fit together are refused in one line, and never read wrong."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from tensor_files import assert_same, entry, raw_file, write

from deepseek_jax.interop.errors import InteropError
from deepseek_jax.interop.safetensors import INDEX, TensorFolder
from deepseek_jax.interop.safetensors_format import DTYPES

# --- folders that do not fit ----------------------------------------------------------------------------------------


def refused(folder: Path) -> str:
    """What the folder is refused with: one line."""
    with pytest.raises(InteropError) as error:
        TensorFolder(folder)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(folder), "DIR")


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    (tmp_path / "file.safetensors").touch()
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "nowhere") == "DIR: no such folder"
    assert refused(tmp_path / "file.safetensors") == "DIR: not a folder; name the one it is in"
    assert refused(tmp_path / "empty") == "DIR: there is no safetensors file"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_pickles_are_not_read(tmp_path, name):
    (tmp_path / name).touch()
    assert refused(tmp_path).startswith(
        f"DIR: only safetensors files are read, and {name} is a pickle, which runs code"
    )


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", r"DIR/model.safetensors.index.json: not valid JSON \(.*\)"),
        pytest.param("[" * 100_000, r"DIR/model.safetensors.index.json: not valid JSON \(.*\)", id="deep"),
        ('{"weight_map": {"a": "x", "a": "y"}}', r".*: not valid JSON \('a' is there twice\)"),
        ("[]", ".*: has no weight_map, which says which file holds which tensor"),
        ('{"metadata": {}}', ".*: has no weight_map, .*"),
        ('{"weight_map": {}}', ".*: has no weight_map, .*"),
        (
            '{"weight_map": {"a": "../x.safetensors"}}',
            r".*: tensor 'a' is in '../x.safetensors', which is not a file .*",
        ),
        ('{"weight_map": {"a": "/x.safetensors"}}', ".* is in '/x.safetensors', which is not a file of this folder"),
        ('{"weight_map": {"a": "b\\\\x"}}', ".* which is not a file of this folder"),
        ('{"weight_map": {"a": "x\\u0000"}}', ".* which is not a file of this folder"),
        ('{"weight_map": {"a": ".."}}', r".* is in '\.\.', which is not a file of this folder"),
        ('{"weight_map": {"a": 3}}', r".* is in 3, which is not a file of this folder"),
        ('{"weight_map": {"a": "\\ud800"}}', r"DIR: 1 of 1 files of the index are missing, with 1 of 1 tensors: .*"),
    ],
)
def test_an_index_that_makes_no_sense_is_refused(tmp_path, index, message):
    (tmp_path / INDEX).write_text(index)
    assert re.fullmatch(message, refused(tmp_path))


def test_an_index_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / INDEX).symlink_to("nowhere")
    assert refused(tmp_path) == f"DIR/{INDEX}: cannot be read (No such file or directory)"


def test_missing_shards_are_named_and_their_tensors_counted(tmp_path):
    write(tmp_path, {f"t{i}": np.zeros(4) for i in range(16)}, shard_bytes=64)
    gone = [f"model-0000{number}-of-00008.safetensors" for number in (1, 2, 3, 5, 6, 7, 8)]
    for name in gone:
        (tmp_path / name).unlink()
    assert refused(tmp_path) == (
        "DIR: 7 of 8 files of the index are missing, with 14 of 16 tensors: "
        f"{', '.join(map(repr, gone[:5]))} and 2 more; fetch the rest"
    )


def test_shards_and_index_must_hold_the_same_tensors(tmp_path):
    write(tmp_path, {f"t{i}": np.zeros(4) for i in range(4)}, shard_bytes=64)
    index = json.loads((tmp_path / INDEX).read_text())
    first = "model-00001-of-00002.safetensors"
    changed = {**index, "weight_map": {**index["weight_map"], "more": first}}
    (tmp_path / INDEX).write_text(json.dumps(changed))
    assert refused(tmp_path) == f"DIR/{first}: lacks 1 of the 3 tensors that the index puts there: 'more'"
    del index["weight_map"]["t1"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert refused(tmp_path) == f"DIR/{first}: the index does not put 1 of its 2 tensors there: 't1'"


def test_without_an_index_a_tensor_in_two_files_is_refused(tmp_path):
    raw_file(tmp_path / "a.safetensors", {"t": entry()}, b"..")
    raw_file(tmp_path / "b.safetensors", {"t": entry()}, b"..")
    assert refused(tmp_path) == "DIR/b.safetensors: tensor 't' is in a.safetensors too"


# --- files that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\xff", "not a safetensors file: its header is no JSON object"),
        (b"[]", "not a safetensors file: its header is no JSON object"),
        (b"", "not a safetensors file: its header is no JSON object"),
        (b'{"\xff": 1}', "the header is not valid JSON ('utf-8' codec can't decode byte 0xff in position 2"),
        (b"{]", "the header is not valid JSON (Expecting property name"),
        pytest.param(b'{"a":' * 100_000, "the header is not valid JSON (maximum recursion", id="deep"),
        pytest.param(b'{"a":' + b"9" * 5000 + b"}", "the header is not valid JSON (Exceeds the limit", id="large"),
        (b'{"a": 1, "a": 2}', "the header is not valid JSON ('a' is there twice)"),
        (b'{"a": NaN}', "the header is not valid JSON (NaN is no JSON)"),
        ({"__metadata__": {"a": 1}}, "__metadata__ must map text to text"),
        ({"__metadata__": None}, "__metadata__ must map text to text"),
        ({"t": 3}, "tensor 't': its entry in the header is not an object"),
        ({"t": entry("F4")}, "tensor 't' is F4, whose values are smaller than a byte; such dtypes are not supported"),
        ({"t": entry("F6_E2M3")}, "tensor 't' is F6_E2M3, whose values are smaller than a byte"),
        ({"t": entry("X9")}, "tensor 't': unknown dtype 'X9' (known: BOOL, U8"),
        ({"t": entry(["U8"])}, "tensor 't': unknown dtype ['U8'] (known"),
        ({"line\nbreak": entry("X9")}, "tensor 'line\\nbreak': unknown dtype"),
        ({"t": entry(shape=[-2])}, "tensor 't': shape [-2] is not a list of sizes"),
        ({"t": entry(shape=[2.0])}, "tensor 't': shape [2.0] is not a list of sizes"),
        ({"t": entry(shape=[True, 2])}, "tensor 't': shape [True, 2] is not a list of sizes"),
        ({"t": entry(shape=[1 << 63])}, "tensor 't': shape [9223372036854775808] is not a list of sizes"),
        ({"t": {"dtype": "U8", "data_offsets": [0, 2]}}, "tensor 't': shape None is not a list of sizes"),
        ({"t": {**entry(), "shape": 2}}, "tensor 't': shape 2 is not a list of sizes"),
        (
            {"t": entry(shape=[1] * 33, offsets=(0, 1))},
            "tensor 't': shape [1, 1, 1, 1, 1, 1, ...] is more than an array",
        ),
        ({"t": entry("U16", [0, 1 << 62], (0, 0))}, "tensor 't': shape [0, 4611686018427387904] is more than an array"),
        ({"t": entry(offsets=[0])}, "tensor 't': data_offsets [0] are not two positions"),
        ({"t": entry(offsets=[0, "2"])}, "tensor 't': data_offsets [0, '2'] are not two positions"),
        ({"t": entry(offsets=[-2, 0])}, "tensor 't': data_offsets [-2, 0] are not two positions"),
        ({"t": entry(offsets=[2, 0])}, "tensor 't': U8 of shape [2] has 2 bytes, and its data_offsets [2, 0] hold"),
        ({"t": entry("U16")}, "tensor 't': U16 of shape [2] has 4 bytes, and its data_offsets [0, 2] hold another"),
        ({"t": entry(offsets=[1, 3])}, "tensor 't' leaves a hole before it: it begins at "),
        ({"s": entry(), "t": entry()}, "tensor 't' overlaps the one before it: it begins at "),
        ({"s": entry(), "t": entry(offsets=[1, 3])}, "tensor 't' overlaps the one before it: it begins at "),
        ({"s": entry(), "t": entry(offsets=[3, 5])}, "tensor 't' leaves a hole before it: it begins at "),
    ],
)
def test_a_wrong_header_is_refused_and_what_is_wrong_named(tmp_path, header, message):
    raw_file(tmp_path / "a.safetensors", header, b"..")
    assert refused(tmp_path).startswith(f"DIR/a.safetensors: {message}")


def test_a_header_of_another_length_than_the_file_has_is_refused(tmp_path):
    path = raw_file(tmp_path / "a.safetensors", {"t": entry()}, b"..", length=1000)
    assert refused(tmp_path).startswith("DIR/a.safetensors: truncated or not a safetensors file: it has ")
    path.write_bytes(b"1234567")
    assert refused(tmp_path) == "DIR/a.safetensors: truncated: the file has 7 bytes, too few for a safetensors file"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert refused(tmp_path) == ("DIR/a.safetensors: only a Git LFS pointer; fetch the file itself with `git lfs pull`")
    with raw_file(path, b"{}", length=100_000_001).open("r+b") as file:
        file.truncate(200_000_000)  # a hole, which takes no space
    assert refused(tmp_path).endswith("says that its header has 100000001 (at most 100000000 are read)")


@pytest.mark.parametrize(("data", "start"), [(b".", "truncated: the file has "), (b"...", "the file has ")])
def test_a_file_that_is_shorter_or_longer_than_its_header_says_is_refused(tmp_path, data, start):
    size = raw_file(tmp_path / "a.safetensors", {"t": entry()}, data).stat().st_size
    described = size + 2 - len(data)
    assert refused(tmp_path) == (
        f"DIR/a.safetensors: {start}{size} bytes, its header describes {described}; fetch it again"
    )


def test_a_folder_with_the_name_of_a_file_is_refused(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    assert refused(tmp_path) == "DIR/a.safetensors: cannot be read (Is a directory)"


def test_a_file_that_is_cut_after_it_was_opened_is_refused_when_it_is_read(tmp_path):
    write(tmp_path, {"a": np.arange(4.0)})
    with TensorFolder(tmp_path) as tensors:
        os.truncate(tmp_path / "model.safetensors", tensors["a"].offset + 20)
        assert_same(tensors.read("a", slice(0, 2)), np.arange(2.0))
        with pytest.raises(InteropError, match=r"model\.safetensors: truncated: the file ends at byte \d+; fetch it"):
            tensors.read("a")
        (tmp_path / "model.safetensors").unlink()
        assert_same(tensors.read("a", slice(0, 2)), np.arange(2.0))
    write(tmp_path, {"a": np.arange(4.0)})
    with TensorFolder(tmp_path) as tensors:
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(InteropError, match=r"model\.safetensors: cannot be read \(No such file or directory\)$"):
            tensors.read("a")
        with pytest.raises(InteropError, match=r"there is no tensor 'b'$"):
            tensors.read("b")


def test_a_bool_that_is_neither_true_nor_false_is_refused(tmp_path):
    raw_file(tmp_path / "a.safetensors", {"t": entry("BOOL")}, b"\1\2")
    with (
        TensorFolder(tmp_path) as tensors,
        pytest.raises(InteropError, match="'t' is BOOL and holds bytes that are ne"),
    ):
        tensors.read("t")


def test_every_cut_of_a_file_is_refused(tmp_path):
    path = raw_file(tmp_path / "a.safetensors", {"s": entry(), "t": entry("F32", (), (2, 6))}, b"123456")
    data = path.read_bytes()
    TensorFolder(tmp_path)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        refused(tmp_path)


def test_a_changed_header_is_refused_or_read_as_it_says(tmp_path):
    """Where it is taken, each byte of data is in one tensor, and the package, where installed, sees the same ones."""
    header = {
        "__metadata__": {"a key": "and a value"},
        "layers.0.mlp.weight": entry("I16", (2, 3), (0, 12)),
        "layers.0.norm.weight": entry("F32", (), (12, 16)),
    }
    path = raw_file(tmp_path / "a.safetensors", header, bytes(range(16)))
    good = path.read_bytes()
    end = len(good) - 16
    random = np.random.default_rng(0)
    taken = 0
    for _ in range(1000):
        data = bytearray(good)
        for _ in range(random.integers(1, 3)):
            place = 0 if random.random() < 0.1 else int(random.integers(end))
            match random.integers(4):
                case 0:
                    data[place] = random.integers(256)
                case 1:
                    data[place] = random.choice(list(b'0123456789[]{}",:-. \\e'))
                case 2:
                    other = int(random.integers(8, end))
                    data[place], data[other] = data[other], data[place]
                case _:
                    data[place] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
        try:
            tensors = TensorFolder(tmp_path)
        except InteropError:
            continue
        taken += 1
        with tensors:
            arrays = {name: tensors.read(name) for name in tensors}
        assert b"".join(arrays[name].tobytes() for name in tensors) == data[end:]
        assert_package_agrees(bytes(data), arrays)
    assert 20 < taken < 500


def assert_package_agrees(data: bytes, arrays: dict[str, np.ndarray]) -> None:
    try:
        from safetensors import deserialize
    except ImportError:
        return
    found = dict(deserialize(data))
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert (DTYPES[found[name]["dtype"]], tuple(found[name]["shape"])) == (array.dtype, array.shape)
        assert bytes(found[name]["data"]) == array.tobytes()
