"""The device table, and the efficiencies that are fitted to kernel tables."""

import dataclasses
from pathlib import Path

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.planning.devices import B200, CPU, DEVICES, H800, find_device, with_price
from deepseek_jax.planning.efficiency import CUTLASS_H800, DEEPGEMM_H800, HOPPER, MXFP8_B200, ProductRow, fit_products
from deepseek_jax.planning.first_rates import FIRST_BLACKWELL, FIRST_HOPPER, with_first_rates


@pytest.mark.parametrize("name", ["h800", "h100", "h200", "b200", "gb200", "cpu"])
def test_every_device_is_whole(name):
    """A source for its numbers, an efficiency table, room for a program, and every dtype has a rate."""
    device = find_device(name)
    assert device.source
    assert 0 < device.usable_memory < device.memory
    assert device.peak("float8") >= device.peak("bfloat16") >= device.peak("float32") > 0
    assert device.efficiency.sources


def test_an_unknown_gpu_gets_the_list_and_how_to_add_one():
    with pytest.raises(ConfigError, match=r"no GPU 'h80'; did you mean h800\? there are h800, h100.*Device\(.*DEVICES"):
        find_device("h80")
    with pytest.raises(ConfigError, match=r"no GPU 'tpu'; .*there are"):
        find_device("tpu")
    assert find_device("H800") is H800, "as it is written does not matter"


def test_a_price_of_ones_own():
    assert with_price(H800, 1.5).price == 1.5
    assert with_price(H800, None).price == 2.0, "DeepSeek's report"
    with pytest.raises(ConfigError, match="dollars"):
        with_price(H800, -1)


def test_a_missing_dtype_runs_in_the_next_wider_one():
    assert CPU.peak("float8") == CPU.peak("float32")


def test_the_fit_finds_the_two_numbers_of_its_law():
    table = [ProductRow(4096, 4096, k, 1000.0 * k / (k + 700)) for k in (512, 2048, 16384)]
    rate, half = fit_products(table)
    assert (rate, half) == (pytest.approx(1000), pytest.approx(700))


@pytest.mark.parametrize(
    ("device", "table", "within"),
    [
        (with_first_rates(H800), DEEPGEMM_H800[:8], 0.06),
        (H800, CUTLASS_H800, 0.11),
        (B200, MXFP8_B200, 0.13),  # at 16384 the device slows down
    ],
    ids=["deepgemm", "cutlass", "b200"],
)
def test_the_kernel_table_comes_out_of_the_fit(device, table, within):
    """But for the narrow result of 2112 columns, which does not fill the device."""
    for row in table:
        fitted = device.product_rate("float8", row.inputs)
        assert fitted == pytest.approx(row.rate, rel=0.2 if row.outputs == 2112 else within)


@pytest.mark.parametrize(
    ("rates", "wanted"),
    [
        (FIRST_HOPPER, (0.6919, 663.3, 0.4978, 0.6738, 0.4487, 0.8955, 0.95625, 0.86, 0.0)),
        (FIRST_BLACKWELL, (0.6919, 663.3, 0.4978, 0.6489, 0.4444, 0.8955, 0.8931, 0.86, 0.0)),
    ],
)
def test_first_rates_stay_as_they_were(rates, wanted):
    """They are what the calibration's first column was predicted with."""
    names = ("products", "half_inputs", "weight_gradients", "attention_forward", "attention_backward", "memory", "node")
    found = [getattr(rates, name) for name in (*names, "collectives", "launch_seconds")]
    assert found == pytest.approx(wanted, rel=2e-4)


def test_the_documented_rates_are_these():
    """docs/planner.md has a table of both sets."""
    page = (Path(__file__).parents[2] / "docs" / "planner.md").read_text()
    sets = [with_first_rates(H800), H800, with_first_rates(B200), B200]

    def cells(*names: str) -> str:
        each = (", ".join(f"{getattr(one.efficiency, name):.0%}" for name in names) for one in sets)
        return f"| {' | '.join(each)} |"

    for row, names in (
        ("long product", ["products"]),
        ("weight gradients", ["weight_gradients"]),
        ("attention forward, backward", ["attention_forward", "attention_backward"]),
        ("passes over memory", ["memory"]),
        ("dispatch, combine in a node", ["node"]),
        ("dispatch, combine between nodes", ["network"]),
        ("other collectives", ["collectives"]),
        ("SMs that exchanges take", ["exchange_units"]),
    ):
        line = next(line for line in page.splitlines() if line.startswith(f"| {row}"))
        assert cells(*names) in line
    halves = " | ".join(f"{one.efficiency.half_inputs:.0f}" for one in sets)
    assert f"| {halves} |" in page


def test_in_bf16_a_kernels_ends_are_as_long_and_its_products_twice():
    """So half the rate is reached at half the contraction."""
    half = HOPPER.half_inputs / 2
    long = HOPPER.products * H800.peak("bfloat16")
    assert H800.product_rate("bfloat16", round(half)) == pytest.approx(long / 2, rel=1e-3)


def test_rates_never_exceed_peaks():
    others = ("half_inputs", "launch_seconds", "loops_copy", "measured", "sources")
    shares = (field.name for field in dataclasses.fields(HOPPER) if field.name not in others)
    rates = (*(one.efficiency for one in DEVICES.values()), FIRST_HOPPER, FIRST_BLACKWELL)
    for name in shares:
        assert all(0 <= getattr(one, name) <= 1 for one in rates), name
    assert len(DEVICES) == len({one.name for one in DEVICES.values()})
