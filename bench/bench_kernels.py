"""Throughput of each op against what a user could run instead: `pytest bench/bench_kernels.py`.

Every contestant is checked against float64 and raced in turns with the others, once per case: the
race fills `extra_info` (tab_speedup: p10, p50, p90). pytest-benchmark then times it alone, which
serves `--benchmark-save` and `--benchmark-compare`.
"""

import functools
from dataclasses import replace

import pytest
import torch

from tab.bench.cases import SIZES
from tab.bench.measure import call, measure
from tab.bench.registry import cases, names, problem
from tab.bench.roofline import measure_roofline, synchronize
from tab.bench.rows import percentiles, speedup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc):
    config = metafunc.config
    ops, sizes = config.getoption("--ops"), config.getoption("--sizes").split(",")
    ops = names() if ops == "all" else ops.split(",")
    for size in sizes:
        assert size in SIZES, f"unknown size {size}; choose from {', '.join(SIZES)}"
    chosen = cases(ops, sizes, device=DEVICE)
    races = [
        pytest.param(case, direction, c.name, id=f"{case.name}-{direction}-{c.name}")
        for case in chosen
        for direction in ("forward", "both")
        for c in entrants(problem(case if case.decode else replace(case, size="tiny")))
        if direction == "forward" or c.differentiable
    ]
    metafunc.parametrize("case, direction, name", races)


def entrants(p):
    return p.benchmark.contestants(p)


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
    entrant = next(c for c in entrants(p) if c.name == name)
    _, timed = call(entrant.build(p), p, direction)

    def once():
        timed(None)
        synchronize(DEVICE)

    benchmark.group = f"{case.name} {direction}"
    median = percentiles(row.seconds[direction])[1]
    flops, moved = p.benchmark.work(p)[direction]
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
