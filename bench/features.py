"""What each feature of the ops costs: the op with it against the same op without it, and against
the same function by FlexAttention and by SDPA with a mask, all on one CPU thread, whose own
processor time is counted. All contestants of an op take turns, in shuffled order.

    python bench/features.py [--tokens 1024] [--heads 8] [--rounds 21] [--only local]
                             [--others without,sdpa] [--out FILE]

Whoever differs from TAB's result by over 1e-3 of its largest number ends the run. Prints a table in
Markdown: milliseconds of TAB with the feature, and how many times as long that is as what it is
compared with, the median of the rounds and its 10th and 90th percentile; below 1, TAB is faster.
On a CPU FlexAttention has no backward pass, and compiled no lse, hence no sinks. A dash stands
where the other does not compute this function. What the features are compared with:

- without: the op with none of them, on as many tokens; of `cu_seqlens` a dense batch of sequences
  of one length, of a decay causal linear attention of the same features;
- FlexAttention and SDPA: with the same mask, cap, slopes, sinks, and, for mla, on keys and values
  that are made of the latents within the call.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from feature_cases import Call, Case, cases

from tab.bench.results import environment, save
from tab.bench.rows import Row, percentiles, row_speedup
from tab.bench.turns import Load

OTHERS = {"without": "× without", "flex": "× FlexAttention", "sdpa": "× SDPA"}


def first(out: torch.Tensor | tuple) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]


def forward(call: Call) -> Callable[[], object]:
    x = [t.detach() for t in call.leaves]
    return lambda: call.function(*x)


def both(call: Call) -> Callable[[], object]:
    """Of all outputs, lse too."""

    def run():
        out = call.function(*call.leaves)
        outs = (out,) if isinstance(out, torch.Tensor) else out
        return torch.autograd.grad(outs, call.leaves, [torch.ones_like(o) for o in outs])

    return run


def check(case: Case, others: list[str]) -> None:
    """The others compute this function."""
    want = first(forward(case.ours)())
    for name in others:
        if name != "without" and (call := getattr(case, name)) is not None:
            off = (first(forward(call)()) - want).abs().max() / want.abs().max()
            if not off < 1e-3:
                raise SystemExit(f"{case.op}, {case.feature}: {name} differs by {off:.1e}")


def contestants(case: Case, others: list[str]) -> Iterator[tuple[str, str, Callable]]:
    """(who, direction, call)"""
    for name in ("ours", *others):
        if (call := getattr(case, name)) is not None:
            yield name, "forward", forward(call)
            if name != "flex":
                yield name, "both", both(call)


def measure(group: list[Case], others: list[str], rounds: int) -> list[dict[str, Row]]:
    """The rows of all cases of an op, by contestant. What several cases share, such as the op
    without any feature, is timed for each: it pairs with the others of its round."""
    calls = [(i, *c) for i, case in enumerate(group) for c in contestants(case, others)]
    times: list[list[float]] = [[] for _ in calls]
    order = random.Random(0)
    for turn in range(rounds + 2):  # two to warm up
        for at in order.sample(range(len(calls)), len(calls)):
            start = time.process_time()
            calls[at][3]()
            if turn >= 2:
                times[at].append(time.process_time() - start)
    found: list[dict[str, Row]] = [{} for _ in group]
    for (i, who, direction, _), seconds in zip(calls, times, strict=True):
        name = f"{group[i].op}/{group[i].feature}"
        row = found[i].setdefault(who, Row(name, "tab" if who == "ours" else who))
        row.timed(direction, seconds, [])
    return found


def columns(others: list[str]) -> list[tuple[str, str]]:
    """(direction, who) of each column behind the first two; flex has no backward pass."""
    found = [("forward", who) for who in ("ours", *others)]
    return found + [("both", who) for who in ("ours", *others) if who != "flex"]


def head(others: list[str]) -> str:
    names = {"forward": "forward, ms", "both": "forward and backward, ms"}
    titles = [names[d] if who == "ours" else OTHERS[who] for d, who in columns(others)]
    return f"| op | feature | {' | '.join(titles)} |\n" + "|---" * (len(titles) + 2) + "|"


def line(case: Case, rows: dict[str, Row], others: list[str]) -> str:
    cells = [case.op, case.feature]
    for direction, who in columns(others):
        if who == "ours":
            cells.append(f"{1e3 * percentiles(rows['ours'].seconds[direction])[1]:.2f}")
        elif who not in rows:
            cells.append("–")
        else:
            low, middle, high = row_speedup(rows["ours"], rows[who], direction)
            cells.append(f"{middle:.2f} ({low:.2f}–{high:.2f})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", default="", help="ops, with a comma between them")
    parser.add_argument("--others", default=",".join(OTHERS), help="flex compiles for minutes")
    parser.add_argument("--out", type=Path, help="every time, as JSON")
    given = parser.parse_args()
    others = given.others.split(",")
    if unknown := set(others) - {*OTHERS}:
        parser.error(f"--others knows {', '.join(OTHERS)}, not {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    facts, load = environment("cpu"), Load()
    only = given.only.split(",") if given.only else []
    groups: dict[str, list[Case]] = {}
    for case in cases(given.heads, given.tokens):
        if not only or case.op.split(",")[0] in only:
            groups.setdefault(case.op, []).append(case)
    print(f"B 1, H {given.heads}, N {given.tokens}, D 64, float32, one thread\n")
    print(head(others))
    written = []
    for group in groups.values():
        for case in group:
            check(case, others)
        for case, rows in zip(group, measure(group, others, given.rounds), strict=True):
            print(line(case, rows, others), flush=True)
            written += rows.values()
        load.note()
    print(f"\nload average {load.record()}")
    if given.out:
        command = " ".join(["python", "bench/features.py", *sys.argv[1:]])
        save(given.out, written, None, facts, command, load.record())


if __name__ == "__main__":
    main()
