"""Data: sources → held-out split → tokens → fill-in-the-middle → packed rows."""

from deepseek_jax.data.config import (
    ArrayRecord,
    DataConfig,
    Jsonl,
    Parquet,
    Source,
    StandardLibrary,
    TextFiles,
    TokenizerConfig,
)
from deepseek_jax.data.corpus import heldout_documents, load_corpus, make_tokenizer, train_documents
from deepseek_jax.data.documents import Document
from deepseek_jax.data.errors import DataError
from deepseek_jax.data.pipeline import train_rows
from deepseek_jax.data.rows import RowIterator, merge_states
from deepseek_jax.data.tokenizer import Tokenizer, check_vocab, train_tokenizer

__all__ = [
    "ArrayRecord",
    "DataConfig",
    "DataError",
    "Document",
    "Jsonl",
    "Parquet",
    "RowIterator",
    "Source",
    "StandardLibrary",
    "TextFiles",
    "Tokenizer",
    "TokenizerConfig",
    "check_vocab",
    "heldout_documents",
    "load_corpus",
    "make_tokenizer",
    "merge_states",
    "train_documents",
    "train_rows",
    "train_tokenizer",
]
