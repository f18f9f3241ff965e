"""Folders in and out: exact whatever the dtype, whole or not at all, and one clear line for what cannot be used."""

import errno
import json
import os
from types import SimpleNamespace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hf_folder import BFLOAT16, assert_same_tensors, random_tensors, read_tensors, write_folder, write_tensors
from small_model import small

import deepseek_jax as ds
from deepseek_jax.config import ConfigError
from deepseek_jax.data.tokenizer import train_tokenizer
from deepseek_jax.interop.errors import InteropError
from deepseek_jax.interop.fp8 import dequantise
from deepseek_jax.interop.huggingface import HuggingFaceFolder
from deepseek_jax.interop.quantization import Quantization
from deepseek_jax.interop.save import save

ODD = small(
    hidden_size=200,
    dense_ffn_size=150,
    attention={"num_heads": 3, "qk_nope_head_dim": 40, "qk_rope_head_dim": 24, "v_head_dim": 50, "kv_lora_rank": 130},
    moe={"expert_ffn_size": 70, "num_shared_experts": 2},
)
"""No size is a multiple of 128, several exceed it, and heads of 64 rows put rotary rows into every block."""
FP8 = Quantization()
UE8M0 = Quantization(scale_format="ue8m0")


def saved(folder, target, **options):
    with HuggingFaceFolder(folder) as source:
        save(source, target, config=source.config, progress=False, **options)
    return target


# --- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fp8", "e8m0"), [(None, False), (FP8, False), (UE8M0, False), (UE8M0, True)], ids=["bf16", "fp8", "ue8m0", "e8m0"]
)
def test_what_is_kept_is_kept_bit_for_bit(tmp_path, fp8, e8m0):
    """MTP, its copies, float32 biases, scales: all of it, in shards of another size."""
    folder = write_folder(tmp_path / "a", ODD, fp8=fp8, e8m0=e8m0)
    out = saved(folder, tmp_path / "b", shard_bytes=100_000)
    assert len(list(out.glob("*.safetensors"))) > 3
    assert_same_tensors(folder, out)
    assert json.loads((out / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_fp8_weights_are_decoded_in_their_own_order_of_rows(tmp_path):
    """A block of 128 rows holds rotary rows of several heads, which change places only after they were scaled."""
    folder = write_folder(tmp_path / "a", ODD, fp8=FP8)
    tensors = read_tensors(folder)
    name = "model.layers.1.self_attn.q_b_proj.weight"
    theirs = dequantise(tensors[name], tensors[f"{name}_scale_inv"], np.float32)
    model = ds.load(folder, dtype="float32", progress=False).model
    ours = np.asarray(model.moe.attention.q_b.weight[...])[0].T
    half_split = [40 + i for i in (*range(0, 24, 2), *range(1, 24, 2))]
    rows = np.array([64 * head + row for head in range(3) for row in (*range(40), *half_split)])
    np.testing.assert_array_equal(ours, theirs[rows])


@pytest.mark.parametrize("precision", ["bfloat16", "fp8", "fp8_ue8m0"])
def test_a_folder_computes_the_same_from_fp8_and_from_what_it_decodes_to(tmp_path, precision):
    folder = write_folder(tmp_path / "a", ODD, fp8=UE8M0)  # decoded to BF16 without rounding
    out = saved(folder, tmp_path / "b", precision=precision)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    first, second = (ds.load(each, dtype="float32", progress=False)(tokens) for each in (folder, out))
    np.testing.assert_array_equal(first, second)


def test_precisions_give_each_tensor_its_dtype(tmp_path):
    folder = write_folder(tmp_path / "a", ODD)
    bias, norm, weight = (
        f"model.layers.1.{name}"
        for name in ("mlp.gate.e_score_correction_bias", "input_layernorm.weight", "self_attn.o_proj.weight")
    )
    expected = {
        "bfloat16": ("float32", "bfloat16", "bfloat16"),
        "float16": ("float32", "float16", "float16"),
        "float32": ("float32", "float32", "float32"),
        "fp8": ("float32", "bfloat16", "float8_e4m3fn"),
    }
    for precision, dtypes in expected.items():
        out = saved(folder, tmp_path / precision, precision=precision)
        tensors = read_tensors(out)
        assert tuple(tensors[name].dtype.name for name in (bias, norm, weight)) == dtypes
        config = json.loads((out / "config.json").read_text())
        assert config["torch_dtype"] == ("bfloat16" if precision == "fp8" else precision)
        assert ("quantization_config" in config) == (precision == "fp8")
        unscaled = ("embed_tokens", "lm_head", "norm", "gate.weight", "eh_proj", "shared_head")
        if precision == "fp8":
            assert not [name for name in tensors if name.endswith("_scale_inv") and any(u in name for u in unscaled)]


def test_fp8_with_other_scales_is_made_anew(tmp_path):
    out = saved(write_folder(tmp_path / "a", ODD, fp8=FP8), tmp_path / "b", precision="fp8_ue8m0")
    scales = [array for name, array in read_tensors(out).items() if name.endswith("_scale_inv")]
    assert scales
    assert all((np.log2(array) % 1 == 0).all() for array in scales)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, BFLOAT16], ids=["float16", "float32", "bfloat16"])
def test_plain_dtypes_load_as_they_are(tmp_path, dtype):
    folder = write_folder(tmp_path / "a", ODD, dtype=dtype)
    model = ds.load(folder, progress=False).model
    weight, norm, bias = model.head.weight, model.final_norm.scale, model.moe.ffn.router.bias
    assert (weight[...].dtype, norm[...].dtype, bias[...].dtype) == (dtype, jnp.float32, jnp.float32)
    np.testing.assert_array_equal(np.asarray(weight[...]), read_tensors(folder)["lm_head.weight"].T)


def test_half_split_rows_are_written_as_such(tmp_path):
    """Also where no config.json to start from says so."""
    folder = write_folder(tmp_path / "a", small(), config={"rope_interleave": False})
    with HuggingFaceFolder(folder) as source:
        save(source, tmp_path / "b", progress=False)
    assert_same_tensors(folder, tmp_path / "b")
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    first, second = (np.asarray(ds.load(each, progress=False)(tokens)) for each in (folder, tmp_path / "b"))
    np.testing.assert_array_equal(first, second)


def test_what_else_a_config_says_of_its_fp8_is_kept(tmp_path):
    folder = write_folder(tmp_path / "a", small(), fp8=FP8)
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] |= {"modules_to_not_convert": ["lm_head"], "scale_fmt": "float"}
    (folder / "config.json").write_text(json.dumps(document))
    kept = json.loads((saved(folder, tmp_path / "b") / "config.json").read_text())
    assert kept["quantization_config"] == document["quantization_config"]
    other = json.loads((saved(folder, tmp_path / "c", precision="fp8_ue8m0") / "config.json").read_text())
    assert other["quantization_config"]["scale_fmt"] == "ue8m0"


@pytest.mark.parametrize("dtype", ["int8", "bool", "float8_e4m3fn", "float64", "half a dozen"])
def test_a_dtype_that_weights_cannot_have(tmp_path, dtype):
    with pytest.raises(ConfigError, match=f"^dtype must be one of bfloat16, float16, float32, not .*{dtype}"):
        ds.load(write_folder(tmp_path / "a", small()), dtype=dtype, progress=False)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = write_folder(tmp_path / "a", small())
    train_tokenizer(["hello"], vocab_size=276).save(folder / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"tokenizer\.json has 276 tokens, and the model's vocab_size is 64"):
        ds.load(folder, progress=False)


def test_a_tied_head_is_no_tensor(tmp_path):
    model = small(tie_embeddings=True)
    folder = write_folder(tmp_path / "a", model)
    names = read_tensors(folder).keys()
    assert "lm_head.weight" not in names
    assert "model.layers.3.shared_head.head.weight" in names
    assert ds.load(folder, progress=False)(np.arange(6)[None]).shape == (1, 6, 64)


def test_mtp_that_the_config_names_and_the_folder_lacks_is_left_out(tmp_path):
    """`transformers` saves it so."""
    folder = write_folder(tmp_path / "a", small(mtp_depth=0), config={"num_nextn_predict_layers": 1})
    assert ds.load(folder, progress=False).config.mtp_depth == 0


def test_buffers_that_follow_from_the_config_are_passed_over(tmp_path):
    tensors = random_tensors(small(mtp_depth=0))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    folder = write_folder(tmp_path / "a", small(mtp_depth=0))
    (folder / "model.safetensors").unlink()
    write_tensors(folder, tensors)
    assert ds.load(folder, progress=False).config.mtp_depth == 0


# --- refused --------------------------------------------------------------------------------------------------------


def changed(tmp_path, change, *, model=None, fp8=None):
    """A folder after `change` was made to its tensors."""
    model = model or small()
    folder = write_folder(tmp_path / "bad", model, fp8=fp8)
    (folder / "model.safetensors").unlink()
    tensors = random_tensors(model, fp8=fp8)
    change(tensors)
    write_tensors(folder, tensors)
    return folder


O_PROJ = "model.layers.1.self_attn.o_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
REFUSED = {
    "missing": (lambda t: t.pop(EXPERT), f"1 tensor is missing: {EXPERT}"),
    "missing_bias": (
        lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias"),
        "1 tensor is missing: model.layers.1.mlp.gate.e_score_correction_bias",
    ),
    "part_of_mtp": (lambda t: t.pop("model.layers.3.eh_proj.weight"), "is missing: model.layers.3.eh_proj.weight"),
    "left_over": (lambda t: t.update(extra=np.ones(3, np.float32)), "1 tensor is left over: extra"),
    "layer_too_many": (
        lambda t: t.update({O_PROJ.replace(".1.", ".7."): t[O_PROJ]}),
        "1 tensor is left over: model.layers.7.self_attn.o_proj.weight",
    ),
    "transposed": (
        lambda t: t.update({O_PROJ: np.ascontiguousarray(t[O_PROJ].T)}),
        rf"1 tensor is of another shape: {O_PROJ} \[16, 24\], not \[24, 16\]",
    ),
    "integers": (
        lambda t: t.update({O_PROJ: t[O_PROJ].astype(np.int8)}),
        rf"1 tensor is of an unexpected dtype: {O_PROJ} \(int8, not float32, bfloat16, float16",
    ),
    "e5m2": (
        lambda t: t.update({O_PROJ: t[O_PROJ].astype(ml_dtypes.float8_e5m2)}),
        rf"unexpected dtype: {O_PROJ} \(float8_e5m2",
    ),
    "experts_of_two_dtypes": (
        lambda t: t.update({EXPERT: t[EXPERT].astype(np.float32)}),
        rf"unexpected dtype: {EXPERT} \(float32, but model.layers.2.mlp.experts.0.gate_proj.weight is bfloat16",
    ),
    "fp8_without_scales": (
        lambda t: t.update({O_PROJ: t[O_PROJ].astype(ml_dtypes.float8_e4m3fn)}),
        f"1 tensor is missing: {O_PROJ}_scale_inv",
    ),
    "fp8_embedding": (
        lambda t: t.update({EMBEDDING: t[EMBEDDING].astype(ml_dtypes.float8_e4m3fn)}),
        r"model.embed_tokens.weight \(float8_e4m3fn, but only linear layers can be FP8\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_folder_that_is_not_the_model_is_refused(tmp_path, change, message):
    folder = changed(tmp_path, change)
    with pytest.raises(InteropError, match=message) as told:
        ds.load(folder, progress=False)
    assert str(folder) in str(told.value)
    assert "\n" not in str(told.value)


FP8_REFUSED = {
    "scale_shape": (
        lambda t: t.update({f"{O_PROJ}_scale_inv": np.ones((2, 1), np.float32)}),
        rf"of another shape: {O_PROJ}_scale_inv \[2, 1\], not \[1, 1\]",
    ),
    "scale_dtype": (
        lambda t: t.update({f"{O_PROJ}_scale_inv": np.ones((1, 1), np.int32)}),
        rf"unexpected dtype: {O_PROJ}_scale_inv \(int32, not float32",
    ),
    "scales_of_two_dtypes": (
        lambda t: t.update({f"{EXPERT}_scale_inv": t[f"{EXPERT}_scale_inv"].astype(BFLOAT16)}),
        rf"{EXPERT}_scale_inv \(bfloat16, but model.layers.2.mlp.experts.0.gate_proj.weight_scale_inv is float32\)",
    ),
    "scale_without_codes": (
        lambda t: t.update({O_PROJ: t[O_PROJ].astype(BFLOAT16)}),
        f"left over: {O_PROJ}_scale_inv",
    ),
}


@pytest.mark.parametrize(("change", "message"), FP8_REFUSED.values(), ids=FP8_REFUSED)
def test_scales_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(InteropError, match=message):
        ds.load(changed(tmp_path, change, fp8=FP8), progress=False)


def test_every_kind_of_difference_is_named_at_once(tmp_path):
    def change(tensors):
        tensors["extra"] = tensors.pop(EXPERT)
        for layer in range(3):
            del tensors[f"model.layers.{layer}.self_attn.q_a_proj.weight"]
            del tensors[f"model.layers.{layer}.self_attn.q_b_proj.weight"]

    with pytest.raises(InteropError, match=r"7 tensors are missing: .* and 2 more; 1 tensor is left over: extra"):
        ds.load(changed(tmp_path, change), progress=False)


def test_an_mtp_embedding_of_its_own_is_refused(tmp_path):
    """The architecture shares it; to drop one of two would be to change the model."""

    def change(tensors):
        copy = tensors["model.layers.3.embed_tokens.weight"].copy()
        copy[17, 3] += 1
        tensors["model.layers.3.embed_tokens.weight"] = copy

    message = "model.layers.3.embed_tokens.weight differs from model.embed_tokens.weight"
    with pytest.raises(InteropError, match=message):
        ds.load(changed(tmp_path, change), progress=False)


def test_copies_may_be_left_out(tmp_path):
    def change(tensors):
        del tensors["model.layers.3.embed_tokens.weight"], tensors["model.layers.3.shared_head.head.weight"]

    assert ds.load(changed(tmp_path, change), progress=False).config.mtp_depth == 1


def test_a_missing_shard_and_a_short_one(tmp_path):
    folder = write_folder(tmp_path / "a", small(), shard_bytes=20_000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    with pytest.raises(InteropError, match=f"{shard.name}.*truncated"):
        ds.load(folder, progress=False)
    shard.unlink()
    with pytest.raises(InteropError, match=shard.name):
        ds.load(folder, progress=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is no JSON"),
        ("[]", "is no JSON object"),
        ("[" * 100_000, "is no JSON"),
        ('{"model_type": "llama"}', "unknown architecture llama"),
    ],
)
def test_a_config_that_cannot_be_used(tmp_path, content, message):
    folder = write_folder(tmp_path / "a", small())
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(InteropError, match=message):
        ds.load(folder, progress=False)


def test_code_in_a_folder_is_never_run(tmp_path):
    folder = write_folder(tmp_path / "a", small(), config={"auto_map": {"AutoConfig": "evil.Config"}})
    (folder / "evil.py").write_text("raise SystemExit('run')\n")
    (folder / "__init__.py").write_text("raise SystemExit('run')\n")
    assert ds.load(folder, progress=False).config.hidden_size == small().hidden_size


# --- whole or not at all --------------------------------------------------------------------------------------------


def test_an_existing_folder_is_not_touched(tmp_path):
    folder = write_folder(tmp_path / "a", small())
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        saved(folder, tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "a", small())
    real, calls = os.pwrite, iter(range(100))

    def full(*arguments):
        if next(calls) > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        saved(folder, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_disk_without_room_is_noticed_first(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "a", small())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(InteropError, match=r"0\.0 GB free, and .* to be written"):
        saved(folder, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_precision_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="keep, bfloat16, float16, float32, fp8, fp8_ue8m0, not 'int4'"):
        saved(write_folder(tmp_path / "a", small()), tmp_path / "b", precision="int4")


def test_numbers_that_a_precision_has_not_are_refused(tmp_path):
    def large(tensors):
        tensors[O_PROJ][3, 4] = 1e6

    folder = changed(tmp_path, large)
    with pytest.raises(InteropError, match=f"{O_PROJ} has values beyond float16's 65,504; write bfloat16 or float32"):
        saved(folder, tmp_path / "half", precision="float16")
    saved(folder, tmp_path / "fp8", precision="fp8")
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_has_no_scale(tmp_path, value):
    def spoil(tensors):
        tensors[O_PROJ][3, 4] = value

    with pytest.raises(InteropError, match=f"{O_PROJ} has values that are not finite, which have no scale"):
        saved(changed(tmp_path, spoil), tmp_path / "fp8", precision="fp8")


def test_codes_are_made_for_blocks_of_128_alone(tmp_path):
    """Folders with others are read; what is not FP8 in them cannot become so in their blocks."""

    def one_in_bfloat16(tensors):
        tensors[O_PROJ] = tensors[O_PROJ].astype(BFLOAT16)
        del tensors[f"{O_PROJ}_scale_inv"]

    folder = changed(tmp_path, one_in_bfloat16, fp8=Quantization(block=(64, 64)))
    message = f"{O_PROJ} is not FP8, and codes are made for blocks of 128x128 alone, not 64x64 as the others'"
    with pytest.raises(InteropError, match=message):
        saved(folder, tmp_path / "fp8", precision="fp8")
    out = saved(folder, tmp_path / "powers", precision="fp8_ue8m0")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["weight_block_size"] == [128, 128]
    assert read_tensors(out)[O_PROJ].dtype == ml_dtypes.float8_e4m3fn


@pytest.mark.parametrize("wanted", [True, False])
def test_a_text_begins_as_the_folder_says(tmp_path, wanted):
    """DeepSeek's tokenizer.json puts nothing before a text; `add_bos_token` beside it does."""
    folder = write_folder(tmp_path / "a", small(vocab_size=300))
    train_tokenizer(["some words"], vocab_size=280).save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": wanted}))
    model = ds.load(folder, progress=False)
    bos, plain = model.tokenizer.bos_id, model.tokenizer.encode("words").tolist()
    assert model.encode("words") == ([bos, *plain] if wanted else plain)


def test_one_prompt_of_token_ids_is_not_several(tmp_path):
    model = ds.load(write_folder(tmp_path / "a", small()), progress=False)
    with pytest.raises(ValueError, match=r"this is one of token ids: put it into a list, \[\[1, 2, 3\]\]"):
        ds.generate(model, [1, 2, 3])
