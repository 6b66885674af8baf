"""Kills the driver of a toy sweep at random moments, resumes it each time, and counts.

    python tests/support/kill_sweep.py 100

A kill is SIGKILL. A sweep that comes to its end is compared with an unbroken one, and the next
begins, until there have been as many kills as asked for. The drivers are forks of one process, so
that a kill costs no import of torch; tests/sweep/test_faults.py does the same with two kills.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import tab.train.training_run
from tab.data.load import load_dataset
from tab.recipe.recipe import load_recipe
from tab.sweep.driver import sweep
from tab.sweep.halving import Budget
from tab.sweep.plan import SweepPlan
from tab.sweep.space import load_space

DATA = "shapes:100/20"
SMALL = {"train.batch_size": 20, "model.mlp.tokens": 4}
SPACE = """
[train]
lr = [0.001, 0.003, 0.01]
[model]
hidden = [4, 8, 12]
[attention]
num_heads = [2, 3, 4]
"""


def plan(folder: Path, **changes) -> SweepPlan:
    """Three rungs of two mechanisms, about three seconds."""
    path = folder / "space.toml"
    path.write_text(SPACE)
    options = {
        "recipe": load_recipe("quick", SMALL),
        "space": load_space(path),
        "budget": Budget(5, (1, 2, 4), 2.0, 60, 20),
        "models": ["mlp"],
        "attentions": ["self", "multi_head"],
        "data": DATA,
        "device": "cpu",
        "seed": 0,
    }
    return SweepPlan(**options | changes)


def drive(out: Path, dataset) -> None:
    """The child: every epoch that is safely on disk leaves a line in epochs.log."""
    torch.set_num_threads(1)
    save = tab.train.training_run.TrainingRun.save

    def logged(run) -> None:
        save(run)
        with open(out / "epochs.log", "a") as file:
            file.write(f"{run.out.name} {len(run.rows)}\n")

    tab.train.training_run.TrainingRun.save = logged
    sweep(SweepPlan.load(out), dataset, out)


def fork(out: Path, dataset) -> int:
    if child := os.fork():
        return child
    try:
        drive(out, dataset)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def result(out: Path) -> tuple[list[str], str]:
    """What must not depend on kills: trials.csv without its seconds, and the winners."""
    lines = (out / "trials.csv").read_text().splitlines()
    place = lines[0].split(",").index("seconds")
    lines = [",".join(f for i, f in enumerate(line.split(",")) if i != place) for line in lines]
    winners = (out / "winners.toml").read_text().splitlines()
    return lines, "\n".join(line for line in winners if not line.startswith("title"))


def wrong(out: Path, unbroken: Path) -> list[str]:
    """What a finished sweep lost, doubled or chose otherwise."""
    found = []
    (lines, winners), (expected, theirs) = result(out), result(unbroken)
    count = Counter(lines)
    found += [f"lost: {line}" for line in set(expected) - set(lines)]
    found += [f"new: {line}" for line in set(lines) - set(expected)]
    found += [f"doubled: {line}" for line, n in count.items() if n > 1]
    if winners != theirs:
        found.append("other winners")
    trained = Counter((out / "epochs.log").read_text().splitlines())
    found += [f"trained again: {line}" for line, n in trained.items() if n > 1]
    for rows in out.glob("runs/*/rows.jsonl"):
        epochs = [json.loads(line)["epoch"] for line in rows.read_text().splitlines()]
        if epochs != list(range(1, len(epochs) + 1)):
            found.append(f"{rows.parent.name}: epochs {epochs}")
    return found


def kill(times: int, folder: Path, *, seed: int = 0, **changes) -> tuple[int, int, list[str]]:
    """-> kills, sweeps that came to their end, and all that was wrong with these."""
    dataset, draw = load_dataset(DATA), random.Random(seed)
    unbroken = folder / "unbroken"
    plan(folder, **changes).save(unbroken, dataset)
    start = time.monotonic()
    _, status = os.waitpid(fork(unbroken, dataset), 0)
    assert status == 0, "the unbroken sweep failed"
    whole = time.monotonic() - start
    kills = ends = 0
    faults: list[str] = []
    while kills < times:
        out = folder / f"sweep{ends}"
        plan(folder, **changes).save(out, dataset)
        status = None
        while status != 0:
            child = fork(out, dataset)
            if kills < times:
                time.sleep(draw.uniform(0, whole / 3))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            kills += status == signal.SIGKILL
            if status not in (0, signal.SIGKILL):
                return kills, ends, [*faults, f"{out.name}: a resumed driver failed ({status})"]
        ends += 1
        faults += [f"{out.name}: {fault}" for fault in wrong(out, unbroken)]
        shutil.rmtree(out)
    return kills, ends, faults


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        start = time.monotonic()
        kills, ends, faults = kill(int(sys.argv[1]), Path(place))
        print(f"{kills} kills, each resumed; {ends} sweeps came to their end; "
              f"{len(faults)} faults; {time.monotonic() - start:.0f} s")  # fmt: skip
        print("\n".join(faults))
        sys.exit(bool(faults))
