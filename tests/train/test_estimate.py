"""The time that is said before work: each variant counts by how often it is trained."""

import dataclasses
import random
import time
from types import SimpleNamespace

import pytest
import torch
from small_cli import SMALL, tab

from tab.cli.expected import duration
from tab.data.load import load_dataset
from tab.recipe.recipe import load_recipe
from tab.sweep.halving import named_budget
from tab.sweep.plan import SweepPlan
from tab.sweep.space import Range, by_chance, load_space
from tab.train import estimate as module
from tab.train.estimate import estimate, run_seconds

SMALL_RECIPE = {
    **{"data.images": 60, "data.validation": 20, "train.batch_size": 20, "train.epochs": 3},
    **{"model.mlp.hidden": 8, "model.mlp.tokens": 4, "model.mlp.match": ""},
}


@pytest.fixture(scope="module")
def configs():
    recipe = load_recipe("quick", SMALL_RECIPE)
    return {name: recipe.run_config("mlp", name, 0) for name in ("none", "linear")}


@pytest.fixture(scope="module")
def data():
    return load_dataset("shapes:100/20")


def test_variants_are_measured_once_and_counted_by_their_runs(configs, data, monkeypatch):
    seconds = {"none": 2.0, "linear": 3.0}
    monkeypatch.setattr(module, "run_seconds", lambda config, *_: seconds[config.attention])
    runs = [(config, share) for config in configs.values() for share in (1.0, 0.5)]
    found = estimate(runs, data, "cpu")
    assert found == module.Estimate(1.5 * 2 + 1.5 * 3, 2, 2)
    # Where time is up, or a variant fails, the others stand in for it, and it is not counted.
    assert estimate(runs, data, "cpu", limit=-1) == module.Estimate(3 * 2.0, 1, 2)
    del seconds["none"]
    assert estimate(runs, data, "cpu") == module.Estimate(3 * 3.0, 1, 2)


def test_a_run_is_its_steps_and_its_scores(configs, data, monkeypatch):
    """In each of 3 epochs the steps, and the batches held out; the test set once, or each time."""
    calls = []
    monkeypatch.setattr(module, "_second", lambda call: (calls.append(call()), 1.0)[1])
    config = configs["linear"]
    parts = module.split_batches(config, data, torch.device("cpu"))
    learnt, held, test = map(len, parts)
    assert learnt > 1
    once = run_seconds(config, data, torch.device("cpu"), parts)
    assert once == 3 * learnt + 3 * held + test
    assert len(calls) == 2
    every = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, split="test"))
    assert run_seconds(every, data, torch.device("cpu"), parts) == 3 * (learnt + held + test)


def test_measuring_moves_no_random_number(configs, data):
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    estimate([(config, 1.0) for config in configs.values()], data, "cpu")
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.2, "1 s"), (89, "89 s"), (100, "2 min"), (3600, "60 min"), (12_000, "3 h 20 min")),
        *((36 * 3600 - 60, "35 h 59 min"), (52 * 3600, "2 d 4 h")),
    ],
)
def test_durations_read_as_one_says_them(seconds, text):
    assert duration(seconds) == text


def test_commands_say_it_before_they_work_and_not_when_nothing_is_left(tmp_path, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: 0.0, perf_counter=time.perf_counter)
    monkeypatch.setattr(module, "time", clock)  # there is time for all variants
    words = ("compare", "--models", "mlp", "--attentions", "none,linear")
    out = tmp_path / "out"
    text = tab(*words, *SMALL, "--out", out).stdout
    said = "one step of each variant was timed."
    assert text.index(f"{out}: 2 runs on ") < text.index(said) < text.index("epoch 1/1")
    assert said not in tab("compare", "--resume", out).stdout
    said = tab("train", "mlp", "none", *SMALL, "--out", tmp_path / "run").stdout
    assert "s: one step was timed." in said


def test_a_sweep_is_as_long_as_the_configurations_of_its_space():
    """Widths of a space differ tenfold: the recipe's own width says little."""
    plan = SweepPlan(
        recipe=load_recipe("quick", SMALL_RECIPE),
        space=load_space("published"),
        budget=named_budget("quick"),
        models=["mlp"],
        attentions=["linear"],
        data="shapes",
        device="cpu",
        seed=0,
    )
    found = plan.samples(("mlp", "linear"), 3)
    widths = {config.model_options.hidden for config in found}
    assert len(found) == 3 and len(widths) > 1 and SMALL_RECIPE["model.mlp.hidden"] not in widths
    assert plan.samples(("mlp", "linear"), 3) == found
    assert 1e-3 <= next(by_chance(Range(1e-3, 1e-1, log=True), random.Random(1))) <= 1e-1
    assert next(by_chance(Range(2, 4), random.Random(1))) in (2, 3, 4)
