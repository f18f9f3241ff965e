"""Parquet: one text column, read row group by row group."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from deepseek_jax.data.config import Parquet
from deepseek_jax.data.documents import Document, Documents, InMemory, SkipCounter, list_files
from deepseek_jax.data.errors import DataError


def iterate_parquet(source: Parquet, skips: SkipCounter) -> Iterator[Document]:
    """Documents of all files in order, named `file:row` from row 0. Raises `DataError` with the file."""
    for name, path in list_files(source.path, ("**/*.parquet",), skips):
        yield from _iterate_file(name, path, source.column, skips)


def open_parquet(source: Parquet) -> Documents:
    """All documents of `source` in random access, held in memory."""
    skips = SkipCounter(source.on_error)
    documents = InMemory(source.path, iterate_parquet(source, skips))
    skips.report(source.path)
    return documents


def _iterate_file(name: str, path: epath.Path, column: str, skips: SkipCounter) -> Iterator[Document]:
    row = 0
    with path.open("rb") as file:
        for texts in _columns(path, file, column):
            for text in texts:
                if text is None:
                    skips.broken(f"{path}: row {row} has a null in column {column!r}")
                elif text:
                    yield Document(f"{name}:{row}", text)
                row += 1


def _columns(path: epath.Path, file, column: str) -> Iterator[list[str | None]]:
    """The column of each row group, as Python strings."""
    try:
        table = pq.ParquetFile(file)
        schema = table.schema_arrow
        if column not in schema.names:
            raise DataError(f"{path}: no column {column!r} (it has: {', '.join(schema.names)})")
        kind = schema.field(column).type
        if not _is_text(kind):
            raise DataError(f"{path}: column {column!r} holds {kind}, not text")
        for group in range(table.num_row_groups):
            yield table.read_row_group(group, columns=[column]).column(0).cast(pa.large_string()).to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: column {column!r} holds invalid UTF-8 ({error.reason})") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: the Parquet file is damaged or cut short ({reason}); fetch it again") from None


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings, in any of Arrow's forms: plain, as views, or as numbers of a dictionary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
