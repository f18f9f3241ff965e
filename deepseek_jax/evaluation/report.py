"""`report.html`: one self-contained page that shows what a run did, made from the files in its folder.

Reads `config.json`, `metrics.jsonl`, `samples.jsonl` and `result.json`; whatever is missing is said to be missing, so
a run that was stopped half-way has a report too (`quantization.json` is only there if it was asked for). Nothing on
the page is loaded from elsewhere, and no script runs.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from deepseek_jax.evaluation import report_plots as plots
from deepseek_jax.evaluation.report_quantization import quantization_maps
from deepseek_jax.paths import user_path, write_aside

FILES = ("config.json", "metrics.jsonl", "samples.jsonl", "result.json")
REPORT_NAME = "report.html"
QUANTIZATION_NAME = "quantization.json"
"""What `tools.quantization_stats` writes into the folder."""


class ReportError(ValueError):
    """There is nothing to report on."""


def write_report(run_dir: epath.PathLike) -> epath.Path:
    """Writes `report.html` in the run folder `run_dir`, over an older one, and returns its path.

    Raises:
      ReportError: the folder does not exist or holds none of the files that a run writes.
      ConfigError: the backend of a cloud path is not installed.
    """
    folder = user_path(run_dir, "the run")
    if not folder.is_dir():
        raise ReportError(f"no run to report on: {folder} is not a folder")
    if not any((folder / name).exists() for name in FILES):
        raise ReportError(f"no run to report on in {folder}: it has none of {', '.join(FILES)}")
    run = _Run(folder)
    path = folder / REPORT_NAME
    write_aside(path, _page(run))
    return path


class _Run:
    """What the files of a run say, with notes on those that could not be read."""

    def __init__(self, folder: epath.Path):
        self.folder = folder
        self.notes: list[str] = []
        self.config = self._document("config.json")
        self.result = self._document("result.json") or {}
        metrics = self._lines("metrics.jsonl")
        self.train = [record for record in metrics if record.get("kind") == "train"]
        self.evaluations = [record for record in metrics if record.get("kind") == "eval"]
        self.samples = self._lines("samples.jsonl")
        self.quantization = self._document(QUANTIZATION_NAME) or {}

    @property
    def title(self) -> str:
        """The recipe's name where the config has one, or else the folder's."""
        name = (self.config or {}).get("name")
        return name if isinstance(name, str) and name else self.folder.absolute().name

    @property
    def bits_per_byte(self) -> float | None:
        """The final held-out bits per byte, or the last one measured on the way."""
        final = self.result.get("heldout_bits_per_byte")
        if _is_number(final):
            return final
        _, values = plots.column(self.evaluations, "heldout_bits_per_byte")
        return float(values[-1]) if len(values) else None

    @property
    def partial_bytes(self) -> int | None:
        """Bytes of held-out text that evaluations on the way read at most; None if all of it, or if that is unknown."""
        evaluation = (self.config or {}).get("evaluation")
        size = evaluation.get("max_bytes") if isinstance(evaluation, Mapping) else None
        return size if _is_number(size) else None

    @property
    def complete_evaluation(self) -> dict[str, Any] | None:
        """Where the others read a part of the held-out text: the last evaluation, if it gave the run's result."""
        final = self.result.get("heldout_bits_per_byte")
        if self.partial_bytes is None or not self.evaluations or not _is_number(final):
            return None
        last = self.evaluations[-1]
        return last if last.get("heldout_bits_per_byte") == final else None

    @property
    def forced_balance(self) -> bool:
        """Whether tokens were dealt out to experts evenly, and not routed, in the run or in any logged step of it."""
        forced = (self.config or {}).get("force_balanced_routing") is True
        return forced or any(record.get("forced_balance") is True for record in self.train)

    def compressor(self, name: str) -> dict[str, float]:
        """The sizes of `gzip` or `xz` that were recorded."""
        sizes = self.result.get(name)
        return {k: v for k, v in sizes.items() if _is_number(v)} if isinstance(sizes, Mapping) else {}

    def _document(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            document = json.loads(path.read_text())
            if isinstance(document, dict):
                return document
            problem = "it is not an object"
        except ValueError as error:
            problem = str(error)
        self.notes.append(f"{name} could not be read: {problem}")
        return None

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        if not path.exists():
            return []
        # A character cut in half ends the line that a killed process was writing; it must not cost the others.
        lines = [line for line in path.read_bytes().decode(errors="replace").split("\n") if line.strip()]
        records = [record for line in lines if (record := _record(line)) is not None]
        if len(records) < len(lines):
            self.notes.append(f"{len(lines) - len(records)} broken lines of {name} are left out")
        return records


def layer_names(config: Mapping[str, Any] | None) -> list[str]:
    """Names of the rows of `load` and the like: MoE layers, counted with the dense ones, then MTP modules.

    `config` is the saved config of the run; there are no names where it does not tell.
    """
    match (config or {}).get("model"):
        case {"num_dense_layers": int(dense), "num_layers": int(layers), "mtp_depth": int(depth)}:
            return [f"layer {i + 1}" for i in range(dense, layers)] + [f"MTP {i + 1}" for i in range(depth)]
    return []


def _record(line: str) -> dict[str, Any] | None:
    """One line of JSON; None if it is broken, as the last one of a killed process may be."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


# --- the page ---

_STYLE = """
:root { --ink: #212529; --soft: #5c636a; --line: #dee2e6; --accent: #3b5bdb; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2.5rem 1.5rem 4rem; color: var(--ink); background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header { border-bottom: 3px solid var(--accent); padding-bottom: 1rem; margin-bottom: 1.6rem; }
h1 { font-size: 1.9rem; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 0.4rem; }
p { margin: 0.3rem 0 0.9rem; max-width: 46em; }
.soft, figcaption { color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: 0.8rem; margin: 0 0 1.4rem; padding: 0; list-style: none; }
.tiles li { flex: 1 1 9rem; border: 1px solid var(--line); border-radius: 8px; padding: 0.7rem 0.9rem; }
.tiles b { display: block; font-size: 1.4rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: 0.85rem; }
.tiles .main { border-color: var(--accent); background: #edf2ff; }
figure { margin: 0.6rem 0 1.2rem; } figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: 0.88rem; margin-top: 0.3rem; max-width: 52em; }
.sample { border: 1px solid var(--line); border-radius: 8px; margin: 0 0 1rem; overflow: hidden; }
.sample header { border: 0; margin: 0; padding: 0.35rem 0.9rem; background: #f1f3f5; font-size: 0.85rem;
                 color: var(--soft); }
pre { font: 13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: 0;
      padding: 0.8rem 0.9rem; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
pre .prompt { color: var(--soft); } pre .text { color: #1c3fb8; }
table { border-collapse: collapse; font-size: 0.92rem; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 1.4rem 0.3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: nowrap; } td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
details { border: 1px solid var(--line); border-radius: 8px; } summary { cursor: pointer; padding: 0.6rem 0.9rem; }
details pre { border-top: 1px solid var(--line); }
.note { background: #fff9db; border-radius: 8px; padding: 0.5rem 0.9rem; }
.alarm { background: #c92a2a; color: #fff; border-radius: 8px; padding: 0.8rem 1.1rem; max-width: none;
         font-weight: 600; print-color-adjust: exact; }
@media print { body { padding: 0; font-size: 12px; } figure, .sample, .tiles { break-inside: avoid; }
               h2 { break-after: avoid; } }
"""


def _page(run: _Run) -> str:
    sections = (_headline, _losses, _training, _experts, _quantization, _samples, _machine, _config)
    with plots.styled():
        body = "\n".join(section(run) for section in sections)
    notes = _FORCED_BALANCE if run.forced_balance else ""
    notes += "".join(f'<p class="note">{html.escape(note)}</p>' for note in run.notes)
    title = html.escape(run.title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title} · deepseek_jax</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<header><h1>{title}</h1>\n"
        f'<span class="soft">a DeepSeek-V3 trained with deepseek_jax</span></header>\n{notes}{body}\n</body>\n</html>\n'
    )


_FORCED_BALANCE = (
    '<p class="alarm" role="alert">FORCED BALANCE (force_balanced_routing): tokens were dealt out evenly to the '
    "experts, whatever the router chose. This run measures speed and memory. Its losses, its loads and its weights are "
    "not those of a trained model.</p>"
)


def _headline(run: _Run) -> str:
    gzip, xz, model = run.compressor("gzip"), run.compressor("xz"), run.bits_per_byte
    last = max((record.get("tokens", 0) for record in run.train), default=None)
    _, rates = plots.column(run.train, "tokens_per_second")
    tiles = [
        ("main", _number(model, "{:.3f}"), "held-out bits per byte"),
        ("", _count(run.result.get("parameters")), "parameters"),
        ("", _count(run.result.get("tokens", last)), "training tokens"),
        ("", _count(sorted(rates)[len(rates) // 2] if len(rates) else None), "tokens per second"),
        ("", _duration(run.result.get("wall_seconds")), "wall time"),
    ]
    items = "".join(f'<li class="{kind}"><b>{value}</b><span>{label}</span></li>' for kind, value, label in tiles)
    if model is None and not gzip and not xz:
        return f'<ul class="tiles">{items}</ul><h2>Held-out text</h2>{_missing("the comparison with gzip and xz")}'
    figure = plots.compression_bars(model, gzip, xz)
    return f'<ul class="tiles">{items}</ul><h2>Held-out text</h2><p>{_verdict(model, gzip, xz)}</p>' + _picture(
        figure,
        "bars of the bits per byte of the model and of the compressors",
        "Bits per byte of the same held-out files: a model that predicts text at b bits per byte can store it in b/8 "
        "of its size. Compressors read the files as one stream, or each by itself.",
    )


def _verdict(model: float | None, gzip: Mapping[str, float], xz: Mapping[str, float]) -> str:
    """One sentence that compares the model with what is recorded of each compressor."""
    rivals = [(name, sizes["concatenated"]) for name, sizes in (("gzip", gzip), ("xz", xz)) if "concatenated" in sizes]
    if model is None:
        return "Of the model, no held-out bits per byte are recorded."
    if not rivals:
        return "Neither gzip's nor xz's size of the same files is recorded."
    parts = []
    for name, size in rivals:
        relation = "below" if model < size else "above"
        parts.append(f"{abs(1 - model / size):.0%} {relation} {name}'s {size:.3f}")
    return f"The model needs {model:.3f} bits for each byte of text that it never saw: {' and '.join(parts)}."


def _losses(run: _Run) -> str:
    if not run.train and not run.evaluations:
        return "<h2>Loss</h2>" + _missing("losses")
    named = {name: run.compressor(name).get("concatenated") for name in ("gzip", "xz")}
    baselines = {name: value for name, value in named.items() if value is not None}
    caption = "Main: the next token. MTP: the tokens after it."
    if plots.has_running_mean(run.train):
        caption += " Faint: every logged step; line: running mean."
    if any("heldout_average_loss" in record for record in run.evaluations):
        caption += " Average: the moving average of the weights."
    last = run.complete_evaluation
    complete = [] if last is None else [last]
    on_the_way = [record for record in run.evaluations if record is not last]
    if on_the_way and run.partial_bytes is not None:
        caption += f" Held-out points on the way: about {run.partial_bytes:,} bytes of the text, where it has more."
        if whole := [*(["the diamond"] if complete else []), *baselines]:
            caption += f" All of it: {', '.join(whole)}."
    figure = plots.loss_curves(run.train, on_the_way, baselines, complete)
    return "<h2>Loss</h2>" + _picture(figure, "losses and held-out bits per byte over training tokens", caption)


def _training(run: _Run) -> str:
    if not run.train:
        return "<h2>Training</h2>" + _missing("training steps")
    alt = "learning rate, gradient norm, balance loss, throughput, utilisation and batch size over training tokens"
    caption = (
        "Every logged step. Balance loss: the sum over layers, before its weight α. Tokens per second "
        "are those since the logged step before; utilisation compares them with the speed of matrix products that was "
        "measured on the same devices when the run began."
    )
    return "<h2>Training</h2>" + _picture(plots.training_curves(run.train), alt, caption)


def _experts(run: _Run) -> str:
    names = layer_names(run.config)
    heat, violation = plots.load_heat_maps(run.train, names), plots.max_violation(run.train, names)
    parts = ["<h2>Expert load</h2>"]
    if heat is None:
        parts.append(_missing("expert loads"))
    else:
        caption = "Tokens sent to each expert, in units of the balanced load: white is balanced, red busy, blue idle."
        if names:
            caption += " Layers are counted from 1, dense ones included; MTP: the module's own experts."
        parts.append(_picture(heat, "heat maps of each expert's load over training tokens", caption, pixels=True))
    alt = "MaxVio of each layer over training tokens"
    parts.append(_missing("MaxVio") if violation is None else _picture(violation, alt, "0 is perfect balance."))
    # Runs of older versions, and of one device, have none of these: nothing is missing there.
    if (evenness := plots.load_evenness(run.train, names)) is not None:
        alt = "entropy of the load and dead experts of each layer over training tokens"
        caption = "Colours as above. Entropy is 1 where all experts get the same load, 0 where one gets all of it. "
        parts.append(_picture(evenness, alt, caption + "A dead expert got no token in the whole batch."))
    if (devices := plots.device_heat_maps(run.train, names)) is not None:
        alt = "heat maps of each device's load, over training tokens and by layer"
        caption = (
            "Tokens that the experts of each device computed, in units of the balanced load; a step waits for the "
            "busiest device. Left: all layers together. Right: each layer in the last logged step."
        )
        parts.append(_picture(devices, alt, caption, pixels=True))
    return "\n".join(parts)


def _quantization(run: _Run) -> str:
    if not run.quantization.get("tensors"):  # made when somebody asks for it: nothing is missing
        return ""
    figure, caption = quantization_maps(run.quantization)
    alt = "heat maps of relative error and underflow of every quantised tensor, by layer"
    return "<h2>Quantisation</h2>" + _picture(figure, alt, caption, pixels=True)


def _samples(run: _Run) -> str:
    if not run.samples:
        return "<h2>Samples</h2>" + _missing("samples")
    blocks = []
    for sample in run.samples:
        step, method = sample.get("step", "?"), sample.get("method", "?")
        prompt, text = (html.escape(str(sample.get(key, ""))) for key in ("prompt", "text"))
        blocks.append(
            f'<div class="sample"><header>step {html.escape(str(step))} · {html.escape(str(method))}</header>'
            f'<pre><span class="prompt">{prompt}</span><span class="text">{text}</span></pre></div>'
        )
    return '<h2>Samples</h2><p class="soft">The prompt in grey, what the model wrote in blue.</p>' + "\n".join(blocks)


def _machine(run: _Run) -> str:
    shown: dict[str, Any] = {name: run.result[name] for name in ("step", "machine", "versions") if name in run.result}
    rows = [(path, value) for path, value in _flat(shown)]
    if not rows:
        return "<h2>Machine and versions</h2>" + _missing("the machine")
    lines = "".join(f"<tr><th>{html.escape(path)}</th><td>{html.escape(str(value))}</td></tr>" for path, value in rows)
    return f"<h2>Machine and versions</h2><table>{lines}</table>"


def _config(run: _Run) -> str:
    if run.config is None:
        return "<h2>Config</h2>" + _missing("the config")
    text = html.escape(json.dumps(run.config, indent=2, ensure_ascii=False))
    return f"<h2>Config</h2><details><summary>The resolved config of this run</summary><pre>{text}</pre></details>"


# --- pieces ---


def _picture(figure, alt: str, caption: str, *, pixels: bool = False) -> str:
    below = f"<figcaption>{html.escape(caption)}</figcaption>"
    return f'<figure><img alt="{html.escape(alt)}" src="{plots.data_uri(figure, pixels=pixels)}">{below}</figure>'


def _missing(what: str) -> str:
    return f'<p class="soft">{what[0].upper()}{what[1:]}: not recorded.</p>'


def _flat(document: Mapping[str, Any], prefix: str = ""):
    for name, value in document.items():
        path = f"{prefix} {name}".strip()
        if isinstance(value, Mapping):
            yield from _flat(value, "" if name == "versions" else path)
        else:
            yield path, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _formatted(value: Any, form: Callable[[float], str]) -> str:
    return form(value) if _is_number(value) else "not recorded"


def _number(value: Any, form: str) -> str:
    return _formatted(value, form.format)


def _count(value: Any) -> str:
    def short(number: float) -> str:
        if number < 1e4:
            return f"{number:,.0f}"
        rounded = float(f"{number:.3g}")  # first, or 999,950 would be a thousand k
        unit, letter = next(u for u in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if rounded >= u[0])
        return f"{rounded / unit:.3g}{letter}"

    return _formatted(value, short)


def _duration(value: Any) -> str:
    def clock(seconds: float) -> str:
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"

    return _formatted(value, clock)
