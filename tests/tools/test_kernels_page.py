"""docs/kernels.md quotes what is committed, what the configs say, and what the compiler makes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.block_scaled_matmul import config as configs
from pallas_kernels.block_scaled_matmul import pipeline
from pallas_kernels.block_scaled_matmul.config import MatmulConfig, default_config, rounds, step_cycles
from tools import kernels_aot, ring
from tools.kernel_ptx import kernel_ptx, main
from tools.kernels_aot import SMS, compile_matmul, compile_wgrad

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
COMMITTED = (ROOT / "tools" / "bench" / "results" / "kernels_aot.md").read_text(encoding="utf-8")
BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)

Row = dict[str, str]


def tables(text: str) -> list[list[Row]]:
    """Every table, its rows as cells by the head's words."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def table_with(*columns: str) -> list[Row]:
    """The page's first table that has these columns."""
    return next(table for table in tables(PAGE) if set(columns) <= table[0].keys())


def quoted(row: Row, other: Row) -> bool:
    """Every cell is the other's; a column's name may be shortened."""
    return all(any(name.startswith(column) and other[name] == cell for name in other) for column, cell in row.items())


# --- what is committed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns", [("M", "N×K"), ("product", "operands"), ("tiles", "moved"), ("kernel", "size")], ids=" ".join
)
def test_rows_of_what_the_compiler_made_are_those_of_the_committed_table(columns):
    rows = table_with(*columns)
    assert len(rows) >= 4
    committed = [row for table in tables(COMMITTED) for row in table]
    assert [row for row in rows if not any(quoted(row, other) for other in committed)] == []


def test_predictions_beside_published_times_are_the_committed_ones():
    """And the ratios that the page draws conclusions from; nothing was measured."""
    predicted = {}
    for row in (row for table in tables(COMMITTED) for row in table):
        if "predicted" in row and row.get("operands", "float8_e4m3fn") == "float8_e4m3fn":
            what = f"grouped, {row['groups × rows']}" if "operands" in row else row.get("M", "")
            speed = re.search(r"(\d+) TFLOP/s", row["predicted"])[1]
            predicted.setdefault(f"{what}, {row['N×K']}", speed)  # bfloat16 results and Fprop come first.
    rows = table_with("published", "measured")
    assert [row["predicted"] for row in rows] == [predicted[row["product"]] for row in rows]
    assert {row["measured"] for row in rows} == {"not yet"}
    ratios = [int(row["predicted"]) / int(row["published"]) for row in rows]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} times" in PAGE
    (wgrad,) = (
        row
        for table in tables(COMMITTED)
        for row in table
        if {"tokens": "4096", "N×K": "7168×2048"}.items() <= row.items()
    )
    assert f"{wgrad['predicted'].split()[2]} TFLOP/s predicted for 4096×7168×2048" in PAGE.replace("\n", " ")


# --- configs and models -----------------------------------------------------------------------------------------------


def test_the_table_of_stages_is_what_its_command_prints():
    assert set(ring.stages_table()) <= set(PAGE.splitlines())


def test_cycles_of_a_step_by_tile():
    rows = table_with("multiply", "consumer")
    assert len(rows) == 6
    for row in rows:
        tile_m, tile_n, cluster = map(int, re.findall(r"\d+", row["tile, cluster"]))
        b_tile = (128, 1) if row["tile, cluster"].startswith("Wgrad") else (128, 128)
        cycles = step_cycles(MatmulConfig(tile_m, tile_n, cluster=cluster, b_tile=b_tile), 4096)
        assert {name: f"{value:.0f}" for name, value in cycles.items()}.items() <= row.items()


def test_registers_by_consumers():
    for row in table_with("at launch", "partial sums"):
        consumers = int(row["consumers"])
        config = MatmulConfig(64 * consumers, 128)
        assert (int(row["producer"]), int(row["consumer"])) == pipeline.REGISTERS[consumers]
        assert (int(row["its sums"]), int(row["partial sums"])) == (64, 64 * config.steps_at_once)
        launch, warpgroups = map(int, row["at launch"].split(" × "))
        assert warpgroups == consumers + 1
        assert launch * warpgroups <= int(row["producer"]) + consumers * int(row["consumer"]) <= 512


def test_bytes_cycles_and_rounds_in_the_text():
    drawn = default_config(ring.M, ring.N, BF16, SMS)
    larger = MatmulConfig(192, 128, stages=4, cluster=2)
    said = {
        "may have": configs.SHARED_MEMORY,
        "128×128 takes": drawn.stage_bytes,
        "Five of them, and": 128 * 128 * 2,
    }
    text = " ".join(PAGE.split())
    for words, number in said.items():
        assert f"{words} {number:,}" in text
    float32 = default_config(ring.M, ring.N, F32, SMS)
    assert (drawn.stages, drawn.most_stages(BF16), float32.stages) == (5, 5, 4)
    assert {config: rounds(config, 4096, 7168, SMS) for config in (drawn, larger)} == {drawn: 14, larger: 10}
    for n, numbers in ((7168, "7355 cycles (14 times 525.3) against 7680"), (24576, "24,691 against 24,576")):
        cycles = [rounds(c, 4096, n, SMS) * max(step_cycles(c, 4096).values()) for c in (drawn, larger)]
        assert re.findall(r"\d{4,}", numbers.replace(",", "")) == [f"{c:.0f}" for c in cycles]
        assert numbers in text
    run = ring.simulate(drawn, ring.M, 16, 1)
    ask, come = ({s.step: s for s in run.spans if s.kind == kind} for kind in ("ask", "come"))
    waits = [round(come[step].end - ask[step].start) for step in range(5, 16)]
    assert f"asked for {min(waits)} to {max(waits)} cycles before" in text


def test_what_the_drawn_block_loses_at_the_end_of_a_tile():
    config = default_config(ring.M, ring.N, BF16, SMS)
    run = ring.simulate(config, ring.M, 16, 2)

    def longest_pause(what):
        spans = sorted((s.start, s.end) for s in run.spans if s.what == what)
        return round(max(b[0] - a[1] for a, b in itertools.pairwise(spans)))

    assert f"stop for {longest_pause('tensor cores')} cycles" in PAGE
    assert f"and lose {longest_pause('L2')}" in PAGE
    lost = 16 * (ring.cycles_per_step(config, ring.M, 16) - max(step_cycles(config, ring.M).values()))
    assert f"{kernels_aot.TILE_CYCLES} cycles for each tile" in " ".join(PAGE.split())
    assert f"({lost:.0f} in the simulation" in PAGE


def test_rows_and_columns_that_the_clusters_of_a_round_read():
    """66 clusters of tiles of 128×256, of 32 rows of tiles and 28 columns."""
    for swath, words in ((8, "1024 rows of a and 2304 columns of b"), (1, "read 384 and 7168")):
        places = [tuple(map(int, pipeline.tile_at(jnp.int32(i), 32, 28, swath))) for i in range(SMS // 2)]
        counts = [len({place[axis] for place in places}) * size for axis, size in ((0, 128), (1, 256))]
        assert [f"{count}" for count in counts] == re.findall(r"\d+", words)
        assert words in " ".join(PAGE.split())


def test_the_code_that_is_shown_is_in_the_kernel():
    """Line by line, in the order of the page."""
    folder = ROOT / "pallas_kernels" / "block_scaled_matmul"
    text = "\n".join((folder / name).read_text(encoding="utf-8") for name in ("pipeline.py", "mosaic_gpu.py"))
    source = (line.strip() for line in text.splitlines())
    shown = [line for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert len(shown) > 10
    for line in shown:
        assert line.strip() == "…" or line.strip() in source, line


# --- what the compiler makes ------------------------------------------------------------------------------------------


@pytest.mark.aot
@pytest.mark.skipif(jax.__version__ != "0.10.2", reason="the page shows the PTX of jax 0.10.2")
def test_the_ptx_that_is_shown_is_that_of_its_command(capsys):
    """Line by line in this order, but for what `…` stands for; and its shared memory lies as the page says."""
    assert main(["4096", "7168", "16384"]) == 0
    ptx = capsys.readouterr().out
    lines = (" ".join(line.split()) for line in ptx.splitlines())
    shown = [line for block in re.findall(r"```ptx\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert len(shown) > 30
    for line in shown:
        pattern = ".*".join(re.escape(part.strip()) for part in " ".join(line.split()).split("…"))
        assert any(re.fullmatch(pattern, other) for other in lines), line
    assert f"prints {len(ptx.splitlines())} lines" in PAGE
    for offset in (81_920, 84_992, 166_912, 167_936, 200_704, 200_744):
        assert str(offset) in ptx
    assert hex(4611686293305294848)[2:] in PAGE
    with pytest.raises(RuntimeError, match="compiled before in this process"):
        kernel_ptx(4096, 7168, 16384)


class Unchecked(MatmulConfig):
    """A config with sizes that spill."""

    TILE_N = (128, 256)

    def __post_init__(self):
        pass


class TwoAtOnce(Unchecked):
    """Two steps before the first is scaled, whatever registers there are."""

    steps_at_once = 2


class ThreeAtOnce(Unchecked):
    """Three."""

    steps_at_once = 3


@pytest.mark.aot
def test_what_spills(monkeypatch):
    """The page's table: what `MatmulConfig` refuses, or does not choose, is what registers do not suffice for.

    At a size of its own, since a kernel is compiled once in a process.
    """
    monkeypatch.setitem(pipeline.REGISTERS, 4, (24, 120))
    monkeypatch.setitem(configs.PARTIAL_SUMS, 4, 64)
    rows = table_with("bytes that a thread spills and reads back")
    wgrad = {"b_tile": (128, 1)}
    tried = [
        MatmulConfig(128, 128, stages=5, cluster=2),
        ThreeAtOnce(128, 128, stages=5, cluster=2),
        MatmulConfig(192, 128, stages=4, cluster=2),
        TwoAtOnce(192, 128, stages=4, cluster=2),
        Unchecked(256, 128, stages=3, cluster=2),
        Unchecked(128, 256, stages=3, cluster=2),
        MatmulConfig(128, 128, stages=4, cluster=2, **wgrad),
        TwoAtOnce(128, 128, stages=4, cluster=2, **wgrad),
        Unchecked(192, 128, stages=3, cluster=2, **wgrad),
    ]
    for row, config in zip(rows, tried, strict=True):
        what, said = row[""], int(row["bytes that a thread spills and reads back"])
        assert what.startswith("Wgrad") == config.column_scales
        assert f"{config.tile_m}×{config.tile_n}" in what
        if config.column_scales:
            kernel = compile_wgrad(8192, 4096, 7168, config)
        else:
            kernel = compile_matmul(8192, 4096, 7168, BF16, config)
        assert kernel.spilled_bytes == said if jax.__version__ == "0.10.2" else bool(kernel.spilled_bytes) == bool(said)


def test_the_command_says_what_is_wrong(capsys):
    assert main(["4096", "0", "16384"]) == 2
    assert capsys.readouterr().err == "error: M, N and K must be at least 1\n"
