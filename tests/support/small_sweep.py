"""A sweep of seconds: how the tests begin it, watch it, kill it and read what it left."""

import json
from pathlib import Path

import pytest
from forks import python
from paths import SUPPORT
from typer.testing import CliRunner

pytest.importorskip("optuna")

from kill_sweep import plan

from tab.cli.main import app
from tab.sweep.driver import SweepWatcher, records, sweep
from tab.sweep.plan import SweepPlan

SELF, MULTI = ("mlp", "self"), ("mlp", "multi_head")


def begin(folder: Path, dataset, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    plan(folder, **changes).save(folder / "sweep", dataset)
    return folder / "sweep"


def whole(folder: Path, dataset) -> tuple:
    """A whole sweep in this process; -> its directory and winners."""
    out = begin(folder, dataset)
    return out, sweep(SweepPlan.load(out), dataset, out)


class Count(SweepWatcher):
    def __init__(self):
        self.epochs, self.ended = 0, []

    def epoch(self, pair, entry, row):
        self.epochs += 1

    def end(self, pair, ended):
        self.ended.append((pair, ended.entry.configuration, ended.entry.rung, ended.status))


def read(out: Path):
    with records(SweepPlan.load(out), out) as found:
        return found


def kills(times: int, folder: Path, **changes) -> str:
    """What kill_sweep.kill returns, in a process of its own: it forks."""
    program = (
        "import json, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import kill_sweep\n"
        "changes = json.loads(sys.argv[4])\n"
        "print(kill_sweep.kill(int(sys.argv[3]), Path(sys.argv[2]), **changes))"
    )
    words = (SUPPORT, folder, times, json.dumps(changes))
    ran = python("-c", program, *words)
    return ran.stdout.strip() or ran.stderr


def tab_sweep(*words: object):
    return CliRunner().invoke(app, ["sweep", *map(str, words)])
