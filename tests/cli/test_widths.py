"""Tables, bars and help fit 80 and 60 columns, and cut no name."""

import io
import re
from collections import Counter

import pytest
import typer
from rich.table import Table
from small_report import run

from tab.analysis.one_variant import Layer
from tab.analysis.same_function import Identity
from tab.bench.history import Line, Point
from tab.bench.regress import Change
from tab.bench.rows import Row
from tab.cli import bench_tables, tables
from tab.cli.answer import pairs
from tab.cli.main import app
from tab.cli.progress import Bars
from tab.cli.robustness_table import robustness_table
from tab.cli.terminal import bar, plain
from tab.layers import layer_names
from tab.recipe.recipe import load_recipe
from tab.report.tables import ranking
from tab.report.text import title
from tab.sweep.trials import RungTrial

WIDTHS = (80, 60)
RUNS = [
    run(name, 0.4 + 0.02 * i + 0.001 * seed, seconds=10.0 + i, seed=seed)
    for i, name in enumerate(layer_names())
    for seed in (0, 1, 2)
]


def printed(made, width: int) -> str:
    file = io.StringIO()
    plain(file=file, width=width).print(made)
    return file.getvalue()


def cut(text: str, width: int) -> list[str]:
    return [line for line in text.splitlines() if len(line) > width or re.search(r"\S…", line)]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_ranking_fits_and_cuts_no_name(width):
    text = printed(tables.ranked_table(ranking(RUNS, "cnn"), "CNN"), width)
    assert not cut(text, width)
    assert text.splitlines()[1].split() == [
        "Attention",
        "Test",
        "%",
        "vs",
        "control",
        "Verdict",
        "Time",
    ]
    for name in layer_names():
        assert any(line.startswith(f"{title(name)}  ") for line in text.splitlines()), name


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_longer_than_its_column_is_folded_and_loses_nothing(width):
    name = "mine_" + "x" * 90
    entries = ranking([run("none"), run(name, 0.6), run("self", status="failed")], "cnn")
    text = printed(tables.ranked_table(entries, "CNN"), width)
    assert not cut(text, width) and text.count("x") == 90
    assert "failed" in text


@pytest.mark.parametrize("width", WIDTHS)
def test_an_identity_check_fits(width):
    layers = [
        Layer("mlp", name, 128, 16, 1_234_567, ("Q", "K"), True, True, ("out.bias",), False)
        for name in layer_names()
    ]
    (text,) = (printed(made, width) for made in tables.identity_tables(Identity(layers, [])))
    assert not cut(text, width)
    for name in layer_names():
        assert any(line.startswith(f"{title(name)}  ") for line in text.splitlines()), name


def bench_rows() -> list[Row]:
    names = ("tab", "tab reference", "eager", "compiled", "performer-pytorch")
    times = {d: [1.234e-3, 1.3e-3, 1.5e-3] for d in ("forward", "both")}
    work = {"floor": {"forward": 1e-4, "both": 2e-4}, "error": 1e-7, "gradient_error": 2e-7}
    rounds = {"forward": [3], "both": [3]}
    more = {"rounds": rounds, "pace": {}, "peak_bytes": 123_000_000}
    case = "performer/vision/causal/bfloat16"
    rows = [Row(case, name, seconds=dict(times), **work, **more) for name in names]
    return [*rows, Row(case, "linformer", skipped="not taken: " + "because " * 20)]


def step_rows() -> list[Row]:
    names = ("none", "tab kv_compression", "eager kv_compression")
    more = {"rounds": {"step": [2]}, "batch": 512, "peak_bytes": 2_345_000_000}
    return [
        Row("steps/vit/fair/b512", name, seconds={"step": [0.1, 0.2]}, **more) for name in names
    ]


def memory_rows() -> list[Row]:
    lengths = (1024, 2048, 4096, 8192, 16384)
    return [
        Row(f"performer/n{n}/full/float32", name, peak_bytes=n * 1_000_000)
        for name in ("tab", "performer-pytorch")
        for n in lengths
    ]


def trials() -> dict:
    drawn = {"lr": 0.00123, "hidden": 256, "num_heads": 8, "compression_ratio": 0.25}
    found = [RungTrial(0, rung, 3 + 2 * rung, "done", 0.5, drawn) for rung in range(3)]
    lost = [RungTrial(1, 0, 3, "diverged", None, drawn)]
    return {("cnn", "kv_compression"): found + lost, ("resnet9", "deepseek_mla"): found}


def robust() -> dict:
    attacks = {"fgsm": 0.1, "pgd": 0.0, "suspicions": ["the loss is flat"]}
    found = {"noise": {"accuracy": [0.7, 0.1]}, "own/fog": {"accuracy": [0.5] * 5}}
    found |= {"attacks": attacks, "calibration": {"ece": 0.05}, "cifar10.1": {"accuracy": 0.6}}
    found["mirrored"] = {"accuracy": 0.71}
    return {"resnet9-kv_compression-s12": {**found, "autoattack": {"accuracy": [0.2, 0.0]}}}


SHARES = {("cnn", "kv_compression"): {"lr": 0.9, "compression_ratio": 0.1}}
CHANGES = [
    Change("performer/vision/causal/bfloat16", "tab", "forward", verdict, 1e-3, 2e-3, 2.0, 1.9, 2.1)
    for verdict in ("slower", "not told apart", "undecidable: one process has no spread")
]
POINTS = [Point(f"291cd2{i}", 1.0, 0.981, 1.034, 26.3 + i) for i in range(2)]
HISTORY = [Line("performer/vision/causal/bfloat16", "tab reference", "both", POINTS)]
MADE = {
    "bench": lambda: list(bench_tables.op_tables(bench_rows())),
    "steps": lambda: [bench_tables.steps_table(step_rows())],
    "memory": lambda: [bench_tables.memory_table(memory_rows())],
    "changes": lambda: list(bench_tables.changes_tables(CHANGES)),
    "history": lambda: list(bench_tables.history_tables(HISTORY)),
    "sweep": lambda: [tables.sweep_table(trials(), (3, 5, 7), "search", SHARES)],
    "robustness": lambda: [robustness_table(robust())],
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", MADE)
def test_every_other_table_fits(name, width):
    for made in MADE[name]():
        text = printed(made, width)
        assert not cut(text, width), text
        cells = "".join(str(c) for column in made.columns for c in (column.header, *column.cells))
        assert not Counter("".join(cells.split())) - Counter(text), text  # all of it is there
        names = [str(cell) for cell in made.columns[0].cells]
        assert names and all(name in text for name in names if len(name) <= 24), text


def test_a_table_that_could_cut_is_told_from_one_that_cannot():
    """The control of the tests above: rich's own table cuts."""
    own = Table("Name")
    own.add_row("x" * 90)
    assert cut(printed(own, 60), 60) and not cut(printed(pairs("", [("", "x" * 90)]), 60), 60)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_bar_cuts_no_name(width, monkeypatch):
    file = io.StringIO()
    shown = plain(file=file, width=width, force_terminal=True)
    monkeypatch.setattr("tab.cli.terminal.console", shown)
    with bar("robustness") as show:
        show(1, 2, "mlp-" + "deepseek_mla" * 5)
    text = re.sub(r"\x1b\[[\d;?]*\w|\s", "", file.getvalue())
    assert "…" not in text and "mlp-" + "deepseek_mla" * 5 in text


@pytest.mark.parametrize("width", WIDTHS)
def test_the_bars_of_a_comparison_cut_nothing(width):
    file = io.StringIO()
    config = load_recipe("quick").run_config("cnn", "kv_compression", 0)
    with Bars(plain(file=file, width=width, force_terminal=True)) as bars:
        bars.start(24, 3)
        bars.begin(config)
        bars.epoch(config, {**run().rows[0], "epoch": 2})
        bars.progress.refresh()
    text = re.sub(r"\x1b\[[\d;?]*\w", "", file.getvalue())
    assert "cnn-kv_compression-s0" in text and "test 16.7%" in text
    assert not cut(text.replace("\r", "\n"), width)


def commands(command=None, words=()):
    command = command or typer.main.get_command(app)
    yield words, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*words, name))


@pytest.mark.parametrize("width", WIDTHS)
def test_help_fits_and_cuts_neither_options_nor_sentences(width):
    for words, command in commands():
        context = command.context_class(command, info_name=" ".join(words), terminal_width=width)
        text = command.get_help(context)
        assert not cut(text, width) and not re.search(r"[a-z]\.\.\.$", text, re.MULTILINE), text
        for parameter in command.params:
            assert all(option in text for option in parameter.opts if option.startswith("-"))
        for name in getattr(command, "commands", ()):
            assert f"\n  {name} " in text
