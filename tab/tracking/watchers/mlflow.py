"""MLflow: a study is an experiment. MLFLOW_TRACKING_URI says where; by default it is a database in
the directory of results."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import Any

from ..watcher import RunWatcher, WatchedRun, metrics, numbers

STATUS = {"done": "FINISHED", "stopped": "KILLED"}  # what ended otherwise has failed


class MLflow(RunWatcher):
    """A run that goes on keeps its identity, and so its page."""

    extra = "mlflow"

    @classmethod
    def check(cls) -> None:
        import alembic  # noqa: F401  # what a database needs, and mlflow-skinny does not bring
        import mlflow  # noqa: F401
        import sqlalchemy  # noqa: F401

    def __init__(self, folder: Path, study: str):
        super().__init__(folder, study)
        default = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        self.uri = os.environ.get("MLFLOW_TRACKING_URI", default)
        self.client: Any = None
        self.runs: dict[str, str] = {}

    @property
    def hint(self) -> str:
        return f"To watch: mlflow ui --backend-store-uri {shlex.quote(self.uri)}"

    def begin(self, run: WatchedRun) -> None:
        if self.client is None:
            self._connect()
        self.runs[run.name] = self.identity(run, lambda: self._create(run))
        self.client.update_run(self.runs[run.name], status="RUNNING")

    def _connect(self) -> None:
        from mlflow import MlflowClient

        self.folder.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(tracking_uri=self.uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", self.study)
        found = self.client.get_experiment_by_name(name)
        self.experiment = found.experiment_id if found else self.client.create_experiment(name)

    def _create(self, run: WatchedRun) -> str:
        from mlflow.entities import Param

        made = self.client.create_run(self.experiment, run_name=run.name).info.run_id
        options = [Param(key, str(value)) for key, value in run.hparams.items()]
        self.client.log_batch(made, params=options)
        return made

    def epoch(self, run: WatchedRun, row: dict) -> None:
        self._log(run, metrics(row), row["epoch"])

    def end(self, run: WatchedRun, status: str, summary: dict) -> None:
        figures = {f"summary/{key}": value for key, value in numbers(summary).items()}
        self._log(run, figures, summary.get("num_epochs") or 0)
        name = self.runs.pop(run.name)
        self.client.set_tag(name, "tab.status", status)
        self.client.set_terminated(name, STATUS.get(status, "FAILED"))

    def _log(self, run: WatchedRun, figures: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(key, value, now, step) for key, value in figures.items()]
        self.client.log_batch(self.runs[run.name], metrics=points)


watcher = MLflow
