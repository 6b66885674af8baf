"""The grid: its files, what survives a kill, what an exception costs."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from patience import until

from tab import files
from tab.compare.columns import MEASURED, NAMES, RESULTS, SUMMARY
from tab.compare.driver import Watcher, compare
from tab.compare.plan import Grid, Plan
from tab.compare.runs import read_runs
from tab.data.load import load_dataset
from tab.recipe.recipe import load_recipe

SEED_RESULTS = (
    "model_name,architecture,attention_type,epoch,train_loss,train_accuracy,test_loss,"
    "test_accuracy,cumulative_training_time"
)
SEED_SUMMARY = (
    "model_name,architecture,attention_type,final_test_accuracy,max_test_accuracy,"
    "final_train_accuracy,final_train_loss,min_train_loss,total_training_time,num_epochs"
)
TINY = {
    "train.epochs": 2,
    "train.batch_size": 20,
    "data.images": 60,
    "data.validation": 20,
    "model.mlp.hidden": 8,
    "model.mlp.tokens": 4,
    "attention.multi_head.num_heads": 2,
}


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("shapes:100/20")


def plan(**changes) -> Plan:
    grid = Grid("quick", ["mlp"], ["none", "multi_head"], 1, "shapes:100/20", "cpu")
    return Plan(load_recipe("quick", TINY), dataclasses.replace(grid, **changes))


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(out: Path) -> list[list[dict]]:
    """Both CSV files but for what is measured in seconds and bytes."""
    files = ("experiment_results.csv", "experiment_summary.csv")
    return [
        [{key: value for key, value in row.items() if key not in MEASURED} for row in rows(out / f)]
        for f in files
    ]


@pytest.fixture(scope="module")
def unbroken(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "grid"
    it = plan()
    it.save(out, dataset)
    runs = compare(it, dataset, out)
    assert [run.status for run in runs] == ["done", "done"]
    return out


def test_csv_files_begin_with_the_published_columns(unbroken):
    results = (unbroken / "experiment_results.csv").read_text().splitlines()
    summary = (unbroken / "experiment_summary.csv").read_text().splitlines()
    assert results[0].startswith(SEED_RESULTS + ",")
    assert summary[0].startswith(SEED_SUMMARY + ",")
    assert results[0].split(",") == NAMES + RESULTS
    assert summary[0].split(",") == NAMES + [column.name for column in SUMMARY]
    assert len(results) == 1 + 2 * 2
    assert results[1].startswith("MLP - Control,MLP,Control,1,")
    assert summary[2].startswith("MLP - multi_head,MLP,multi_head,")
    last, line = (
        rows(unbroken / "experiment_results.csv")[1],
        rows(unbroken / "experiment_summary.csv")[0],
    )
    assert line["final_test_accuracy"] == last["test_accuracy"] != ""
    assert line["final_validation_accuracy"] == last["validation_accuracy"] != ""
    assert line["accuracy_mean"] == line["final_test_accuracy"]
    assert rows(unbroken / "experiment_summary.csv")[1]["verdict"] == "one seed: no verdict"


def test_environment_and_config_are_enough_to_resume(unbroken, dataset):
    facts = json.loads((unbroken / "environment.json").read_text())
    assert facts["dataset"]["fingerprint"] == dataset.fingerprint
    assert facts["dataset"]["note"] == dataset.note
    assert "reference" in facts["backends"]["linear_fwd"]
    assert Plan.load(unbroken) == plan()


def test_a_finished_grid_trains_nothing_again(unbroken, dataset):
    class Epochs(Watcher):
        seen = 0

        def epoch(self, config, row):
            self.seen += 1

    before, watcher = numbers(unbroken), Epochs()
    compare(Plan.load(unbroken), dataset, unbroken, watcher=watcher)
    assert watcher.seen == 0
    assert numbers(unbroken) == before


def test_killed_and_resumed_equals_unbroken(unbroken, dataset, tmp_path):
    """SIGKILL once the second run has its first epoch on disk: in the middle of the grid."""
    out = tmp_path / "killed"
    plan().save(out, dataset)
    program = (
        "import time; from pathlib import Path\n"
        "from tab.compare.driver import *; from tab.data.load import load_dataset\n"
        f"out = Path({str(out)!r})\n"
        "class Slow(Watcher):\n"
        "    def epoch(self, config, row):\n"
        "        if config.attention != 'none': time.sleep(600)\n"
        "compare(Plan.load(out), load_dataset('shapes:100/20'), out, watcher=Slow())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], env=os.environ)
    waited = out / "runs" / "mlp-multi_head-s0" / "rows.jsonl"
    assert until(lambda: waited.exists() or process.poll() is not None)
    assert process.poll() is None, "the comparison ended by itself"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [run.status for run in read_runs(out, plan().grid)] == ["done", "running"]
    runs = compare(Plan.load(out), dataset, out)
    assert [len(run.rows) for run in runs] == [2, 2]
    assert numbers(out) == numbers(unbroken)


def test_an_exception_ends_its_own_run_only_and_is_tried_again(dataset, tmp_path):
    """Seven heads do not divide eight channels: building the layer fails."""
    broken = Plan(load_recipe("quick", TINY | {"attention.multi_head.num_heads": 7}), plan().grid)
    grid = dataclasses.replace(broken.grid, attentions=["multi_head", "none"])
    broken, out = Plan(broken.recipe, grid), tmp_path / "broken"
    broken.save(out, dataset)
    failed, control = compare(broken, dataset, out)
    assert (failed.status, control.status) == ("failed", "done")
    assert "num_heads=7" in failed.error and "Traceback" in failed.error
    line = rows(out / "experiment_summary.csv")[0]
    assert line["status"] == "failed" and "num_heads=7" in line["error"]
    assert line["final_test_accuracy"] == ""
    assert compare(broken, dataset, out)[0].status == "failed"


def test_a_diverged_run_stays_and_the_grid_goes_on(dataset, tmp_path):
    it, out = Plan(load_recipe("quick", TINY | {"train.lr": 1e30}), plan().grid), tmp_path / "nan"
    it.save(out, dataset)
    assert [run.status for run in compare(it, dataset, out)] == ["diverged", "diverged"]
    assert [line["status"] for line in rows(out / "experiment_summary.csv")] == ["diverged"] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attentions": ["multihead"]}, "multi_head"),
        ({"models": ["mpl"]}, "mlp"),
        ({"attentions": ["none", "none"]}, "each name once"),
        ({"models": []}, "each name once"),
        ({"seeds": 0}, "at least one"),
        ({"seeds": 3, "control_seeds": 2}, "control_seeds = 2: .* at least 3"),
        ({"attentions": ["self"], "control_seeds": 5}, "control_seeds = 5: .* with none"),
    ],
)
def test_bad_grids_are_refused_before_anything_is_written(changes, message, dataset, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan(**changes).save(tmp_path / "out", dataset)
    assert not (tmp_path / "out").exists()


def test_data_too_small_for_the_recipe_is_refused_before_anything_is_written(dataset, tmp_path):
    it = Plan(load_recipe("quick", TINY | {"data.validation": 500}), plan().grid)
    with pytest.raises(ValueError, match="500"):
        it.save(tmp_path / "out", dataset)
    assert not (tmp_path / "out").exists()


def test_a_directory_in_use_or_of_something_else_is_refused(unbroken, dataset, tmp_path):
    with pytest.raises(ValueError, match="already holds"):
        plan().save(unbroken, dataset)
    with pytest.raises(ValueError, match=r"no config\.toml"):
        Plan.load(tmp_path)
    (tmp_path / "config.toml").write_text(load_recipe("quick").to_toml())
    with pytest.raises(ValueError, match="no \\[grid\\]"):
        Plan.load(tmp_path)


def test_two_processes_do_not_share_a_directory(unbroken, dataset):
    with files.locked(unbroken), pytest.raises(ValueError, match="in use"):
        compare(plan(), dataset, unbroken)


def test_seeds_are_the_outer_loop():
    cells = Grid("quick", ["mlp", "cnn"], ["none", "self"], 2, "shapes", "cpu").cells()
    assert cells[:3] == [("mlp", "none", 0), ("cnn", "none", 0), ("mlp", "self", 0)]
    assert cells[4] == ("mlp", "none", 1) and len(cells) == 8


def test_an_ended_run_of_another_comparison_is_not_taken_for_this_ones(unbroken, dataset, tmp_path):
    """It ended with numbers, which once stood in the table without a word."""
    other, out = Plan(load_recipe("quick", TINY | {"train.lr": 0.5}), plan().grid), tmp_path / "a"
    other.save(out, dataset)
    shutil.copytree(unbroken / "runs", out / "runs")
    with pytest.raises(ValueError, match=r"mlp-none-s0 is another one: train.lr was .* is 0.5"):
        compare(other, dataset, out)


def test_a_comparison_goes_on_with_its_own_data_only(unbroken):
    with pytest.raises(ValueError, match=r"made with shapes:100/20 \(\w+\), not with shapes:50/20"):
        compare(plan(), load_dataset("shapes:50/20"), unbroken)
