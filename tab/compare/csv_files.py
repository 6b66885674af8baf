"""The two CSV files of a comparison, a function of config.toml and runs/ alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from ..files import write_text
from . import columns
from .disturbance import disturbed, spread
from .runs import ENDED, Run
from .verdicts import verdicts


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
    ended, seeds = [run for run in runs if run.status in ENDED], {}
    for run in runs:
        seeds.setdefault((run.model, run.attention), []).append(run)
    times = {key: _times(mine) for key, mine in seeds.items()}
    found = {model: verdicts(runs, model) for model in {run.model for run in runs}}
    lines = (names(run) | row | {"seed": run.seed} for run in runs for row in run.rows)
    write_csv(out / "experiment_results.csv", columns.NAMES + columns.RESULTS, lines)
    own = [column for column in columns.SUMMARY if not column.group]
    lines = (
        names(run)
        | {column.name: column.of(run) for column in own}
        | (said.columns() if run.counts and (said := found[run.model].get(run.attention)) else {})
        | times[run.model, run.attention]
        for run in ended
    )
    header = [column.name for column in columns.SUMMARY]
    write_csv(out / "experiment_summary.csv", columns.NAMES + header, lines)


def _times(runs: list[Run]) -> dict:
    return {"time_spread": spread(runs), "time_disturbed": disturbed(runs)}


def write_csv(path: Path, header: list[str], lines: Iterable[dict]) -> None:
    """None becomes an empty field; keys that are no column are left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, header, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())
