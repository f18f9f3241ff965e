"""How long one layer, or one end of the model, takes on one device: the sum of its operations, each by its roofline.

An operation takes as long as its FLOPs at the rate that its kind reaches (`efficiency.py`), or as its bytes at the rate
of the memory, whichever is longer, and a launch; where it was measured, as long as that. What a fused kernel need not
write is not counted; norms, rotary embeddings, SwiGLU, quantisation and the sorting of rows for experts are passes of
their own over memory, and counted as bytes alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import NamedTuple

from deepseek_jax.planning.devices import Device
from deepseek_jax.planning.efficiency import Efficiency, Pass
from deepseek_jax.planning.flops import (
    Matmul,
    attention_core,
    attention_matmuls,
    ffn_matmuls,
    mtp_projection,
    output_head,
)
from deepseek_jax.planning.job import Job
from deepseek_jax.planning.kept import kept_bytes

GROUP_ROWS = 128
"""Groups of rows for experts start at multiples of it: half of it is lost for each, on average."""


class Op(NamedTuple):
    """One operation of one microbatch on one device."""

    name: str
    module: str
    of: Pass
    seconds: float
    flops: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """A job's operations on a device."""

    job: Job
    device: Device

    @property
    def efficiency(self) -> Efficiency:
        """Of the device's kernels."""
        return self.device.efficiency

    @functools.cached_property
    def _memory(self) -> float:
        return self.device.memory_bandwidth * self.efficiency.memory

    @functools.cached_property
    def _code(self) -> float:
        """Bytes of a number in tiles."""
        return 1 + 4 / 128

    def layer(self, *, dense: bool) -> tuple[Op, ...]:
        """All operations of one layer, without its exchanges."""
        ops = [
            *self._matmuls(attention_matmuls(self.job.model)),
            *self._attention_core(),
            *self._matmuls(ffn_matmuls(self.job.model, dense=dense)),
            *self._passes_over_memory(dense),
        ]
        if self.job.parallel.recompute == "full":
            ops += [one._replace(name=f"{one.name} again", of="B", flops=0.0) for one in ops if one.of == "F"]
        return tuple(ops)

    def copies(self, *, dense: bool) -> tuple[Op, ...]:
        """What a layer in a loop over layers has besides: the room for what it keeps is set to zero, and that is copied
        in and out; weights are copied out for either pass, their gradients copied in."""
        if not self.efficiency.loops_copy or self.job.parallel.pipe > 1:  # the pipeline works on layers where they lie
            return ()
        job, model = self.job, self.job.model
        full = job.parallel.recompute == "full"
        kept = job.tokens * (model.hidden_size * job.width if full else kept_bytes(job, dense=dense))
        matmuls = (*attention_matmuls(model), *ffn_matmuls(model, dense=dense))
        weights = job.width * sum(self._matrices_held(one) * one.inputs * one.outputs for one in matmuls)
        passes: tuple[tuple[str, Pass, float], ...] = (
            ("stacking what is kept", "F", 3 * kept),
            ("stacking what is kept", "B", 2 * kept),
            *(("slicing weights", of, 2 * weights) for of in ("F", "B", "W")),
        )
        return tuple(self._moved(name, "elementwise", of, size) for name, of, size in passes)

    def embedding(self) -> tuple[Op, ...]:
        """The lookup of a microbatch's tokens and its gradient."""
        return self._only_measured("embedding")

    def mtp_join(self) -> tuple[Op, ...]:
        """What an MTP module has besides its layer and its head."""
        return (*self._matmuls((mtp_projection(self.job.model),)), *self._only_measured("mtp norms"))

    def head(self) -> tuple[Op, ...]:
        """The output head with its loss, once."""
        config = self.job.model
        logits = self.job.tokens * config.vocab_size * self.job.width
        ops = list(self._matmuls((output_head(config),)))
        ops += [self._moved("loss", "output head", of, 2 * logits) for of in ("F", "B")]
        return (*ops, *self._only_measured("final norm"))

    def _op(self, name: str, module: str, of: Pass, seconds: float, flops: float = 0.0) -> Op:
        return Op(
            name, module, of, self.efficiency.measured.get((name, of), seconds + self.efficiency.launch_seconds), flops
        )

    def _only_measured(self, name: str) -> tuple[Op, ...]:
        """An operation that matters on CPUs alone: there where it was measured."""
        passes: tuple[Pass, ...] = ("F", "B")
        return tuple(self._op(name, name, of, 0.0) for of in passes if (name, of) in self.efficiency.measured)

    def _matmuls(self, matmuls: Iterable[Matmul]) -> Iterable[Op]:
        job, device = self.job, self.device
        selective = job.parallel.recompute == "selective"
        for one in matmuls:
            dtype = job.dtype(one.kind)
            rows = job.tokens * one.visits * self._routed_factor(one)
            flops = 2.0 * rows * one.inputs * one.outputs
            operand = self._code if dtype == "float8" else job.width
            held = self._matrices_held(one) * one.inputs * one.outputs

            def product(of: Pass, rate: float, moved: float, again: str = "", one=one, flops=flops) -> Op:
                counted = 0.0 if again else job.tokens * one.flops
                seconds = max(flops / rate, moved / self._memory)
                return self._op(one.name + again, one.module, of, seconds, counted)

            forward_rate = device.product_rate(dtype, one.inputs)
            read = rows * one.inputs * operand + held * operand
            forward = product("F", forward_rate, read + rows * one.outputs * job.width)
            yield forward
            if selective and one.recomputed:
                yield forward._replace(name=f"{one.name} again", of="B", flops=0.0)
            back_rate = device.product_rate(dtype, one.outputs)
            yield product("B", back_rate, rows * (one.outputs * operand + one.inputs * job.width) + held * operand)
            weight_rate = self.efficiency.weight_gradients * device.peak(dtype)
            # The float32 sum is read and written.
            yield product("W", weight_rate, rows * (one.inputs + one.outputs) * operand + 8 * held)

    def _routed_factor(self, one: Matmul) -> float:
        """Rows that experts work on, over the tokens' visits: the busiest device's, and those that fill up groups."""
        if one.kind != "routed_experts":
            return 1.0
        each = self.job.tokens * one.visits / self._experts_here
        padding = GROUP_ROWS / 2 if self.job.is_fp8 else 0
        return self.job.busiest + padding / each

    @property
    def _experts_here(self) -> float:
        parallel = self.job.parallel
        return self.job.model.moe.num_experts / (parallel.node * parallel.expert)

    def _matrices_held(self, one: Matmul) -> float:
        """How many matrices of this shape a device has."""
        return self._experts_here if one.kind == "routed_experts" else 1

    def _attention_core(self) -> Iterable[Op]:
        job, attention = self.job, self.job.model.attention
        peak = self.device.peak(job.precision.compute)
        # Counted forward and, twice that, backward; scores are computed again there, which is half of a forward more.
        flops = job.tokens * attention_core(job.model, job.length)
        numbers = job.tokens * attention.num_heads * (2 * attention.qk_head_dim + 2 * attention.v_head_dim)
        moved = numbers * job.width / self._memory
        forward = flops / (peak * self.efficiency.attention_forward)
        yield self._op("attention", "attention", "F", max(forward, moved), flops)
        backward = 2.5 * flops / (peak * self.efficiency.attention_backward)
        yield self._op("attention", "attention", "B", max(backward, 2 * moved), 2 * flops)

    # --- passes over memory -------------------------------------------------------------------------------------------

    def _moved(self, name: str, module: str, of: Pass, size: float) -> Op:
        return self._op(name, module, of, size / self._memory)

    def _passes_over_memory(self, dense: bool) -> Iterable[Op]:
        """Bytes per token of everything but products and attention, as passes that read and write memory."""
        for name, of, size in (*self._attention_passes(), *self._ffn_passes(dense), *self._quantisation(dense)):
            if size:
                yield self._moved(name, "elementwise", of, size * self.job.tokens)

    def _attention_passes(self) -> Iterable[tuple[str, Pass, float]]:
        job, attention, width = self.job, self.job.model.attention, self.job.model.hidden_size
        a = job.width
        latents = (attention.q_lora_rank or 0) + attention.kv_lora_rank
        again = job.parallel.recompute == "selective"
        norms = 2 * (2 * width + latents) * a  # two of the width, two of latents: read and written
        # Queries turn in place; keys are put together from what heads have and what they share.
        rope = 2 * attention.num_heads * attention.qk_rope_head_dim * a
        keys = attention.num_heads * (attention.qk_nope_head_dim + attention.qk_head_dim) * a
        residual = 2 * 3 * width * a  # two sums: two read, one written
        yield "norms", "F", norms
        yield "rotary embedding", "F", rope + keys
        yield "residual sums", "F", residual
        yield "norms", "B", 1.5 * norms + (norms if again else 0)  # x and dy read, dx written
        yield "rotary embedding", "B", rope + keys + (rope + keys if again else 0)
        yield "residual sums", "B", residual

    def _ffn_passes(self, dense: bool) -> Iterable[tuple[str, Pass, float]]:
        job, moe, width = self.job, self.job.model.moe, self.job.model.hidden_size
        a, again = job.width, job.parallel.recompute == "selective"
        visits = moe.experts_per_token * job.busiest
        hidden = job.model.dense_ffn_size if dense else (moe.num_shared_experts + visits) * moe.expert_ffn_size
        swiglu = "dense SwiGLU" if dense else "SwiGLU"
        yield swiglu, "F", 3 * hidden * a  # gate and up read, their product written
        yield swiglu, "B", 5 * hidden * a + (3 * hidden * a if again else 0)  # and dy read, two gradients written
        if dense:
            return
        # Rows are sorted by expert as they come (read and written), and their outputs summed.
        yield "sorting rows", "F", 2 * visits * width * job.wire
        yield "summing outputs", "F", (visits + 2 * self._nodes + 1) * width * a
        yield "sorting rows", "B", 2 * visits * width * job.wire
        yield "summing outputs", "B", (visits + 2 * self._nodes + 1) * width * a

    @property
    def _nodes(self) -> float:
        return min(self.job.parallel.node, self.job.model.moe.groups_per_token)

    def _quantisation(self, dense: bool) -> Iterable[tuple[str, Pass, float]]:
        """Of inputs and gradients of linear layers in FP8. What norms and SwiGLU write they quantise themselves."""
        a, code = self.job.width, self._code
        for one in (*attention_matmuls(self.job.model), *ffn_matmuls(self.job.model, dense=dense)):
            if self.job.dtype(one.kind) != "float8":
                continue
            rows = one.visits * self._routed_factor(one)
            if one.name == "output":  # attention's output; E5M6 is kept besides
                yield "quantising", "F", rows * one.inputs * (a + code + 1.5)
            if one.name.endswith("gate_up"):  # SwiGLU's inputs are kept in codes
                yield "quantising", "F", rows * one.outputs * (a + code)
            if not one.name.endswith("down"):  # a gradient of an output: read, and written in tiles along its row
                yield "quantising", "B", rows * one.outputs * (a + code)
            # For weight gradients both operands have tiles along tokens.
            yield "quantising", "W", rows * (one.inputs * 2 * code + one.outputs * (a + code))


class PassSeconds(NamedTuple):
    """Compute and exchange of one pass over a layer, an end or a stage."""

    compute: float
    exchange: float = 0.0

    def __add__(self, other: tuple) -> PassSeconds:  # type: ignore[override]
        return PassSeconds(self.compute + other[0], self.exchange + other[1])


def pass_seconds(ops: Iterable[Op]) -> dict[Pass, float]:
    """Seconds of compute of each pass."""
    found: dict[Pass, float] = {"F": 0.0, "B": 0.0, "W": 0.0}
    for one in ops:
        found[one.of] += one.seconds
    return found
