"""What a watcher of runs is. docs/tracking.md has a small one whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import files
from ..run_config import RunConfig, flat

Value = bool | int | float | str


@dataclass(frozen=True)
class WatchedRun:
    """A run as watchers are told of it.

    name: that of its directory, such as mlp-linear-s0, or in a sweep mlp-linear-c012.
    config: all of its options, resolved (`config.to_dict()`).
    """

    name: str
    config: RunConfig

    @property
    def hparams(self) -> dict[str, Value]:
        """The options by dotted names: model, attention, seed, train.lr, model_options.hidden, …
        What is neither a number nor a text is given as text."""
        options = flat(self.config.to_dict()).items()
        return {k: v if isinstance(v, Value) else str(v) for k, v in options}


class RunWatcher:
    """Told what happens to runs; this one keeps silent. Derive from it and write what you need.

    A class becomes known as `--watch NAME` by an entry point of the group `tab.watchers`. It lives
    in the process of the command, wherever the runs are, and is called by one thread. What it
    raises costs no run: the command says so in a line, and goes on without it.

    Example:
    >>> class Print(RunWatcher):
    ...     def epoch(self, run, row):
    ...         print(run.name, metrics(row)["loss/train"])
    """

    extra = ""  # the extra of TAB that installs what it needs

    @classmethod
    def check(cls) -> None:
        """Called before anything begins: an exception where it cannot work, for instance an
        ImportError where a package is missing. It ends the command."""

    def __init__(self, folder: Path, study: str):
        """folder: where it may write; it is made when first written to. study: the name of the
        directory of results, which groups its runs."""
        self.folder, self.study = folder, study

    @property
    def hint(self) -> str:
        """A line that tells how to look at what it writes; "" for none."""
        return ""

    def begin(self, run: WatchedRun) -> None:
        """A run begins, or goes on: after a stop, or in a sweep in its next rung. Told when its
        first epoch here has ended."""

    def epoch(self, run: WatchedRun, row: dict) -> None:
        """After an epoch, of those that are trained now: `row` is its line of rows.jsonl."""

    def end(self, run: WatchedRun, status: str, summary: dict) -> None:
        """A run that began has ended: "done", "diverged", "failed", or "stopped" where it can be
        resumed. summary: as in run.json, in a sweep the score of its rung; it may be empty."""

    def close(self) -> None:
        """After the last call."""

    def identity(self, run: WatchedRun, make: Callable[[], str]) -> str:
        """By what another program knows this run: `make()` at first, and the same ever after, also
        when the run goes on in another process. Kept in a file, as names may come again elsewhere.
        """
        path = self.folder / f"{run.name}.id"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, make())
        return path.read_text(encoding="utf-8")


def metrics(row: dict) -> dict[str, float]:
    """A row's figures by grouped names: train_loss -> loss/train, seconds -> cost/seconds. What was
    not measured in this epoch is not among them.

    Example:
    >>> metrics({"epoch": 1, "train_loss": 2.5, "test_loss": None, "seconds": 3.0})
    {'loss/train': 2.5, 'cost/seconds': 3.0}
    """
    return {_tag(key): value for key, value in numbers(row).items() if key != "epoch"}


def _tag(column: str) -> str:
    part, _, what = column.rpartition("_")
    if what in ("loss", "accuracy"):
        return f"{what}/{part}"
    return f"cost/{column}" if column != "learning_rate" else column


def numbers(summary: dict) -> dict[str, float]:
    """The entries of a row or summary that are numbers: what was not measured is None."""
    return {key: value for key, value in summary.items() if isinstance(value, int | float)}
