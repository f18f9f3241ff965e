"""Tables of devices: what they say is what is chosen, and a file that is none is named."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import device_tables, implementation
from pallas_kernels.block_scaled_matmul.config import Groups, MatmulConfig, config_for, default_config, matmul
from pallas_kernels.device_tables import FIELDS, DeviceTable, file_name, read
from pallas_kernels.grouped_matmul import preferred_alignment
from pallas_kernels.grouped_matmul.config import ArrayConfig, array_config_for, array_matmul
from pallas_kernels.implementation import choose
from pallas_kernels.quantize import quantize
from pallas_kernels.target import H200, compiling_for, target

BF16 = jnp.dtype(jnp.bfloat16)
MEASURED = MatmulConfig(128, 64, stages=3, cluster=2, swath=4)
CUT = {field: getattr(MEASURED, field) for field in FIELDS}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of the user's own tables, and nothing that was read before."""
    monkeypatch.setenv(device_tables.OWN_FOLDER, str(tmp_path))
    monkeypatch.setattr(device_tables, "FOLDER", tmp_path / "none")
    for cached in (device_tables._of_device, implementation._say):
        cached.cache_clear()
    yield tmp_path
    for cached in (device_tables._of_device, implementation._say):
        cached.cache_clear()


def table(**changes):
    known = ((matmul(4096, 2112, 7168, BF16), CUT),)
    fields = {"jax": jax.__version__, "date": "2026-01-02", "passed": ("quantize",), "matmuls": known}
    return DeviceTable(H200.kind, **fields | changes)


def test_a_table_is_read_as_it_was_written(folder):
    grouped = array_matmul(512, 256, 128, BF16, Groups("rows", 4, 128), True)
    wgrad = matmul(512, 256, 4096, jnp.dtype(jnp.float32), b_tile=(128, 1), groups=Groups("depth", 4, 128))
    written = table(matmuls=((grouped, CUT), (wgrad, CUT)))
    path = written.write(folder / "new")
    assert path.name == file_name("NVIDIA H200") == "nvidia_h200.json"
    assert read(path) == written
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.pop("passed"), "KeyError: 'passed'"),
        (lambda fields: fields.update(more=1), "unexpected keyword argument 'more'"),
        (lambda fields: fields["matmuls"][0].update(tokens=0), "positive whole numbers"),
        (lambda fields: fields["matmuls"][0]["config"].pop("swath"), "a config has tile_m"),
        (lambda fields: fields["matmuls"][0]["config"].update(swath="8"), "whole numbers each"),
        (lambda fields: fields.update(jax=0), "must be text"),
    ],
)
def test_what_is_no_table_is_named_in_one_line(folder, change, message):
    path = table().write(folder)
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message) as error:
        device_tables.of_device(H200.kind)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_kernel_is_chosen_by_itself_only_where_a_table_of_this_jax_says_that_it_passed(folder, caplog):
    caplog.set_level(logging.INFO, "pallas_kernels")
    obstacles = {"mosaic_gpu": None, "reference": None}
    for written, wanted, said in (
        (None, "reference", "no table says that the kernel passed its checks on NVIDIA H200"),
        (table(), "mosaic_gpu", "quantize runs as mosaic_gpu"),
        (
            table(passed=("requantize",)),
            "reference",
            "the kernel of quantize did not pass its checks on NVIDIA H200, says its table of 2026",
        ),
        (table(jax="0.0.1"), "reference", "is of jax 0.0.1, and this is"),
    ):
        if written is not None:
            written.write(folder)
        device_tables._of_device.cache_clear()
        implementation._say.cache_clear()
        caplog.clear()
        with compiling_for(H200):
            assert choose("quantize", None, obstacles) == choose("quantize", None, obstacles) == wanted
            assert choose("quantize", "mosaic_gpu", obstacles) == "mosaic_gpu"
        (record,) = caplog.records  # Said once.
        assert said in record.getMessage()
        assert (record.levelno == logging.INFO) == (wanted == "mosaic_gpu")


def test_what_the_kernel_cannot_take_is_said_and_goes_without(folder, caplog):
    caplog.set_level(logging.INFO, "pallas_kernels")
    table().write(folder)
    with compiling_for(H200):
        assert choose("quantize", None, {"mosaic_gpu": "it needs a matrix", "reference": None}) == "reference"
    assert [record.getMessage() for record in caplog.records] == ["quantize runs as reference: it needs a matrix"]


def test_on_a_cpu_nothing_is_said(folder, caplog):
    caplog.set_level(logging.INFO, "pallas_kernels")
    assert target().backend == "cpu"
    assert choose("quantize", None, {"mosaic_gpu": "it is for GPUs", "reference": None}) == "reference"
    assert not caplog.records


def test_a_matmul_is_cut_as_the_nearest_that_was_measured(folder):
    far = dataclasses.replace(MEASURED, swath=16)
    known = [(matmul(rows, 2112, 7168, BF16), cut) for rows, cut in ((4096, CUT), (64, CUT | {"swath": far.swath}))]
    table(matmuls=tuple(known)).write(folder)
    with compiling_for(H200):
        assert config_for(4096, 2112, 7168, BF16, 132) == config_for(8192, 2112, 7168, BF16, 132) == MEASURED
        assert config_for(100, 2112, 7168, BF16, 132) == far
        for sizes in ((8193, 2112, 7168), (4096, 2112, 7040), (4096, 2176, 7168)):
            assert config_for(*sizes, BF16, 132) == default_config(*sizes[:2], BF16, 132)
        groups = Groups("rows", 4, 128)
        grouped = config_for(4096, 2112, 7168, BF16, 132, groups=groups)
        assert grouped == default_config(4096, 2112, BF16, 132, groups=groups)
        columns = config_for(4096, 2112, 7168, BF16, 132, b_tile=(128, 1))
        assert columns == default_config(4096, 2112, BF16, 132, b_tile=(128, 1))
    assert config_for(4096, 2112, 7168, BF16, 132) == default_config(4096, 2112, BF16, 132)  # Of a CPU there is none.


def test_of_a_wgrad_the_tokens_are_what_is_summed_over(folder):
    float32, cut = jnp.dtype(jnp.float32), CUT | {"tile_m": 128, "tile_n": 32}
    table(matmuls=((matmul(7168, 2112, 4096, float32, b_tile=(128, 1)), cut),)).write(folder)
    with compiling_for(H200):
        for tokens in (4096, 4097, 8192):
            config = config_for(7168, 2112, tokens, float32, 132, b_tile=(128, 1))
            assert config == MatmulConfig(**cut, b_tile=(128, 1))
        for rows, tokens in ((3584, 4096), (7168, 8193)):
            config = config_for(rows, 2112, tokens, float32, 132, b_tile=(128, 1))
            assert config == default_config(rows, 2112, float32, 132, b_tile=(128, 1))


def test_a_kernel_whose_derivative_rests_on_another_needs_both(folder):
    table(passed=("grouped_matmul",)).write(folder)
    obstacles = {"mosaic_gpu": None, "reference": None}
    with compiling_for(H200):
        assert choose("grouped_matmul", None, obstacles) == "mosaic_gpu"
        assert choose("grouped_matmul", None, obstacles, rests_on=("grouped_matmul_dw",)) == "reference"


def test_work_on_the_hosts_processor_goes_without_kernels(folder):
    """As exporting a run does, on a machine with a GPU whose kernels passed."""
    with compiling_for(H200._replace(trusted=True)), jax.default_device(jax.devices("cpu")[0]):
        assert target().backend == "cpu"
        quantize(jnp.ones((128, 128), jnp.bfloat16), (1, 128))
    with compiling_for(H200), device_tables.ignored():
        assert device_tables.of_device(H200.kind) is None


def test_products_of_bfloat16_have_configs_of_their_own(folder):
    groups, cut = Groups("rows", 4, 128), {"tile_m": 128, "tile_n": 64, "stages": 5, "cluster": 1, "swath": 2}
    table(matmuls=((array_matmul(512, 256, 128, BF16, groups, False), cut),)).write(folder)
    with compiling_for(H200):
        assert array_config_for(512, 256, 128, BF16, 132, groups, False) == ArrayConfig(**cut)
        assert array_config_for(512, 256, 128, BF16, 132, groups, True) != ArrayConfig(**cut)


def test_groups_start_at_whole_tiles_where_the_kernel_multiplies_them(folder):
    assert preferred_alignment() == 1
    with compiling_for(H200):
        assert preferred_alignment() == 1
    with compiling_for(H200._replace(trusted=True)):
        assert preferred_alignment() == 128
