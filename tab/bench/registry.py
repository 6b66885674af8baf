"""Which ops are benchmarked: the files of tab/bench/ops/, and what installed packages bring.

A file of that folder is named as its op is and ends with `benchmark = …`. A package of your own
declares its benchmark as an entry point:

    [project.entry-points."tab.benchmarks"]
    mine = "my_package.bench:benchmark"
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from importlib.metadata import entry_points

import torch

from ..checks import check_keys, unknown
from . import ops as folder
from .benchmark import Benchmark, Draw, Problem
from .cases import Case


def names() -> list[str]:
    """The ops of TAB, then those of others, each in alphabetical order."""
    return [*_own(), *sorted({point.name for point in _entry_points()} - set(_own()))]


def benchmark(op: str) -> Benchmark:
    """Of this op, or a ValueError that names the ops there are."""
    if op in _own():
        found = importlib.import_module(f"{folder.__name__}.{op}").benchmark
    elif given := [point for point in _entry_points() if point.name == op]:
        found = given[0].load()
    else:
        choose = f"choose from {', '.join(names())}"
        raise ValueError(unknown(op, names(), choose, what="op "))
    if not isinstance(found, Benchmark):
        raise TypeError(f"the benchmark of {op} is no tab.bench.benchmark.Benchmark: {found!r}")
    return found


def benchmarks() -> dict[str, Benchmark]:
    return {name: benchmark(name) for name in names()}


def _own() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_")]


def _entry_points() -> Iterable:
    return entry_points(group="tab.benchmarks")


def chosen(given: list[str], known: Iterable[str], where: str) -> list[str]:
    """The names given, or all that are known for "all"; a ValueError names one that is none."""
    names = [*known] if given == ["all"] else given
    check_keys(where, names, known)
    return names


def cases(ops, sizes, causal=(False,), dtype=torch.float32, device="cpu") -> list[Case]:
    """Each op at each size; only some have a `decode` form, which is causal by itself."""
    found = [
        Case(op, size, flag, dtype, device)
        for op in ops
        for size in sizes
        for flag in causal
        if _measured(benchmark(op), size == "decode", flag, first=flag == causal[0])
    ]
    if not found:
        every = benchmarks()
        raise ValueError(
            f"{', '.join(ops)}: nothing to measure. The size decode is for "
            f"{_listed(n for n, b in every.items() if b.decode)}; without a causal form is "
            f"{_listed(n for n, b in every.items() if True not in b.causal)}; with that form alone "
            f"is {_listed(n for n, b in every.items() if False not in b.causal)}"
        )
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _measured(b: Benchmark, decode: bool, causal: bool, *, first: bool) -> bool:
    if causal not in b.causal:
        return False
    return not decode or (b.decode is not None and first)


def problem(case: Case, seed: int = 0) -> Problem:
    """Random tensors, of unit variance and contiguous."""
    found = benchmark(case.op)
    if case.decode:
        if found.decode is None:
            raise ValueError(f"{case.op} has no benchmark of decoding")
        found = found.decode
    return found.problem(case, Draw(case, seed))
