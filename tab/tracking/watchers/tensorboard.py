"""TensorBoard: each run's rows as scalars, its config as text, its options and end as hparams."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from ..watcher import RunWatcher, WatchedRun, metrics, numbers


class TensorBoard(RunWatcher):
    """Writes to folder/<run>. A run that goes on does so in a new event file; epochs from before
    are not written again."""

    extra = "tensorboard"

    @classmethod
    def check(cls) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    def __init__(self, folder: Path, study: str):
        super().__init__(folder, study)
        self.writers: dict[str, Any] = {}

    @property
    def hint(self) -> str:
        return f"To watch: tensorboard --logdir {shlex.quote(str(self.folder))}"

    def begin(self, run: WatchedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = self.writers[run.name] = SummaryWriter(str(self.folder / run.name))
        text = json.dumps(run.config.to_dict(), indent=4)
        writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))

    def epoch(self, run: WatchedRun, row: dict) -> None:
        writer = self.writers[run.name]
        for tag, value in metrics(row).items():
            writer.add_scalar(tag, value, row["epoch"])
        writer.flush()  # to be seen now, and not lost by a kill

    def end(self, run: WatchedRun, status: str, summary: dict) -> None:
        from torch.utils.tensorboard.summary import hparams

        writer, final = self.writers.pop(run.name), {}
        for key, value in numbers(summary).items():
            final[f"summary/{key}"] = value
            writer.add_scalar(f"summary/{key}", value, summary.get("num_epochs"))
        # Not writer.add_hparams, which opens a second run for them.
        for part in hparams({**run.hparams, "status": status}, final):
            writer.file_writer.add_summary(part)
        writer.close()


watcher = TensorBoard
