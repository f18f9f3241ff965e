from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from etils import epath

from deepseek_jax.config import ConfigError
from deepseek_jax.data import DataConfig, DataError, Jsonl, Parquet, TextFiles
from deepseek_jax.data.sources import open_documents, stream_documents

TEXTS = ["first\n", "größer – 大", "", "third"]


def documents(source) -> list[tuple[str, str]]:
    opened = open_documents(source)
    found = [(opened[i].id, opened[i].text) for i in range(len(opened))]
    assert found == [(d.id, d.text) for d in stream_documents(source)]
    return found


def jsonl_bytes(field: str = "text") -> bytes:
    return b"".join(json.dumps({"n": 1, field: t}, ensure_ascii=False).encode() + b"\n" for t in TEXTS) + b"\n"


def zstd_frames(data: bytes) -> bytes:
    """Two frames, the border in the middle of a line."""
    return zstandard.compress(data[:40]) + zstandard.compress(data[40:])


def parquet(path, column: str = "text", values=tuple(TEXTS)) -> None:
    pq.write_table(pa.table({"n": range(len(values)), column: list(values)}), path, row_group_size=2)


def test_text_files_keep_their_bytes_and_pass_over_hidden_and_empty_ones(tmp_path):
    for name, data in {"b/x.py": b"a\r\nb\r", "a.py": b"\xef\xbb\xbfbom", "c.md": b"md", ".git/y.py": b"no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "empty.py").touch()
    (tmp_path / ".hidden.py").write_text("no")
    assert documents(TextFiles(path=tmp_path, glob="**/*.py")) == [("a.py", "\ufeffbom"), ("b/x.py", "a\r\nb\r")]
    assert [i for i, _ in documents(TextFiles(path=epath.Path(tmp_path)))] == ["a.py", "b/x.py", "c.md"]
    assert [i for i, _ in documents(TextFiles(path=tmp_path, glob="*.??"))] == ["a.py", "c.md"]
    assert [i for i, _ in documents(TextFiles(path=tmp_path / "b" / "x.*"))] == ["x.py"]


@pytest.mark.parametrize(
    ("suffix", "pack"), [("jsonl", bytes), ("jsonl.gz", gzip.compress), ("jsonl.zst", zstd_frames)]
)
def test_jsonl_plain_and_packed(tmp_path, suffix, pack):
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/b"):
        (tmp_path / f"{name}.{suffix}").write_bytes(pack(jsonl_bytes("content")))
    expected = [
        (f"{file}.{suffix}:{line}", TEXTS[line - 1]) for file in ("a", "sub/b") for line in (1, 2, 4)
    ]  # the empty text is left out, and so is the blank line
    assert documents(Jsonl(path=tmp_path, field="content")) == expected
    assert documents(Jsonl(path=tmp_path / f"a.{suffix}", field="content")) == expected[:3]
    assert documents(Jsonl(path=f"{tmp_path}/*.{suffix}", field="content")) == expected[:3]


def test_parquet(tmp_path):
    parquet(tmp_path / "a.parquet", "body")
    expected = [("a.parquet:0", TEXTS[0]), ("a.parquet:1", TEXTS[1]), ("a.parquet:3", TEXTS[3])]
    assert documents(Parquet(path=tmp_path, column="body")) == expected


def test_the_size_of_a_source_is_in_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl_bytes()))
    parquet(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("".join(TEXTS), encoding="utf-8")
    expected = len("".join(TEXTS).encode())
    assert expected > len("".join(TEXTS))
    for source in (
        Jsonl(path=tmp_path / "a.jsonl"),
        Jsonl(path=tmp_path / "a.jsonl.gz"),
        Parquet(path=tmp_path),
        TextFiles(path=tmp_path / "a.txt"),
    ):
        assert open_documents(source).total_bytes == expected, source


@pytest.mark.parametrize(
    "kind",
    [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=["large", "view", "dictionary"],
)
def test_parquet_takes_every_form_of_text(tmp_path, kind):
    column = pa.array([*TEXTS, TEXTS[0]]).cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=2)
    assert pq.read_schema(tmp_path / "a.parquet").field("text").type == kind
    assert [text for _, text in documents(Parquet(path=tmp_path))] == [TEXTS[0], TEXTS[1], TEXTS[3], TEXTS[0]]


def test_parquet_refuses_a_dictionary_of_bytes(tmp_path):
    column = pa.array([b"7", b"8", b"7"]).dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'text' holds dictionary<.*>, not text$"):
        open_documents(Parquet(path=tmp_path))


@pytest.mark.parametrize("source", [TextFiles, Jsonl, Parquet])
def test_missing_and_empty_sources(tmp_path, source):
    with pytest.raises(DataError, match=r"nowhere: no such file or folder$"):
        open_documents(source(path=tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r": no file matches \*\*/\*"):
        open_documents(source(path=tmp_path))


def test_sources_without_text(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.jsonl").write_text("\n\n")
    for source in (TextFiles(path=tmp_path, glob="*.txt"), Jsonl(path=tmp_path)):
        with pytest.raises(DataError, match="holds no text"):
            open_documents(source)


def test_invalid_utf8_names_file_and_offset(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"fine \xff\xfe")
    with pytest.raises(
        DataError,
        match=r"bad\.txt: invalid UTF-8 at byte offset 5 \(0xff\); convert the file to UTF-8; on_error=skip",
    ):
        open_documents(TextFiles(path=tmp_path))
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: invalid UTF-8 at byte offset 24 \(0xff\)"):
        open_documents(Jsonl(path=tmp_path))


BROKEN_LINES = [
    (b'{"text": "a"', r"bad\.jsonl:2: not valid JSON \(Expecting ',' delimiter: column 13"),
    (b'{"txt": "a", "id": 3}', r"bad\.jsonl:2: no field 'text' \(it has: txt, id\)"),
    (b'{"text": 7}', r"bad\.jsonl:2: field 'text' holds a int, not text"),
    (b'["text"]', r"bad\.jsonl:2: holds a list, not an object"),
    (b'{"text": "\\ud800"}', r"bad\.jsonl:2: field 'text' holds half a surrogate pair"),
    (b"9" * 5000, r"bad\.jsonl:2: not valid JSON"),
    (b"[" * 100_000, r"bad\.jsonl:2: not valid JSON"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN_LINES)
def test_broken_line_names_file_and_line_or_is_counted(tmp_path, line, message, caplog):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n')
    with pytest.raises(DataError, match=message):
        open_documents(Jsonl(path=tmp_path))
    skipping = Jsonl(path=tmp_path, on_error="skip")
    assert documents(skipping) == [("bad.jsonl:1", "a"), ("bad.jsonl:3", "c")]
    assert "left out 1 broken documents, the first: " in caplog.text


def test_a_text_file_that_is_no_utf8_is_left_out_and_counted(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("größer", encoding="utf-8")
    (tmp_path / "b.txt").write_text("größer", encoding="latin-1")
    (tmp_path / "c.txt").write_text("c")
    source = TextFiles(path=tmp_path, on_error="skip")
    assert documents(source) == [("a.txt", "größer"), ("c.txt", "c")]
    assert open_documents(source).total_bytes == len("größerc".encode())
    assert "left out 1 broken documents, the first: " in caplog.text
    assert "b.txt: invalid UTF-8 at byte offset 2 (0xf6)" in caplog.text


def test_jsonl_that_changes_under_a_run(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl_bytes())
    opened = open_documents(Jsonl(path=tmp_path))
    (tmp_path / "a.jsonl").write_bytes(b"short\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: the line is not what it was when the run began"):
        opened[1]


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", zstandard.compress)])
@pytest.mark.parametrize("keep", [0.4, 0.95])
def test_packed_file_cut_short(tmp_path, suffix, pack, keep):
    data = pack(jsonl_bytes() * 500)
    (tmp_path / f"cut.jsonl.{suffix}").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DataError, match=rf"cut\.jsonl\.{suffix}: the \w+ file is damaged or cut short \(.*\); fetch"):
        open_documents(Jsonl(path=tmp_path))


def test_packed_file_that_is_something_else(tmp_path):
    for suffix in ("gz", "zst"):
        path = tmp_path / f"plain.jsonl.{suffix}"
        path.write_bytes(jsonl_bytes())
        with pytest.raises(DataError, match="is damaged or cut short"):
            open_documents(Jsonl(path=path))


@pytest.mark.parametrize("keep", [0.5, 0.98])
def test_parquet_cut_short(tmp_path, keep):
    parquet(tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DataError, match=r"a\.parquet: the Parquet file is damaged or cut short \(.*\); fetch it again"):
        open_documents(Parquet(path=tmp_path))


def test_parquet_with_the_wrong_column_or_nulls(tmp_path):
    parquet(tmp_path / "a.parquet", values=("x", None, "y"))
    with pytest.raises(DataError, match=r"a\.parquet: no column 'body' \(it has: n, text\)"):
        open_documents(Parquet(path=tmp_path, column="body"))
    with pytest.raises(DataError, match=r"a\.parquet: column 'n' holds int64, not text"):
        open_documents(Parquet(path=tmp_path, column="n"))
    with pytest.raises(DataError, match=r"a\.parquet: row 1 has a null in column 'text'"):
        open_documents(Parquet(path=tmp_path))
    assert [i for i, _ in documents(Parquet(path=tmp_path, on_error="skip"))] == ["a.parquet:0", "a.parquet:2"]


def test_parquet_with_invalid_utf8(tmp_path):
    raw = pa.array([b"ok", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": raw}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: column 'text' holds invalid UTF-8"):
        open_documents(Parquet(path=tmp_path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig(sources=()), "data.sources is empty"),
        (lambda: DataConfig(sources=("corpus/",)), "data.sources holds 'corpus/'; use TextFiles"),
        (lambda: DataConfig(sequence_length=0), "data.sequence_length must be positive"),
        (lambda: DataConfig(fim_rate=1.5), "data.fim_rate is a share"),
        (lambda: DataConfig(heldout_fraction=1.0), "data.heldout_fraction must be at least 0 and below 1"),
        (lambda: DataConfig(epochs=0), "data.epochs must be positive or none"),
        (lambda: DataConfig(epochs=2, sources=(TextFiles(path="a"), TextFiles(path="b"))), "has no meaning for a wei"),
        (lambda: TextFiles(path="a", weight=0), "weight of a TextFiles must be positive"),
        (lambda: TextFiles(path=""), "a TextFiles needs a path"),
        (lambda: TextFiles(path="a", on_error="ignore"), "on_error of a TextFiles must be raise or skip"),
        (lambda: Jsonl(path="a", on_error="ignore"), "on_error of a Jsonl must be raise or skip, not 'ignore'"),
    ],
)
def test_inconsistent_config(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
