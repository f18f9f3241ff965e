"""Folders of `transformers` read and written here: the same logits, the same tensors, the same greedy tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.interop.huggingface import HuggingFaceFolder
from deepseek_jax.interop.save import save

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
hf = pytest.importorskip("hf")

FAMILIES = {"v3": transformers.DeepseekV3Config, "v2": transformers.DeepseekV2Config}
SEEDS = {"v3": range(476, 483), "v2": range(322, 329)}
"""Of configurations that have every rule between them."""
CASES = [(family, seed) for family, seeds in SEEDS.items() for seed in seeds]
GREEDY_SEEDS = {"v3": 7, "v2": 1}
"""Of weights whose continuations are no loops, and whose best token is always clearly the best."""
LENGTHS = (5, 12, 19)
NEW_TOKENS = 64
TOLERANCE = 1e-4
"""Of the largest logit, in float32."""
PLAIN = {"rope_type": "default"}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "beta_fast": 4.0, "beta_slow": 1.0}
MSCALES = (
    {"mscale": 1.0, "mscale_all_dim": 1.0},
    {"mscale": 0.707, "mscale_all_dim": 0.707},
    {"mscale": 0.7, "mscale_all_dim": 1.3},
    {},
)
ROPES = (PLAIN, PLAIN, *(YARN | mscales for mscales in MSCALES))


def drawn(family: str, seed: int) -> transformers.PretrainedConfig:
    """A configuration with sizes and rules drawn at random, all that their code of the family honours."""
    rng = np.random.default_rng([seed, family == "v3"])

    def size(low: int, high: int) -> int:
        return int(rng.integers(low, high, endpoint=True))

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    heads, layers, groups = size(1, 3), size(1, 3), pick(1, 2, 4)
    experts, kept = groups * size(2, 4), size(1, groups)
    rules = {"v3": {"norm_topk_prob": pick(True, False), "num_mtp_layers": pick(0, 1)}}
    rules["v2"] = {"topk_method": pick("greedy", "group_limited_greedy")}
    return FAMILIES[family](
        vocab_size=size(50, 90),
        hidden_size=heads * size(7, 13) + 2 * (family == "v3"),  # V2's is a multiple of the heads
        intermediate_size=size(20, 50),
        num_hidden_layers=layers,
        first_k_dense_replace=pick(0, size(0, layers), layers),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=pick(None, size(5, 15)),
        # V2's code views the rotary columns that follow as pairs, so their place must be even.
        kv_lora_rank=size(5, 20) if family == "v3" else 2 * size(3, 10),
        qk_nope_head_dim=size(3, 11) if family == "v3" else 2 * size(2, 5),
        qk_rope_head_dim=2 * size(1, 6),
        v_head_dim=size(3, 13),
        rms_norm_eps=pick(1e-6, 1e-5, 1e-3),
        rope_parameters=pick(*ROPES) | {"rope_theta": pick(10_000.0, 50_000.0, 500.0)},
        n_routed_experts=experts,
        n_shared_experts=size(1, 3),
        num_experts_per_tok=size(1, min(4, kept * experts // groups)),
        moe_intermediate_size=size(5, 20),
        n_group=groups,
        topk_group=kept,
        routed_scaling_factor=pick(1.0, 2.5, 16.0),
        tie_word_embeddings=pick(True, False, False),
        max_position_embeddings=4096,
        **rules[family],
    )


def fixed(family: str, **changes) -> transformers.PretrainedConfig:
    """The model that exports and generation are tried on: every rule that has an effect is in force."""
    rules = {"v3": {"norm_topk_prob": True, "num_mtp_layers": 1}, "v2": {"topk_method": "group_limited_greedy"}}
    rules["v2"]["routed_scaling_factor"] = 16.0
    fields = {
        **{"vocab_size": 97, "hidden_size": 34, "intermediate_size": 43},
        **{"num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
        **{"q_lora_rank": 13, "kv_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 9},
        **{"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "n_shared_experts": 2},
        **{"moe_intermediate_size": 17, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-5},
        **{"max_position_embeddings": 4096, "tie_word_embeddings": False},
        **{"rope_parameters": YARN | MSCALES[2] | {"rope_theta": 500.0}},
    }
    return FAMILIES[family](**fields | rules[family] | changes)


def prompts(vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, length).tolist() for length in LENGTHS]


def their_logits(model, rows: list[list[int]]) -> list[np.ndarray]:
    """Of each row by itself, without any padding."""
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0].float().numpy() for row in rows]


def assert_same_logits(model: deepseek_jax.LanguageModel, theirs, rows: list[list[int]]) -> None:
    """Our rows are padded on the right, and compared where they are not."""
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, prompt in enumerate(rows):
        tokens[row, : len(prompt)] = prompt
    ours = np.asarray(model(tokens))
    assert ours.dtype == np.float32
    for row, expected in enumerate(their_logits(theirs, rows)):
        assert expected.std() > 0.1
        np.testing.assert_allclose(
            ours[row, : len(expected)], expected, rtol=0, atol=TOLERANCE * np.abs(expected).max()
        )


def load_theirs(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors_torch.load_file(file).items()}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Of torch, whose threads cost more than they give at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A saved `fixed` model of each family."""
    paths = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, path in paths.items():
        hf.random_model(fixed(family), GREEDY_SEEDS[family]).save_pretrained(path)
    return paths


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_a_saved_folder_gives_the_same_logits(family, seed, tmp_path):
    config = drawn(family, seed)
    theirs = hf.random_model(config, seed)
    theirs.save_pretrained(tmp_path)
    rows = prompts(config.vocab_size)
    assert_same_logits(deepseek_jax.load(tmp_path, progress=False), theirs, rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_drawn_configs_have_every_rule(family):
    configs = [drawn(family, seed) for seed in SEEDS[family]]
    moe = [config for config in configs if config.first_k_dense_replace < config.num_hidden_layers]
    kept = {"all" if c.topk_group == c.n_group else "some" for c in moe if c.n_group > 1}
    assert kept == {"all", "some"}
    assert {c.n_group for c in moe} >= {1, 4}
    assert {c.num_experts_per_tok for c in moe} >= {1, 2, 3}
    assert {c.n_shared_experts for c in moe} >= {1, 2}
    assert len({c.routed_scaling_factor for c in moe}) > 1
    assert {c.first_k_dense_replace == 0 for c in configs} == {True, False}
    assert any(c.first_k_dense_replace == c.num_hidden_layers for c in configs)
    assert any(0 < c.first_k_dense_replace < c.num_hidden_layers for c in configs)
    assert {c.q_lora_rank is None for c in configs} == {True, False}
    assert {c.tie_word_embeddings for c in configs} == {True, False}
    assert len({c.rms_norm_eps for c in configs}) == len({c.rope_parameters["rope_theta"] for c in configs}) == 3
    ropes = [c.rope_parameters for c in configs]
    assert {rope["rope_type"] for rope in ropes} == {"default", "yarn"}
    assert len({(rope.get("mscale"), rope.get("mscale_all_dim")) for rope in ropes if "factor" in rope}) >= 3
    rule = {"v3": "norm_topk_prob", "v2": "topk_method"}[family]
    assert len({getattr(c, rule) for c in moe}) == 2


FIELDS = (
    *({"n_group": 2}, {"topk_group": 1}, {"num_experts_per_tok": 2}, {"routed_scaling_factor": 1.0}),
    *({"rms_norm_eps": 1e-3}, {"rope_parameters": PLAIN | {"rope_theta": 500.0}}),
    *(
        {"rope_parameters": YARN | MSCALES[2] | {"rope_theta": 500.0} | change}
        for change in (
            *({"rope_theta": 600.0}, {"factor": 4.0}, {"original_max_position_embeddings": 64}),
            *({"beta_fast": 32.0}, {"beta_slow": 0.2}, {"mscale": 1.0}, {"mscale_all_dim": 1.0}),
        )
    ),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_moves_the_logits_by_more_than_the_tolerance(family):
    """So a field that was not read would be seen."""
    model = hf.random_model(fixed(family))
    rows = prompts(97)[-1:]
    (expected,) = their_logits(model, rows)
    changes = [*FIELDS, {"norm_topk_prob": False} if family == "v3" else {"topk_method": "greedy"}]
    for change in changes:
        other = hf.random_model(fixed(family, **change))
        other.load_state_dict(model.state_dict())
        (moved,) = their_logits(other, rows)
        assert np.abs(moved - expected).max() > 10 * TOLERANCE * np.abs(expected).max(), change


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_differs_by_token(family):
    model = hf.random_model(fixed(family), GREEDY_SEEDS[family])
    chosen: list[int] = []
    for layer in model.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda module, _, output: chosen.append(len(output[2].unique())))
    their_logits(model, prompts(97)[-1:])
    assert len(chosen) == 2
    assert min(chosen) > 6


@pytest.mark.parametrize("precision", ["keep", "bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_folder_gives_the_same_logits_there_and_here(family, precision, folders, tmp_path):
    out = tmp_path / "out"
    with HuggingFaceFolder(folders[family]) as source:
        config = source.config if precision == "keep" else None
        save(source, out, precision=precision, config=config, shard_bytes=30_000, progress=False)
    assert len(list(out.glob("model-*.safetensors"))) > 3
    before, after = tensors_of(folders[family]), tensors_of(out)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        narrow = precision == "bfloat16" and not name.endswith("e_score_correction_bias")
        assert torch.equal(after[name], tensor.bfloat16() if narrow else tensor), name
    model = deepseek_jax.load(out, dtype=np.float32, progress=False)
    assert_same_logits(model, load_theirs(out), prompts(97))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_of_bfloat16_in_float32_has_the_same_bits(family, tmp_path):
    model = hf.random_model(fixed(family)).bfloat16()
    model.save_pretrained(tmp_path / "in")
    with HuggingFaceFolder(tmp_path / "in") as source:
        save(source, tmp_path / "out", precision="float32", progress=False)
    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16}
    assert after.keys() == before.keys()
    loaded = load_theirs(tmp_path / "out").state_dict()
    for name, tensor in before.items():
        assert after[name].dtype == torch.float32, name
        assert torch.equal(after[name], tensor.float()), name
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor.float()), name


BLOCKS = {
    **{"hidden_size": 256, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 128},
    **{"v_head_dim": 64, "moe_intermediate_size": 128, "intermediate_size": 256, "n_shared_experts": 1},
}
"""Whole blocks of 128×128: theirs takes rows over rows of scales for the size of a block, which ragged ones belie."""


@pytest.mark.parametrize("precision", ["fp8", "fp8_ue8m0"])
def test_an_fp8_folder_is_decoded_to_the_same_weights_and_logits_there_and_here(precision, tmp_path, monkeypatch):
    # It asks for accelerate, which on one device it does not use.
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
    hf.random_model(fixed("v3", **BLOCKS), 7).save_pretrained(tmp_path / "in")
    with HuggingFaceFolder(tmp_path / "in") as source:
        save(source, tmp_path / "out", precision=precision, config=source.config, progress=False)
    tensors = tensors_of(tmp_path / "out")
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in tensors.values()) == 3 * 5 + 3 + 2 * (12 + 1) * 3
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        **{"dtype": torch.float32, "experts_implementation": "eager"},
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
    )
    theirs = theirs.eval().float()  # what is not FP8 stays BF16
    name = "model.layers.0.self_attn.q_b_proj.weight"
    scales = tensors[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(theirs.state_dict()[name], tensors[name].float() * scales)
    assert_same_logits(deepseek_jax.load(tmp_path / "out", dtype=np.float32, progress=False), theirs, prompts(97))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_gives_the_same_tokens(family, folders):
    """Ours in one batch of unequal prompts, theirs one by one."""
    theirs = load_theirs(folders[family])
    rows = prompts(97)
    expected = []
    for row in rows:
        output = theirs.generate(
            torch.tensor([row]),
            attention_mask=torch.ones(1, len(row)),  # or a 0 in the prompt would be taken for padding
            **{"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0},
            **{"output_logits": True, "return_dict_in_generate": True},
        )
        expected.append(output.sequences[0, len(row) :].tolist())
        best = torch.cat(output.logits).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-3
        assert len(set(expected[-1][-32:])) > 8
    model = deepseek_jax.load(folders[family], progress=False)
    assert deepseek_jax.generate(model, rows, max_new_tokens=NEW_TOKENS, stop_ids=()) == expected
