"""The one error of reading and writing the folders of others."""

from __future__ import annotations


class InteropError(ValueError):
    """A Hugging Face folder that cannot be read, written or represented. One line."""
