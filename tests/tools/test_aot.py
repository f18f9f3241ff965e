"""Compiling for GPUs that are not there: errors in one line."""

import subprocess
import sys

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.planning.gpu_target import h200_mesh


def test_devices_must_fill_their_hosts():
    with pytest.raises(ConfigError, match=r"^12 devices do not fill hosts of 8; change parallel.data$"):
        h200_mesh(ParallelConfig(data=3, expert=4))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "usage: python -m tools.aot --recipe NAME"),
        (["--recipe=tiny.pretran"], "no recipe tiny.pretran. Did you mean tiny.pretrain?"),
        (["--recipe=tiny.pretrain", "--set=parallel.dat=2"], "parallel.dat"),
        (["--recipe=v3.pretrain", "--devices=1000"], "1,000 devices are no multiple of 1,024"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, line):
    command = [sys.executable, "-m", "tools.aot", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert line in done.stderr
