"""What the tests that execute PTX share: Triton's launchers in the place of the CUDA C++ ops,
inputs, and the launches that have to be executed.

A case is (f, textbook, inputs): shapes are the smallest that make every loop turn, and lead to the
launches that the kernels' own cases name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from unittest import mock

import torch
from every import EVERY
from proof import assert_accurate, outputs_and_gradients
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


def every_launch(
    op: str, cases: Iterable[Case], floors: dict[torch.dtype, float] | None = None
) -> None:
    """Executes the cases that lead to a launch which has to be, and holds each against float64.

    floors: of `assert_accurate`, where a result is wider than the operands of its products.
    """
    wanted, seen = to_execute(op), []
    for f, exact, x in cases:
        if (wanted - {identity(launch) for launch in seen}) & planned(f, x):
            with executed(ARCH) as now:
                assert_accurate(f, exact, x, floor=(floors or {}).get(x[0].dtype, 2e-6))
            seen += now
    covered(op, seen)


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
        outputs_and_gradients(f, x)
    return found


def covered(op: str, seen: list[Launch]) -> None:
    """Every launch that stands for the op's was one of these, which keep to the limits."""
    known = to_execute(op)
    missing = known - {identity(launch) for launch in seen}
    assert not missing, f"{len(missing)} of {len(known)} launches not executed: {sorted(missing)}"
    assert not faults([compiled(op, launch, ARCH) for launch in distinct(seen)])


def segments_of(tokens: int):
    """Sequences beyond so many tokens are cut into segments, of so many each."""
    return mock.patch.multiple("tab.kernels._segments", SEGMENT=tokens, FUSED_TOKENS=tokens)
