"""The columns of a comparison: of its CSV files, and with them of the report.

A metric is one entry of SUMMARY. Its column stands in experiment_summary.csv; with a title it also
stands in the tables of report.md and report.html, averaged over seeds as it says:

    Column("best_epoch", lambda run: ..., title="Best epoch", unit="number", over="median")

A value is a function of the run as it lies on disk (`Run`: its rows, its summary, its files), so
that a report of older results has it too. What only training can measure stands in the summary that
training writes (`TrainingRun.outcome`), and a column without a function reads it from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from ..train.training_run import ROW
from .disturbance import slowdown
from .runs import Run
from .verdicts import COLUMNS as OF_VERDICT

Unit = Literal["percent", "seconds", "count", "bytes", "number"]
Over = Literal["mean", "median", "any"]
Better = Literal["", "more", "less"]


@dataclass(frozen=True)
class Column:
    """One column of experiment_summary.csv."""

    name: str
    value: Callable[[Run], object] | None = None  # None: what the run's summary has by that name
    title: str = ""  # its heading in tables; "": it stands in the CSV file alone
    unit: Unit = "number"
    over: Over = "mean"  # of the seeds; any: all have the same
    lead: bool = False  # it stands beside the verdict, and not in the table of costs
    better: Better = ""  # which way is: an arrow in its heading
    on_cpu: bool = True  # False: there it is the whole process's, so that tables leave it out
    measured: bool = False  # it differs between two equal runs: a time, or what follows from one
    group: bool = False  # of the mechanism over its seeds, and the same in the line of each

    def __post_init__(self):
        for key, kind in (("unit", Unit), ("over", Over), ("better", Better)):
            if getattr(self, key) not in get_args(kind):
                given, known = getattr(self, key), ", ".join(get_args(kind))
                raise ValueError(f"column {self.name}: {key} = {given!r}: give one of {known}")

    def of(self, run: Run) -> object:
        return self.value(run) if self.value else run.summary.get(self.name)


def last(rows: list[dict], key: str):
    """The latest measured value of a column of the rows, or None."""
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


# The first columns of both files are those of the published study, in its order.
NAMES = ["model_name", "architecture", "attention_type"]
SUMMARY = [
    Column("final_test_accuracy"),  # in tables it is the mean that verdicts speak of
    Column("max_test_accuracy"),
    Column("final_train_accuracy", title="Train acc.", unit="percent", lead=True, better="more"),
    Column("final_train_loss"),
    Column("min_train_loss"),
    Column(
        "total_training_time",
        title="Train time",
        unit="seconds",
        over="median",
        lead=True,
        better="less",
        measured=True,
    ),
    Column("num_epochs"),
    Column("seed", lambda run: run.seed),
    Column("status", lambda run: run.status),
    Column(
        "images_per_second",
        title="Images/s",
        unit="count",
        over="median",
        better="more",
        measured=True,
    ),
    Column("parameters", title="Parameters", unit="count", over="any"),
    Column("attention_parameters"),
    Column("block_parameters", title="In blocks", unit="count", over="any"),
    Column("flops", title="FLOPs/image", unit="count", over="any"),
    # How far the residual branches got: ‖branch‖/‖stream‖ and the mean |γ| (tab/models/parts.py).
    Column("branch_share", title="Branch share", unit="percent"),
    Column("branch_gate"),
    Column("ffn_share", title="FFN share", unit="percent"),
    Column(
        "peak_memory_bytes",
        title="Peak memory",
        unit="bytes",
        over="any",
        better="less",
        on_cpu=False,
        measured=True,
    ),
    Column("final_validation_accuracy", lambda run: last(run.rows, "validation_accuracy")),
    Column("error", lambda run: run.error.strip().split("\n")[-1]),
    Column("seeds_at_once"),
    *(Column(name, group=True) for name in OF_VERDICT),
    Column("time_spread", group=True, measured=True),  # slowest seed over fastest
    Column("time_disturbed", group=True, measured=True),  # is that, or a slowdown, too much?
    Column("slowdown", slowdown, measured=True),  # training time over that without other work
    # Of the machine over the last minute of the run.
    Column("load_average", lambda run: run.load, measured=True),
]

# Of experiment_results.csv: a line for each epoch.
_PUBLISHED = ["epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"]
_PUBLISHED += ["cumulative_training_time"]
RESULTS = [*_PUBLISHED, "seed", *(name for name in ROW if name not in _PUBLISHED)]
MEASURED = {column.name for column in SUMMARY if column.measured}
MEASURED |= {"cumulative_training_time", "seconds", "cpu_seconds", "waited_seconds"}
