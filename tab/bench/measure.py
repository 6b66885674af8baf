"""Correct first, then timed: contestants take turns, so that noise hits all of them alike."""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops._op import Unavailable
from .benchmark import Contestant, Problem
from .cases import Case
from .registry import problem
from .roofline import Roofline, synchronize
from .rows import DIRECTIONS, Row, worst_of

# One exponential of a CPU as FLOPs of the floor: 12 instructions of the units that multiply and add
# (csrc/cpu/core/exp.h), each of which could have been a multiply-add.
EXPONENTIAL = 24
TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of max|truth|


def measure(
    case: Case,
    roofline: Roofline,
    *,
    directions: tuple[str, ...] = DIRECTIONS,
    budget: float = 4.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    cold: bool = False,
    only: Callable[[str], bool] = lambda name: True,
    seed: int = 0,
    judge: bool = True,
) -> list[Row]:
    """All contestants at one case. budget: seconds of timing per contestant and direction.

    cold: each call is preceded by a pass over a buffer larger than the last-level cache.
    judge: False where the float64 reference would not fit; whoever runs is then timed.
    """
    p = problem(case, seed)
    entrants = [c for c in p.benchmark.contestants(p) if only(c.name)]
    rows = {c.name: Row(case.name, c.name, skipped=c.why_not) for c in entrants}
    runners: dict[str, Callable] = {}
    for c in entrants:
        if c.why_not is None:
            runs = directions if c.differentiable else ("forward",)
            _admit(c, p, rows[c.name], runners, runs, judge)
    for direction in directions:
        able = {
            name: call(f, p, direction)
            for name, f in runners.items()
            if direction == "forward" or _differentiable(entrants, name)
        }
        flush = _flusher(case.device) if cold else None
        times, pace = take_turns(able, case.device, budget, min_rounds, max_rounds, flush, seed)
        for name, seconds in times.items():
            rows[name].timed(direction, seconds, pace)
    for name, f in runners.items():
        last = directions[-1] if _differentiable(entrants, name) else "forward"
        rows[name].peak_bytes = peak(call(f, p, last), case.device)
    exponentials = 0 if case.device.startswith("cuda") else p.benchmark.exponentials(p)
    for row in rows.values():
        for direction, (flops, moved) in p.benchmark.work(p).items():
            counted = 0 if direction == "backward" else EXPONENTIAL * exponentials
            row.floor[direction] = roofline.floor(flops + counted, moved)
            row.flops[direction], row.moved[direction] = flops, moved
    return list(rows.values())


def _differentiable(entrants: list[Contestant], name: str) -> bool:
    return next(c.differentiable for c in entrants if c.name == name)


# --- correct first -------------------------------------------------------------------------------


def _admit(
    c: Contestant,
    p: Problem,
    row: Row,
    runners: dict,
    directions: tuple[str, ...],
    judge: bool,
) -> None:
    """Checks c against float64; the wrong and the broken are told apart and not timed."""
    gradient = any(d != "forward" for d in directions)
    exact, small = p.sliced(torch.float64), p.sliced(p.case.dtype)
    truth = _run(p.benchmark.ours(exact, "reference"), exact, gradient) if judge else []
    try:
        result = _run(c.build(small), small, gradient) if judge else []
        runner = c.build(p)
        for direction in directions:  # the first calls at full size: compilation, or out of memory
            _timed(*call(runner, p, direction), p.case.device, None)
    except Unavailable as error:
        row.skipped = f"not taken: {error.reason}"
        return
    except Exception as error:  # a peer may fail in any way; the table says how
        row.skipped = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        return
    runners[c.name] = runner
    errors = [_relative(x, t) for x, t in zip(result, truth, strict=True)]
    row.error, row.gradient_error = worst_of(errors[:1]), worst_of(errors[1:])
    worst = worst_of(errors)
    # Who approximates may be far off, and yet no number at all is no approximation.
    judged = p.benchmark.exact or c.name.startswith("tab")
    bound = TOLERANCE[p.case.dtype] if judged else sys.float_info.max
    if judge and not worst <= bound:
        row.skipped = f"wrong: error {worst:.1e} of the largest value"
        del runners[c.name]


def _run(f: Callable, p: Problem, gradient: bool) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_(gradient) for x in p.inputs]
    out = f(*leaves)
    out = out if isinstance(out, Tensor) else out[0]  # a state or lse beside it is not compared
    if not gradient:
        return [out.detach()]
    weight = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype, device=out.device)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def _relative(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth).abs().max() / truth.abs().max()).item()


# --- then timed ----------------------------------------------------------------------------------


def call(f: Callable, p: Problem, direction: str) -> tuple[Callable, Callable]:
    """(prepare, timed): `prepare` runs before each timed call and its result is passed on."""
    leaves = [x.detach().requires_grad_(direction != "forward") for x in p.inputs]
    if direction == "forward":
        return lambda: None, lambda _: f(*leaves)
    with torch.no_grad():
        do = torch.randn_like(f(*leaves))
    if direction == "backward":
        return lambda: f(*leaves), lambda out: torch.autograd.grad(out, leaves, do)
    return lambda: None, lambda _: torch.autograd.grad(f(*leaves), leaves, do)


def take_turns(
    calls, device, budget, min_rounds, max_rounds, flush, seed
) -> tuple[dict[str, list[float]], list[float]]:
    """Rounds in which everyone runs once, in shuffled order; slow ones stop at their budget. With
    the times of each, those of the yardstick: one a round, at its end, and over as long a time as
    the others take, as a machine that is shared is busy now and idle a moment later."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    warm = [_timed(*call, device, None) for call in calls.values()]
    pace, one = [], yardstick(device)
    took = min(_timed(*one, device, None) for _ in range(3))
    count = round(min(max(statistics.median(warm) / took, 1), 1000)) if warm else 1
    order, shuffle = list(calls), random.Random(seed)
    gc.collect()
    for done in range(max_rounds):
        shuffle.shuffle(order)
        active = [n for n in order if done < min_rounds or sum(times[n]) < budget]
        if not active:
            break
        for name in active:
            times[name].append(_timed(*calls[name], device, flush))
        pace.append(sum(_timed(*one, device, flush) for _ in range(count)) / count)
    return times, pace


def yardstick(device: str) -> tuple[Callable, Callable]:
    """A fixed PyTorch op, about a millisecond: how fast the machine was in a round. What slows it
    as well (other work, a lower clock) is no change of a kernel."""
    n = 4096 if device.startswith("cuda") else 384
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(device)
    return lambda: None, lambda _: torch.softmax(x @ x, -1)


def _timed(prepare: Callable, timed: Callable, device: str, flush: Callable | None) -> float:
    state = prepare()
    if flush:
        flush()
    synchronize(device)
    start = time.perf_counter()
    result = timed(state)
    synchronize(device)
    seconds = time.perf_counter() - start
    del result, state
    return seconds


def _flusher(device: str) -> Callable:
    buffer = torch.zeros(2**26, device=device)  # 256 MB
    return lambda: buffer.add_(1)


def peak(call: tuple[Callable, Callable], device: str) -> int | None:
    """Bytes that one call holds above what was there before; None where the system cannot tell.

    On a CPU only in whole pages, and what the process keeps from earlier calls (scratch memory of
    kernels, freed blocks) does not count again: memory.py asks in a fresh process.
    """
    prepare, timed = call
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed(prepare())
        return torch.cuda.max_memory_allocated() - before
    try:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        timed(prepare())
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(key: str) -> int:
    with open("/proc/self/status") as f:
        line = next(line for line in f if line.startswith(key))
    return int(line.split()[1]) * 1024
