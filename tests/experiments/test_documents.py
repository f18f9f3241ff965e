"""What the README and error messages tell a user to write is what is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from deepseek_jax.paths import _BACKENDS

ROOT = Path(__file__).parents[2]


# --- the README's loop ----------------------------------------------------------------------------------------------


def readme_loop() -> str:
    """The code block under 'As a library'."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## As a library")[2]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def statements(source: str) -> tuple[set[str], list[str]]:
    """Modules that are imported, and every statement without a body of its own, in order, without its comments."""
    imported, others = set(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign | ast.Return):
            others.append(ast.unparse(node))
        elif isinstance(node, ast.FunctionDef):
            others.append(f"{ast.unparse(node.decorator_list)} {node.name}({ast.unparse(node.args)})")
    return imported, others


def test_the_readmes_loop_is_that_of_the_script_which_is_tested():
    """Each of its statements is in experiments/own_loop.py, whose own test trains with it."""
    imported, wanted = statements(readme_loop())
    there, found = statements((ROOT / "experiments" / "own_loop.py").read_text(encoding="utf-8"))
    assert imported <= there
    assert len(wanted) >= 10
    assert [statement for statement in wanted if statement not in found] == []


# --- extras ---------------------------------------------------------------------------------------------------------


def extras() -> dict[str, ast.expr]:
    """`extras_require` of setup.py, by name."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "extras_require":
            assert isinstance(node.value, ast.Dict)
            return {ast.literal_eval(key): value for key, value in zip(node.value.keys, node.value.values, strict=True)}
    raise AssertionError("setup.py has no extras_require")


def named_extras() -> dict[str, set[str]]:
    """Extras that are named to be installed, and the files that name them."""
    found: dict[str, set[str]] = {}
    files = [ROOT / name for name in ("README.md", "Makefile", "setup.py")]
    for folder in ("deepseek_jax", "experiments", "tools", "docs"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    for path in files:
        for names in re.findall(r"deepseek_jax\[([a-z0-9_,-]+)\]", path.read_text(encoding="utf-8")):
            for name in names.split(","):
                found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return found


def test_the_extras_that_messages_and_documents_name_are_there():
    named = named_extras()
    assert {"wandb"} <= named.keys(), "what is looked for has another form"
    assert {name: files for name, files in named.items() if name not in extras()} == {}
    assert {extra for _, extra in _BACKENDS.values()} <= extras().keys()


def test_the_extras_of_the_makefile_are_there():
    line = re.search(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert {"dev", "parity"} <= set(re.findall(r"[a-z]+", line)) & extras().keys()


def test_there_are_extras_for_gpus_comparisons_wandb_and_tools():
    """And `tools` is what the project's own checks need, under the name that its contributors look for."""
    found = extras()
    assert {"cuda", "parity", "wandb", "tools", "dev"} <= found.keys()
    assert ast.unparse(found["tools"]) == ast.unparse(found["dev"])
