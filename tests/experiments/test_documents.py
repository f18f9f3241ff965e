"""What the README and error messages tell a user to write is what is there."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.pipeline.generators import GENERATORS, make_schedule
from deepseek_jax.parallel.pipeline.simulate import Costs, simulate, stage_costs
from deepseek_jax.parallel.pipeline.tables import make_tables
from deepseek_jax.parallel.pipeline.text import from_text
from deepseek_jax.paths import _BACKENDS
from tools import schedule as schedule_tool

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


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(document):
    """Links and pictures within the repository."""
    file = ROOT / document
    links = re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8"))
    inside = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in inside if not (file.parent / link).exists()] == []


# --- docs/pipeline.md -----------------------------------------------------------------------------------------------


def pipeline_document() -> str:
    return (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")


def rows_of(table: str) -> list[list[str]]:
    """Cells of a table's lines below its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def table_after(words: str) -> list[list[str]]:
    """The table whose head begins with these words."""
    return rows_of(re.search(rf"^\| {words}.*\n(?:\|.*\n)+", pipeline_document(), re.MULTILINE)[0])


def shown_commands() -> Iterator[tuple[str, str]]:
    """(command, the table that follows it, or nothing)."""
    blocks = re.split(r"^```sh\n(.*?)^```\n", pipeline_document(), flags=re.DOTALL | re.MULTILINE)
    for command, after in zip(blocks[1::2], blocks[2::2], strict=True):
        table = re.match(r"(?:\s|!\[.*\n)*((?:\|.*\n)+)", after)
        yield command.strip(), table[1] if table else ""


@pytest.mark.parametrize(("command", "table"), list(shown_commands()), ids=lambda text: text.rpartition("/")[2])
def test_what_docs_pipeline_shows_is_what_its_commands_give(command, table, tmp_path, monkeypatch, capsys):
    """Pictures byte for byte; of tables every line, though some may be left out."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "tools.schedule"]
    drawn = None
    if "--draw" in words:
        place = words.index("--draw") + 1
        drawn, words[place] = ROOT / words[place], str(tmp_path / "drawn.svg")
    assert schedule_tool.main(words[3:]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = table.splitlines()
    assert [line for line in lines[:1] + lines[2:] if line not in printed] == []
    assert drawn or lines
    if drawn:
        assert drawn.read_text() == (tmp_path / "drawn.svg").read_text()
        assert f"](pipeline/{drawn.name})" in pipeline_document()


def test_the_schedule_in_docs_pipeline_is_its_file():
    """And the refusals that the page quotes are those of the changes that it describes."""
    shown, refusals = re.findall(r"```text\n(.*?)```", pipeline_document(), re.DOTALL)
    assert shown == (ROOT / "docs" / "pipeline" / "early_gradients.txt").read_text()
    exchanged = shown.replace("F0.1 BW0.0", "BW0.0 F0.1", 1).replace("F0.0 B0.0 F0.1", "F0.1 F0.0 B0.0", 1)
    for broken, said in zip((shown.replace(" W0.2", ""), exchanged), refusals.splitlines(), strict=True):
        with pytest.raises(ConfigError) as refused:
            from_text(broken, "it")
        assert str(refused.value) == f"it: {said}"


def test_the_bubbles_in_docs_pipeline():
    """P = 8, M = 32, with F = B = W = 1 of 1/P of the model, ranks apart and in lock step."""
    rows = table_after(r"schedule \| bubble \| P = 8, M = 32")
    assert [re.search(r"`(\w+)`", row[0])[1] for row in rows] == list(GENERATORS)
    for name, row in zip(GENERATORS, rows, strict=True):
        schedule = make_schedule(name, 8, 32)
        costs = stage_costs(Costs(), schedule.stages)
        found = [simulate(schedule, costs, mode).bubble for mode in ("ideal", "lock_step")]
        assert found == [float(row[2]), float(row[3])]


@pytest.mark.parametrize("ranks", range(4, 17, 2))
def test_lock_step_in_docs_pipeline(ranks):
    """DualPipe's bubble is 5P/2 - 8 from P = 4 on, and 1F1B takes 4M + 3P - 4."""
    microbatches = 4 * ranks
    assert simulate(make_schedule("dualpipe", ranks, microbatches), mode="lock_step").bubble == 5 * ranks / 2 - 8
    plain = simulate(make_schedule("one_f_one_b", ranks, microbatches), mode="lock_step")
    assert plain.makespan == 4 * microbatches + 3 * ranks - 4


def test_the_steady_ticks_in_docs_pipeline():
    rows = table_after("steady ticks")
    assert len(rows) == 6
    for row in rows:
        name, times = re.fullmatch(r"`(\w+)`, M = (\d)P", row[0]).groups()
        for ranks, cell in zip((2, 4, 8, 16), row[1:], strict=True):
            tables = make_tables(make_schedule(name, ranks, int(times) * ranks))
            steady = tables.steady
            assert cell == f"{steady.end - steady.start if steady else 0} of {tables.ticks}"
