"""The tuner: its checks can fail, its candidates can be had, and what it finds is what the table says."""

import types

import jax
import jax.numpy as jnp
import mosaic_interpreter
import numpy as np
import pytest

from pallas_kernels import device_tables
from pallas_kernels.device_tables import FIELDS
from pallas_kernels.target import H200
from pallas_kernels.tune import __main__ as command
from pallas_kernels.tune import checks, products, search
from pallas_kernels.tune.candidates import candidates, variants
from pallas_kernels.tune.products import BF16, Product, all_products
from pallas_kernels.tune.timing import Timing, time_kernels

SMALL = [
    Product("Fprop", 64, 128, 256),
    Product("Dgrad", 64, 128, 256),
    Product("Wgrad", 128, 256, 128),
    *(Product(name, 128, 128, 256, 2) for name in ("Fprop", "Wgrad")),
    *(Product(name, 128, 128, 256, 2, BF16) for name in ("Fprop", "Dgrad", "Wgrad")),
]


@pytest.fixture
def few(monkeypatch):
    """Small operands for the checks."""
    for name, value in {
        "SIZES": ((100, 130, 150), (1, 1, 7), (0, 8, 8)),
        "GROUPS": (0, 140, 1),
        "GROUPED_ROWS": 500,
        "GROUPED_WIDTHS": (130, 70),
        "SHAPES": ((100, 130), (1, 7)),
        "SWIGLU": ((70, 128),),
        "PERMUTED": ((20, 100, 3, 150),),
    }.items():
        monkeypatch.setattr(checks, name, value)


def test_an_implementation_that_equals_the_reference_passes(few):
    said = []
    assert checks.run_checks("reference", said.append) == tuple(checks.CHECKS)
    assert len(said) == len(checks.CHECKS)


@pytest.mark.parametrize("op", list(checks.CHECKS))
def test_every_check_can_fail(few, monkeypatch, op):
    """By an implementation that is off by a little more than it may be."""
    right = {"grouped_matmul": checks.grouped_matmul, "grouped_matmul_dx": checks.grouped_matmul_dx}
    right["grouped_matmul_dw"] = checks.grouped_matmul_dw
    function = right.get(op) or getattr(checks, op)

    def wrong(*args, implementation, **options):
        out = function(*args, implementation="reference", **options)
        return jax.tree.map(_spoiled, out) if implementation == "wrong" else out

    if op in right:
        operands = {"grouped_matmul": "x", "grouped_matmul_dx": "dy", "grouped_matmul_dw": "both"}[op]
        check = checks._check_grouped(wrong, operands)
    elif op in ("quantize", "quantize_both", "quantize_weight"):
        check = checks._check_quantizer(wrong, ((1, 128),) if op == "quantize" else (None,))
    else:
        monkeypatch.setattr(checks, op, wrong)
        check = checks.CHECKS[op]
    with pytest.raises(checks.CheckFailed):
        check("wrong")


def _spoiled(leaf):
    """One number of it is another."""
    if leaf.size == 0:
        return leaf
    flat = leaf.reshape(-1)
    wide = flat[-1].astype(jnp.float32)
    return flat.at[-1].set((wide * 1.5 + 1).astype(leaf.dtype)).reshape(leaf.shape)


def test_a_kernel_that_cannot_be_compiled_has_not_passed(few):
    said = []
    assert checks.run_checks("mosaic_gpu", said.append) == ()
    assert all("FAILED: ValueError" in line and "it is for GPUs of compute capability 9.0" in line for line in said)


@pytest.mark.parametrize("product", all_products(), ids=str)
def test_candidates_can_be_had_and_the_default_is_the_first(product):
    found = candidates(product, 132, 8)
    assert found[0] == product.default(132)
    assert 2 <= len(found) == len(set(found)) <= 8
    more = variants(found[0])
    assert found[0] not in more
    assert len(more) >= 3
    for config in (*found, *more):
        config.check_memory(product.result[2])


def test_the_matmuls_of_a_table_are_told_apart():
    names = [product.matmul for product in all_products()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("product", SMALL, ids=str)
def test_operands_and_the_product_without_the_kernel(product):
    a, b = product.make_operands(0)
    rows, columns, dtype = product.result
    got = product.portable(a, b)
    assert got.dtype == dtype
    grouped_results = product.groups is not None and product.name == "Wgrad"
    assert got.shape == ((product.groups, rows, columns) if grouped_results else (rows, columns))
    assert float(jnp.abs(got).max()) > 0


def test_the_fastest_is_found_and_the_default_stays_where_nothing_is_gained(monkeypatch):
    product = all_products()[0]
    monkeypatch.setattr(Product, "make_operands", lambda self, seed: ())
    default = product.default(132)
    tiles = candidates(product, 132, 3)[2]
    fastest = variants(tiles)[0]
    for factor, wanted in ((0.5, fastest), (0.995, default)):
        _tune_with(monkeypatch, lambda config, f=factor: {fastest: f, tiles: f + 0.001}.get(config, 1.0))
        found = search.tune(product, 132, tilings=3)
        assert found.config == wanted
        assert (found.default.median, found.portable.median) == (100, 700)


def test_what_cannot_be_compiled_is_passed_over_but_not_the_default(monkeypatch, caplog):
    product = all_products()[0]
    monkeypatch.setattr(Product, "make_operands", lambda self, seed: ())

    def broken(config):
        if config != product.default(132):
            raise RuntimeError("ptxas failed\nmore")
        return 1.0

    _tune_with(monkeypatch, broken)
    assert search.tune(product, 132, tilings=3).config == product.default(132)
    assert "ptxas failed" in caplog.text
    _tune_with(monkeypatch, lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        search.tune(product, 132, tilings=3)


@pytest.mark.parametrize("product", SMALL, ids=str)
def test_what_is_timed_has_to_be_the_product(product, monkeypatch):
    operands = product.make_operands(0)
    right = search.Right(product, operands)
    monkeypatch.setattr(Product, "by_kernel", lambda self, config: self.portable)
    right.require(None)
    monkeypatch.setattr(Product, "by_kernel", lambda self, config: lambda a, b: self.portable(a, b) * 1.1)
    with pytest.raises(checks.CheckFailed, match="results are wrong"):
        right.require(None)


def test_what_is_wrong_is_not_the_fastest(monkeypatch, caplog):
    product = all_products()[0]
    monkeypatch.setattr(Product, "make_operands", lambda self, seed: ())
    _tune_with(monkeypatch, lambda config: 1.0 if config == product.default(132) else 0.1)

    def require(config):
        if config != product.default(132):
            raise checks.CheckFailed("7 of 9 results are wrong")

    monkeypatch.setattr(search, "Right", lambda product, operands: types.SimpleNamespace(require=require))
    assert search.tune(product, 132, tilings=3).config == product.default(132)
    assert "7 of 9 results are wrong" in caplog.text


def _tune_with(monkeypatch, seconds):
    """A GPU on which a config takes 100 · seconds(config) µs, and the portable product 700."""
    monkeypatch.setattr(Product, "by_kernel", lambda self, config: config)

    def timing(function, *operands, calls):
        return Timing(100 * seconds(function) if hasattr(function, "tile_m") else 700.0, 0.0)

    monkeypatch.setattr(search, "time_kernels", timing)
    monkeypatch.setattr(search, "Right", lambda product, operands: types.SimpleNamespace(require=lambda config: None))


def test_times_by_the_clock_of_the_host():
    found = time_kernels(lambda x: x @ x, jnp.ones((64, 64)), calls=20)
    assert 0 < found.median < 1e6
    assert found.spread >= 0


def test_on_a_cpu_the_command_says_that_there_is_nothing_to_tune(capsys):
    assert command.main([]) == 2
    assert "nothing to tune here: it is for GPUs of compute capability 9.0" in capsys.readouterr().err


def test_the_command_writes_what_was_found(monkeypatch, tmp_path, capsys):
    """With others in the place of the GPU, the checks and the clock."""
    monkeypatch.setattr(command, "not_hopper", lambda: None)
    monkeypatch.setattr(command, "target", lambda: H200)
    monkeypatch.setattr(command, "run_checks", lambda say: ("block_scaled_matmul", "grouped_matmul_dw"))
    monkeypatch.setattr(command, "all_products", lambda: SMALL)
    monkeypatch.setattr(Product, "make_operands", lambda self, seed: ())
    _tune_with(monkeypatch, lambda config: 1.0)
    assert command.main(["--to", str(tmp_path)]) == 0
    table = device_tables.read(tmp_path / "nvidia_h200.json")
    assert table.passed == ("block_scaled_matmul", "grouped_matmul_dw")
    passed = [p for p in SMALL if p.groups is None or p.name == "Wgrad"]
    assert [matmul for matmul, _ in table.matmuls] == [p.matmul for p in passed]
    for product, (_, cut) in zip(passed, table.matmuls, strict=True):
        assert cut == {field: getattr(product.default(132), field) for field in FIELDS}
    out = capsys.readouterr().out
    assert out.count("1.00 times | 7.00 times |") == len(passed)
    # What was measured stays, and is not measured again unless asked.
    for options, measured in ((["--checks_only"], 0), ([], 0), (["--again"], len(passed))):
        assert command.main(["--to", str(tmp_path), *options]) == 0
        assert len(device_tables.read(tmp_path / "nvidia_h200.json").matmuls) == len(passed)
        assert capsys.readouterr().out.count("7.00 times |") == measured


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "not_hopper", lambda: None)
    (tmp_path / "file").write_text("")
    assert command.main(["--to", str(tmp_path / "file" / "folder")]) == 2
    assert "name another folder with --to" in capsys.readouterr().err


def test_a_wrong_gradient_is_found(few, monkeypatch):
    def wrong(x, w, sizes, implementation):
        scale = 1.0 if implementation == "reference" else 1.2
        return right(x, jax.lax.stop_gradient(w * (1 - scale)) + w * scale, sizes, implementation="reference")

    right = checks.grouped_matmul
    monkeypatch.setattr(checks, "grouped_matmul", wrong)
    with pytest.raises(checks.CheckFailed, match=r"the gradient of . in bfloat16"):
        checks._check_grouped_derivative("wrong")


@pytest.mark.parametrize("product", [SMALL[1], SMALL[3], SMALL[4]], ids=str)
def test_the_kernel_that_is_timed_is_the_product(product, monkeypatch):
    """Interpreted, on small operands: `by_kernel` passes the operands as the kernel reads them."""
    config = product.default(1)
    grouped = (products.grouped, "rows_by_matrices"), (products.grouped, "rows_by_rows")
    for module, name in ((products.block_scaled, "block_scaled_matmul"), *grouped):
        monkeypatch.setattr(module, name, _interpreted(getattr(module, name)))
    a, b = product.make_operands(1)
    got, want = product.by_kernel(config)(a, b), product.portable(a, b)
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=2**-7, atol=2e-2 * float(jnp.abs(want).max())
    )


def _interpreted(kernel):
    def run(*args, config):
        return mosaic_interpreter.interpret(kernel, *args, config=config, sms=1)

    return run
