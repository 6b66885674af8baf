"""The two CSV files of a comparison, a function of config.toml and runs/ alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from ..files import write_text
from . import columns
from .runs import ENDED, Run
from .verdicts import verdicts

DISTURBED = 1.5  # a spread from which on other work, not the mechanism, decided the times


def attention_label(attention: str) -> str:
    """The control's name in the published files is "Control"."""
    return "Control" if attention == "none" else attention


def names(run: Run) -> dict[str, str]:
    """{"model_name": "CNN - multi_head", "architecture": "CNN", "attention_type": "multi_head"}"""
    architecture, attention = run.model.upper(), attention_label(run.attention)
    return dict(
        zip(columns.NAMES, (f"{architecture} - {attention}", architecture, attention), strict=True)
    )


def write_csvs(out: Path, runs: list[Run]) -> None:
    """Both files from all runs; a run that has not ended has no line in the summary."""
    ended, spreads = [run for run in runs if run.status in ENDED], time_spreads(runs)
    found = {model: verdicts(runs, model) for model in {run.model for run in runs}}
    lines = (names(run) | row | {"seed": run.seed} for run in runs for row in run.rows)
    write_csv(out / "experiment_results.csv", columns.NAMES + columns.RESULTS, lines)
    own = [column for column in columns.SUMMARY if not column.group]
    lines = (
        names(run)
        | {column.name: column.of(run) for column in own}
        | (said.columns() if run.counts and (said := found[run.model].get(run.attention)) else {})
        | _disturbance(spreads.get((run.model, run.attention)))
        for run in ended
    )
    header = [column.name for column in columns.SUMMARY]
    write_csv(out / "experiment_summary.csv", columns.NAMES + header, lines)


def time_spreads(runs: list[Run]) -> dict[tuple[str, str], float]:
    """(model, attention) -> its slowest seed's time over its fastest's, where there are two."""
    times: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if run.scored and (seconds := run.summary.get("total_training_time")):
            times.setdefault((run.model, run.attention), []).append(seconds)
    return {key: max(mine) / min(mine) for key, mine in times.items() if len(mine) > 1}


def _disturbance(spread: float | None) -> dict:
    return {} if spread is None else {"time_spread": spread, "time_disturbed": spread > DISTURBED}


def write_csv(path: Path, header: list[str], lines: Iterable[dict]) -> None:
    """None becomes an empty field; keys that are no column are left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, header, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())
