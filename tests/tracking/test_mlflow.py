"""--watch mlflow, in a database in the directory of results."""

import json
import sys

import pytest
from small_cli import SMALL, flat, tab

from tab.recipe.recipe import load_recipe
from tab.tracking import Watchers, check

NAME = "mlp-none-s0"


@pytest.fixture(scope="module")
def mlflow():
    pytest.importorskip("alembic")
    return pytest.importorskip("mlflow")


@pytest.fixture
def store(mlflow, tmp_path, monkeypatch):
    """Where MLFLOW_TRACKING_URI leads."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return mlflow.MlflowClient(tracking_uri=uri)


def test_a_run_is_logged_and_goes_on_as_the_same(store, tmp_path, mlflow):
    """Two of its epochs from a first process, as it were, the rest from another."""
    out = tmp_path / "study"
    words = ("train", "mlp", "none", *SMALL, "--epochs", 2, "--out", out / NAME)
    assert tab(*words).exit_code == 0
    rows = [json.loads(line) for line in (out / NAME / "rows.jsonl").read_text().splitlines()]
    about = json.loads((out / NAME / "run.json").read_text())
    config, kinds = load_recipe("quick").run_config("mlp", "none", 0), check(["mlflow"])
    with Watchers(kinds, out) as told:
        told.epoch(NAME, config, rows[0])
    experiment = store.get_experiment_by_name("study")
    (run,) = store.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED" and run.data.tags["tab.status"] == "stopped"
    with Watchers(kinds, out) as told:
        told.epoch(NAME, config, rows[1])
        told.end(NAME, "done", about["summary"])
    (run,) = store.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == NAME
    assert run.data.params["train.lr"] == str(config.train.lr)
    assert run.data.params["model_options.hidden"] == str(config.model_options.hidden)
    losses = store.get_metric_history(run.info.run_id, "loss/train")
    wanted = [(row["epoch"], row["train_loss"]) for row in rows]
    assert sorted((metric.step, metric.value) for metric in losses) == wanted
    accuracy = about["summary"]["final_test_accuracy"]
    assert run.data.metrics["summary/final_test_accuracy"] == accuracy


def test_by_default_the_database_lies_with_the_results(mlflow, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (watcher,) = Watchers(check(["mlflow"]), tmp_path).watchers.values()
    assert watcher.uri == f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}"
    assert "mlflow ui" in watcher.hint and not (tmp_path / "mlflow").exists()


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    ran = tab("train", "mlp", "none", *SMALL, "--out", tmp_path / "run", "--watch", "mlflow")
    assert ran.exit_code == 2 and "transformer-attention-bench[mlflow]" in flat(ran.output)
    assert not (tmp_path / "run").exists()
