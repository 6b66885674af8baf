"""A comparison that is not finished is reported in few words, however many runs are missing."""

import io
from dataclasses import replace

import pytest
from rich.console import Console
from small_report import FACTS, run

from tab.analysis.robustness import measure
from tab.cli.tables import ranked_table
from tab.compare.driver import compare
from tab.compare.plan import Grid, Plan
from tab.data.load import load_dataset
from tab.recipe.recipe import load_recipe
from tab.report import build, markdown
from tab.report.forest import note, rows
from tab.report.tables import costs_table, ranking
from tab.report.unfinished import notes, seeds_of, unfinished


def missing(attention, seeds):
    empty = {"rows": [], "summary": {}, "error": ""}
    return [replace(run(attention, seed=s, status="missing"), **empty) for s in seeds]


RUNS = [run("none"), run("self", 0.6), *missing("none", range(1, 10)), *missing("self", (1, 2, 4))]
RUNS += missing("local", range(5))
GRID = Grid("fair", ["cnn"], ["none", "self", "local"], 5, "shapes", "cpu", control_seeds=10)


def test_seeds_in_words():
    assert seeds_of([3]) == "seed 3" and seeds_of([2, 0, 1]) == "seeds 0–2"
    assert seeds_of([0, 2, 3, 7]) == "seeds 0, 2–3, 7"


def test_a_row_says_a_state_once():
    assert notes(RUNS[2:11]) == "not begun (seeds 1–9)"
    assert notes([run("self"), run("self", status="failed", seed=1), *missing("self", (2, 3))]) == (
        "failed (seed 1), not begun (seeds 2–3)"
    )


def test_rows_that_lack_the_same_seeds_stand_together():
    (said,) = unfinished([*RUNS, *missing("linear", range(5))])
    assert "- 22 of 24 runs not begun: CNN: seeds 1–9 of Control; seeds 1–2, 4 of Self-" in said
    assert "; seeds 0–4 of Local, Linear" in said and "--resume" in said


def test_the_terminal_names_rows_that_lack_the_same_seeds_together():
    runs = [*RUNS[:2], *missing("none", (1, 2)), *missing("self", (1, 2))]
    console = Console(width=100, file=io.StringIO())
    console.print(ranked_table(ranking(runs, "cnn"), ""))
    (line,) = [line for line in console.file.getvalue().split("\n") if "not begun" in line]
    assert line.strip() == "Self-Attention, Control: not begun (seeds 1–2)."


def test_what_one_seed_cannot_say_is_not_said():
    text = markdown.report(RUNS, FACTS, GRID, {})
    assert "## Statistics" not in text and "± is half" not in text
    assert "| not begun (seeds 0–4) |" in text and "| – | Local | – |" in text
    assert "Local" not in costs_table(ranking(RUNS, "cnn"))
    two = [*RUNS, run("none", seed=1), run("self", 0.6, seed=1)]
    assert "## Statistics" in markdown.report(two, FACTS, GRID, {})


def test_the_words_below_the_forest_plot_are_of_what_it_shows():
    one = note(rows(ranking(RUNS, "cnn")))
    assert "without intervals" in one and "A star" not in one and "the median of seeds" not in one
    two = note(rows(ranking([*RUNS, run("none", seed=1), run("self", 0.62, seed=1)], "cnn")))
    assert "with intervals of 95 %" in two and "the median of seeds" in two


def test_the_report_is_there_before_the_noise_is_measured(tmp_path, monkeypatch):
    """Which takes minutes where there are many runs; whoever stops it has the rest."""
    small = {"train.epochs": 1, "train.batch_size": 20, "data.images": 60, "data.validation": 20}
    small |= {"model.mlp.hidden": 8, "model.mlp.tokens": 4}
    grid = Grid("quick", ["mlp"], ["none", "self"], 1, "shapes:100/20", "cpu")
    dataset = load_dataset(grid.data)
    out = Plan(load_recipe("quick", small), grid).save(tmp_path / "res", dataset)
    compare(Plan.load(out), dataset, out)

    def stopped(run, *args, **options):
        if "-self-" in run.name:
            raise KeyboardInterrupt
        return measure(run, *args, **options)

    def text():
        return (out / "report.html").read_text() + (out / "report.md").read_text()

    monkeypatch.setattr(build, "measure", stopped)
    for waiting in (2, 1):
        with pytest.raises(KeyboardInterrupt):
            build.write_report(out, dataset)
        assert text().count(f"the accuracy under noise of {waiting} of 2 runs") == 2
        assert "Self-Attention" in text()
    monkeypatch.undo()
    build.write_report(out, dataset)
    assert "Being measured" not in text() and "noise.png" in text()
