"""Comparisons that train several seeds at once: groups, kills, and what the command says."""

import csv
import dataclasses
import os
import signal

import pytest
from small_training import TIMES
from tasks import children
from typer.testing import CliRunner

from tab.cli.main import app
from tab.compare.driver import Watcher, compare
from tab.compare.plan import Grid, Plan
from tab.data.load import load_dataset
from tab.recipe.recipe import load_recipe
from tab.tasks.processes import Processes

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = Grid("quick", ["mlp"], ["none", "linear"], 3, "shapes:100/20", "cpu", batch_seeds=2)
TINY = {
    **{"train.epochs": 2, "train.batch_size": 20, "data.images": 60, "data.validation": 20},
    **{"model.mlp.hidden": 8, "model.mlp.tokens": 4, "attention.linear.num_heads": 2},
}


def numbers(outcome):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in outcome.rows]


def test_groups_are_consecutive_seeds_and_cover_the_grid():
    groups = GRID.groups()
    assert [[s for _, _, s in group] for group in groups] == [[0, 1], [0, 1], [2], [2]]
    assert sorted(cell for group in groups for cell in group) == sorted(GRID.cells())
    assert dataclasses.replace(GRID, batch_seeds=1).groups() == [[c] for c in GRID.cells()]


def test_compare_trains_groups_and_resumes(tmp_path):
    data = load_dataset(GRID.data)
    out = tmp_path / "grid"
    Plan(load_recipe("quick", TINY), GRID).save(out, data)
    runs = compare(Plan.load(out), data, out)
    assert [run.status for run in runs] == ["done"] * 6
    assert [run.rows[0]["seeds_at_once"] for run in runs] == [2, 2, 2, 2, 1, 1]
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/model.safetensors")}
    compare(Plan.load(out), data, out)
    assert stamps == {
        path: path.stat().st_mtime_ns for path in out.glob("runs/*/model.safetensors")
    }


def test_a_killed_process_costs_the_group_nothing(tmp_path):
    """SIGKILL after a seed's first epoch: the group goes on in another process, bit for bit."""
    data, killed, epochs = load_dataset(GRID.data), [], []

    class Kill(Watcher):
        def epoch(self, config, row):
            epochs.append((config.id, row["epoch"]))
            if not killed:
                killed.append(children(os.getpid())[0])
                os.kill(killed[0], signal.SIGKILL)

    plan = Plan(load_recipe("quick", TINY | {"train.epochs": 6}), GRID)
    for name in ("whole", "killed"):
        plan.save(tmp_path / name, data)
    whole = compare(plan, data, tmp_path / "whole")
    where = Processes(1, 1)
    runs = compare(plan, data, tmp_path / "killed", watcher=Kill(), executor=where)
    assert killed and {"mlp-none-s1"} <= {name for name, _ in epochs}
    for a, b in zip(whole, runs, strict=True):
        assert numbers(a) == numbers(b) and b.status == "done"
        assert (a.path / "model.safetensors").read_bytes() == (
            b.path / "model.safetensors"
        ).read_bytes()


def test_the_command_says_that_times_are_shares(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["compare", "--data", GRID.data, "--models", "mlp", "--attentions", "none,linear"]
    words += ["--recipe", "quick", "--seeds", "2", "--batch-seeds", "2"]
    words += [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(app, [*words, "--out", "out"])
    assert result.exit_code == 0, result.output
    assert "2 seeds of a mechanism were trained at once" in (tmp_path / "out/report.md").read_text()
    with (tmp_path / "out/experiment_summary.csv").open(newline="") as file:
        assert [line["seeds_at_once"] for line in csv.DictReader(file)] == ["2"] * 4
    result = CliRunner().invoke(app, ["compare", "--resume", "out", "--batch-seeds", "1"])
    assert result.exit_code == 2 and "--batch-seeds: was 2, now 1" in result.output
