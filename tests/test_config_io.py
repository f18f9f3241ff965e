"""Overrides by path, and configs that survive being written and read."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Literal

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from deepseek_jax.config import ConfigError, ModelConfig, MoEConfig, YarnConfig, require
from deepseek_jax.config_io import (
    diff,
    format_config,
    from_dict,
    leaves,
    load_config,
    override,
    override_all,
    save_config,
    to_dict,
)
from deepseek_jax.config_text import parse_value, quote_value


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder(Source):
    path: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Web(Source):
    urls: tuple[str, ...] = ()
    retries: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd:
    lr: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    width: int = 8
    heads: int = 2

    def __post_init__(self):
        require(self.width % self.heads == 0, f"size.width ({self.width}) must be a multiple of size.heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    name: str
    note: str | None = None
    steps: int = 100
    clip: float = 1.0
    flag: bool = False
    color: Color = Color.RED
    mode: Literal["fast", "slow", 3] = "fast"
    sizes: tuple[int, ...] = (1, 2)
    ramp: tuple[tuple[float, int], ...] = ()
    optimizer: Adam | Sgd = Adam()
    size: Size = Size()
    extra: Size | None = None
    sources: tuple[Source, ...] = (Folder(path="a"), Web())


BASE = Config(name="base")


# --- override -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "path", "expected"),
    [
        ("steps=1_000", "steps", 1000),
        ("steps=2**14", "steps", 16384),
        ("steps=1e6", "steps", 1_000_000),
        ("steps = -3", "steps", -3),
        ("clip=3e-4", "clip", 3e-4),
        ("clip=2", "clip", 2.0),
        ("clip=inf", "clip", math.inf),
        ("flag=True", "flag", True),
        ("note=none", "note", None),
        ('note="none"', "note", "none"),
        ("note=a=b, c", "note", "a=b, c"),
        ("note=", "note", ""),
        ("color=BLUE", "color", Color.BLUE),
        ("color=blue", "color", Color.BLUE),
        ("mode=slow", "mode", "slow"),
        ("mode=3", "mode", 3),
        ("sizes=4,5,2**3", "sizes", (4, 5, 8)),
        ("sizes=()", "sizes", ()),
        ("sizes=[7,]", "sizes", (7,)),
        ("ramp=(0.5,10),(1,20)", "ramp", ((0.5, 10), (1.0, 20))),
        ("ramp=((0.5,10),)", "ramp", ((0.5, 10),)),
        ("optimizer.betas=0.8,0.9", "optimizer", Adam(betas=(0.8, 0.9))),
        ("optimizer=Sgd", "optimizer", Sgd()),
        ("optimizer=Sgd(lr=2)", "optimizer", Sgd(lr=2.0)),
        ("extra=Size(width=4, heads=4)", "extra", Size(width=4, heads=4)),
        ("sources.0.path=/data/x", "sources", (Folder(path="/data/x"), Web())),
        ("sources.1=Folder(path='b,c')", "sources", (Folder(path="a"), Folder(path="b,c"))),
        (
            "sources=Web(urls=(u,v),retries=2),Folder(path=b)",
            "sources",
            (Web(urls=("u", "v"), retries=2), Folder(path="b")),
        ),
    ],
)
def test_override_reads(assignment, path, expected):
    changed = override(BASE, assignment)
    assert getattr(changed, path) == expected
    assert type(getattr(changed, path)) is type(expected)
    assert all(p.startswith(path) for p, *_ in diff(BASE, changed))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps=1.5", "steps=1.5: '1.5' is not a whole number"),
        ("steps=true", "is not a whole number"),
        ("steps=1e999999999", "is not a whole number"),
        ("steps=9**999999999", "is not a whole number"),
        ("steps=__import__('os')", "is not a whole number"),
        ("clip=big", "clip=big: 'big' is not a number"),
        ("clip=nan", "'nan' is not a number"),
        ("flag=1", "flag=1: '1' is not true or false"),
        ("color=green", "'green' is not one of RED, BLUE"),
        ("mode=faster", "'faster' is not one of fast, slow, 3"),
        ("sizes=1,x", "'1,x' is not a list a,b,… each a whole number"),
        ("optimizer.betas=0.9", "'0.9' is not 2 values a,b,…: a number; a number"),
        ("sources.1.retries=x", "sources.1.retries=x: 'x' is not a whole number or none"),
        ("optimizer=Lion", r"'Lion' is not Adam\(…\) or Sgd\(…\); .*set for example optimizer.lr"),
        ("optimizer=Sgd(lr=x)", "optimizer=Sgd.lr=x.: Sgd.lr: 'x' is not a number"),
        ("optimizer=Sgd(rate=1)", "Sgd takes field=value with the fields lr, not 'rate=1'"),
        ("sources.0=Folder", "sources.0=Folder: Folder needs path"),
        ("extra=Size(width=3)", r"size.width \(3\) must be a multiple"),
        ("stepz=3", "no field stepz; did you mean steps?"),
        ("optimiser.betas=1,2", "no field optimiser.betas; did you mean optimizer.betas?"),
        ("betas=1,2", "no field betas; did you mean optimizer.betas?"),
        ("beta=1,2", "no field beta; did you mean optimizer.betas?"),
        ("size.steps=3", "no field size.steps; did you mean steps?"),
        ("sources.2.path=x", "no field sources.2.path; did you mean sources.0.path?"),
        ("sources.-1.path=x", "no field sources.-1.path; did you mean sources.0.path?"),
        ("steps.0=3", "no field steps.0; did you mean steps?"),
        ("qqqqqqqq=3", "no field qqqqqqqq; it has name, note, steps,"),
        ("extra.width=3", "extra is none and has no fields; set it first, for example extra=Size"),
        ("steps", "override 'steps' must read path=value, for example"),
        ("=3", "must read path=value"),
        ("size.heads=3", r"after size.heads=3: size.width \(8\) must be a multiple of size.heads"),
    ],
)
def test_override_refuses(assignment, message):
    with pytest.raises(ConfigError, match=message):
        override(BASE, assignment)


def test_overrides_that_must_agree_move_together():
    changed = override_all(BASE, ["size.width=9", "size.heads=3"])
    assert changed.size == Size(width=9, heads=3)
    with pytest.raises(ConfigError, match=r"after size.width=9, size.heads=2: size.width"):
        override_all(BASE, ["size.width=9", "size.heads=2"])


def test_overrides_apply_in_order():
    assert override_all(BASE, ["steps=1", "steps=2"]).steps == 2
    assert override_all(BASE, ["extra=Size", "extra.width=4"]).extra == Size(width=4)
    assert override_all(BASE, ["sources.0.path=x", "sources.0=Web"]).sources[0] == Web()
    assert override_all(BASE, []) == BASE


def test_override_validates_the_architecture():
    with pytest.raises(ConfigError, match=r"after moe.num_experts=33: moe.num_experts \(33\) must be a multiple"):
        override(ModelConfig(), "moe.num_experts=33")
    assert override(ModelConfig(), "attention.yarn=YarnConfig(factor=8)").attention.yarn == YarnConfig(factor=8)


# --- save and load --------------------------------------------------------------------------------------------------

floats = st.floats(allow_nan=False)
numbers = st.integers(-(2**63), 2**63)
sizes = st.builds(lambda heads, k: Size(width=heads * k, heads=heads), st.integers(1, 99), st.integers(0, 99))
configs = st.builds(
    Config,
    name=st.text(),
    note=st.none() | st.text(),
    steps=numbers,
    clip=floats,
    flag=st.booleans(),
    color=st.sampled_from(Color),
    mode=st.sampled_from(["fast", "slow", 3]),
    sizes=st.lists(numbers).map(tuple),
    ramp=st.lists(st.tuples(floats, numbers)).map(tuple),
    optimizer=st.builds(Adam, lr=floats, betas=st.tuples(floats, floats)) | st.builds(Sgd, lr=floats),
    size=sizes,
    extra=st.none() | sizes,
    sources=st.lists(
        st.builds(Source, weight=floats)
        | st.builds(Folder, path=st.text(), weight=floats)
        | st.builds(Web, urls=st.lists(st.text()).map(tuple), retries=st.none() | numbers)
    ).map(tuple),
)


@given(configs)
def test_a_config_survives_its_dict(config):
    assert from_dict(Config, to_dict(config)) == config


@given(config=configs)
def test_a_config_survives_its_file(config, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "config.json"
    save_config(config, path)
    loaded = load_config(Config, path)
    assert loaded == config
    assert diff(loaded, config) == []


@given(configs)
@example(Config(name="1e3", note="none", sources=(Folder(path="null"), Web(urls=("a,b", "'", "true", "")))))
def test_what_is_printed_can_be_set(config):
    assert parse_value(quote_value(config), Config) == config
    again = override_all(BASE, [f"{path}={quote_value(getattr(config, path))}" for path in to_dict(config)])
    assert again == config


def test_saving_leaves_no_other_file(tmp_path):
    save_config(BASE, tmp_path / "new" / "config.json")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["config.json"]


def test_only_open_choices_name_their_type():
    data = to_dict(BASE)
    assert data["optimizer"]["type"] == "Adam"
    assert [s["type"] for s in data["sources"]] == ["Folder", "Web"]
    assert "type" not in data
    assert "type" not in data["size"]


def change(path, value, config=BASE):
    """The saved `config` with one place changed; `...` removes it."""
    data = to_dict(config)
    *parents, last = path.split(".")
    place = data
    for name in parents:
        place = place[int(name) if isinstance(place, list) else name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("name", ..., "^the saved config lacks name: another version wrote it, or it was edited$"),
        ("sources.0.path", ..., "lacks sources.0.path"),
        ("stepz", 3, "no field stepz; did you mean steps?"),
        ("size.head", 3, "no field size.head; did you mean size.heads?"),
        ("steps", 1.0, "steps is 1.0, which is not a whole number"),
        ("steps", True, "steps is True, which is not a whole number"),
        ("clip", "1", "clip is '1', which is not a number"),
        ("flag", 1, "flag is 1, which is not true or false"),
        ("color", "GREEN", "color is 'GREEN', which is not one of RED, BLUE"),
        ("mode", "3", "mode is '3', which is not one of fast, slow, 3"),
        ("sizes", 3, "sizes is 3, which is not a list a,b,… each a whole number"),
        ("sizes", [1, "x"], "sizes.1 is 'x', which is not a whole number"),
        ("optimizer.betas", [1.0], "optimizer.betas has 1 values and must be 2 values"),
        ("optimizer.type", "Lion", r"optimizer.type is 'Lion', which is not Adam\(…\) or Sgd\(…\)"),
        ("optimizer.type", ..., "optimizer must name its type, one of Adam, Sgd"),
        ("size", None, "size is None, which is not Size"),
        ("size.heads", 3, r"size.width \(8\) must be a multiple"),
    ],
)
def test_from_dict_refuses(path, value, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Config, change(path, value))


@pytest.mark.parametrize(
    "assignment",
    [
        "steps=7",
        "note=a",
        "size=Size(width=4,heads=4)",
        "size.heads=4",
        "optimizer.betas=0.1,0.2",
        "sources=Web(retries=3)",
        "sources.0.weight=2",
        "sources.1.urls=u,v",
    ],
)
def test_a_field_that_a_saved_config_lacks_takes_its_default(assignment):
    """As one does that came after it was saved."""
    changed = override(BASE, assignment)
    assert from_dict(Config, to_dict(changed)) == changed != BASE
    assert from_dict(Config, change(assignment.partition("=")[0], ..., changed)) == BASE


def test_load_refuses(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"no config at .*config.json"):
        load_config(Config, path)
    path.write_text('{"name": ')
    with pytest.raises(ConfigError, match=r"config.json is not a saved config: .*line 1"):
        load_config(Config, path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"config.json: the config is \[\], which is not Config"):
        load_config(Config, path)
    with pytest.raises(ConfigError, match=r"is a folder; name the config.json in it"):
        load_config(Config, tmp_path)


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(ConfigError, match="steps holds a object, which a config file cannot"):
        to_dict(dataclasses.replace(BASE, steps=object()))


# --- look -----------------------------------------------------------------------------------------------------------


def test_leaves_are_named_by_their_path():
    found = leaves(BASE)
    assert found["optimizer.betas"] == (0.9, 0.95)
    assert found["sources.0.path"] == "a"
    assert "sources" not in found
    assert found["extra"] is None


def test_diff_names_each_change():
    changed = override_all(BASE, ["steps=7", "optimizer=Sgd", "sources.1.retries=3"])
    assert diff(BASE, changed) == [("steps", 100, 7), ("optimizer", Adam(), Sgd()), ("sources.1.retries", None, 3)]
    assert diff(BASE, BASE) == []


def test_format_marks_what_differs_from_the_defaults():
    config = override_all(BASE, ["steps=20_000", "optimizer.lr=3e-4", "extra=Size(heads=4)", "note=a b"])
    assert format_config(config) == FORMATTED


FORMATTED = """\
  Config
    name         base
*   note         a b     default none
*   steps        20_000  default 100
    clip         1.0
    flag         false
    color        RED
    mode         fast
    sizes        (1,2)
    ramp         ()
    optimizer    Adam
*     lr         0.0003  default 0.001
      betas      (0.9,0.95)
    size         Size
      width      8
      heads      2
*   extra        Size    default none
      width      8
*     heads      4       default 2
    sources
      0          Folder
        weight   1.0
        path     a
      1          Web
        weight   1.0
        urls     ()
        retries  none
"""


def test_format_marks_a_choice_of_other_classes():
    text = format_config(override_all(BASE, ["optimizer=Sgd", "sources.1=Folder(path=b)"]))
    marked = [" ".join(line.split()) for line in text.splitlines() if line.startswith("*")]
    assert marked == [
        "* optimizer Sgd default Adam(lr=0.001,betas=(0.9,0.95))",
        "* sources default (Folder(weight=1.0,path=a),Web(weight=1.0,urls=(),retries=none))",
    ]


def test_texts_that_read_as_something_else_are_quoted():
    assert quote_value(("a b", "3", "none", "x=1")) == '(a b,"3","none","x=1")'


def test_format_marks_nothing_of_the_paper_architecture():
    assert "*" not in format_config(ModelConfig())
    assert format_config(ModelConfig(moe=MoEConfig(num_experts=64))).count("*") == 1
