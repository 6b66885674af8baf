"""A hundred classes: sizes are matched for the logits that the data set needs."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from tab.cli.main import app
from tab.compare.driver import compare
from tab.compare.plan import Grid, Plan
from tab.compare.runs import read_runs
from tab.data.load import Dataset, Split
from tab.models.flops import forward_flops
from tab.models.image_model import build_model, parameter_count
from tab.recipe.recipe import load_recipe
from tab.recipe.size_matching import flops_of, parameters_of
from tab.train.loop import train

CLASSES = 100
SMALL = {
    "train.epochs": 1,
    "train.batch_size": 50,
    "data.validation": 100,
    "model.cnn.hidden": 64,
    "model.cnn.channels": 8,
}


@pytest.fixture(scope="module")
def hundred():
    labels = torch.arange(3 * CLASSES) % CLASSES
    images = torch.randint(0, 256, (len(labels), 32, 32, 3), dtype=torch.uint8)
    names = tuple(f"class {i:02}" for i in range(CLASSES))
    test = Split(images[:CLASSES], labels[:CLASSES])
    return Dataset("hundred", names, Split(images, labels), test, "made up", "0" * 16)


def plan(recipe="fair"):
    grid = Grid(recipe, ["cnn"], ["none", "multi_head", "linear"], 1, "hundred", "cpu")
    return Plan(load_recipe(recipe, SMALL), grid)


@pytest.mark.parametrize("recipe, key", [("fair", "parameters"), ("fair_flops", "flops")])
def test_a_comparison_matches_for_its_classes(hundred, tmp_path, recipe, key):
    plan(recipe).save(tmp_path / "out", hundred)
    # As a user of the API does, with the plan that was saved, or with the one on disk.
    for made in (plan(recipe), Plan.load(tmp_path / "out")):
        compare(made, hundred, tmp_path / "out")
    assert Plan.load(tmp_path / "out").grid.classes == CLASSES
    runs = {(run.model, run.attention): run.summary for run in read_runs(
        tmp_path / "out", Grid.load(tmp_path / "out"))}  # fmt: skip
    for (model, attention), summary in runs.items():
        off = summary[key] / runs[model, "multi_head"][key] - 1
        assert abs(off) < 0.03, (model, attention, off)


@pytest.mark.parametrize(
    "model, match",
    [("mlp", "multi_head"), ("mlp", "flops:multi_head"), ("resnet9", "multi_head")],
)
def test_sizes_are_of_the_classes(model, match):
    cost = forward_flops if match.startswith("flops") else parameter_count
    ours = flops_of if match.startswith("flops") else parameters_of
    recipe = load_recipe("fair", {f"model.{model}.match": match})
    target = cost(build_model(recipe.run_config(model, "multi_head", 0, classes=CLASSES), CLASSES))
    for attention in ("none", "linear", "local"):
        config = recipe.run_config(model, attention, 0, classes=CLASSES)
        size = cost(build_model(config, CLASSES))
        assert abs(size / target - 1) < 0.02 and ours(config, CLASSES) == size, attention


def test_a_sweep_matches_for_its_classes(hundred, tmp_path):
    pytest.importorskip("optuna")
    from tab.sweep.halving import Budget
    from tab.sweep.plan import SweepPlan
    from tab.sweep.space import load_space

    budget = Budget(2, (1,), 2, 100, 100)
    named = (["cnn"], ["none"], "hundred", "cpu", 0)
    recipe = load_recipe("fair", SMALL)
    SweepPlan(recipe, load_space("small"), budget, *named).save(tmp_path / "out", hundred)
    kept = SweepPlan.load(tmp_path / "out").config(("cnn", "none"), {"lr": 0.01})
    assert kept.model_options == recipe.run_config("cnn", "none", 0, classes=CLASSES).model_options
    assert kept.model_options != recipe.run_config("cnn", "none", 0).model_options


def test_what_an_older_version_matched_for_ten_goes_on(hundred, tmp_path, monkeypatch):
    plan().save(tmp_path / "out", hundred)
    config = tmp_path / "out/config.toml"
    lines = config.read_text().splitlines()
    config.write_text("\n".join(line for line in lines if not line.startswith("classes")) + "\n")
    assert Plan.load(tmp_path / "out").grid == dataclasses.replace(plan().grid, classes=10)
    old = load_recipe("fair", SMALL).run_config("cnn", "none", 0)
    train(old, hundred, tmp_path / "run", stop_after=1)
    monkeypatch.setattr("tab.cli.train.load_data", lambda *_: hundred)
    sets = [f"--set={key}={value}" for key, value in SMALL.items()]
    words = ["train", "cnn", "none", *sets, "--device=cpu", "--out"]
    for folder, resume in (("run", ["--resume"]), ("new", [])):
        ran = CliRunner().invoke(app, [*words, str(tmp_path / folder), *resume])
        assert ran.exit_code == 0, ran.output
    found = json.loads((tmp_path / "new/run.json").read_text())
    assert found["config"]["model_options"]["hidden"] != old.model_options.hidden
