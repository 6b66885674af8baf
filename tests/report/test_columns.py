"""A metric is one entry: what is added to the table of columns is found wherever it belongs."""

import csv

import pytest
from small_report import FACTS, run

from tab.cli.tables import ranked_rows
from tab.compare import columns
from tab.compare.columns import Column
from tab.compare.csv_files import write_csvs
from tab.compare.plan import Grid
from tab.report import markdown
from tab.report.html import html_page
from tab.report.tables import ranked_columns, ranking

RUNS = [
    run(name, accuracy, seed=s) for s in (0, 1) for name, accuracy in (("none", 0.4), ("self", 0.5))
]
BEST = Column(
    "best_epoch",
    lambda run: max(run.rows, key=lambda row: row["test_accuracy"])["epoch"],
    title="Best epoch",
    over="median",
    better="more",
)


def test_a_metric_is_one_entry(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "SUMMARY", [*columns.SUMMARY, BEST])
    write_csvs(tmp_path, RUNS)
    with (tmp_path / "experiment_summary.csv").open(newline="") as file:
        assert [line["best_epoch"] for line in csv.DictReader(file)] == ["3"] * len(RUNS)
    grid = Grid("fair", ["cnn"], ["none", "self"], 2, "shapes", "cpu")
    text = markdown.report(RUNS, FACTS, grid, {})
    table = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    first = next(i for i, line in enumerate(table) if " Best epoch ↑ " in line)
    place = table[first].index(" Best epoch ↑ ")
    assert [line[place] for line in table[first + 2 : first + 4]] == [" 3 (3–3) "] * 2
    ranked = {"cnn": ranking(RUNS, "cnn")}
    page = html_page(text, {}, [], {}, None)
    assert "Best epoch ↑</th>" in page and "3 (3–3)</td>" in page
    assert ranked_rows(ranked["cnn"])[0]["best_epoch"] == 3


def test_the_tables_have_the_columns_of_before():
    assert [*ranked_columns()] == [
        *("Rank", "Attention", "Test acc. (%) ↑", "vs control (points) ↑", "Verdict"),
        *("p (Dunnett)", "Time ratio (×) ↓", "Train acc. (%) ↑", "Train time (s) ↓", "Note"),
        *("Images/s ↑", "Parameters", "In blocks", "FLOPs/image", "Branch share (%)"),
        *("FFN share (%)", "Peak memory (MiB) ↓"),
    ]


def test_an_unknown_unit_or_average_is_refused():
    with pytest.raises(ValueError, match="column x: unit = 'miles': give one of percent, seconds"):
        Column("x", unit="miles")
    with pytest.raises(ValueError, match="over = 'mode': give one of mean, median, any"):
        Column("x", over="mode")
