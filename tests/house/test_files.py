"""Small files: what is written reads back as the same, whatever the text and the numbers."""

import dataclasses
import json
import math
from typing import Literal, NotRequired, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tab import files
from tab.compare.plan import Grid, Plan
from tab.files import Corrupt, formats
from tab.recipe.recipe import load_recipe
from tab.sweep.space import Space, load_space, tables_of

FEW = settings(max_examples=50)
TEXT = st.text()  # hypothesis leaves lone surrogates out: these are refused, see below
PLAIN = st.booleans() | st.integers() | st.floats() | TEXT
TABLES = st.recursive(
    st.dictionaries(TEXT, PLAIN | st.lists(PLAIN, max_size=3), max_size=3),
    lambda inner: st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def same(a: object, b: object) -> bool:
    """Equal, of the same type, NaN and -0.0 too."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and str(a) == str(b))
    return type(a) is type(b) and a == b


@FEW
@given(TABLES)
def test_toml_reads_back(tmp_path_factory, table):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    table.pop("format", None)
    formats.write_toml(path, table)
    assert same(formats.read_toml(path, dict, ""), table)


@FEW
@given(TABLES)
def test_json_reads_back(tmp_path_factory, table):
    path = tmp_path_factory.getbasetemp() / "any.json"
    table.pop("format", None)
    formats.write_json(path, table)
    assert same(formats.read_json(path, dict, ""), table)


@FEW
@given(TEXT, TEXT, st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_a_comparison_reads_back(tmp_path_factory, data, title, lr):
    """Emoji and DEL once made a config.toml that nothing could read after the training."""
    out = tmp_path_factory.getbasetemp()
    recipe = load_recipe("quick", {"train.lr": lr, "title": title})
    grid = Grid("quick", ["mlp"], ["none"], 1, data, "cpu")
    formats.write_toml(out / "config.toml", Plan(recipe, grid).table())
    assert Plan.load(out) == Plan(recipe, grid)


@FEW
@given(TEXT, st.floats(0, 1), st.floats(2, 3), st.booleans())
def test_a_space_reads_back(tmp_path_factory, title, low, high, log):
    path = tmp_path_factory.getbasetemp() / "space.toml"
    lr = {"low": low + 1e-300, "high": high, "log": log}
    tables = {"title": title, "train": {"lr": lr}, "model": {}, "attention": {}}
    formats.write_toml(path, tables)
    space = load_space(path)
    formats.write_toml(path, tables_of(space))
    assert load_space(path) == space == Space("space", space.tables)
    assert space.tables["title"] == title and space.tables["train"]["lr"].low == low + 1e-300


def test_a_name_that_is_no_text(tmp_path):
    """A file's name may be any bytes. JSON keeps them; TOML cannot, which is said at once."""
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    formats.write_json(tmp_path / "a.json", {"name": name})
    assert formats.read_json(tmp_path / "a.json", dict, "") == {"name": name}
    with pytest.raises(ValueError, match=r'data = "a/caf\\udce9": this is no Unicode.*rename it'):
        formats.write_toml(tmp_path / "a.toml", {"models": ["mlp"], "data": f"a/{name}"})
    assert not (tmp_path / "a.toml").exists()


class Shape(TypedDict):
    name: str
    parts: list[str]
    sizes: dict[str, list[float]]
    state: Literal["on", "off"]
    score: float | None
    more: NotRequired[int]
    last: NotRequired[list[str] | None]


GOOD = {"name": "x", "parts": ["a"], "sizes": {"b": [1, 2.5]}, "state": "on", "score": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"other": 3, "more": 4, "score": 1}, None),
        ({"name": None}, "it: name = None: give a string"),
        ({"parts": {"a": 1}}, "it: parts"),
        ({"parts": ["a", 1]}, "it: parts = 1: give a string"),
        ({"sizes": {"b": 1}}, "it: sizes = 1: give list"),
        ({"sizes": {"b": ["1"]}}, "it: sizes = '1': give a number"),
        ({"state": "broken"}, "give 'on', 'off'"),
        ({"more": "4"}, "it: more"),
        ({"last": None}, None),
        ({"last": ["a"]}, None),
        ({"last": [1]}, "it: last = 1: give a string"),
        ({"format": 2}, "a later TAB (format 2; this one reads 1): update TAB, or remove it"),
        ({"format": "new"}, "format = 'new'"),
    ],
)
def test_content_is_checked(change, message, tmp_path):
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(GOOD | change))
    if message is None:
        change.pop("format", None)
        assert formats.read_json(path, Shape, "remove it") == GOOD | change
        return
    with pytest.raises(Corrupt) as caught:
        formats.read_json(path, Shape, "remove it")
    said = str(caught.value)
    assert message in said and said.startswith(str(path)) and said.endswith("remove it")
    assert "\n" not in said


def test_what_is_missing_is_named(tmp_path):
    for key in GOOD:
        path = tmp_path / "shape.json"
        path.write_text(json.dumps({k: v for k, v in GOOD.items() if k != key}))
        with pytest.raises(Corrupt, match=f"it has no {key}; remove it"):
            formats.read_json(path, Shape, "remove it")


def test_a_dataclass_takes_what_it_names_alone():
    @dataclasses.dataclass
    class Two:
        a: int
        b: int = 0

    assert formats.check("two", {"a": 1}, Two) == {"a": 1}
    for table, message in (({"b": 1}, "two has no a"), ({"a": 1, "c": 2}, "unknown 'c'")):
        with pytest.raises(ValueError, match=message):
            formats.check("two", table, Two)


def test_a_line_that_broke_off_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    for end in ('{"a": ', '{"a": "é'.encode()[:-1].decode("latin1"), ""):
        path.write_bytes(b'{"a": 1}\n{"a": 2}\n' + end.encode("latin1"))
        assert formats.read_lines(path, "") == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a": 2}')  # an editor took the last line end
    assert formats.read_lines(path, "") == [{"a": 1}, {"a": 2}]
    for middle in ("[1]", "3", '{"a": ', ""):
        path.write_text(f'{{"a": 1}}\n{middle}\n{{"a": 2}}\n')
        with pytest.raises(Corrupt, match=r"rows\.jsonl is damaged or foreign"):
            formats.read_lines(path, "")


def test_a_name_that_is_taken_gets_a_number(tmp_path):
    made = [files.fresh(tmp_path / "results" / "12:00") for _ in range(3)]
    assert [path.name for path in made] == ["12:00", "12:00-2", "12:00-3"]
    assert all(path.is_dir() for path in made)
