"""How long the GPU itself takes for what `tab bench` races, in bfloat16:
`python bench/gpu_times.py cuda|cpu OUT.json`. Prints a line a contestant, in µs a call:

    wall    one call, on the host's clock, until the GPU has finished
    events  calls in a row, between two events on the GPU: the host's time where that is longer
    graph   the same calls as a CUDA graph: the GPU's alone, which docs/gpu.md estimates

Calls take turns on so many inputs that the L2 cache holds none until it comes again. TAB is first
in all cases, then come its rivals. A CPU has `wall` alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tab.bench.benchmark import Contestant, Problem
from tab.bench.cases import Case
from tab.bench.measure import call
from tab.bench.registry import cases, problem
from tab.files.formats import write_json

L2 = 2**27  # bytes: twice an H200's
ROUNDS = 7
OPS = "sparse,mla,linear,gated_linear,performer,local"  # the weakest first


def drawn(case: Case) -> list[Problem]:
    """The case, again and again where its inputs are small."""
    first = problem(case)
    more = 1 + L2 // sum(x.nbytes for x in first.inputs) if case.device == "cuda" else 1
    return [first, *(problem(case, seed) for seed in range(1, min(8, more)))]


def rows(problems: list[Problem], ours: bool) -> Iterator[dict]:
    """Of TAB "auto", or of all others that can run."""
    p = problems[0]
    for c in p.benchmark.contestants(p):
        if c.why_not is not None or c.name.startswith("tab ") or (c.name == "tab") != ours:
            continue
        for direction in ("forward", "both") if c.differentiable else ("forward",):
            row = {"case": p.case.name, "contestant": c.name, "direction": direction}
            try:
                yield row | times(calls(c, problems, direction), p.case.device == "cuda")
            except Exception as error:  # a rival may fail in any way
                yield row | {"failed": said(error)}


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {[*str(error).splitlines(), ''][0][:80]}"


def calls(c: Contestant, problems: list[Problem], direction: str) -> list[Callable]:
    """One for each of the problems, the first calls of which are over."""
    made = [call(c.build(p), p, direction)[1] for p in problems]
    found = [lambda f=f: f(None) for f in made]
    for _ in range(3):
        for f in found:
            f()
    return found


def times(found: list[Callable], gpu: bool) -> dict[str, float]:
    """µs a call; what no graph can hold has a text in the place of its time."""
    once = statistics.median(wall(f, gpu) for f in found * ROUNDS)
    if not gpu:
        return {"wall": once}
    row = {"wall": once, "events": between_events(lambda: [f() for f in found]) / len(found)}
    try:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for f in found:
                f()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            held = [f() for f in found]
        row["graph"] = between_events(graph.replay) / len(found)
        del held
    except Exception as error:
        row["graph"] = said(error)
    return row


def wall(f: Callable, gpu: bool) -> float:
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if gpu:
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start)


def between_events(f: Callable, repeats: int = 10) -> float:
    """µs of one f: the median of several rounds."""
    found = []
    for _ in range(ROUNDS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            f()
        last.record()
        last.synchronize()
        found.append(1e3 * first.elapsed_time(last) / repeats)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--ops", default=OPS)
    parser.add_argument("--sizes", default="cifar,vision,long")
    given = parser.parse_args()
    kind = torch.bfloat16 if given.device == "cuda" else torch.float32
    raced = cases(given.ops.split(","), given.sizes.split(","), (False, True), kind, given.device)
    found = []
    for ours in (True, False):
        for row in (row for case in raced for row in rows(drawn(case), ours)):
            found.append(row)
            write_json(given.out, {"rows": found})
            told = (f"{x:.1f}" if isinstance(x, float) else x for x in row.values())
            print("time", *told, flush=True)


if __name__ == "__main__":
    main()
