"""What general-purpose compressors make of the held-out documents: the yardstick beside a model's bits per byte.

A language model that predicts text at b bits per byte could compress it to b/8 of its size, so gzip's and xz's sizes
of the very same files say how much the model has learnt beyond repeated strings. Two readings: all files as one
stream, which lets a compressor learn from one file for the next, and each file by itself, as a model without context
across documents sees them.
"""

from __future__ import annotations

import dataclasses
import gzip
import lzma
from collections.abc import Callable, Iterable


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionBaselines:
    """Bits per byte of `gzip -9` and `xz -9e` on the same documents; lower is better, 8 is no compression."""

    gzip_concatenated: float
    """All documents as one stream, in the order of their identities."""
    gzip_per_file: float
    """Each document by itself: the sum of the compressed sizes, headers included, over the sum of the sizes."""
    xz_concatenated: float
    xz_per_file: float
    documents: int
    total_bytes: int


def compression_baselines(documents: Iterable[tuple[str, bytes]]) -> CompressionBaselines:
    """Compresses `documents`, pairs of identity (a relative path) and content, in the order of their identities.

    Takes seconds per megabyte, nearly all of it in xz, so callers keep the result.

    Raises:
      ValueError: there is nothing to compress.
    """
    contents = [content for _, content in sorted(documents)]
    total = sum(map(len, contents))
    if total == 0:
        raise ValueError(f"compression baselines need text: {len(contents)} documents of 0 bytes together were given")
    joined = [b"".join(contents)]
    return CompressionBaselines(
        gzip_concatenated=_bits_per_byte(_gzip, joined),
        gzip_per_file=_bits_per_byte(_gzip, contents),
        xz_concatenated=_bits_per_byte(_xz, joined),
        xz_per_file=_bits_per_byte(_xz, contents),
        documents=len(contents),
        total_bytes=total,
    )


def _bits_per_byte(compress: Callable[[bytes], bytes], contents: list[bytes]) -> float:
    return 8 * sum(len(compress(content)) for content in contents) / sum(map(len, contents))


def _gzip(content: bytes) -> bytes:
    return gzip.compress(content, compresslevel=9, mtime=0)


def _xz(content: bytes) -> bytes:
    # Preset 9e asks for a dictionary of 64 MiB; one that covers the file finds the same matches (the sizes are equal),
    # and does not spend a tenth of a second per file on clearing tables for the rest.
    dictionary = min(max(2**16, 2 ** len(content).bit_length()), 2**26)
    preset = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}
    return lzma.compress(content, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=[preset])
