"""Writes the folders of `golden/`: two tiny models of Hugging Face's code, with what that code computes from them.

Made with torch 2.13.0 and transformers 5.23.0 by `python tests/interop/make_golden.py`, which needs the `parity` extra;
`test_golden.py` needs neither. Each folder holds config.json and model.safetensors as `save_pretrained` writes them,
and expected.npz: tokens int32 `[3, 19]` padded on the right, their lengths `[3]`, logits float32 `[3, 19, V]` of each
row by itself (zero where it is padded), and the tokens that greedy decoding adds to each, int32 `[3, 24]`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).parent / "golden"
LENGTHS = (5, 12, 19)
NEW_TOKENS = 24
LEAST_MARGIN = 3e-3
"""By which the best logit leads at every step, so that rounding does not decide."""
COMMON = {
    **{"vocab_size": 67, "hidden_size": 30, "intermediate_size": 37, "num_hidden_layers": 3},
    **{"first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 12},
    **{"qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 7, "rms_norm_eps": 1e-5},
    **{"n_group": 4, "topk_group": 2, "num_experts_per_tok": 2, "max_position_embeddings": 4096},
}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 512},
    **{"beta_fast": 4.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}
V3 = transformers.DeepseekV3Config(
    **COMMON | {"q_lora_rank": 11, "n_routed_experts": 12, "n_shared_experts": 1, "moe_intermediate_size": 13},
    num_mtp_layers=0,
    rope_parameters=YARN,
)
V2 = transformers.DeepseekV2Config(
    **COMMON | {"q_lora_rank": None, "n_routed_experts": 8, "n_shared_experts": 2, "moe_intermediate_size": 9},
    topk_method="group_limited_greedy",
    routed_scaling_factor=16.0,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
)


def write_random_model(folder: Path, config: transformers.PretrainedConfig, dtype: torch.dtype, seed: int) -> None:
    """config.json and model.safetensors, with weights of a size at which routing differs by token."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(mean=-0.7, std=0.1)
        else:
            tensor.normal_(mean="norm" in name, std=0.15)
    with tempfile.TemporaryDirectory() as wide:
        model.save_pretrained(wide)
        # Loaded in BF16 and not cast to it, so that the biases stay in float32, as in the published folders.
        transformers.AutoModelForCausalLM.from_pretrained(wide, dtype=dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink()


def expected(folder: Path) -> dict[str, np.ndarray] | None:
    """What their code computes from a folder, in float32; None if a step of greedy decoding is too close, or loops."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    vocab_size = model.config.vocab_size
    rng = np.random.default_rng(0)
    tokens = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    logits = np.zeros((*tokens.shape, vocab_size), np.float32)
    greedy = []
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = rng.integers(0, vocab_size, length)
        sequence = torch.tensor(tokens[row : row + 1, :length], dtype=torch.long)
        with torch.no_grad():
            logits[row, :length] = model(sequence).logits[0].numpy()
            for _ in range(NEW_TOKENS):
                best = model(sequence).logits[0, -1].topk(2)
                if best.values[0] - best.values[1] < LEAST_MARGIN:
                    return None
                sequence = torch.cat([sequence, best.indices[None, :1]], dim=1)
        greedy.append(sequence[0, length:].numpy().astype(np.int32))
        if len(set(greedy[-1].tolist())) < NEW_TOKENS // 3:
            return None
    return {"tokens": tokens, "lengths": np.array(LENGTHS), "logits": logits, "greedy": np.stack(greedy)}


def main() -> None:
    for name, config, dtype in (("v3", V3, torch.bfloat16), ("v2", V2, torch.float32)):
        arrays, seed = None, 0
        while arrays is None:
            shutil.rmtree(GOLDEN / name, ignore_errors=True)
            write_random_model(GOLDEN / name, config, dtype, seed)
            arrays, seed = expected(GOLDEN / name), seed + 1
        np.savez_compressed(GOLDEN / name / "expected.npz", **arrays)
        sizes = {file.name: file.stat().st_size for file in sorted((GOLDEN / name).iterdir())}
        print(f"{name}: seed {seed - 1}, bytes {sizes}")


if __name__ == "__main__":
    main()
