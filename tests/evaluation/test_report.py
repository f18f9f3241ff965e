"""The report page: what is on it, that it stands alone, and that a run with gaps still has one."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.evaluation import report_plots
from deepseek_jax.evaluation.report import ReportError, _count, write_report
from tools import report as tool

LAYERS, EXPERTS = 3, 8
NASTY = "<script>alert(\"x\")</script> & 'quoted' $x^2$ — ünïcode\n\tindented"
RESULT = {
    "heldout_bits_per_byte": 1.5,
    "gzip": {"concatenated": 2.0, "per_file": 2.1},
    "xz": {"concatenated": 1.25, "per_file": 1.9},
    "wall_seconds": 3725,
    "parameters": 19_834_112,
    "tokens": 409_600,
    "machine": {"device": "1 x cpu"},
    "versions": {"jax": "0.10.2"},
}


def train_line(step: int) -> dict:
    load = np.random.default_rng(step).dirichlet(np.ones(EXPERTS), LAYERS)
    return {
        "step": step, "tokens": step * 4096, "kind": "train", "loss": 9.0 / step, "loss_main": 8.0 / step,
        "loss_mtp": 8.5 / step, "loss_balance": 1e-4, "grad_norm": 1.0 + step % 7, "learning_rate": 3e-4,
        "tokens_per_second": 2000.0 + step, "mfu": 0.3, "batch_rows": 8,
        "max_vio": (load.max(axis=1) * EXPERTS - 1).tolist(), "load": load.tolist(),
    }  # fmt: skip


def eval_line(step: int) -> dict:
    return {
        "step": step, "tokens": step * 4096, "kind": "eval", "heldout_bits_per_byte": 3.0 / step, "heldout_loss": 1.0
    }  # fmt: skip


def make_run(folder: Path, *, without: tuple[str, ...] = ()) -> Path:
    lines = [train_line(step) for step in range(1, 121)] + [eval_line(60), eval_line(120)]
    samples = [{"step": 120, "prompt": "def <main>", "text": NASTY, "method": "greedy"}]
    files = {
        "config.json": json.dumps({"name": "tiny.pretrain", "data": {"path": "<b>&"}}),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
        "samples.jsonl": "".join(json.dumps(sample) + "\n" for sample in samples),
        "result.json": json.dumps(RESULT),
    }
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        if name not in without:
            (folder / name).write_text(text)
    return folder


class Page(HTMLParser):
    """Tags, attributes and text of a page; checks that tags are closed in order."""

    VOID = ("meta", "img", "!doctype")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts, self._open = [], [], [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.extend(attributes)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> str:
    return Path(write_report(make_run(tmp_path_factory.mktemp("run")))).read_text()


def pictures(text: str) -> list[str]:
    return re.findall(r'<img alt="[^"]+" src="(data:image/(?:svg\+xml|png);base64,[A-Za-z0-9+/=]+)">', text)


def test_a_full_run_shows_everything(full):
    page = Page(full)
    text = "".join(page.texts)
    for heading in ("Held-out text", "Loss", "Training", "Expert load", "Samples", "Machine and versions", "Config"):
        assert heading in text
    assert "not recorded" not in text
    assert len(pictures(full)) == page.tags.count("img") == 5
    for shown in ("1.500", "19.8M", "410k", "1 h 2 min", "0.10.2", "1 x cpu"):
        assert shown in text, shown
    assert "25% below gzip's 2.000 and 20% above xz's 1.250" in text


def test_the_page_stands_alone(full):
    page = Page(full)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "srcset", "poster", "data"):
            assert value.startswith("data:image/"), value[:80]
        assert not name.startswith("on")
    assert "url(" not in full
    assert "@import" not in full


def test_every_picture_is_whole(full):
    for address in pictures(full):
        head, _, body = address.partition(",")
        raw = base64.b64decode(body, validate=True)
        if "svg" in head:
            assert raw.lstrip().startswith(b"<?xml")
            assert raw.rstrip().endswith(b"</svg>")
        else:
            assert raw.startswith(b"\x89PNG")
            assert raw[-8:-4] == b"IEND"


def test_text_of_the_run_is_escaped(full):
    assert "<script" not in full
    text = "".join(Page(full).texts)
    assert NASTY in text
    assert "def <main>" in text
    assert '"path": "<b>&"' in text


def test_the_same_run_gives_the_same_page(tmp_path, full):
    assert Path(write_report(make_run(tmp_path / "run"))).read_text() == full


@pytest.mark.parametrize("only", ["config.json", "metrics.jsonl", "samples.jsonl", "result.json"])
def test_one_file_is_enough(tmp_path, only):
    others = tuple({"config.json", "metrics.jsonl", "samples.jsonl", "result.json"} - {only})
    text = "".join(Page(Path(write_report(make_run(tmp_path, without=others))).read_text()).texts)
    assert "not recorded" in text


def test_a_stopped_run_shows_its_last_evaluation(tmp_path):
    text = Path(write_report(make_run(tmp_path, without=("result.json",)))).read_text()
    assert f"<b>{3.0 / 120:.3f}</b>" in text


@pytest.mark.parametrize(
    "lines",
    [
        [{"step": 1, "tokens": 10, "kind": "train"}],
        [{"step": 1, "kind": "train", "loss_main": 3.0, "load": [], "max_vio": []}],
        [{"step": 1, "tokens": 10, "kind": "train", "loss_main": "nan", "grad_norm": "inf", "mfu": None}],
        [{"step": 1, "tokens": 10, "kind": "train", "load": [[0.5, 0.5], [1.0]], "max_vio": [0.1]}],
        [train_line(1)],
        [eval_line(1)],
        [{"step": 1, "tokens": 10, "kind": "other"}],
        [],
    ],
)
def test_odd_metrics_make_a_page(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(Path(write_report(tmp_path)).read_text())  # which asserts that its tags are closed
    assert "broken lines" not in "".join(page.texts)


def test_broken_files_are_noted_and_the_rest_is_shown(tmp_path):
    make_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "result.json").write_text("[1]")
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 121, "kind": "train", "text": "\xc3')
    text = "".join(Page(Path(write_report(tmp_path)).read_text()).texts)
    assert "config.json could not be read" in text
    assert "result.json could not be read: it is not an object" in text
    assert "1 broken lines of metrics.jsonl are left out" in text
    assert "Tokens sent to each expert" in text


def test_nothing_to_report_on_is_an_error(tmp_path):
    with pytest.raises(ReportError, match=r"it has none of config.json, metrics.jsonl, samples.jsonl, result.json"):
        write_report(tmp_path)
    with pytest.raises(ReportError, match=r"nowhere is not a folder"):
        write_report(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_the_heat_map_shows_the_loads_of_every_layer():
    loads = np.random.default_rng(0).dirichlet(np.ones(EXPERTS), (1000, LAYERS))
    lines = [{"kind": "train", "tokens": i * 10, "load": load.tolist()} for i, load in enumerate(loads)]
    panels = [axes for axes in report_plots.load_heat_maps(lines).axes if axes.get_title() or axes.get_title("left")]
    assert len(panels) == LAYERS
    for layer, axes in enumerate(panels):
        (mesh,) = axes.collections
        image = np.asarray(mesh.get_array())
        # 1000 steps in bins of 3: the first is the mean of the first three, the last stands for one.
        assert image.shape == (EXPERTS, 334)
        np.testing.assert_allclose(image[:, 0], loads[:3, layer].mean(axis=0) * EXPERTS)
        np.testing.assert_allclose(image[:, -1], loads[-1, layer] * EXPERTS)
        np.testing.assert_allclose(image.mean(), 1.0)
        edges = mesh.get_coordinates()[0, :, 0]
        np.testing.assert_array_equal(edges, [0, *np.arange(25, 9990, 30), 9990])  # half-way between bins


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((0, "0"), (9_999, "9,999"), (10_000, "10k"), (999_499, "999k"), (999_950, "1M"), (19_834_112, "19.8M")),
        *((999_600_000, "1B"), (671_026_000_000, "671B"), (14.8e12, "14.8T"), (None, "not recorded")),
    ],
)
def test_counts_have_three_digits_and_a_letter(number, text):
    assert _count(number) == text


def test_many_layers_fit():
    lines = [
        {"kind": "train", "tokens": t, "load": np.full((13, 4), 0.25).tolist(), "max_vio": [0.1] * 13} for t in (1, 2)
    ]
    assert report_plots.data_uri(report_plots.load_heat_maps(lines), pixels=True).startswith("data:image/png")
    assert report_plots.data_uri(report_plots.max_violation(lines)).startswith("data:image/svg+xml")


def test_the_command_line(tmp_path, capsys):
    make_run(tmp_path / "run")
    assert tool.main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    assert tool.main(["report", str(tmp_path / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    assert tool.main(["report"]) == 2
    assert "usage" in capsys.readouterr().err


def test_the_command_says_in_one_line_what_it_cannot_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = make_run(tmp_path / "run")
    (run / "report.html").mkdir()
    for path, message in (
        ("gs://bucket/run", "error: the run at gs://bucket/run needs gcsfs, which is not installed: pip install"),
        ("ftp://host/run", "error: the run cannot be at ftp://host/run: use a local path, gs://… or s3://…"),
        (str(run), f"error: [Errno 21] Is a directory: '{run}/report.html'"),
    ):
        assert tool.main(["report", path]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(message)


def test_a_run_may_be_named_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_run(tmp_path / "run")
    assert tool.main(["report", "~/run"]) == 0
    assert (tmp_path / "run" / "report.html").exists()
