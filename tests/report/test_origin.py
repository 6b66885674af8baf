"""The report says what it was made with: command, overrides, data, dates, load; and which times
other work decided."""

import csv
import json
import shutil

import pytest
import small_grid

from tab.compare.csv_files import write_csvs
from tab.compare.runs import Run, read_runs
from tab.data.load import load_dataset
from tab.recipe.recipe import load_recipe
from tab.report import markdown, origin
from tab.report.build import write_report
from tab.report.tables import ranking
from tab.train.facts import made_with


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("shapes:100/20")


@pytest.fixture(scope="module")
def out(dataset, tmp_path_factory):
    out = small_grid.begin(tmp_path_factory.mktemp("origin") / "out", dataset)
    small_grid.resume(out, dataset)
    return out


def test_a_comparison_keeps_how_it_was_made(out, dataset):
    facts = made_with(out, dataset)
    assert facts["overrides"] == small_grid.SMALL and facts["command"]
    counts = {key: facts["dataset"][key] for key in ("train", "validation", "test", "classes")}
    assert counts == {"train": 60, "validation": 20, "test": 20, "classes": len(dataset.classes)}
    (time,) = facts["times"]
    assert time["started"] <= time["ended"] and time["command"] == facts["command"]
    assert {"load", "load_at_end"} <= time.keys()
    runs = read_runs(out, small_grid.GRID)
    assert all(run.load is not None for run in runs)
    text = "\n\n".join(origin.origin(facts, runs))
    assert "trained on 60 images, validated on 20, tested on 20" in text
    assert dataset.fingerprint[:12] in text and "train.batch_size = 20" in text
    assert f"{time['started']} to {time['ended']}" in text and "load average" in text


def test_each_time_that_somebody_worked_on_it_is_kept(out, dataset):
    small_grid.resume(out, dataset)
    facts = made_with(out, dataset)
    assert len(facts["times"]) == 2 and facts["overrides"] == small_grid.SMALL
    path = out / "environment.json"
    del facts["times"][1]["ended"]  # as after a kill
    path.write_text(json.dumps(facts))
    assert "to a kill" in "\n".join(origin.origin(made_with(out, dataset), []))


def test_a_comparison_of_before_says_what_it_knows(out, dataset):
    facts = made_with(out, dataset)
    old = {k: v for k, v in facts.items() if k not in ("command", "overrides", "times")}
    old["dataset"] = {k: facts["dataset"][k] for k in ("name", "note", "fingerprint")}
    assert origin.origin(old, []) == [f"**Data:** {dataset.note}"]


def test_overrides_are_those_of_the_call():
    changes = {"train.lr": 0.5}
    assert load_recipe("quick", changes).overrides == changes
    assert load_recipe("quick", changes) == load_recipe("quick", changes | {"train.lr": 0.5})


# --- times ----------------------------------------------------------------------------------------


def run(attention, seed, seconds, tmp_path):
    summary = {"final_test_accuracy": 0.5, "total_training_time": seconds,
               "images_per_second": 9.0, "num_epochs": 1}  # fmt: skip
    path = tmp_path / f"cnn-{attention}-s{seed}"
    return Run("cnn", attention, seed, path, "done", summary=summary, load=0.5)


def test_times_that_seeds_do_not_share_are_marked(tmp_path):
    times = {"none": (10.0, 12.0), "self": (20.0, 31.0), "local": (10.0, 15.0)}
    runs = [run(a, s, x, tmp_path) for a, mine in times.items() for s, x in enumerate(mine)]
    runs.append(run("flex", 0, 10.0, tmp_path))
    write_csvs(tmp_path, runs)
    with (tmp_path / "experiment_summary.csv").open(newline="") as file:
        lines = {(x["attention_type"], x["seed"]): x for x in csv.DictReader(file)}
    marked = {key[0]: line["time_disturbed"] for key, line in lines.items()}
    assert marked == {"Control": "False", "self": "True", "local": "False", "flex": ""}
    assert lines["self", "0"]["load_average"] == "0.5"
    assert (lines["self", "1"]["time_spread"], lines["flex", "0"]["time_spread"]) == ("1.55", "")
    entries = ranking(runs, "cnn")
    text = "\n".join([markdown.markdown_table(entries), markdown.disturbance(entries)])
    assert "| 26 (20–31) \\* |" in text and "| 11 (10–12) |" in text
    assert "more than 1.5 times" in text and "Here: Self-Attention." in text
    said = "to 1.12× (Local); that leaves out Self-Attention, as other work decided the times."
    assert said in markdown.summary("cnn", entries)
    assert markdown.disturbance(ranking(runs[:2], "cnn")) == ""


def test_a_report_of_figures_alone(out, dataset, tmp_path):
    """What is handed on without its weights still reports, and says what that costs."""
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    (first, *others) = sorted(copy.glob("runs/*/model.safetensors"))
    count = len(others) + 1
    for lost, paths in ((1, [first]), (count, others)):
        for path in paths:
            path.unlink()
        text = write_report(copy, dataset).read_text(encoding="utf-8")
        assert f"**Without weights:** the model.safetensors of {lost} of {count} runs" in text
    assert "Without weights" not in write_report(out, dataset).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name, title", [("folder:cars", "the pictures in cars"), ("cifar10", "cifar10")]
)
def test_the_title_says_pictures_in_a_folder_as_one_does(name, title):
    assert markdown.data_title(name) == title
