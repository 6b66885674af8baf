"""Results of the recipe `published` beside the published figures."""

import csv
from pathlib import Path

from paths import ROOT

from tab.compare.driver import compare
from tab.compare.plan import Grid, Plan
from tab.compare.runs import Run
from tab.data.load import load_dataset
from tab.layers import attention_names
from tab.recipe.published import EPOCHS, curves, published_attentions
from tab.recipe.recipe import load_recipe
from tab.report.published import beside, published_charts, published_picture, published_section
from tab.train.loop import train


def test_the_published_table_is_whole():
    assert len(curves()) == 22 and len(published_attentions()) == 11
    assert "flex" not in published_attentions()
    assert set(published_attentions()) <= set(attention_names())
    assert {len(part) for run in curves().values() for part in run} == {EPOCHS}
    control, kimi = curves()["cnn", "none"], curves()["mlp", "kimi_k2"]
    assert (control.test[-1], control.train[-1], control.test[0]) == (0.7044, 0.8926, 0.4310)
    assert (kimi.test[-1], kimi.train[-1]) == (0.5103, 0.9545)


def run_of(model, attention, seed, test, epochs=100, tmp="x"):
    summary = {"final_test_accuracy": test, "final_train_accuracy": 0.9}
    rows = [{}] * epochs
    return Run(model, attention, seed, tmp, "done", rows=rows, summary=summary)


def test_the_section_counts_what_lies_near():
    runs = [run_of("cnn", "none", s, 0.7044 + 0.01 * s) for s in range(2)]  # mean 0.5 points off
    runs += [run_of("mlp", "self", 0, 0.5236 + 0.0149), run_of("mlp", "linear", 0, 0.5110 - 0.0151)]
    text = published_section(runs, "a note")
    assert "2 of 3 test accuracies lie within 1.5 points" in text and "19 of 22" in text
    assert "a note" in text and "These runs had" not in text
    lines = {tuple(c.strip() for c in line.split("|")[1:3]): line for line in text.splitlines()
             if line.startswith("| ")}  # fmt: skip
    assert "| 70.9 ± 6.4 | +0.5 | yes |" in lines["CNN", "Control"]
    assert "| -1.5 | no |" in lines["MLP", "Linear"]
    assert "| – | – | – |" in lines["MLP", "Local"]
    short = published_section([run_of("mlp", "none", 0, 0.5, epochs=5)], "n")
    assert "These runs had 5 epochs, the published ones 100" in short
    assert published_section([], "n") == ""


def curve_of(model, attention, shift, epochs, status="done", seed=0) -> Run:
    """The published run, `shift` above it, as far as `epochs`."""
    theirs = curves()[model, attention]
    rows = [
        {"epoch": e + 1, "test_accuracy": theirs.test[e] + shift, "train_accuracy": theirs.train[e]}
        for e in range(epochs)
    ]
    summary = {"final_test_accuracy": rows[-1]["test_accuracy"], "final_train_accuracy": 0.9}
    return Run(model, attention, seed, Path("x"), status, rows, summary, epochs=100)


def test_epochs_stand_beside_the_published_ones_also_of_a_run_that_was_stopped(tmp_path):
    runs = [curve_of("cnn", "none", 0.01, 12, "running"), curve_of("mlp", "self", -0.02, 100)]
    runs += [curve_of("mlp", "self", 0.04, 50, "running", seed=1)]  # not in the means
    runs[0].rows[2]["test_accuracy"] -= 0.05
    pairs = beside(runs)
    assert {pair: len(ours["test"]) for pair, (ours, _) in pairs.items()} == {
        ("mlp", "self"): 100, ("cnn", "none"): 12,
    }  # fmt: skip
    lines = [[c.strip() for c in line.split("|")[1:-1]]
             for line in published_section(runs, "n").splitlines()]  # fmt: skip
    marks = next(line for line in lines if "Epoch 1" in line)
    assert marks[3:-1] == [f"Epoch {m}" for m in (1, 2, 5, 10, 20, 50, 100)]
    control = [line for line in lines if line[:2] == ["CNN", "Control"]]
    assert control[0][3] == "stopped after epoch 12 of 100"
    assert control[1][2:4] == ["here, 12 epochs", "44.1"] and control[1][7:] == ["–"] * 4
    assert control[2][2:4] == ["published", "43.1"]
    assert control[3][2:4] == ["difference", "+1.0"] and control[3][-1] == "-4.0 (epoch 3)"
    assert ["difference", *["-2.0"] * 7] in [line[2:10] for line in lines]
    charts = published_charts(pairs).charts
    assert [len(s["x"]) for s in charts[1]["series"]] == [12] * 4
    published_picture(tmp_path / "p.png", pairs)
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_runs_scored_but_once_have_no_curve():
    run = curve_of("mlp", "self", 0, 100)
    for row in run.rows[:-1]:
        row["test_accuracy"] = None
    assert beside([run]) == {} and "Epoch 1" not in published_section([run], "n")


def test_an_unfinished_comparison_is_reported_as_far_as_it_came(tmp_path):
    from tab.report import write_report

    dataset, out = load_dataset("shapes:40/20"), tmp_path / "out"
    small = {"train.epochs": 3, "train.batch_size": 20, "model.mlp.hidden": 16}
    plan = Plan(load_recipe("published", small), Grid("published", ["mlp"], ["none", "self"], 1,
                                                      "shapes:40/20", "cpu"))  # fmt: skip
    plan.save(out, dataset)
    train(plan.configs()[0], dataset, out / "runs" / "mlp-none-s0", stop_after=2)
    sweep = ROOT / "results" / "examples" / "sweep"
    text = write_report(out, dataset, sweep=sweep).read_text()
    assert "Recipe `published`, 3 epochs" in text and "## Hyperparameters" in text
    assert "`mlp-none-s0`: stopped after epoch 2 of 3" in text
    assert "1 of 2 runs not begun: MLP: seed 0 of Self-Attention" in text
    assert "| here, 2 epochs |" in text and "pictures/published.png" in text
    page = (out / "report.html").read_text()
    assert "stopped after epoch 2 of 3" in page and "MLP: Control</figcaption>" in page


def test_a_comparison_reports_beside_the_published_figures(tmp_path):
    from tab.report import write_report

    dataset = load_dataset("shapes:40/20")
    small = {"train.epochs": 1, "train.batch_size": 20, "model.mlp.hidden": 16}
    recipe = load_recipe("published", small)
    assert recipe.attentions() == published_attentions()
    assert load_recipe("fair").attentions() == attention_names()
    grid = Grid("published", ["mlp"], ["none", "multi_head"], 1, "shapes:40/20", "cpu")
    Plan(recipe, grid).save(tmp_path / "out", dataset)
    compare(Plan.load(tmp_path / "out"), dataset, tmp_path / "out")
    text = write_report(tmp_path / "out", dataset).read_text()
    assert "Beside the published figures" in text and dataset.note in text
    with (tmp_path / "out" / "experiment_summary.csv").open(newline="") as file:
        found = {r["attention_type"]: float(r["final_test_accuracy"]) for r in csv.DictReader(file)}
    assert f"| 53.2 | {100 * found['Control']:.1f} |" in text
