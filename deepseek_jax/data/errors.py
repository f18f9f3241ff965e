"""The one error of the data pipeline."""

from __future__ import annotations


class DataError(ValueError):
    """Data or a tokenizer that cannot be used. The message is one line: which file, where in it, what to do."""
