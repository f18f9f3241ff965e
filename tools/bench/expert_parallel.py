"""Benchmark: what expert parallelism costs, on eight virtual devices.

    python -m tools.bench.expert_parallel [--write]

Three tables. Dispatch and combine of one MoE layer, forward and backward, by every portable dispatcher, against a dense
exchange that gathers all tokens on all devices and sums their outputs; at even and at skewed load. The bytes of
optimizer state that a device holds, against theory. A whole train step of `zoo.bench()` with its experts spread over
eight devices, against one device for the same work. All share the same few cores, in processes that take turns.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

from deepseek_jax import zoo
from deepseek_jax.config import MoEConfig
from experiments.run import prepare_environment
from tools.bench.common import LENGTH, ROWS, machine, make_trainer

RESULT = Path(__file__).parent / "results" / "expert_parallel.md"
DEVICES, NODES = 8, 2
TOKENS, WIDTH = 512, 1024
MOE = MoEConfig(num_experts=64, experts_per_token=8, expert_ffn_size=64)
EXCHANGES = ("all_to_all", "two_hop", "all-gather")
LOADS = ("even", "skewed")
STEPS = {
    "one device": (1, {}),
    "expert 8": (8, {"expert": 8}),
    "node 2 x expert 4": (8, {"node": 2, "expert": 4}),
    "data 2 x expert 4": (8, {"data": 2, "expert": 4}),
}

_PART = flags.DEFINE_string("part", None, "measure one part in this process and print it as JSON")
_TURNS = flags.DEFINE_integer("turns", 3, "processes per side of the train step")
_WRITE = flags.DEFINE_bool("write", False, f"write the tables to {RESULT.name} in tools/bench/results")


def main(argv):
    """Measures one part, or each in a process of its own, and prints the tables."""
    del argv
    if _PART.value:
        name, _, side = _PART.value.partition(":")
        print(json.dumps({"exchange": measure_exchanges, "state": measure_state, "step": measure_step}[name](side)))
        return
    exchanges, state = run_alone("exchange"), run_alone("state")
    steps: dict[str, list[float]] = {side: [] for side in STEPS}
    for turn in range(_TURNS.value):
        for side in STEPS:
            steps[side].append(run_alone(f"step:{side}"))
            print(f"turn {turn + 1}, {side}: {steps[side][-1]:.0f} tokens/s", file=sys.stderr)
    text = report(exchanges, state, steps)
    print(text)
    if _WRITE.value:
        RESULT.write_text(text)


def run_alone(part: str):
    """One measurement in a fresh process."""
    command = [sys.executable, "-m", "tools.bench.expert_parallel", f"--part={part}"]
    done = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


# --- dispatch and combine ---------------------------------------------------------------------------------------------


def measure_exchanges(_: str) -> list[dict]:
    """Milliseconds and bytes of there and back, forward and backward, for each exchange and load; turns alternate."""
    prepare_environment(os.environ, virtual_devices=DEVICES)
    import jax

    cases = {(name, load): make_case(name, load) for load in LOADS for name in EXCHANGES}
    seconds: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for turn in range(12):
        for case, (run, _) in cases.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            if turn > 1:
                seconds[case].append(time.perf_counter() - begin)
    return [
        {"name": name, "load": load, "ms": 1e3 * statistics.median(seconds[name, load]), **cases[name, load][1]}
        for name, load in cases
    ]


def make_case(name: str, load: str):
    """A function that goes there and back, and the bytes of it: used, between nodes, and of its buffers."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    from deepseek_jax.compat import to_varying
    from deepseek_jax.parallel.dispatch import ExpertMesh, dispatchers
    from deepseek_jax.parallel.dispatch.local import gather_tokens, gather_weights, group, sum_choices
    from deepseek_jax.parallel.mesh import mesh_of
    from deepseek_jax.training.step_record import bytes_per_row

    split = ("node", "expert")
    mesh = mesh_of(np.array(jax.devices()).reshape(1, 1, NODES, DEVICES // NODES))
    rng = np.random.default_rng(0)
    experts = draw_experts(rng, load)
    local = MOE.num_experts // DEVICES
    ladder = () if name == "all-gather" else dispatchers(name, MOE, ExpertMesh(NODES, 4), tokens=TOKENS, slack=1.5)

    def through(dispatcher, x, weights, experts):
        plans, traffic = dispatcher.plan(experts)
        y = jnp.zeros_like(x)
        for plan in plans:
            inputs = dispatcher.dispatch(x, weights, plan)
            y += dispatcher.combine(inputs.rows * inputs.weights[:, None], inputs.handle)
        return y, traffic

    def everywhere(x, weights, experts):
        """All tokens on all devices, each of which keeps what its experts are to compute."""
        x, weights, experts = (lax.all_gather(leaf, split, tiled=True) for leaf in (x, weights, experts))
        mine = experts - lax.axis_index(split) * local
        mine = jnp.where((mine >= 0) & (mine < local), mine, -1)
        room = 2 * TOKENS * MOE.experts_per_token if load == "even" else experts.size
        grouping, *_ = group(mine, local, capacity=room, alignment=1)
        rows = gather_tokens(x, grouping) * gather_weights(weights, grouping)[:, None]
        return lax.psum_scatter(sum_choices(rows, grouping), split, tiled=True), None

    def compiled(exchange):
        def device(x, weights, experts):
            x, weights, experts = to_varying((x, weights, experts), split)

            def loss(x, weights):
                y, traffic = exchange(x, weights, experts)
                return (y * y).sum(), traffic

            gradients, traffic = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, weights)
            return gradients, jax.tree.map(lambda leaf: leaf[None], traffic)

        spec = jax.P(split)
        return jax.jit(jax.shard_map(device, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec))

    x = rng.normal(size=(DEVICES * TOKENS, WIDTH)).astype(np.float32)
    weights = rng.random(experts.shape).astype(np.float32)
    arguments = jax.device_put((x, weights, experts), jax.NamedSharding(mesh, jax.P(split)))
    per_row = bytes_per_row(WIDTH, MOE.experts_per_token, 4)
    if not ladder:
        run = compiled(everywhere)
        rows = TOKENS * (DEVICES - 1)  # to every other device, and back from it
        sent = {"used": rows * per_row, "nodes": TOKENS * (DEVICES - 4) * per_row, "buffer": rows * per_row}
        return functools.partial(run, *arguments), {**sent, "setting": ""}
    for place, dispatcher in enumerate(ladder, start=1):
        run = compiled(functools.partial(through, dispatcher))
        traffic = jax.device_get(run(*arguments)[1])
        if not traffic.lost.sum():
            setting = f"{place} of {len(ladder)}, {dispatcher.rounds} round{'s' * (dispatcher.rounds > 1)}"
            break
    crossed = traffic.crossed.mean(axis=0)
    buffer = dispatcher.rounds * sum((hop.size - 1) * hop.capacity for hop in dispatcher.hops) * per_row
    if name == "two_hop":
        nodes = crossed[0]
    else:  # of what one hop sends, what leaves the node
        here = np.arange(len(experts)) // TOKENS // 4
        visits = np.stack([(experts // local == device).any(axis=1) for device in range(DEVICES)], axis=1)
        nodes = sum(visits[here != device // 4, device].sum() for device in range(DEVICES)) / DEVICES
    sent = {"used": crossed.sum() * per_row, "nodes": nodes * per_row, "buffer": buffer}
    return functools.partial(run, *arguments), {**{k: float(v) for k, v in sent.items()}, "setting": setting}


def draw_experts(rng, load: str):
    """Choices int32 `[tokens, K]` within each token's limit of groups; skewed, half of the tokens choose the same."""
    import numpy as np

    choices = np.empty((DEVICES * TOKENS, MOE.experts_per_token), np.int32)
    for row in choices:
        groups = rng.permutation(MOE.num_groups)[: MOE.groups_per_token]
        members = (groups[:, None] * MOE.experts_per_group + np.arange(MOE.experts_per_group)).ravel()
        row[:] = rng.permutation(members)[: MOE.experts_per_token]
    if load == "skewed":
        choices[::2] = np.arange(MOE.experts_per_token)
    return choices


# --- optimizer state --------------------------------------------------------------------------------------------------


def measure_state(_: str) -> list[dict]:
    """Bytes of master weights and moments on a device, counted on its arrays, and what theory says."""
    prepare_environment(os.environ, virtual_devices=DEVICES)
    import jax

    from deepseek_jax.training.optimizer import OptimizerConfig
    from deepseek_jax.tree import flatten

    rows = []
    for axes in ({"data": 8}, {"data": 2, "expert": 4}, {"node": 2, "expert": 4}):
        for zero in (True, False):
            for moments, each in (("float32", 12), ("bfloat16", 8)):
                trainer, _, _ = make_trainer(zoo.bench(), axes, zero=zero)
                trainer.optimizer = OptimizerConfig(moment_dtype=moments).make(trainer.params_layout.specs)
                state = trainer.fresh_state(trainer.params_layout.initial(0), trainer.bias_layout.initial(0))
                held = jax.tree.leaves((state.params, state.opt_state))
                first = jax.devices()[0]
                counted = sum(s.data.nbytes for leaf in held for s in leaf.addressable_shards if s.device == first)
                ranks = axes.get("node", 1) * axes.get("expert", 1)
                theory = 0.0
                for name, leaf in flatten(state.params).items():
                    experts = ".experts." in name
                    copies = axes.get("data", 1) * (1 if experts else ranks) if zero else 1
                    theory += each * leaf.size / copies / (ranks if experts else 1)
                rows.append({"axes": axes, "zero": zero, "moments": moments, "counted": counted, "theory": theory})
                del state, held
    return rows


# --- a train step -----------------------------------------------------------------------------------------------------


def measure_step(side: str) -> float:
    """Tokens per second of the median of eight steps."""
    devices, axes = STEPS[side]
    prepare_environment(os.environ, virtual_devices=devices)
    import jax

    trainer, batch, hyper = make_trainer(zoo.bench(), axes, force_balance=True)
    trainer.room.set_state({"setting": 0, "calm": 0, "patience": 50})  # where a run is once its routing is even
    state, seconds = trainer.initial_state(0), []
    for turn in range(10):
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(trainer.step(state, batch, hyper))
        if turn > 1:
            seconds.append(time.perf_counter() - begin)
    return ROWS * LENGTH / statistics.median(seconds)


# --- the tables -------------------------------------------------------------------------------------------------------


def report(exchanges: list[dict], state: list[dict], steps: dict[str, list[float]]) -> str:
    """The tables, with what is needed to read them later."""
    lines = [
        "# Expert parallelism on eight virtual devices",
        "",
        f"`python -m tools.bench.expert_parallel --write` on {datetime.date.today()}, on {machine()}; "
        f"jax {importlib.metadata.version('jax')}. Eight devices share these cores: times compare ways to do the same "
        "work, and say nothing of a network.",
        "",
        "## Dispatch and combine",
        "",
        f"There and back, forward and backward, float32: {TOKENS} tokens of width {WIDTH} a device, top "
        f"{MOE.experts_per_token} of {MOE.num_experts} experts in {MOE.groups_per_token} of {MOE.num_groups} groups, "
        f"on {NODES} nodes of {DEVICES // NODES}. Skewed: every other token chooses the same experts of one device. "
        "MB a device sends: rows that are needed, those of them that leave the node, and buffers as they travel. "
        "Medians of 10 alternating runs; the setting is the first of the ladder with room.",
        "",
        "| load | exchange | ms | to all-gather | MB needed | between nodes | in buffers | setting |",
        "|---|---|---|---|---|---|---|---|",
    ]
    dense = {one["load"]: one["ms"] for one in exchanges if one["name"] == "all-gather"}
    for one in exchanges:
        mb = " | ".join(f"{one[key] / 1e6:.1f}" for key in ("used", "nodes", "buffer"))
        ratio = one["ms"] / dense[one["load"]]
        lines.append(f"| {one['load']} | {one['name']} | {one['ms']:.0f} | {ratio:.2f} | {mb} | {one['setting']} |")
    lines += [
        "",
        "## Optimizer state of a device",
        "",
        "Master weights and both moments of `zoo.bench()`, MiB, counted on the arrays of the first device. Theory: 12 "
        "bytes a parameter (8 with bfloat16 moments) over the ranks that would else hold copies.",
        "",
        "| mesh | moments | ZeRO-1 | theory | counted | on every rank |",
        "|---|---|---|---|---|---|",
    ]
    whole = {(str(one["axes"]), one["moments"]): one["counted"] for one in state if not one["zero"]}
    for one in state:
        if one["zero"]:
            axes = " x ".join(f"{name} {size}" for name, size in one["axes"].items())
            numbers = one["theory"], one["counted"], whole[str(one["axes"]), one["moments"]]
            sizes = " | ".join(f"{number / 2**20:.1f}" for number in numbers)
            lines.append(f"| {axes} | {one['moments']} | yes | {sizes} |")
    one_device = statistics.median(steps["one device"])
    lines += [
        "",
        "## A train step",
        "",
        f"`zoo.bench()`, {ROWS} × {LENGTH} tokens, float32, forced balance, least room; medians of 8 steps in each of "
        f"{_TURNS.value} processes that take turns. The goal is at most 1.5 times the time of one device, the aim 1.3.",
        "",
        "| mesh | tokens/s | each turn | time to one device |",
        "|---|---|---|---|",
    ]
    for side, rates in steps.items():
        median = statistics.median(rates)
        turns = ", ".join(f"{rate:,.0f}" for rate in rates)
        lines.append(f"| {side} | {median:,.0f} | {turns} | {one_device / median:.2f} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    app.run(main)
