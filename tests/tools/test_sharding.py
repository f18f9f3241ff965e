"""The table of what a recipe puts on every device: the 671B recipe on 2048 devices, and one line where it cannot be."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from deepseek_jax.planning.memory import step_memory
from deepseek_jax.planning.parameters import total_parameters
from deepseek_jax.training.sharding_table import ShardingTable, abstract_state, abstract_trainer, sharding_table
from experiments import v3
from tools import sharding as tool


@pytest.fixture(scope="module")
def table() -> ShardingTable:
    return sharding_table(v3.pretrain())


def total(table: ShardingTable, field: str) -> int:
    return sum(getattr(row, field) for row in table.rows)


# --- the 671B recipe ------------------------------------------------------------------------------------------------


def test_in_seconds_and_without_allocating_anything():
    """A process of its own, that counts the arrays that jax has, and the memory; imports alone take 250 MB."""
    code = (
        "import jax; from tools import sharding; assert sharding.main(['v3.pretrain']) == 0; "
        "peak = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]; "
        "print(len(jax.live_arrays()), peak[0].split()[1] if peak else 0)"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("the memory of a process is read from /proc")
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 60
    arrays, kilobytes = map(int, done.stdout.splitlines()[-1].split())
    assert arrays == 0
    assert kilobytes < 1_000_000


def test_the_recipes_mesh_is_the_papers(table):
    """Section 3.2: 16 stages, experts over 64 devices on 8 nodes; 2048 of them, two copies of each expert."""
    assert table.mesh == {"pipe": 16, "data": 2, "node": 8, "expert": 8}
    assert (table.devices, table.batch_rows, table.microbatches) == (2048, 15_360, 120)


def test_all_parameters_are_there(table):
    """671.026B with router biases, 11.6B more of MTP; the same as the declarations say."""
    model = v3.pretrain().model
    assert table.elements(mtp=False) == total_parameters(model, mtp=False) == 671_026_419_200
    assert table.elements(mtp=False) + table.elements(mtp=True) == total_parameters(model)


def test_every_array_is_split_as_the_state_says(table):
    """Each dimension, and the bytes of one device's part of it."""
    state = abstract_state(abstract_trainer(v3.pretrain()))
    arrays = jax.tree.leaves(state.params) + jax.tree.leaves(state.router_bias)
    assert len(arrays) == len(table.rows)
    by_bytes = sorted(4 * math.prod(array.sharding.shard_shape(array.shape)) for array in arrays)
    assert sorted(row.master_bytes for row in table.rows) == by_bytes
    rows = {row.name: row for row in table.rows}
    experts = rows["moe.ffn.experts.gate_up"]
    assert experts.shape == (16, 3, 256, 7168, 4096), "the fourth is in the tail"
    assert rows["mtp.block.ffn.experts.gate_up"].shape == (16, 1, 256, 7168, 4096)
    assert experts.partition == (("pipe",), (), ("node", "expert"), ("data",), ())
    assert experts.copy_partition == (("pipe",), (), ("node", "expert"), (), ())
    assert experts.master_bytes == 4 * 3 * (256 // 64) * 7168 // 2 * 4096
    assert experts.moment_bytes == experts.master_bytes, "two of two bytes"
    assert experts.copy_bytes == 2 * 2 * 3 * (256 // 64) * 7168 * 4096, "of both stages that DualPipe works on"
    assert experts.gradient_bytes == 2 * experts.copy_bytes
    head = rows["head.weight"]
    assert head.partition == (("data", "node", "expert"), ("pipe",))
    assert head.copy_bytes == 2 * 7168 * 129_280 // 16
    router = rows["moe.ffn.router.weight"]
    assert (router.copy_dtype, router.copy_bytes) == ("float32", 2 * 4 * 3 * 7168 * 256), "gathered in full precision"
    norm = rows["final_norm.scale"]
    assert (norm.copy_bytes, norm.gradient_bytes, norm.partition) == (0, 4 * 7168, ((),)), "used as it is"
    bias = rows["moe.ffn.router.bias"]
    assert (bias.master_bytes, bias.moment_bytes, bias.copy_bytes, bias.gradient_bytes) == (
        4 * 3 * 256,
        0,
        2 * 3 * 4 * 256 // 2,
        0,
    )


def test_master_and_moments_are_those_of_zero(table):
    """Theory: 8 bytes a parameter with moments in bfloat16, once over all devices, empty slots included."""
    assert table.state_bytes_per_element == 8
    held = sum(row.held_elements for row in table.parameters)
    state = sum(row.master_bytes + row.moment_bytes for row in table.parameters)
    assert 1 <= state / (8 * held / 2048) < 1.001, "only vectors are not split over all"
    padding = held / sum(row.elements for row in table.parameters)
    assert math.isclose(table.least_state_bytes * padding, 8 * held / 2048)


def test_moments_in_float32_make_it_twelve_bytes():
    wide = tool.resolve("v3.pretrain", ["optimizer.moment_dtype=float32", "parallel.pipe=1"], 128)
    table = sharding_table(wide)
    assert table.state_bytes_per_element == 12
    assert total(table, "moment_bytes") == 2 * sum(row.master_bytes for row in table.parameters)
    assert sum(row.held_elements for row in table.rows) == total_parameters(wide.model), "one stage has no empty slot"


def test_on_one_device_the_bytes_are_the_planners():
    """`planning.memory`: masters and their copy, the float32 sum of gradients, moments."""
    base = tool.resolve("tiny.pretrain", ["precision.compute=bfloat16", "optimizer.moment_dtype=bfloat16"], None)
    table = sharding_table(base)
    plan = step_memory(base.model, 1, microbatches=2, moment_bytes=2, compute_bytes=2)
    full = sum(row.held_elements for row in table.rows if row.copy_dtype == "float32")
    biases = sum(row.held_elements for row in table.biases)
    assert total(table, "master_bytes") + total(table, "copy_bytes") == plan.parameters - 2 * full
    assert total(table, "moment_bytes") == plan.moments - 4 * biases
    assert total(table, "gradient_bytes") == 4 * (total_parameters(base.model) - biases)
    assert table.collectives == ()


def test_expert_weights_are_summed_over_their_copies_alone(table):
    """Section 3.2: over data; a dense weight over all 128 devices of its stage."""
    scattered = {one.axes: one for one in table.collectives if one.kind == "reduce_scatter" and len(one.shape) == 5}
    assert set(scattered) == {("data",)}
    dense = {one.axes for one in table.collectives if one.kind == "reduce_scatter" and len(one.shape) < 5}
    assert dense == {("data", "node", "expert")}


def test_a_token_is_sent_across_once_to_each_of_four_nodes(table):
    """Section 2.1.2: 4 nodes of 8. Room for 1.5 times that, of which 7/8 leave; 4 slots, 120 microbatches of 4096."""
    sent = sum(
        one.bytes_sent
        for one in table.collectives
        if (one.axes, one.purpose, one.phase) == (("node",), "combine", "forward")
    )
    assert sent == 4 * 120 * 4096 * 4 * 1.5 * 7 / 8 * 7168 * 2


# --- the command ----------------------------------------------------------------------------------------------------


def call(capsys, *argv) -> tuple[int, str, str]:
    capsys.readouterr()
    code = tool.main(list(argv))
    return code, *capsys.readouterr()


def cells(text: str, head: str) -> list[list[str]]:
    """The rows of the Markdown table whose first column has this name."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head} "))
    stop = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : stop]]


def test_what_is_printed(table):
    text = tool.report(table)
    assert text.splitlines()[0] == "Mesh: pipe 16 x data 2 x node 8 x expert 8 = 2,048 devices"
    assert "671.026B parameters, router biases included, and 11.610B of MTP modules" in text
    rows = {row[0]: row[1:] for row in cells(text, "parameter")}
    assert len(rows) == len(table.rows)
    assert rows["moe.ffn.experts.down"] == [
        "[16, 3, 256, 2048, 7168]", "pipe, –, node·expert, –, data", "bfloat16", "pipe, –, node·expert, –, –",
        "352", "352", "705", "1,409",
    ]  # fmt: skip
    each = re.search(
        r"Each device: master (.*), moments (.*), working copy (.*), gradient (.*), together (.*) GB", text
    )
    shown = [float(number) for number in each.groups()]
    fields = ("master_bytes", "moment_bytes", "copy_bytes", "gradient_bytes")
    exact = [total(table, field) / 1e9 for field in fields]
    assert shown == pytest.approx([*exact, sum(exact)], rel=5e-3)
    assert "Theory: 8 bytes a parameter" in text
    exchanges = {tuple(row[:4]): row[4:6] for row in cells(text, "what for")}
    assert exchanges["combine", "forward", "all_to_all", "node"] == ["8", "480"]
    assert text.splitlines()[-1].startswith(
        "What stages and the model's two ends send is counted as often as the schedule"
    )


def test_more_devices_are_more_replicas(capsys):
    code, out, _ = call(capsys, "tiny.pretrain", "--devices", "8", "--set", "parallel.expert=4")
    assert code == 0
    assert out.startswith("Mesh: pipe 1 x data 2 x node 1 x expert 4 = 8 devices\n")
    assert "What stages" not in out
    assert "empty, because" not in out


def test_the_table_is_written_for_programs(tmp_path, capsys):
    path = tmp_path / "table.json"
    code, _, _ = call(capsys, "tiny.pretrain", "--devices", "2", "--json", str(path))
    assert code == 0
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["devices"] == 2
    table = sharding_table(tool.resolve("tiny.pretrain", [], 2))
    assert document["parameters"] == json.loads(json.dumps([dataclasses.asdict(row) for row in table.parameters]))
    assert [one["bytes_sent"] for one in document["collectives"]] == [one.bytes_sent for one in table.collectives]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["v3.pretran"], "no recipe v3.pretran. Did you mean v3.pretrain?"),
        (
            ["v3.pretrain", "--devices", "100"],
            "100 devices are no multiple of 1,024, which pipe 16 x node 8 x expert 8",
        ),
        (["v3.pretrain", "--devices", "0"], "0 devices are no multiple of 1,024"),
        (["v3.pretrain", "--set", "parallel.expert=7"], "256 experts cannot be split evenly over 56 devices"),
        (["v3.pretrain", "--set", "parallel.pipe=3"], "dualpipe needs an even number of ranks, not 3: use 2 or 4"),
        (["v3.pretrain", "--set", "parallel.pipe=6"], "model.vocab_size=129280 does not split evenly over parallel.pi"),
        (["v3.pretrain", "--set", "parallel.pipe=64"], "64 stages are more than the model's 61 layers"),
        (
            ["v3.pretrain", "--set", "parallel.node=16", "--set", "parallel.expert=4"],
            "model.moe.num_groups (8) does not map to 16 nodes",
        ),
        (["v3.pretrain", "--set", "parallel.dispatcher=local"], "parallel.dispatcher=local needs all experts on one"),
        (["tiny.pretrain", "--json", "/nowhere/table.json"], "No such file or directory"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(argv, says, capsys):
    code, out, err = call(capsys, *argv)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]*\n", err)
    assert says in err


# --- the recipe -----------------------------------------------------------------------------------------------------


def test_the_recipe_is_the_papers():
    """Section 4.2: 14.8T tokens, 3072 to 15360 sequences of 4K over 469B, 2.2e-4 to 2.2e-5 to 7.3e-6 after 2K steps."""
    made = v3.pretrain()
    schedule, rate = made.schedule, made.optimizer.peak_lr
    assert (schedule.total_tokens, made.data.sequence_length) == (14.8e12, 4096)
    assert (made.model.attention.yarn, made.precision.compute) == (None, "bfloat16")
    assert made.optimizer.moment_dtype == "bfloat16"
    ramp = [schedule.rows(int(tokens)) for tokens in (0, 200e9, 470e9, 14e12)]
    assert ramp[0] == 3072 < ramp[1] < 15_360 == ramp[2] == ramp[3]
    sizes = {schedule.rows(int(billions * 1e9)) for billions in range(480)}
    assert len(sizes) == 9
    assert all(size % made.parallel.batch_shards == 0 for size in sizes)
    tokens = 0
    for _ in range(2000):
        tokens += schedule.rows(tokens) * 4096
    assert schedule.learning_rate(tokens) == 1 > schedule.learning_rate(tokens - 3072 * 4096), "2000 steps of warm-up"
    rates = [schedule.learning_rate(int(trillions * 1e12)) * rate for trillions in (9.99, 14.31, 14.7)]
    assert rates == pytest.approx([2.2e-4, 2.2e-5, 7.3e-6])
    weights = [schedule.mtp_weight(int(trillions * 1e12)) for trillions in (9.99, 10.01)]
    biases = [schedule.bias_rate(int(trillions * 1e12)) for trillions in (14.29, 14.31)]
    assert (weights, biases) == ([0.3, 0.1], [0.001, 0.0])


def test_the_smaller_mesh_changes_nothing_else():
    base, smaller = v3.pretrain(), v3.pretrain_512()
    assert math.prod(smaller.parallel.shape) == 512
    assert dataclasses.replace(smaller, parallel=base.parallel) == base


def test_a_machine_of_fewer_devices_is_refused_in_one_line(tmp_path, capsys):
    """By the command that trains, before anything is made."""
    from experiments import run

    assert run.main(["v3.pretrain", "--workdir", str(tmp_path / "run")]) != 0
    assert re.fullmatch(
        r"error: the mesh pipe 16 x data 2 x node 8 x expert 8 needs 2048 devices, [^\n]*\n", capsys.readouterr().err
    )
