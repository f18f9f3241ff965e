"""Any Hugging Face tokenizer.json: those of other model families give text back, pack into rows, and train a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from tiny_run import VOCABULARY, experiment, quick_runs, train
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from deepseek_jax.data import DataConfig, DataError, Tokenizer, TokenizerConfig, make_tokenizer, train_documents
from deepseek_jax.data.fim import cut, rearrange, restore
from deepseek_jax.data.pipeline import train_rows
from tests.data.conftest import document_text
from tests.data.test_rows import all_documents

FIM = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")


def learn(backend: tokenizers.Tokenizer, specials: list[str], **options) -> tokenizers.Tokenizer:
    trainer = trainers.BpeTrainer(special_tokens=specials, show_progress=False, **options)
    backend.train_from_iterator((document_text(i) for i in range(60)), trainer)
    return backend


def byte_level(*specials: str, vocab_size: int = 340) -> tokenizers.Tokenizer:
    """GPT-2's kind: bytes as letters; and, as many files have it, padding, truncation and specials around a text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learn(backend, list(specials), vocab_size=vocab_size, initial_alphabet=alphabet)
    backend.enable_truncation(5)
    backend.enable_padding(length=9, pad_token=specials[0])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{specials[0]} $A", special_tokens=[(specials[0], 0)]
    )
    return backend


def metaspace(place: str) -> tokenizers.Tokenizer:
    """Llama's kind: ▁ for a blank, one more before the text, and bytes for characters that the vocabulary lacks.

    Files have the blank before the text either from the normalizer or from the pre-tokenizer.
    """
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if place == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    learn(backend, ["<unk>", "<s>", "</s>", *pieces], vocab_size=400, limit_alphabet=60)
    spec = json.loads(backend.to_str())  # the bytes are tokens of the model, and no special ones
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in pieces]
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def loaded(backend: tokenizers.Tokenizer, folder) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Tokenizer:
    return loaded(byte_level("<|endoftext|>", *FIM), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module", params=["normalizer", "pre_tokenizer"])
def llama(request, tmp_path_factory) -> Tokenizer:
    return loaded(metaspace(request.param), tmp_path_factory.mktemp("llama"))


TEXTS = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="▁"), max_size=100)  # ▁ is Llama's blank
CODE = "def f(x):\n\treturn x  # Größe 你好 👩‍👩‍👧\r\n\r\n"


@given(text=TEXTS)
@example(text=CODE)
@example(text="<|endoftext|><fim_prefix>")
def test_a_byte_level_text_comes_back_byte_for_byte(gpt2, text):
    tokens = gpt2.encode(text)
    assert gpt2.decode(tokens) == text
    assert not set(tokens.tolist()) & gpt2.special_ids
    assert gpt2.byte_lengths[tokens].sum() == len(text.encode())


@given(text=TEXTS)
@example(text=CODE)
@example(text="</s><s><unk><0x41>")
@example(text=" x")
@example(text="x")
def test_a_metaspace_text_comes_back_without_a_blank_before_it(llama, text):
    tokens = llama.encode(text)
    assert llama.decode(tokens) == text
    assert not set(tokens.tolist()) & llama.special_ids
    assert llama.byte_lengths[tokens].sum() == len(llama.decode(tokens).encode())


def blank_first(kind: str) -> tokenizers.Tokenizer:
    """A file of each kind that puts a blank before a text, with StarCoder's names for fill-in-the-middle."""
    if kind != "byte-level":
        backend = metaspace(kind)
        backend.add_special_tokens(list(FIM))
        return backend
    backend = byte_level("</s>", *FIM)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend


@pytest.mark.parametrize("kind", ["normalizer", "pre_tokenizer", "byte-level"])
def test_no_part_of_a_rearranged_document_has_a_blank_of_the_file(kind, tmp_path):
    tokenizer = loaded(blank_first(kind), tmp_path)
    for seed in range(20):
        prefix, middle, suffix = cut(CODE, np.random.default_rng(seed))
        tokens = rearrange(CODE, tokenizer, np.random.default_rng(seed))
        assert tokenizer.decode(tokens) == f"{FIM[0]}{prefix}{FIM[2]}{suffix}{FIM[1]}{middle}"


@pytest.mark.parametrize("kind", ["normalizer", "pre_tokenizer", "byte-level"])
def test_a_saved_file_gives_other_tools_the_same_tokens_without_the_blank(kind, tmp_path):
    """And has another fingerprint than the file with the blank: what was tokenized so is no part of such a run."""
    backend = blank_first(kind)
    tokenizer = loaded(backend, tmp_path)
    assert tokenizer.fingerprint() != fingerprint_of_file(backend)
    tokenizer.save(tmp_path / "saved.json")
    assert Tokenizer.load(tmp_path / "saved.json").fingerprint() == tokenizer.fingerprint()
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "saved.json"))
    for text in ("x", " x", "  x y", CODE):
        ids = other.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer.encode(text).tolist()
        assert other.decode(ids) == text


CODER = ("<｜User｜>", "<｜Assistant｜>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<think>", "</think>")


def coder() -> tokenizers.Tokenizer:
    """DeepSeek-Coder's kind: words in the file are control tokens by their names, and others are ordinary letters."""
    backend = byte_level("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
    backend.no_padding()
    backend.no_truncation()
    backend.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False) for name in (*CODER, "õ")])
    return backend


def fingerprint_of_file(backend: tokenizers.Tokenizer) -> str:
    """Of a run's tokenizer as every version has saved it: what the file says, and nothing that was made of it."""
    backend.no_padding()
    backend.no_truncation()
    content = json.dumps(json.loads(backend.to_str()), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def test_text_does_not_turn_into_tokens_that_a_file_marks_as_words(tmp_path):
    tokenizer = loaded(coder(), tmp_path)
    roles = ("user", "assistant", "fim_begin", "fim_hole", "fim_end", "think_begin", "think_end")
    ids = [getattr(tokenizer, f"{role}_id") for role in roles]
    assert tokenizer.special_ids == {tokenizer.bos_id, tokenizer.eos_id, *ids}
    text = "a<think>b" + "".join(CODER)
    tokens = tokenizer.encode(text)
    assert not set(tokens.tolist()) & tokenizer.special_ids
    assert tokenizer.decode(tokens, skip_specials=True) == text
    assert tokenizer.byte_lengths[tokens].sum() == len(text.encode())
    assert tokenizer.decode(ids) == "".join(CODER)
    assert tokenizer.decode(ids, skip_specials=True) == ""
    assert not tokenizer.byte_lengths[ids].any()


def test_letters_among_the_added_tokens_stay_letters(tmp_path):
    tokenizer = loaded(coder(), tmp_path)
    (letter,) = tokenizer.encode("õ")
    assert letter not in tokenizer.special_ids
    assert tokenizer.byte_lengths[letter] == 2
    assert tokenizer.decode([letter], skip_specials=True) == "õ"


def test_a_run_of_a_file_that_marks_specials_as_words_resumes(tmp_path):
    """Checkpoints hold the fingerprint that older versions gave the file, and its copy in the run's folder has it."""
    tokenizer = loaded(coder(), tmp_path)
    assert tokenizer.fingerprint() == fingerprint_of_file(coder())
    tokenizer.save(tmp_path / "kept.json")
    assert json.loads((tmp_path / "kept.json").read_text()) == json.loads(coder().to_str())
    kept = Tokenizer.load(tmp_path / "kept.json")
    assert kept.fingerprint() == tokenizer.fingerprint()
    assert kept.special_ids == tokenizer.special_ids


def test_special_tokens_of_the_families_are_found(gpt2, llama):
    assert (gpt2.bos_id, gpt2.eos_id, gpt2.pad_id) == (None, 0, 0)
    assert (gpt2.fim_begin_id, gpt2.fim_end_id, gpt2.fim_hole_id) == (1, 2, 3)
    assert (llama.bos_id, llama.eos_id, llama.pad_id, llama.fim_begin_id) == (1, 2, 2, None)
    assert llama.special_ids == {0, 1, 2}


@pytest.fixture(scope="module")
def one_epoch(config) -> DataConfig:
    return dataclasses.replace(config, epochs=1, split_combined_rate=1.0)


def test_rows_of_a_byte_level_vocabulary_hold_the_text(one_epoch, gpt2):
    """Without a beginning-of-sentence token, as GPT-2 has it, and rearranged with StarCoder's names."""
    data = dataclasses.replace(one_epoch, add_bos=False, fim_rate=0.5, virtual_shards=1)
    rows, iterator = [], train_rows(data, gpt2, seed=0)
    while not iterator.exhausted:
        rows.append(iterator.next_batch(1))
    stream = np.concatenate([row["tokens"][row["loss_mask"] == 1] for row in rows])
    documents = np.split(stream, np.flatnonzero(stream == gpt2.eos_id) + 1)[:-1]
    texts = [gpt2.decode(restore(document[:-1], gpt2)) for document in documents]
    assert sorted(texts) == sorted(document.text for document in train_documents(data))
    assert 10 < sum(document[0] == gpt2.fim_begin_id for document in documents) < 45


def test_rows_of_a_metaspace_vocabulary_hold_the_text(one_epoch, llama):
    data = dataclasses.replace(one_epoch, fim_rate=0.0)
    found = sorted(llama.decode(tokens) for tokens in all_documents(data, llama))
    assert found == sorted(document.text for document in train_documents(data))


@pytest.mark.parametrize(
    ("specials", "message"),
    [
        (("[CLS]", "[SEP]"), r"the vocabulary lacks the special token eos \(.+\); every document ends with it"),
        (("<s>", "[SEP]"), r"the vocabulary lacks the special token eos \(.+\); every document ends with it"),
        (
            ("[CLS]", "</s>"),
            r"the vocabulary lacks the special token bos \(.+\); set data\.add_bos=false to go without",
        ),
    ],
)
def test_a_vocabulary_without_begin_or_end_is_refused_in_one_line(tmp_path, specials, message):
    """Before a run has made anything."""
    path, texts = tmp_path / "tokenizer.json", tmp_path / "texts"
    byte_level(*specials, vocab_size=VOCABULARY).save(str(path))
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(document_text(number))
    run = experiment(texts, tokenizer=TokenizerConfig(path=path))
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, fim_rate=0.0))
    with pytest.raises(DataError, match=rf"^{path}: {message}$") as refused:
        train(run, tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_run_trains_with_a_foreign_vocabulary_and_keeps_it(tmp_path):
    source, texts = tmp_path / "tokenizer.json", tmp_path / "texts"
    byte_level("<|endoftext|>", "<|begin_of_text|>", *FIM, vocab_size=VOCABULARY).save(str(source))
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(document_text(number))
    base = experiment(texts, tokenizer=TokenizerConfig(path=source))
    short = dataclasses.replace(base.schedule, total_tokens=4 * base.data.sequence_length)
    with quick_runs():
        result, _ = train(dataclasses.replace(base, schedule=short), tmp_path / "run")
    assert (result.status, result.step) == ("done", 2)
    assert result.heldout_bits_per_byte > 0
    kept = make_tokenizer(TokenizerConfig(path=tmp_path / "run"), base.data)
    assert kept.fingerprint() == Tokenizer.load(source).fingerprint()
