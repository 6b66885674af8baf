"""The two CSV files of a comparison, a function of config.toml and runs/ alone.

The first columns are those of the published study, in its order.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from ..files import write_text
from .runs import ENDED, Run
from .verdicts import COLUMNS, verdicts

NAMES = ["model_name", "architecture", "attention_type"]
RESULTS = [
    *("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
    "cumulative_training_time",
    *("seed", "validation_loss", "validation_accuracy", "seconds", "images_per_second"),
    *("peak_memory_bytes", "learning_rate", "seeds_at_once"),
]
SUMMARY = [
    *("final_test_accuracy", "max_test_accuracy", "final_train_accuracy", "final_train_loss"),
    *("min_train_loss", "total_training_time", "num_epochs"),
    *("seed", "status", "images_per_second", "parameters", "attention_parameters", "flops"),
    *("peak_memory_bytes", "final_validation_accuracy", "error", "seeds_at_once"),
    *COLUMNS,  # of the mechanism over its seeds: the same in the line of each
    *("time_spread", "time_disturbed"),  # of the same: slowest over fastest; is that too much?
    "load_average",  # of the machine over the last minute of the run
]
DISTURBED = 1.5  # a spread from which on other work, not the mechanism, decided the times
MEASURED = {  # columns that differ between two equal runs: times, and what follows from them
    *("cumulative_training_time", "total_training_time", "seconds", "images_per_second"),
    *("peak_memory_bytes", "time_spread", "time_disturbed", "load_average"),
}


def attention_label(attention: str) -> str:
    """The control's name in the published files is "Control"."""
    return "Control" if attention == "none" else attention


def names(run: Run) -> dict[str, str]:
    """{"model_name": "CNN - multi_head", "architecture": "CNN", "attention_type": "multi_head"}"""
    architecture, attention = run.model.upper(), attention_label(run.attention)
    return dict(zip(NAMES, (f"{architecture} - {attention}", architecture, attention), strict=True))


def write_csvs(out: Path, runs: list[Run]) -> None:
    """Both files from all runs; a run that has not ended has no line in the summary."""
    ended, spreads = [run for run in runs if run.status in ENDED], time_spreads(runs)
    found = {model: verdicts(runs, model) for model in {run.model for run in runs}}
    lines = (names(run) | row | {"seed": run.seed} for run in runs for row in run.rows)
    write_csv(out / "experiment_results.csv", NAMES + RESULTS, lines)
    lines = (
        names(run)
        | run.summary
        | {"seed": run.seed, "status": run.status, "error": run.error.strip().split("\n")[-1]}
        | {"final_validation_accuracy": last(run.rows, "validation_accuracy")}
        | (found[run.model][run.attention].columns() if run.scored else {})
        | _disturbance(spreads.get((run.model, run.attention)))
        | {"load_average": run.load}
        for run in ended
    )
    write_csv(out / "experiment_summary.csv", NAMES + SUMMARY, lines)


def time_spreads(runs: list[Run]) -> dict[tuple[str, str], float]:
    """(model, attention) -> its slowest seed's time over its fastest's, where there are two."""
    times: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if run.scored and (seconds := run.summary.get("total_training_time")):
            times.setdefault((run.model, run.attention), []).append(seconds)
    return {key: max(mine) / min(mine) for key, mine in times.items() if len(mine) > 1}


def _disturbance(spread: float | None) -> dict:
    return {} if spread is None else {"time_spread": spread, "time_disturbed": spread > DISTURBED}


def last(rows: list[dict], key: str):
    """The latest measured value of a column, or None."""
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def write_csv(path: Path, columns: list[str], lines: Iterable[dict]) -> None:
    """None becomes an empty field; keys that are no column are left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())
