"""Throughput of each op against what a user could run instead: `pytest bench/bench_kernels.py`.

Every contestant is checked against float64 and raced in turns with the others, once per case: the
race fills `extra_info` (tab_speedup: p10, p50, p90). pytest-benchmark then times it alone, which
serves `--benchmark-save` and `--benchmark-compare`.
"""

import functools
from dataclasses import replace

import pytest
import torch

from tab.bench.cases import SIZES, cases, problem, work
from tab.bench.contestants import PYTORCH, contestants
from tab.bench.measure import call, measure, percentiles, speedup
from tab.bench.roofline import measure_roofline, synchronize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc):
    config = metafunc.config
    ops, sizes = config.getoption("--ops"), config.getoption("--sizes").split(",")
    ops = list(PYTORCH) if ops == "all" else ops.split(",")
    for size in sizes:
        assert size in SIZES, f"unknown size {size}; choose from {', '.join(SIZES)}"
    chosen = cases(ops, sizes, device=DEVICE)
    entrants = [
        pytest.param(case, direction, c.name, id=f"{case.name}-{direction}-{c.name}")
        for case in chosen
        for direction in ("forward", "both")
        for c in contestants(problem(case if case.decode else replace(case, size="tiny")))
        if direction == "forward" or c.differentiable
    ]
    metafunc.parametrize("case, direction, name", entrants)


@functools.cache
def roofline():
    return measure_roofline(torch.float32, DEVICE)


@functools.cache
def race(case, budget):
    return {
        row.contestant: row
        for row in measure(case, roofline(), directions=("forward", "both"), budget=budget)
    }


def test_throughput(benchmark, case, direction, name, request):
    rows = race(case, request.config.getoption("--budget"))
    row = rows[name]
    if row.skipped:
        pytest.skip(row.skipped)
    p = problem(case)
    entrant = next(c for c in contestants(p) if c.name == name)
    _, timed = call(entrant.build(p), p, direction)

    def once():
        timed(None)
        synchronize(DEVICE)

    benchmark.group = f"{case.name} {direction}"
    median = percentiles(row.seconds[direction])[1]
    flops, moved = work(p)[direction]
    benchmark.extra_info |= {
        "interleaved_ms": [1e3 * x for x in percentiles(row.seconds[direction])],
        "tab_speedup": speedup(row.seconds[direction], rows["tab"].seconds[direction]),
        "gflops": flops / median / 1e9,
        "gbytes": moved / median / 1e9,
        "of_floor": row.floor[direction] / median,
        "error": row.error,
        "gradient_error": row.gradient_error,
        "peak_bytes": row.peak_bytes,
    }
    benchmark.pedantic(once, rounds=max(3, min(30, int(0.5 / median))), warmup_rounds=1)
