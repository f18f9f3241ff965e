"""gzip's and xz's bits per byte: by hand on tiny input, and against the programs."""

import dataclasses
import json
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from deepseek_jax.evaluation.compression import compression_baselines

TINY = [("b", b"\x01"), ("a", b"\xff")]


def standard_library(count: int) -> list[tuple[str, bytes]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.glob("*.py"), key=lambda path: path.stat().st_size)[40 : 40 + count]
    return [(str(path.relative_to(root)), path.read_bytes()) for path in files]


def test_tiny_input_by_hand():
    result = compression_baselines(TINY)
    # 10 bytes of header, 8 of checksum and size, and one deflate block: 3 bits of type, 8 for byte 0x01, 9 for 0xff,
    # 7 for the end. That is 18 or 19 bits = 3 bytes for one document, 27 bits = 4 bytes for both.
    assert result.gzip_per_file == 8 * (21 + 21) / 2
    assert result.gzip_concatenated == 8 * 22 / 2
    # 12 bytes of stream header, 12 of footer, 8 of index, 28 of block (12 header, 8 LZMA2 and its padding, 8 CRC64).
    assert result.xz_per_file * 2 / 8 == 2 * 60
    assert (result.documents, result.total_bytes) == (2, 2)


def test_documents_are_joined_in_the_order_of_their_paths():
    documents = standard_library(6)
    assert compression_baselines(documents) == compression_baselines(documents[::-1])


def test_repetition_compresses_only_together():
    text = standard_library(1)[0][1]
    result = compression_baselines([("a", text), ("b", text)])
    assert result.xz_concatenated < 0.6 * result.xz_per_file
    assert result.gzip_concatenated < result.gzip_per_file


@pytest.mark.parametrize(("name", "command"), [("gzip", ["gzip", "-9nc"]), ("xz", ["xz", "-9ec", "-T1"])])
def test_the_programs_agree(name, command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")

    def size(content: bytes) -> int:
        return len(subprocess.run(command, input=content, capture_output=True, check=True).stdout)

    documents = standard_library(8)
    result = dataclasses.asdict(compression_baselines(documents))
    joined = b"".join(content for _, content in sorted(documents))
    header = {"gzip": 32, "xz": 0}[name]  # bytes per stream: other headers, and gzip does not match quite as zlib does
    assert abs(result[f"{name}_concatenated"] * len(joined) / 8 - size(joined)) <= header
    alone = sum(size(content) for _, content in documents)
    assert abs(result[f"{name}_per_file"] * len(joined) / 8 - alone) <= header * len(documents)


def test_the_result_is_plain_json():
    result = dataclasses.asdict(compression_baselines(TINY))
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("documents", [[], [("a", b"")]])
def test_nothing_to_compress_is_an_error(documents):
    with pytest.raises(ValueError, match=rf"need text: {len(documents)} documents of 0 bytes"):
        compression_baselines(documents)
