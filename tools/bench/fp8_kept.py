"""What FP8 layers keep between their forward and backward passes, for `tools.bench.fp8`."""

from __future__ import annotations

import dataclasses

from deepseek_jax import zoo
from deepseek_jax.precision.policy import PrecisionPolicy
from tools.bench.pipeline_memory import trace_run

LAYERS, TOKENS = 4, 4096


def kept(policy: PrecisionPolicy) -> list:
    """What one stage of two MoE layers of DeepSeek-V3 keeps of a microbatch, as shapes and dtypes."""
    import jax.numpy as jnp
    import optax

    from deepseek_jax.model.transformer import Transformer
    from deepseek_jax.parallel.mesh import ParallelConfig
    from deepseek_jax.parallel.placement import place
    from deepseek_jax.training.sharding_table import abstract_mesh
    from deepseek_jax.training.step import Trainer
    from deepseek_jax.training.step_config import StepConfig, wire

    config = dataclasses.replace(zoo.deepseek_v3(), num_layers=LAYERS, num_dense_layers=0, mtp_depth=0)
    parallel = ParallelConfig(pipe=2, expert=16, schedule="one_f_one_b", microbatch_rows=1)
    options = StepConfig(
        schedule=parallel.schedule,
        microbatch_rows=1,
        compute_dtype=jnp.dtype(policy.compute),
        dispatch_dtype=wire(policy.dispatch),
        capacity=1.0,
    )
    placement = place(config, stage_map=parallel.schedule_choice.stage_map)
    model, mesh = Transformer(config, policy.fp8), abstract_mesh(parallel)
    trainer = Trainer(model, placement, mesh, lambda specs: optax.identity(), options)
    return trace_run(trainer, (4 * parallel.batch_shards, TOKENS + 1), lambda run: run.shapes.residual)


INPUTS = {
    "dispatched": "tokens that came here (input of the experts)",
    "gate_up": "inputs of the experts' SwiGLU",
    "shared": "inputs of the shared expert's SwiGLU",
    "attention": "attention's output (input of its projection)",
}


def by_meaning(found: list) -> dict[str, list]:
    """The kept arrays by what they are, told by their sizes; scales go with their codes."""
    model = zoo.deepseek_v3()
    hidden, heads = model.hidden_size, model.attention.num_heads * model.attention.v_head_dim
    wide = 2 * model.moe.expert_ffn_size
    groups: dict[str, list] = {what: [] for what in (*INPUTS.values(), "everything else")}
    for array in found:
        rows, width = array.shape[1], array.shape[-1]
        is_scale = array.dtype == "float32" and array.ndim == 3
        many = rows > TOKENS
        if many and (width == hidden or (is_scale and width == hidden // 128)):
            what = INPUTS["dispatched"]
        elif width == wide or (is_scale and width == wide // 128):
            what = INPUTS["gate_up" if many else "shared"]
        elif array.size >= array.shape[0] * TOKENS * heads or (is_scale and width == heads // 128):
            what = INPUTS["attention"]
        else:
            what = "everything else"
        groups[what].append(array)
    return groups
