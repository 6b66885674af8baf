"""Several comparisons in one table: against N, and against what cannot be by construction."""

import csv
import json

import pytest
from typer.testing import CliRunner

from tab.bench.results import save
from tab.bench.rows import Row
from tab.cli.main import app
from tab.compare.driver import compare
from tab.compare.plan import Grid, Plan
from tab.data.load import load_dataset
from tab.recipe.recipe import load_recipe
from tab.report.lengths import costs, joined, trained
from tab.report.tasks import answers

SMALL = {"train.epochs": 1, "train.batch_size": 8, "train.lr": 1e-3, "data.validation": 8}


def trained_in(out, recipe, model, attentions, data, changes):
    plan = Plan(
        load_recipe(recipe, SMALL | changes), Grid(recipe, [model], attentions, 2, data, "cpu")
    )
    dataset = load_dataset(data)
    out = plan.save(out, dataset)
    compare(plan, dataset, out)
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = tmp_path_factory.mktemp("lengths")
    found = []
    for n in (8, 16):
        sizes = {"model.tokens.tokens": n, "model.tokens.hidden": 16, "model.tokens.match": ""}
        names, data = ["none", "mixer", "multi_head"], f"recall:{n}:40/60"
        found.append(trained_in(out / str(n), "recall", "tokens", names, data, sizes))
    vit = {"model.vit.patch": 8, "model.vit.hidden": 16, "model.vit.match": "", "data.images": 16}
    vit |= {"model.vit.depth": 1}
    found.append(trained_in(out / "vit", "study", "vit", ["none", "local"], "shapes:40/20", vit))
    return found


def step(contestant, n, seconds, peak=None):
    row = Row(f"steps/vit/n{n}/study/b4", contestant, batch=4, tokens=n, peak_bytes=peak)
    row.timed("step", seconds, [])
    return row


def test_accuracy_and_cost_stand_in_one_line(folders, tmp_path):
    rows = [step("none", 16, [1.0] * 3), step("tab local", 16, [1.0, 2.0, 4.0], 3_000_000)]
    rows += [step("eager local", 16, [2.0, 8.0, 8.0], 5_000_000), step("tab local", 64, [5.0] * 3)]
    save(tmp_path / "steps.json", rows, None, {}, "tab bench steps")
    lines = joined(trained(folders[2:]), costs(tmp_path / "steps.json"))
    assert [(x["attention"], x["tokens"]) for x in lines] == [
        *(("none", 16), ("local", 16), ("local", 64))
    ]
    none, local, longer = lines
    scores = [run.accuracy for run in trained(folders[2:])[1].runs]
    assert local["accuracy"] == pytest.approx(sum(scores) / 2) and local["seeds"] == 2
    assert local["step_ms"] == 2000 and local["step_peak_mb"] == 3
    assert local["times_faster"] == 2  # the median of 2, 4 and 2 within each round
    assert "times_faster" not in none and "accuracy" not in longer


def test_rows_stand_in_the_order_in_which_they_come(tmp_path):
    """One that is missing at a length is no reason to stand before those that are not."""
    names = {16: ("none", "tab local", "tab mixer"), 64: ("none", "tab mixer")}
    rows = [step(name, n, [1.0] * 3) for n in names for name in names[n]]
    save(tmp_path / "steps.json", rows, None, {}, "tab bench steps")
    lines = joined([], costs(tmp_path / "steps.json"))
    assert [(x["attention"], x["tokens"]) for x in lines] == [
        *(("none", 16), ("none", 64), ("local", 16), ("mixer", 16), ("mixer", 64))
    ]


def test_the_command(folders, tmp_path):
    save(tmp_path / "steps.json", [step("none", 16, [1.0])], None, {}, "tab bench steps")
    given = [*map(str, folders), "--steps", str(tmp_path / "steps.json"), "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["lengths", *given])
    assert done.exit_code == 0, done.output
    assert "Step ms" in done.output and "At most %" in done.output
    found = json.loads(CliRunner().invoke(app, ["lengths", *given, "--json"]).stdout)
    assert {row["step_ms"] for row in found["rows"]} >= {1000.0} and len(found["tasks"]) == 6
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept >= {"lengths.csv", "lengths.md", "lengths.png", "tasks.csv", "tasks.md"}
    with open(tmp_path / "tasks.csv", encoding="utf-8") as file:
        rows = {(row["attention"], row["tokens"]): row for row in csv.DictReader(file)}
    assert len(rows) == 6 and rows["none", "8"]["ceiling"] == "0.0625"
    text = (tmp_path / "tasks.md").read_text(encoding="utf-8")
    assert "blind to keys" in text and "| Attention | N 8 | N 16 |" in text


def test_what_was_found_beside_what_was_predicted(folders):
    """A run above its ceiling is told: the prediction is tested and not repeated."""
    found = {(a.attention, a.tokens): a for a in answers(trained(folders[:1]))}
    assert found["none", 8].found == "as predicted" and found["multi_head", 8].found == "not solved"
    for path in folders[0].glob("runs/tokens-*/run.json"):
        run = json.loads(path.read_text())
        run["summary"]["final_test_accuracy"] = 0.99
        path.write_text(json.dumps(run))
    found = {(a.attention, a.tokens): a for a in answers(trained(folders[:1]))}
    assert found["none", 8].found == found["mixer", 8].found == "above its ceiling"
    assert found["multi_head", 8].found == "solved"


def test_what_cannot_be_joined_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="both hold none at 8 tokens"):
        trained([folders[0], folders[0]])
    save(tmp_path / "old.json", [Row("steps/cnn/fair/b4", "none")], None, {}, "tab bench steps")
    with pytest.raises(ValueError, match="--patch"):
        costs(tmp_path / "old.json")
    assert CliRunner().invoke(app, ["lengths"]).exit_code == 2
