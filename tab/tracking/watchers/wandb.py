"""Weights & Biases: a study is a group, a run of it a run. WANDB_MODE, WANDB_PROJECT and all other
variables of W&B hold."""

from __future__ import annotations

import os
import secrets
import shlex
from pathlib import Path
from typing import Any

from ..watcher import RunWatcher, WatchedRun, metrics, numbers


class WandB(RunWatcher):
    """A run that goes on keeps its identity, and so its page."""

    extra = "wandb"

    @classmethod
    def check(cls) -> None:
        import wandb

        if wandb.setup().settings.mode != "online":
            return
        try:
            wandb.login()
        except wandb.errors.UsageError as error:
            raise ValueError(
                f"--watch wandb: {error} Or set WANDB_MODE=offline, and send the runs later with "
                "wandb sync"
            ) from error

    def __init__(self, folder: Path, study: str):
        super().__init__(folder, study)
        self.runs: dict[str, Any] = {}

    @property
    def hint(self) -> str:
        import wandb

        if wandb.setup().settings.mode == "offline":
            return f"To send later: wandb sync {shlex.quote(str(self.folder / 'wandb'))}/offline-*"
        return ""

    def begin(self, run: WatchedRun) -> None:
        import wandb

        self.folder.mkdir(parents=True, exist_ok=True)
        self.runs[run.name] = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tab"),
            group=os.environ.get("WANDB_RUN_GROUP", self.study),
            name=run.name,
            id=self.identity(run, lambda: secrets.token_hex(6)),
            resume="allow",
            config=run.config.to_dict(),
            dir=str(self.folder),
            reinit="create_new",  # several runs are open at once
            settings=wandb.Settings(console="off", silent=True),
        )
        self.runs[run.name].define_metric("*", step_metric="epoch")

    def epoch(self, run: WatchedRun, row: dict) -> None:
        self.runs[run.name].log({"epoch": row["epoch"], **metrics(row)})

    def end(self, run: WatchedRun, status: str, summary: dict) -> None:
        open_run = self.runs.pop(run.name)
        open_run.summary.update({"status": status, "summary": numbers(summary)})
        open_run.finish(exit_code=0 if status == "done" else 1)


watcher = WandB
