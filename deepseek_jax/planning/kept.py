"""What a layer keeps from its forward to its backward pass, in bytes per token."""

from __future__ import annotations

from deepseek_jax.planning.job import Job
from deepseek_jax.planning.memory import layer_bytes


def routed_rows(job: Job) -> float:
    """Rows that a device has room for, per token."""
    room = job.parallel.capacity if job.parallel.node * job.parallel.expert > 1 else 1.0
    return room * job.model.moe.experts_per_token


def kept_bytes(job: Job, *, dense: bool, room: float | None = None, elsewhere: bool = True) -> float:
    """Bytes per token that a layer keeps from its forward to its backward pass.

    Args:
      job: the layout; its recomputation is not "full".
      dense: which kind of layer.
      room: for routed rows, as a multiple of what balanced routing needs; default: the recipe's.
      elsewhere: whether experts are on other devices, so that what came from there is kept.
    """
    moe, width = job.model.moe, job.model.hidden_size
    code = 1 + 4 / 128 if job.is_fp8 else job.width
    rows = routed_rows(job) if room is None else room * moe.experts_per_token
    if job.parallel.recompute == "none":
        return _kept_whole(job, rows, dense=dense)
    kept = layer_bytes(job.model, dense, True, job.width, job.is_fp8)
    if dense:
        return kept
    kept += (rows - moe.experts_per_token) * 2 * moe.expert_ffn_size * code
    return kept + (rows * width * code if elsewhere else 0.0)


def _kept_whole(job: Job, rows: float, *, dense: bool) -> float:
    """The same where nothing is computed again: norms keep three float32 arrays of each input, SwiGLU six of its own.
    In FP8 it is less by what linear layers then keep in codes; that is not counted."""
    moe, attention, width, a = job.model.moe, job.model.attention, job.model.hidden_size, job.width
    latents = (attention.q_lora_rank or 0) + attention.kv_lora_rank
    norms = 3 * 4 * (2 * width + latents) + (3 * width + latents) * a
    core = attention.num_heads * ((2 * attention.qk_head_dim + 3 * attention.v_head_dim) * a + 4)
    if dense:
        return norms + core + 6 * job.model.dense_ffn_size * a
    shared = 6 * moe.num_shared_experts * moe.expert_ffn_size * a
    routed = rows * (width * a + moe.expert_ffn_size * (6 * a + 4))
    return norms + core + width * (4 + a) + shared + routed + (8 + moe.experts_per_token) * moe.num_experts
