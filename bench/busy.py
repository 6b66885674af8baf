"""A training step beside other processes that keep a core busy each: how long it takes, with TAB's
threads that wait in a short spin, and with libgomp's own, which spin on.

    python bench/busy.py [--turns 5] [--hogs 0,1,2,4] [--threads 2] [--attention multi_head]
                         [--recipe fair] [--budget 3]

Runs take turns, each in a process of its own (`tab bench steps`, the CNN of the recipe).
Prints a Markdown table: ms a step, the median of the turns with the lowest and the highest, and how
many times its time on a quiet machine that is. On a machine that is not quiet it means nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tab.analysis.steps import label_of

SPINS = {"libgomp": "300000", "TAB": None}  # GOMP_SPINCOUNT; 300,000 is libgomp's own default


def step(options: argparse.Namespace, spins: str | None) -> float:
    """Seconds of one training step."""
    given = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    if spins:
        given["GOMP_SPINCOUNT"] = spins
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "steps.json")
        words = ["bench", "steps", "--recipe", options.recipe, "--models", "cnn"]
        words += ["--attentions", options.attention, "--threads", str(options.threads)]
        words += ["--processes", "1", "--budget", str(options.budget), "--out", str(out)]
        command = [sys.executable, "-m", "tab", *words]
        subprocess.run(command, env=given, check=True, capture_output=True)
        rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    (row,) = (row for row in rows if row["contestant"] == label_of(options.attention))
    return statistics.median(row["seconds"]["step"])


def beside(hogs: int, measure) -> float:
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(hogs)]
    try:
        time.sleep(1)
        return measure()
    finally:
        for hog in running:
            hog.kill()
            hog.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--hogs", default="0,1,2,4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attention", default="multi_head")
    parser.add_argument("--recipe", default="fair")
    parser.add_argument("--budget", type=float, default=3.0)
    options = parser.parse_args()
    hogs = [int(n) for n in options.hogs.split(",")]
    times = {(name, n): [] for name in SPINS for n in hogs}
    for turn in range(options.turns):
        for name, n in times:
            times[name, n].append(beside(n, partial(step, options, SPINS[name])))
        print(f"turn {turn + 1} of {options.turns}", file=sys.stderr)
    print("| other processes |", *(f"{name} ms | × quiet |" for name in SPINS))
    print("|---|" + "---|---|" * len(SPINS))
    for n in hogs:
        cells = []
        for name in SPINS:
            mine = sorted(times[name, n])
            median = statistics.median(mine)
            over = median / statistics.median(times[name, hogs[0]])
            spread = f"{1e3 * mine[0]:.0f}–{1e3 * mine[-1]:.0f}"
            cells += [f"{1e3 * median:.0f} ({spread})", f"{over:.2f}"]
        print("|", " | ".join([str(n), *cells]), "|")


if __name__ == "__main__":
    main()
