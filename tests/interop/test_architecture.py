"""`config.json` and `ModelConfig` say the same, both ways, and what cannot be said is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from deepseek_jax import zoo
from deepseek_jax.config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig
from deepseek_jax.interop.architecture import read_architecture, rope_interleaved, write_architecture
from deepseek_jax.interop.errors import InteropError
from deepseek_jax.interop.quantization import Quantization, read_quantization, write_quantization
from deepseek_jax.model.rope import rope_frequencies, rope_tables, softmax_scale

COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "ep_size": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
}
V3 = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
KIMI_K2 = V3 | {
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": V3["rope_scaling"] | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
V2_LITE = COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-06,
    "rope_scaling": V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
V2 = V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
MOONLIGHT = {name: value for name, value in V2_LITE.items() if name != "rope_scaling"} | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "vocab_size": 163840,
}
FILES = {
    "v3": (V3, zoo.deepseek_v3(long_context=True)),
    "kimi_k2": (KIMI_K2, zoo.kimi_k2(long_context=True)),
    "v2": (V2, zoo.deepseek_v2(long_context=True)),
    "v2_lite": (V2_LITE, zoo.deepseek_v2_lite(long_context=True)),
    "moonlight": (MOONLIGHT, zoo.moonlight_16b_a3b()),
}
MODELS = {
    **{name: model for name, (_, model) in FILES.items()},
    "v3_short": zoo.deepseek_v3(),
    "v2_short": zoo.deepseek_v2(),
    "kimi_short": zoo.kimi_k2(),
    **{make.__name__: make() for make in (zoo.tiny, zoo.small, zoo.bench)},
}
PLAIN = {name: value for name, value in V3.items() if name not in ("rope_scaling", "rope_theta")}
NEWER_ROPE = {"rope_parameters": V3["rope_scaling"] | {"rope_type": "yarn", "rope_theta": 10000}}
NEWER = PLAIN | NEWER_ROPE
files = pytest.mark.parametrize(("file", "model"), FILES.values(), ids=FILES)


def without(values: dict, *names: str) -> dict:
    return {name: value for name, value in values.items() if name not in names}


@st.composite
def models(draw) -> ModelConfig:
    """Any model that one of the two families has."""
    size = st.integers(1, 40)
    positive = st.floats(1e-6, 1e6)
    sigmoid = draw(st.booleans())
    num_groups, per_group = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    kept = draw(st.integers(1, num_groups))
    layers = draw(size)
    fast = draw(st.floats(1, 64))
    yarn = YarnConfig(
        factor=draw(st.floats(1, 100)),
        original_length=draw(st.integers(1, 10_000)),
        beta_fast=fast,
        beta_slow=draw(st.floats(0.5, fast)),
        **draw(
            st.sampled_from(
                [{}, {"mscale": 0.707, "mscale_all_dim": 0.707}, {"mscale_all_dim": 0.8}, {"mscale_all_dim": 0.0}]
            )
        ),
    )
    return ModelConfig(
        vocab_size=draw(size),
        hidden_size=draw(size),
        num_layers=layers,
        num_dense_layers=draw(st.integers(0, layers)),
        dense_ffn_size=draw(size),
        attention=AttentionConfig(
            num_heads=draw(size),
            q_lora_rank=draw(st.none() | size),
            kv_lora_rank=draw(size),
            qk_nope_head_dim=draw(size),
            qk_rope_head_dim=2 * draw(size),
            v_head_dim=draw(size),
            rope_theta=draw(positive),
            yarn=draw(st.none() | st.just(yarn)),
        ),
        moe=MoEConfig(
            num_experts=num_groups * per_group,
            num_shared_experts=draw(st.integers(0, 3)),
            experts_per_token=draw(st.integers(1, kept * per_group)),
            expert_ffn_size=draw(size),
            num_groups=num_groups,
            groups_per_token=kept,
            score_function="sigmoid" if sigmoid else "softmax",
            group_score="top2_sum" if sigmoid else "max",
            normalize_weights=draw(st.booleans()) if sigmoid else False,
            routed_scale=draw(positive),
            use_bias=sigmoid,
        ),
        mtp_depth=draw(st.integers(0, 2)) if sigmoid else 0,
        rms_norm_eps=draw(positive),
        init_std=draw(positive),
        tie_embeddings=draw(st.booleans()),
    )


@files
def test_the_released_files_are_the_models_of_the_zoo(file, model):
    assert read_architecture(file) == dataclasses.replace(model, init_std=0.02)
    assert rope_interleaved(file)


@files
def test_writing_over_a_file_what_it_says_changes_nothing(file, model):
    before = copy.deepcopy(file)
    written = write_architecture(read_architecture(file), base=file)
    assert written == file == before
    assert json.dumps(written, sort_keys=True) == json.dumps(file, sort_keys=True)  # 40 stays 40, and not 40.0


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": without(V3["rope_scaling"], "type") | {"rope_type": "yarn", "truncate": True}},
        {"rope_scaling": V3["rope_scaling"] | {"rope_type": "yarn"}},
        NEWER_ROPE,
        NEWER_ROPE | {"rope_theta": 10000},
    ],
)
def test_the_spelling_of_the_rotation_is_kept(rope):
    file = (V3 if "rope_scaling" in rope else PLAIN) | rope
    assert json.dumps(write_architecture(read_architecture(file), base=file)) == json.dumps(file)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_is_written_reads_back(model):
    assert read_architecture(json.loads(json.dumps(write_architecture(model)))) == model


@given(models())
def test_any_model_reads_back(model):
    assert read_architecture(json.loads(json.dumps(write_architecture(model)))) == model


@given(models(), st.sampled_from([V3, V2]), st.booleans(), st.sampled_from([{}, {"rope_theta": 10000}]))
def test_any_model_reads_back_over_the_file_of_another_of_its_family(model, base, newer, theta):
    if newer:
        base = without(base, "rope_scaling", "rope_theta") | {"rope_parameters": {"rope_type": "default"}} | theta
    if (model.moe.score_function == "sigmoid") == (base["model_type"] == "deepseek_v3"):
        written = write_architecture(model, base=base)
        assert read_architecture(json.loads(json.dumps(written))) == model
        assert ("rope_parameters" in written, "rope_scaling" in written) == (newer, not newer)
        assert written["bos_token_id"] == base["bos_token_id"]
    else:
        with pytest.raises(InteropError, match=r"is a deepseek_v., which has no .* router: start from a deepseek_v"):
            write_architecture(model, base=base)


def test_groups_that_are_all_kept_need_no_rank_and_are_written_as_one():
    moe = MoEConfig(num_experts=4, experts_per_token=2, num_groups=4, groups_per_token=4, group_score="max")
    written = write_architecture(ModelConfig(moe=moe))
    assert (written["n_group"], written["topk_group"]) == (1, 1)
    assert read_architecture(written).moe == dataclasses.replace(
        moe, num_groups=1, groups_per_token=1, group_score="top2_sum"
    )


def test_how_far_positions_reach():
    long, short = zoo.deepseek_v3(long_context=True), zoo.deepseek_v3()
    assert write_architecture(long)["max_position_embeddings"] == 163_840
    assert write_architecture(short)["max_position_embeddings"] == 4096
    assert write_architecture(short, max_position_embeddings=512)["max_position_embeddings"] == 512
    assert write_architecture(zoo.moonlight_16b_a3b(), base=MOONLIGHT)["max_position_embeddings"] == 8192
    assert write_architecture(short, base=V3)["max_position_embeddings"] == 4096
    assert write_architecture(short, base=V3)["rope_scaling"] is None


@pytest.mark.parametrize(
    "file",
    [
        NEWER,
        NEWER | {"rope_theta": 10000},
        V3 | NEWER_ROPE,
        V3 | {"rope_scaling": without(V3["rope_scaling"], "type") | {"rope_type": "yarn"}},
        V3 | {"rope_scaling": without(V3["rope_scaling"], "beta_fast", "beta_slow")},
        V3 | {"rope_scaling": V3["rope_scaling"] | {"attention_factor": 1.0, "truncate": True}},
        V3 | {"model_type": None},
        without(V3, "model_type"),
        without(V3, "architectures"),
        without(V3, "scoring_func", "topk_method", "norm_topk_prob", "n_group", "topk_group", "moe_layer_freq"),
        without(V3, "routed_scaling_factor", "first_k_dense_replace", "rope_theta", "rms_norm_eps", "hidden_act"),
        without(V3, "initializer_range", "tie_word_embeddings", "num_key_value_heads", "attention_bias"),
        without(V3, "num_nextn_predict_layers") | {"num_mtp_layers": 1},
        V3 | {"sliding_window": None, "layer_types": ["full_attention"] * 61, "index_topk": None},
    ],
)
def test_other_spellings_of_v3(file):
    assert read_architecture(file) == read_architecture(V3)


@pytest.mark.parametrize(
    "file",
    [
        V2_LITE | {"q_lora_rank": 0},
        V2_LITE | {"n_group": None, "topk_group": None},
        without(V2_LITE, "n_group", "topk_group", "topk_method", "scoring_func", "norm_topk_prob"),
        V2_LITE | {"topk_method": "group_limited_greedy"},
    ],
)
def test_other_spellings_of_v2_lite(file):
    assert read_architecture(file) == read_architecture(V2_LITE)


def test_greedy_keeps_every_group():
    moe = read_architecture(V2 | {"topk_method": "greedy"}).moe
    assert (moe.num_groups, moe.groups_per_token) == (8, 8)


def test_a_file_without_experts_is_dense():
    file = without(V3, "moe_intermediate_size") | {"n_routed_experts": None, "num_nextn_predict_layers": 0}
    model = read_architecture(file)
    assert model.num_dense_layers == model.num_layers == 61
    assert read_architecture(write_architecture(model, base=file)) == model
    assert read_architecture(V3 | {"n_shared_experts": None}).moe.num_shared_experts == 0
    few = V3 | {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}
    assert read_architecture(few).num_dense_layers == read_architecture(few).num_layers == 2


def test_no_mtp_where_a_file_names_none():
    assert read_architecture(without(V3, "num_nextn_predict_layers")).mtp_depth == 0


def test_yarn_without_mscales_scales_the_rotation_and_not_the_scores():
    file = V3 | {"rope_scaling": without(V3["rope_scaling"], "mscale", "mscale_all_dim")}
    attention = read_architecture(file).attention
    assert (attention.yarn.mscale, attention.yarn.mscale_all_dim) == (1, 0)
    assert softmax_scale(attention) == pytest.approx(192**-0.5)
    np.testing.assert_allclose(rope_tables(attention, np.zeros(1))[0], 1.36889, rtol=1e-5)
    factor = {"attention_factor": 0.1 * np.log(40) + 1}
    assert read_architecture(V3 | {"rope_scaling": file["rope_scaling"] | factor}).attention == attention


def yarn(**changes) -> dict:
    return {"rope_scaling": V3["rope_scaling"] | changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "^x.json: unknown architecture llama; supported: deepseek_v2, deepseek_v3, kimi_k2$"),
        ({"model_type": None, "architectures": ["LlamaForCausalLM"]}, "unknown architecture LlamaForCausalLM"),
        ({"model_type": None, "architectures": None}, "^x.json: model_type is missing; supported: deepseek_v2"),
        ({"model_type": ["deepseek_v3"]}, "unknown architecture"),
        ({"model_type": "deepseek_v32"}, r"deepseek_v32: its sparse attention \(the indexer\) is not supported yet"),
        ({"model_type": None, "architectures": ["DeepseekV32ForCausalLM"]}, "sparse attention"),
        ({"index_topk": 2048}, "index_topk 2048: sparse attention"),
        ({"attention_bias": True}, "^x.json: attention_bias true is not supported; supported: false$"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"hidden_act": "gelu"}, '^x.json: hidden_act "gelu" is not supported; supported: "silu"$'),
        ({"num_key_value_heads": 8}, "^x.json: num_key_value_heads 8 is not supported; supported: 128$"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ({"moe_layer_freq": [0, 1]}, r"moe_layer_freq \[0, 1\]"),
        ({"moe_layer_freq": True}, "moe_layer_freq true"),
        ({"sliding_window": 4096}, "sliding_window 4096 is not supported; supported: null"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"topk_method": "greedy"}, 'topk_method "greedy" is not supported; supported: "noaux_tc"'),
        ({"scoring_func": "softmax"}, 'scoring_func "softmax" is not supported; supported: "sigmoid"'),
        ({"topk_group": None}, "topk_group must be an integer, not null"),
        ({"hidden_size": "7168"}, '^x.json: hidden_size must be an integer, not "7168"$'),
        ({"hidden_size": 7168.0}, "hidden_size must be an integer, not 7168.0"),
        ({"hidden_size": True}, "hidden_size must be an integer, not true"),
        ({"hidden_size": None}, "hidden_size must be an integer, not null"),
        ({"hidden_size": -1}, "^x.json: model.hidden_size must be positive, not -1$"),
        ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps must be a finite number, not "1e-6"'),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number, not NaN"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a finite number, not one of 401 digits"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false, not 1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"rope_interleave": None}, "rope_interleave must be true or false, not null"),
        ({"n_group": 7}, r"^x.json: moe.num_experts \(256\) must be a multiple of moe.num_groups \(7\)$"),
        ({"num_mtp_layers": 2}, r"num_nextn_predict_layers \(1\) and num_mtp_layers \(2\) disagree"),
        ({"n_routed_experts": None}, "num_nextn_predict_layers 1 is not supported with MTP modules that have no exp"),
        ({"first_k_dense_replace": 62}, "num_nextn_predict_layers 1 is not supported with MTP modules that have no"),
        ({"rope_scaling": [1]}, r"rope_scaling must be a JSON object, not \[1\]"),
        (yarn(type="linear"), '^x.json: rope_scaling.type "linear" is not supported; supported: "default", "yarn"$'),
        (yarn(rope_type="longrope"), 'rope_scaling.rope_type "longrope"'),
        ({"rope_scaling": {"factor": 40}}, "rope_scaling.rope_type is missing beside factor"),
        (yarn(truncate=False), "rope_scaling.truncate false is not supported; supported: true"),
        (yarn(attention_factor=1.2), r"rope_scaling.attention_factor 1.2 is not supported; supported: null, 1.0"),
        (yarn(mscale=None), "mscale without mscale_all_dim, or the reverse"),
        (yarn(mscale=0.707, mscale_all_dim=0), "mscale without mscale_all_dim, or the reverse"),
        (yarn(factor=None), "rope_scaling.factor must be a finite number, not null"),
        (yarn(factor=0.5), "^x.json: yarn.factor must be at least 1, not 0.5$"),
        (yarn(partial_rotary_factor=0.5), "rope_scaling.partial_rotary_factor 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention is an object"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_scaling and rope_parameters disagree"),
        (yarn(rope_theta=5e4), "rope_theta has 2 values: 10000.0, 50000.0"),
    ],
)
def test_what_v3_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(InteropError, match=message) as told:
        read_architecture(V3 | changes, source="x.json")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"norm_topk_prob": True},
            "norm_topk_prob true with routed_scaling_factor 16.0 is read differently by different",
        ),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers 1 is not supported; supported: 0"),
        ({"topk_method": "noaux_tc"}, 'topk_method "noaux_tc" is not supported; supported: "greedy", "group_limited'),
        ({"scoring_func": "sigmoid"}, 'scoring_func "sigmoid"'),
        ({"rope_interleave": False}, "rope_interleave false is not supported; supported: true"),
    ],
)
def test_what_v2_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(InteropError, match=message):
        read_architecture(V2 | changes)


def test_v2_renormalises_where_no_scale_could_be_applied_or_left_out():
    changes = {"norm_topk_prob": True, "routed_scaling_factor": 1.0}
    model = read_architecture(V2 | changes)
    assert (model.moe.normalize_weights, model.moe.routed_scale) == (True, 1.0)
    assert write_architecture(model)["norm_topk_prob"] is True


SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "q_lora_rank"]
SIZES += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts"]
SIZES += ["num_experts_per_tok", "moe_intermediate_size"]


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_is_missing_is_named(name):
    with pytest.raises(InteropError, match=f"^config.json: {name} is missing"):
        read_architecture(without(V3, name))


@pytest.mark.parametrize("name", ["factor", "original_max_position_embeddings"])
def test_a_number_of_yarn_that_is_missing_is_named(name):
    with pytest.raises(InteropError, match=f"^config.json: rope_scaling.{name} is missing"):
        read_architecture(V3 | {"rope_scaling": without(V3["rope_scaling"], name)})


def test_a_file_that_is_no_object():
    with pytest.raises(InteropError, match=r"^config.json must be a JSON object, not \[\]$"):
        read_architecture([])


def test_half_split_weights_are_told_and_are_the_same_model():
    file = V3 | {"rope_interleave": False}
    assert not rope_interleaved(file)
    assert read_architecture(file) == read_architecture(V3)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (zoo.tiny, {"use_bias": False}, "moe.use_bias=False with moe.score_function=sigmoid: deepseek_v3 has True"),
        (zoo.tiny, {"group_score": "max"}, "moe.group_score=max .* deepseek_v3 ranks groups by top2_sum"),
        (zoo.deepseek_v2, {"use_bias": True}, "moe.use_bias=True with moe.score_function=softmax"),
        (zoo.deepseek_v2, {"group_score": "top2_sum"}, "deepseek_v2 ranks groups by max"),
        (zoo.deepseek_v2, {"normalize_weights": True}, "norm_topk_prob true with routed_scaling_factor 16.0"),
        (zoo.deepseek_v2, {"mtp_depth": 1}, "deepseek_v2 has no MTP"),
    ],
)
def test_what_neither_family_has_is_not_written(make, changes, message):
    model = make()
    depth = changes.get("mtp_depth", model.mtp_depth)
    moe = dataclasses.replace(model.moe, **without(changes, "mtp_depth"))
    with pytest.raises(InteropError, match=message):
        write_architecture(dataclasses.replace(model, moe=moe, mtp_depth=depth))


def test_a_temperature_that_is_read_in_two_ways_is_not_written():
    attention = AttentionConfig(yarn=YarnConfig(mscale=0.5, mscale_all_dim=0.0))
    with pytest.raises(InteropError, match=r"the config.json to write: rope_scaling.mscale without mscale_all_dim"):
        write_architecture(ModelConfig(attention=attention))


@pytest.mark.parametrize(
    ("section", "quantization"),
    [
        (V3["quantization_config"], Quantization()),
        (without(V3["quantization_config"], "fmt", "activation_scheme"), Quantization()),
        (V3["quantization_config"] | {"scale_fmt": "ue8m0"}, Quantization(scale_format="ue8m0")),
        (V3["quantization_config"] | {"scale_fmt": "float"}, Quantization()),
        (V3["quantization_config"] | {"weight_block_size": [64, 32]}, Quantization(block=(64, 32))),
        (None, None),
    ],
)
def test_quantization_is_read_and_written_back(section, quantization):
    assert read_quantization({"quantization_config": section}) == quantization
    written = write_quantization({"a": 1, "quantization_config": {"quant_method": "old"}}, quantization)
    assert written["a"] == 1
    assert ("quantization_config" in written) == (quantization is not None)
    assert read_quantization(json.loads(json.dumps(written))) == quantization


def test_v3_and_v3_1_say_fp8_as_released():
    plain = without(V3, "quantization_config")
    assert write_quantization(plain, Quantization()) == V3
    powers = write_quantization(plain, Quantization(scale_format="ue8m0"))["quantization_config"]
    assert powers == V3["quantization_config"] | {"scale_fmt": "ue8m0"}
    assert "quantization_config" not in plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "compressed-tensors"}, '^x.json: quantization_config.quant_method "compressed-tensors" is'),
        ({"quant_method": "awq"}, 'quant_method "awq" is not supported; supported: "fp8"'),
        ({"quant_method": None}, "quant_method must be a string, not null"),
        ({"fmt": "e5m2"}, 'fmt "e5m2" is not supported; supported: "e4m3"'),
        ({"activation_scheme": "static"}, 'activation_scheme "static"'),
        ({"weight_block_size": None}, "weight_block_size must be two block sizes"),
        ({"weight_block_size": [128]}, r"weight_block_size must be two positive integers, not \[128\]"),
        ({"weight_block_size": [128, 0]}, "weight_block_size must be two positive integers"),
        ({"scale_fmt": "e4m3"}, 'scale_fmt "e4m3" is not supported; supported: "float", "ue8m0"'),
    ],
)
def test_other_quantizations_are_refused_by_name(changes, message):
    with pytest.raises(InteropError, match=message):
        read_quantization({"quantization_config": V3["quantization_config"] | changes}, source="x.json")


@pytest.mark.torch
@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_transformers_reads_what_is_written_and_we_what_it_saves(model, newer):
    """In both spellings, its rotation and softmax scale are ours, YaRN with equal betas and no YaRN included."""
    transformers = pytest.importorskip("transformers")
    written = write_architecture(model, base={"rope_parameters": {"rope_type": "default"}} if newer else None)
    config = transformers.AutoConfig.for_model(**copy.deepcopy(written))
    assert json.loads(config.to_json_string())["model_type"] == written["model_type"]
    assert read_architecture(json.loads(config.to_json_string())) == model
    assert config.rope_parameters["rope_theta"] == model.attention.rope_theta
    assert config.max_position_embeddings == written["max_position_embeddings"]
    compare_rotation(config, model.attention)


@pytest.mark.torch
def test_transformers_rotates_as_we_do_without_mscales():
    transformers = pytest.importorskip("transformers")
    file = V3 | {"rope_scaling": without(V3["rope_scaling"], "mscale", "mscale_all_dim")}
    compare_rotation(transformers.DeepseekV3Config.from_dict(copy.deepcopy(file)), read_architecture(file).attention)


def compare_rotation(config, attention: AttentionConfig) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding, yarn_apply_mscale

    theirs = DeepseekV3RotaryEmbedding(config)
    np.testing.assert_allclose(theirs.inv_freq.numpy(), rope_frequencies(attention), rtol=2e-6)
    cosine = float(rope_tables(attention, np.zeros(1))[0][0, 0])
    assert theirs.attention_scaling == pytest.approx(cosine, rel=1e-6)
    scale = yarn_apply_mscale(config.rope_parameters, attention.qk_head_dim**-0.5)
    assert scale == pytest.approx(softmax_scale(attention), rel=1e-9)
