"""`pallas_kernels` needs jax, NumPy and ml_dtypes and nothing of this repository, and its README's example runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

WITHOUT_THE_REST = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepseek_jax", "experiments", "tools", "flax", "optax", "absl"):
            raise ImportError(f"pallas_kernels imports {name}")

sys.meta_path.insert(0, Refuse())
import pallas_kernels
names = [m.name for m in pkgutil.walk_packages(pallas_kernels.__path__, "pallas_kernels.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_nothing_of_the_repository_is_imported():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_REST], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) > 10


def test_the_example_of_the_readme():
    text = (ROOT / "pallas_kernels" / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    scope: dict = {}
    exec(example, scope)
    assert scope["y"].shape == (300, 512)
    assert scope["dw"].shape == (1024, 512)
