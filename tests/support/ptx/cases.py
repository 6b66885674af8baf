"""What the tests that execute PTX share: Triton's launchers in the place of the CUDA C++ ops,
inputs, and the launches that have to be executed.

A case is (f, textbook, inputs): shapes are the smallest that make every loop turn, and lead to the
launches that the kernels' own cases name. Without inputs f has no gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from unittest import mock

import pytest
import torch
from every import EVERY
from proof import assert_accurate, outputs_and_gradients, poisoned
from ptx.machine import executed
from torch import Tensor

from tab.doctor.kernel_launches import Launch, code, distinct, heaviest, identity, launches
from tab.doctor.kernel_limits import faults
from tab.doctor.kernel_report import compiled
from tab.kernels._launch import LAUNCHERS, load, recording
from tab.ops import OPS

ARCH = 80
FULL, HALF = torch.float32, torch.bfloat16
Case = tuple[Callable, Callable, Sequence[Tensor]]


@contextlib.contextmanager
def launchers():
    """Within the block an op's backend "cuda" is its Triton launcher, for CPU tensors."""
    load()
    library = torch.library.Library("tab_cuda", "IMPL")
    for name in LAUNCHERS:
        library.impl(name, OPS[name].kernels["triton"], "CPU")
    yield
    library._destroy()


def call(op: str, *args):
    return OPS[op].apply("cuda", *args)


def heads(generator, n, *sizes, dtype, h=2, scale=1.0):
    """(1, H, N, size) each, laid out by tokens as projections give them"""
    drawn = (scale * torch.randn(1, n, h, size, generator=generator) for size in sizes)
    return [x.to(dtype).transpose(1, 2) for x in drawn]


def mask(generator, n):
    some = torch.rand(1, n, generator=generator) > 0.3
    some[:, 0] = True
    return some


# --- what is executed -----------------------------------------------------------------------------


def leads_to_every_launch(op: str, cases: Iterable[Case], *_) -> None:
    """The cases lead to each launch that has to be executed; none is made."""
    met = set().union(*(planned(f, x) for f, _, x in cases))
    missing = to_execute(op) - met
    assert not missing, f"no case leads to {sorted(missing)}"


def executes_every_launch(
    op: str,
    cases: Iterable[Case],
    floors: dict[torch.dtype, float] | None = None,
    same: Callable = torch.testing.assert_close,
) -> None:
    """Executes the cases that lead to a launch which has to be, and holds each against float64.

    floors: of `assert_accurate`, where a result is wider than the operands of its products.
    same: holds the result of a case without gradients against the textbook's.
    """
    wanted, seen = to_execute(op), []
    for f, exact, x in cases:
        if not x:
            with executed(ARCH) as now, poisoned():
                given = f()
            same(given, exact())
            seen += now
        elif (wanted - {identity(launch) for launch in seen}) & planned(f, x):
            with executed(ARCH) as now:
                assert_accurate(f, exact, x, floor=(floors or {}).get(x[0].dtype, 2e-6))
            seen += now
    missing = wanted - {identity(launch) for launch in seen}
    assert not missing, f"{len(missing)} of {len(wanted)} launches not executed: {sorted(missing)}"
    assert not faults([compiled(op, launch, ARCH) for launch in distinct(seen)])


# `make test` proves of the same cases that none is lacking, which `make kernels` executes.
both_ways = pytest.mark.parametrize(
    "prove",
    [
        pytest.param(leads_to_every_launch, marks=pytest.mark.any_torch),
        pytest.param(executes_every_launch, marks=pytest.mark.compiles),
    ],
)


def to_execute(op: str) -> set[str]:
    """Of the launches of the same code the heaviest, or all of them."""
    found = launches(ARCH)[op]
    return {identity(launch) for launch in (found if EVERY else heaviest(found, code))}


def planned(f: Callable, x: Sequence[Tensor]) -> set[str]:
    """The launches of f and of its gradients; none is made."""
    found: set[str] = set()

    def record(kernel, grid, *args, **options):
        found.add(identity(Launch(kernel, args, options)))

    with recording(record, ARCH):
        outputs_and_gradients(f, x) if x else f()
    return found


def segments_of(tokens: int):
    """Sequences beyond so many tokens are cut into segments, of so many each."""
    return mock.patch.multiple("tab.kernels._segments", SEGMENT=tokens, FUSED_TOKENS=tokens)
