"""TensorBoard: the rows of each run as scalars, written while it trains. Needs the extra
`tensorboard`."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..compare.driver import Watcher
from ..compare.runs import Run
from ..run_config import RunConfig


class Board(Watcher):
    """Writes what `shown` is told to `folder`/<run>, for `tensorboard --logdir folder`.

    A resumed run goes on in a new event file; epochs from before are not written again.
    """

    def __init__(self, folder: Path, shown: Watcher | None = None):
        self.folder, self.shown = folder, shown or Watcher()
        self.open, self.writers = summary_writer(), {}

    @property
    def hint(self) -> str:
        return f"To watch: tensorboard --logdir {shlex.quote(str(self.folder))}"

    def start(self, runs: int, epochs: int) -> None:
        self.shown.start(runs, epochs)

    def begin(self, config: RunConfig) -> None:
        self.shown.begin(config)

    def epoch(self, config: RunConfig, row: dict) -> None:
        if config.id not in self.writers:
            self.writers[config.id] = self.open(str(self.folder / config.id))
        writer = self.writers[config.id]
        for key, value in row.items():
            if key != "epoch" and value is not None:
                writer.add_scalar(tag(key), value, row["epoch"])
        writer.flush()  # to be seen now, and not lost by a kill
        self.shown.epoch(config, row)

    def end(self, run: Run) -> None:
        if run.id in self.writers:
            self.writers.pop(run.id).close()
        self.shown.end(run)


def summary_writer() -> type:
    """torch's SummaryWriter; an ImportError that names the extra if TensorBoard is not there."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"--tensorboard needs TensorBoard ({error}): "
            'pip install "transformer-attention-bench[tensorboard]"'
        ) from error
    return SummaryWriter


def tag(column: str) -> str:
    """A column of the rows under its group: train_loss -> loss/train, seconds -> cost/seconds."""
    part, _, what = column.rpartition("_")
    if what in ("loss", "accuracy"):
        return f"{what}/{part}"
    return f"cost/{column}" if column != "learning_rate" else column
