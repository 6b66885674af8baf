"""The pages that list every key, column, error and figure are held to the code and the results."""

import ast
import dataclasses
import importlib.util
import json
import re
import typing

import pytest
from documents import blocks, named, rows, section, text_of
from paths import ROOT

import tab
from tab import run_config
from tab.analysis import robustness_file
from tab.bench import results
from tab.bench.rows import Row, row_speedup
from tab.compare import columns
from tab.compare.plan import Grid
from tab.layers import attention_options, layer_names
from tab.sweep.plan import SweepFile
from tab.sweep.trials import BESIDE
from tab.train.facts import Facts
from tab.train.run_files import RunFile

RECIPES, FILES = ROOT / "docs" / "recipes.md", ROOT / "docs" / "output-files.md"
MEMORY = ROOT / "bench" / "results" / "epyc-2core-avx512" / "memory.json"
TROUBLES, BENCHMARKS = ROOT / "docs" / "troubleshooting.md", ROOT / "docs" / "benchmarks.md"


def first_cells(text: str) -> list[str]:
    return [name for line in rows(text) for name in named(line[0])]


# --- recipes --------------------------------------------------------------------------------------


def keys(text: str) -> dict[str, list[str]]:
    return {name: line for line in rows(text) for name in named(line[0])}


@pytest.mark.parametrize("name", run_config.SECTIONS)
def test_every_key_of_a_section_is_described(name):
    told = keys(section(RECIPES, f"## `[{name}]`"))
    check_fields(told, dataclasses.fields(run_config.SECTIONS[name]), run_config.SECTIONS[name])


def test_every_key_of_the_models_is_described():
    """Those of all, then what each has beside them, below the line that names it."""
    text = section(RECIPES, "## `[model.NAME]`")
    parts = re.split(r"^`\[model\.(\w+)\]` also has$", text, flags=re.MULTILINE)
    shared = dataclasses.fields(run_config.Mlp)
    check_fields(keys(parts[0]), shared, run_config.Mlp)
    told = dict(zip(parts[1::2], map(keys, parts[2::2]), strict=True))
    for model, kind in run_config.MODELS.items():
        own = [f for f in dataclasses.fields(kind) if f.name not in {s.name for s in shared}]
        assert (model in told) == bool(own), model
        check_fields(told.get(model, {}), own, kind)


def check_fields(told: dict[str, list[str]], fields, kind: type) -> None:
    """Names, the choices of a Literal, and defaults."""
    assert [*told] == [field.name for field in fields], kind.__name__
    hints = typing.get_type_hints(kind)
    for field in fields:
        _, values, default, meaning = told[field.name]
        if typing.get_origin(hints[field.name]) is typing.Literal:
            choices = [str(x) for x in typing.get_args(hints[field.name])]
            assert re.findall(r"[\w.]+", values) == choices, field.name
        stated = "" if field.default is dataclasses.MISSING else str(field.default)
        assert default.strip("`") == stated and meaning, field.name


def test_every_option_of_every_mechanism_is_described():
    """Where it is, and its default, where that is no None that other sizes decide."""
    told: dict[str, set[str]] = {}
    for option, where, default, meaning in rows(section(RECIPES, "## Options of the mechanisms")):
        names = set(named(where))
        if where.startswith("all but"):
            names = set(layer_names()) - names
        assert names <= set(layer_names()) and default and meaning, option
        for name in named(option):
            assert name not in told, f"{name} stands twice"
            told[name] = names
            values = {layer: attention_options(layer)[name] for layer in names}
            if name == "seed" or None in values.values():
                continue
            stated = {layer: json.dumps(value) for layer, value in values.items()}
            one = len(set(stated.values())) == 1
            parts = {value if one else f"{value} in `{layer}`" for layer, value in stated.items()}
            assert set(default.split(", ")) == parts, name
    has: dict[str, set[str]] = {}
    for name in layer_names():
        for option in attention_options(name):
            has.setdefault(option, set()).add(name)
    assert told == has


# --- Python ---------------------------------------------------------------------------------------


def test_every_public_name_has_its_docstring_on_the_site():
    told = re.findall(
        r"^::: tab\.(?:\w+\.)*(\w+)$", text_of(ROOT / "docs" / "api.md"), re.MULTILINE
    )
    assert len(set(told)) == len(told)
    assert {name for name in tab.__all__ if name != "functional"} <= set(told)


# --- output files ---------------------------------------------------------------------------------


def test_every_column_of_a_comparison_is_described():
    summary = first_cells(section(FILES, "### experiment_summary.csv"))
    assert summary == columns.NAMES + [column.name for column in columns.SUMMARY]
    assert first_cells(section(FILES, "### experiment_results.csv")) == (
        columns.NAMES + columns.RESULTS
    )


def test_every_column_of_a_sweep_is_described():
    assert sorted(first_cells(section(FILES, "### trials.csv"))) == sorted(BESIDE)


@pytest.mark.parametrize(
    "heading, names",
    [
        ("### config.toml", [f.name for f in dataclasses.fields(Grid)]),
        ("### environment.json", typing.get_type_hints(Facts)),
        ("### run.json", typing.get_type_hints(RunFile)),
        ("### sweep.toml", typing.get_type_hints(SweepFile)),
        ("## Of a benchmark", [*typing.get_type_hints(results.Record)]),
        ("## Of a benchmark", [f.name for f in dataclasses.fields(Row)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_key_of_a_file_is_described(heading, names):
    assert set(names) <= set(first_cells(section(FILES, heading)))


def test_every_key_of_robustness_is_described():
    kinds = [robustness_file.Curve, *robustness_file.KINDS.values()]
    names = {name for kind in kinds for name in typing.get_type_hints(kind)}
    told = first_cells(section(FILES, "### robustness.json"))
    assert {*names, "clean", "large", "zero_gradients"} == set(told)


def keys_within(found: object, known: set[str], stop: set[str]) -> set[str]:
    """The keys, at any depth, that are not described; below `stop` they are of the reader's own."""
    if isinstance(found, list):
        return set().union(*(keys_within(item, known, stop) for item in found))
    if not isinstance(found, dict):
        return set()
    below = [value for key, value in found.items() if key not in stop]
    missing = {key for key in found if key not in known}
    return missing.union(*(keys_within(value, known, stop) for value in below))


def test_what_was_really_written_holds_no_other_key():
    known = set(re.findall(r"`([\w.]+)`", text_of(FILES))) | {"forward", "backward", "both", "step"}
    known |= {"format", "overrides", "p_holm"}
    written = [*ROOT.glob("bench/results/*/*.json"), *ROOT.glob("results/*/*/environment.json")]
    assert len(written) >= 5
    for path in written:
        found = results.read_json(path, dict, "")
        assert not keys_within(found, known, {"backends", "overrides"}), path


# --- errors ---------------------------------------------------------------------------------------


def texts() -> list[list[str]]:
    """Every text of the code: its fixed parts, between which something is filled in."""
    found = []
    for path in [*ROOT.glob("tab/**/*.py"), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value for p in node.values if isinstance(p, ast.Constant)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value]
            else:
                continue
            if sum(map(len, parts)) >= 20:
                found.append(parts)
    return found


def says(line: str, parts: list[str]) -> bool:
    """The line has all of them, in this order."""
    at = 0
    for part in parts:
        at = line.find(part, at) + len(part)
        if at < len(part):
            return False
    return True


def test_a_message_is_known_by_its_fixed_parts_in_order():
    assert says("a = 1: give b", ["a = ", ": give "]) and says("xx", [])
    assert not says(": give a = ", ["a = ", ": give "]) and not says("a", ["b"])


def test_the_errors_that_are_explained_are_those_of_the_code():
    known = texts()
    messages = [line for block in blocks(TROUBLES, "text") for line in block.splitlines()]
    assert len(messages) >= 15
    assert not [line for line in messages if not any(says(line, parts) for parts in known)]


# --- figures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel_speed():
    """The script that draws README's picture."""
    spec = importlib.util.spec_from_file_location("ks", ROOT / "bench" / "kernel_speed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernel_speed_is_that_of_the_files(kernel_speed, tmp_path):
    """The tables; the picture, as it is committed and as it is drawn now; and in README, from the
    least to the most of an operator, forward and backward."""
    page = text_of(BENCHMARKS)
    assert kernel_speed.written(page) == page, "python bench/kernel_speed.py writes the tables"
    assert kernel_speed.MEASURED in kernel_speed.folders()
    best = kernel_speed.best_others(kernel_speed.MEASURED)
    assert len(kernel_speed.table(kernel_speed.MEASURED)) == len(best) + 2
    kernel_speed.draw(kernel_speed.MEASURED, tmp_path / "drawn.svg")
    pictures = [text_of(path) for path in (kernel_speed.PICTURE, tmp_path / "drawn.svg")]
    wins: dict[str, list[float]] = {}
    for (op, size), directions in best.items():
        _, found = results.load(kernel_speed.MEASURED / f"{op}.json")
        case = [row for row in found if row.case.startswith(f"{op}/{size}/") and not row.skipped]
        (ours,) = (row for row in case if row.contestant == "tab")
        for direction in ("forward", "both"):
            rivals = [row for row in case if row is not ours and direction in row.seconds]
            ratios = {row.contestant: row_speedup(row, ours, direction) for row in rivals}
            name, ratio = min(ratios.items(), key=lambda item: item[1][1])
            assert directions[direction] == (name, ratio), (op, size, direction)
            assert all(f"{ratio[1]:.1f}× {name}" in picture for picture in pictures)
        wins.setdefault(op, []).append(directions["both"][1][1])
    readme = " ".join(text_of(ROOT / "README.md").split())
    for op, all_wins in wins.items():
        ends = [f"{x:.1f}" if x < 9.95 else f"{x:.0f}" for x in (min(all_wins), max(all_wins))]
        span = "× to ".join(dict.fromkeys(ends))
        assert f"{'latent attention' if op == 'mla' else op} {span}×" in readme, (op, span)


def test_the_table_of_memory_is_that_of_the_file():
    _, found = results.load(MEMORY)
    peaks = {(tuple(row.case.split("/")[:2]), row.contestant): row.peak_bytes for row in found}
    told = rows(section(BENCHMARKS, "## Memory"))
    assert {(op.strip("`"), name) for op, name, *_ in told} == {(k[0][0], k[1]) for k in peaks}
    for op, name, *cells in told:
        for n, cell in zip((1024, 4096, 8192, 16384), cells, strict=True):
            peak = peaks[(op.strip("`"), f"n{n}"), name]
            assert cell == ("–" if peak is None else f"{peak / 1e6:,.0f}"), (op, name, n)
