from __future__ import annotations

import pytest

from deepseek_jax.data import DataConfig, TextFiles, Tokenizer, train_tokenizer

SENTENCES = (
    "def area(width, height):\n    return width * height\n\n",
    "The rain in Spain, 1234567 drops of it: stays mainly in the plain.\n\n",
    "for name in names:\n    print(f'{name}!');\n\n\n",
    "Größe 你好 – naïve café ✓\r\n",
)


def document_text(number: int) -> str:
    """Texts of very different lengths, each with its number in it."""
    return f"# document {number}\n" + SENTENCES[number % 4] * (1 + number * number % 23)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer((document_text(i) for i in range(60)), vocab_size=400)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """60 text files in two folders."""
    root = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        path = root / f"part{i % 2}" / f"{i:02d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(document_text(i).encode())
    return root


@pytest.fixture(scope="session")
def config(folder) -> DataConfig:
    return DataConfig(
        sources=(TextFiles(path=folder),), sequence_length=63, heldout_min_documents=6, virtual_shards=4, cache_mb=1
    )
