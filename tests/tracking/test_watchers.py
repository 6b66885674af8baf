"""Watchers of runs: what they are told, by every command, and that none of them costs a run."""

import doctest
import json
import re
import shlex
import signal
from importlib.metadata import EntryPoint

import pytest
from paths import ROOT
from small_cli import SMALL, flat, tab

from tab.recipe.recipe import load_recipe
from tab.tracking import RunWatcher, Watchers, check, metrics, names
from tab.tracking import group as module
from tab.tracking import watcher as interface

GRID = ("compare", "--models", "mlp", "--attentions", "none,multi_head", *SMALL)
TRAIN = ("train", "mlp", "none", *SMALL)


class Diary(RunWatcher):
    """Notes each call; raises in those that `fails` names."""

    calls: list = []  # noqa: RUF012
    fails: tuple = ()

    def note(self, what, *said):
        Diary.calls.append((what, *said))
        if what in Diary.fails:
            raise OSError(f"no way\nto {what}")

    def begin(self, run):
        self.note("begin", run.name)

    def epoch(self, run, row):
        self.note("epoch", run.name, row["epoch"])

    def end(self, run, status, summary):
        self.note("end", run.name, status, summary)

    def close(self):
        self.note("close")


@pytest.fixture(autouse=True)
def diary(monkeypatch):
    """As if a package had declared it."""
    point = EntryPoint("diary", "test_watchers:Diary", "tab.watchers")
    monkeypatch.setattr(EntryPoint, "load", lambda point: Diary)
    monkeypatch.setattr(module, "_entry_points", lambda: [point])
    Diary.calls, Diary.fails = [], ()
    return Diary


def told(name: str) -> list:
    return [call for call in Diary.calls if call[1:2] == (name,)]


def test_what_a_comparison_tells(tmp_path):
    out = tmp_path / "out"
    words = ("--epochs", 2, "--out", out, "--watch", "diary")
    assert tab(*GRID, *words).exit_code == 0
    for name in ("mlp-none-s0", "mlp-multi_head-s0"):
        summary = json.loads((out / "runs" / name / "run.json").read_text())["summary"]
        epochs = [("epoch", name, 1), ("epoch", name, 2)]
        assert told(name) == [("begin", name), *epochs, ("end", name, "done", summary)]
    assert Diary.calls.count(("close",)) == 1
    Diary.calls.clear()
    assert tab("compare", "--resume", out, "--watch", "diary").exit_code == 0
    assert Diary.calls == [("close",)]  # what had ended is not told again


def test_what_a_sweep_tells(tmp_path):
    pytest.importorskip("optuna")
    sizes = ["--images", 60, "--validation", 20, "--configurations", 2, "--epochs", "1,2"]
    chosen = ["--models", "mlp", "--attentions", "none", "--eta", 2, "--data", "shapes:100/20"]
    how = ["--recipe", "quick", "--space", "small", "--device", "cpu", "--out", tmp_path / "s"]
    how += ["--set", "train.batch_size=20"]
    ran = tab("sweep", *chosen, *sizes, *how, "--watch", "diary")
    assert ran.exit_code == 0, ran.output
    by_run = {call[1] for call in Diary.calls if len(call) > 1}
    assert by_run == {"mlp-none-c000", "mlp-none-c001"}
    whole = [n for n in by_run if [c[0] for c in told(n)] == ["begin", "epoch", "end"] * 2]
    assert len(whole) == 1  # one went on, to the second rung
    last = told(whole[0])[-1]
    assert last[2] == "done" and last[3]["rung"] == 2 and last[3]["num_epochs"] == 2
    assert 0 <= last[3]["validation_accuracy"] <= 1


def test_what_train_tells(tmp_path):
    assert tab(*TRAIN, "--out", tmp_path / "run", "--watch", "diary").exit_code == 0
    assert [call[0] for call in Diary.calls] == ["begin", "epoch", "end", "close"]


@pytest.mark.parametrize(
    ("fails", "command"), [("begin", TRAIN), ("epoch", GRID), ("epoch", TRAIN), ("end", TRAIN)]
)
def test_a_watcher_that_raises_costs_no_run(fails, command, tmp_path):
    Diary.fails = (fails, "close")
    ran = tab(*command, "--out", tmp_path / "out", "--watch", "diary")
    assert ran.exit_code == 0, ran.output
    line = f"--watch diary stopped (OSError: no way to {fails}); the runs go on without it"
    assert flat(ran.stderr).count(line) == 1 and "Traceback" not in ran.stderr
    runs = list((tmp_path / "out").rglob("run.json"))
    assert [json.loads(run.read_text())["status"] for run in runs] == ["done"] * len(runs) != []
    called = [call[0] for call in Diary.calls]
    assert called[-2:] == [fails, "close"] and called.count(fails) == 1  # then left alone


def test_another_watcher_is_told_all_the_same(tmp_path):
    class Broken(RunWatcher):
        def begin(self, run):
            raise ValueError

    config, said = load_recipe("quick").run_config("mlp", "none", 0), []
    kinds = {"broken": Broken, "diary": Diary}
    with Watchers(kinds, tmp_path, say=said.append) as group:
        group.epoch(config.id, config, {"epoch": 1})
    called = [call[0] for call in Diary.calls]
    assert called == ["begin", "epoch", "end", "close"] and Diary.calls[2][2] == "stopped"
    assert said == [
        "--watch broken stopped (ValueError: no reason given); the runs go on without it"
    ]


def test_control_c_ends_the_runs_as_stopped_and_the_hint_names_the_watcher(tmp_path, monkeypatch):
    def interrupted(self, run, row):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Diary, "epoch", interrupted)
    ran = tab(*GRID, "--out", tmp_path / "out", "--watch", "diary")
    assert ran.exit_code == 130
    again = ["tab", "compare", "--resume", str(tmp_path / "out"), "--watch=diary"]
    assert f"go on with: {shlex.join(again)}" in flat(ran.stderr)
    assert Diary.calls[-2:] == [("end", "mlp-none-s0", "stopped", {}), ("close",)]


def test_unknown_names_and_foreign_classes_are_refused(tmp_path, monkeypatch):
    assert names() == ["mlflow", "tensorboard", "wandb", "diary"]
    ran = tab(*GRID, "--out", tmp_path / "out", "--watch", "tensorbord")
    assert ran.exit_code == 2 and "tensorboard" in ran.stderr
    monkeypatch.setattr(EntryPoint, "load", lambda point: dict)
    with pytest.raises(TypeError, match=r"diary is no tab\.tracking\.RunWatcher"):
        check(["diary"])
    assert not (tmp_path / "out").exists()


def test_figures_by_groups():
    row = {"epoch": 3, "train_loss": 0.5, "test_accuracy": None, "seconds": 2.0}
    assert metrics({**row, "learning_rate": 0.1}) == {
        "loss/train": 0.5,
        "cost/seconds": 2.0,
        "learning_rate": 0.1,
    }


def test_a_run_that_fails_before_its_first_epoch_is_told_of(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no")

    monkeypatch.setattr("tab.compare.driver.train", fail)
    assert tab(*GRID, "--out", tmp_path / "out", "--watch", "diary").exit_code == 1
    assert told("mlp-none-s0") == [("begin", "mlp-none-s0"), ("end", "mlp-none-s0", "failed", {})]


def test_examples_run():
    ran = doctest.testmod(interface)
    assert ran.attempted and not ran.failed


def test_the_watcher_in_the_documentation(tmp_path):
    text = (ROOT / "docs/tracking.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(code, space := {})
    config = load_recipe("quick").run_config("mlp", "none", 0)
    with Watchers({"lines": space["Lines"]}, tmp_path, say=pytest.fail) as told:
        told.epoch(config.id, config, {"epoch": 1, "train_loss": 2.0, "test_loss": None})
        told.end(config.id, "done", {"final_test_accuracy": 0.5, "status": "done"})
    lines = (tmp_path / "lines/lines.jsonl").read_text().splitlines()
    first, last = map(json.loads, lines)
    assert first == {"run": "mlp-none-s0", "epoch": 1, "loss/train": 2.0}
    assert last["final_test_accuracy"] == 0.5 and last["train.lr"] == config.train.lr
