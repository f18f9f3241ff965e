"""Compiling for GPUs that are not there: what is counted in a program, and one line where the plugin is missing."""

import subprocess
import sys

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.planning.gpu_target import h200_mesh
from tools.aot import count_collectives

PROGRAM = """
  %a = (bf16[8]{0}, bf16[8]{0}) all-gather-start(%p), dimensions={0}
  %b = bf16[8]{0} all-gather-done(%a)
  %c = f32[8]{0} ragged-all-to-all(%p, %q), replica_groups={}
  ROOT %d = f32[8]{0} all-to-all(%c), dimensions={0}
"""


def test_a_collective_that_starts_and_ends_counts_once():
    assert count_collectives(PROGRAM) == {"all-to-all": 1, "ragged-all-to-all": 1, "all-gather": 1}


def test_devices_must_fill_their_hosts():
    with pytest.raises(ConfigError, match=r"^12 devices do not fill hosts of 8; change parallel.data$"):
        h200_mesh(ParallelConfig(data=3, expert=4))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "usage: python -m tools.aot RECIPE"),
        (["tiny.pretran"], "no recipe tiny.pretran. Did you mean tiny.pretrain?"),
        (["tiny.pretrain", "--set=parallel.dat=2"], "parallel.dat"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, line):
    command = [sys.executable, "-m", "tools.aot", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert line in done.stderr
