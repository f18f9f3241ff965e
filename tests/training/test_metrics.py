"""The metrics writer's files: what stands in them, and what a resumed run leaves of them."""

from __future__ import annotations

import json
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.training.metrics import MetricsWriter, check_wandb, read_metrics


def lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_a_line_holds_scalars_and_vectors(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(10, {"loss": jnp.float32(3.21), "load/layer_3": np.array([4, 0, 2]), "tied": True}, tokens=640)
        writer.write(
            10, {"bits_per_byte": 2.5, "max_vio": jnp.array([0.1, 0.2]), "sample": "def f"}, tokens=640, kind="eval"
        )
    assert [json.loads(line) for line in lines(tmp_path)] == [
        {"step": 10, "tokens": 640, "kind": "train", "loss": 3.21, "load/layer_3": [4, 0, 2], "tied": True},
        {"step": 10, "tokens": 640, "kind": "eval", "bits_per_byte": 2.5, "max_vio": [0.1, 0.2], "sample": "def f"},
    ]
    assert [r["step"] for r in read_metrics(tmp_path)] == [10, 10]
    assert [r["kind"] for r in read_metrics(tmp_path / "metrics.jsonl", kind="eval")] == ["eval"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, np.float64])
def test_floats_read_back_exactly(tmp_path, dtype):
    values = np.random.default_rng(0).normal(size=50).astype(dtype)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"vector": values, "scalar": values[0]}, tokens=1)
    (record,) = read_metrics(tmp_path)
    np.testing.assert_array_equal(np.asarray(record["vector"]).astype(dtype), values)
    assert np.asarray(record["scalar"]).astype(dtype) == values[0]


def test_non_finite_values_stay_valid_json(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": math.nan, "norms": [math.inf, -math.inf, 1.0], "all": [math.nan]}, tokens=1)
    assert '"loss": "nan", "norms": ["inf", "-inf", 1.0]' in lines(tmp_path)[0]
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"])
    assert record["norms"] == [math.inf, -math.inf, 1.0]


def test_lines_are_there_before_the_writer_closes(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"loss": 1.0}, tokens=1)
    assert len(lines(tmp_path)) == 1
    writer.close()
    writer.write(2, {"loss": 1.0}, tokens=2)
    writer.close()
    assert len(lines(tmp_path)) == 1


def test_resume_drops_what_came_after(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 7):
            writer.write(step, {"loss": float(step)}, tokens=step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed in the middle of a line
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=4) as writer:
        writer.write(5, {"loss": 50.0}, tokens=5)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_without_a_file_starts_one(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=4) as writer:
        writer.write(5, {"loss": 1.0}, tokens=5)
    assert len(read_metrics(tmp_path)) == 1


def test_another_runs_metrics_are_not_touched(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0}, tokens=1)
    with pytest.raises(ConfigError, match=r"metrics.jsonl holds another run's metrics; resume that run or use another"):
        MetricsWriter(tmp_path, tensorboard=False)
    assert len(read_metrics(tmp_path)) == 1


def test_tensorboard_gets_every_value(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0, "load": [1, 2, 3], "sample": "text"}, tokens=1)
        writer.write(1, {"bits_per_byte": 1.0}, tokens=1, kind="eval")
    (events,) = (tmp_path / "tensorboard").iterdir()
    data = events.read_bytes()
    for tag in (b"train/loss", b"train/tokens", b"train/load", b"train/sample", b"eval/bits_per_byte"):
        assert tag in data


def test_only_the_first_process_writes(tmp_path):
    with MetricsWriter(tmp_path / "none", enabled=False) as writer:
        writer.write(1, {"loss": object()}, tokens=1)
    assert not (tmp_path / "none").exists()


def test_wandb_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"needs its package: pip install 'deepseek_jax\[wandb\]', or logging.wandb=none"
    ):
        MetricsWriter(tmp_path / "run", wandb="project")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_part_of_wandb", "No module named 'a_part_of_wandb'"),
        ("raise TypeError('Descriptors cannot be created\\nIf this call', 1)", r".*Descriptors cannot be created.*"),
        ("raise TypeError", "TypeError"),
    ],
)
def test_a_broken_wandb_is_not_called_missing(tmp_path, monkeypatch, source, reason):
    (tmp_path / "wandb.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    expected = rf"^the package wandb is installed, but broken: {reason}; install it again, or logging\.wandb=none$"
    with pytest.raises(ConfigError, match=expected):
        check_wandb("project")
    check_wandb(None)


def test_what_wandb_refuses_is_one_line_and_leaves_no_file(tmp_path, monkeypatch):
    def refuse(**settings):
        raise RuntimeError("No API key configured. Use `wandb login`.\nMore on another line")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    with pytest.raises(ConfigError, match=r"^Weights & Biases refused: No API key .* `wandb login`; .*") as refused:
        MetricsWriter(tmp_path, wandb="project")
    assert str(refused.value).endswith("logging.wandb=none goes without")
    assert "another line" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def fake_wandb(logged: list) -> types.SimpleNamespace:
    """A package that keeps what it is told."""
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda exit_code=0: logged.append(exit_code)
    )
    return types.SimpleNamespace(init=lambda **settings: logged.append(settings) or run, Histogram=tuple)


def test_wandb_gets_every_value(tmp_path, monkeypatch):
    logged: list = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(logged))
    with MetricsWriter(tmp_path, tensorboard=False, wandb="project", config={"a": 1}) as writer:
        writer.write(3, {"loss": 1.5, "load": [1, 2]}, tokens=9)
    settings, line, end = logged
    assert settings["project"] == "project"
    assert settings["config"] == {"a": 1}
    assert line == (3, {"train/tokens": 9, "train/loss": 1.5, "train/load": (1, 2)})
    assert end == 0


def test_wandb_is_told_that_a_run_failed(tmp_path, monkeypatch):
    logged: list = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(logged))
    with pytest.raises(ZeroDivisionError), MetricsWriter(tmp_path, tensorboard=False, wandb="project"):
        raise ZeroDivisionError
    MetricsWriter(tmp_path, tensorboard=False, wandb="project", resume_step=0).close(failed=True)
    assert [value for value in logged if isinstance(value, int)] == [1, 1]


def test_only_a_resumed_run_has_the_wandb_id_of_another(tmp_path, monkeypatch):
    logged: list = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(logged))

    def begin(folder, resume_step=None):
        with MetricsWriter(folder, tensorboard=False, wandb="project", resume_step=resume_step) as writer:
            writer.write(1, {"loss": 1.0}, tokens=1)
        return begun()[-1]["id"]

    def begun():
        return [settings for settings in logged if isinstance(settings, dict)]

    first = begin(tmp_path / "run")
    with pytest.raises(ConfigError, match="holds another run's metrics"):
        begin(tmp_path / "run")
    assert [begin(tmp_path / "run", resume_step=step) for step in (0, 4)] == [first, first]
    (tmp_path / "run").rename(tmp_path / "old")
    begin(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    third = begin(tmp_path / "run")
    begin(tmp_path / "unlogged", resume_step=4)
    assert len({settings["id"] for settings in begun()}) == 4
    assert [begin(tmp_path / "old", resume_step=1), begin(tmp_path / "run", resume_step=1)] == [first, third]
    assert {settings["resume"] for settings in begun()} == {"allow"}


def test_the_writer_refuses(tmp_path):
    with (
        MetricsWriter(tmp_path, tensorboard=False) as writer,
        pytest.raises(ValueError, match="metric names step are taken by the line itself"),
    ):
        writer.write(1, {"step": 1}, tokens=1)


def test_reading_refuses(tmp_path):
    with pytest.raises(ConfigError, match=r"no metrics at .*metrics.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\n{"step":\n{"step": 3, "kind": "train"}\n')
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 2: not JSON"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\n{"step":')
    assert len(read_metrics(tmp_path)) == 1
