"""The PTX that Triton compiles for sm_80, executed on a CPU (tests/support/ptx): every launch of
the experts and of batch assembly that `tab doctor --kernels` knows, against float64. Bounds,
alignment and races are watched; shared memory and outputs start as NaN."""

from __future__ import annotations

import pytest
import torch
from proof import assert_accurate, poisoned

from tab.doctor.kernel_launches import identity, launches
from tab.ops import OPS

pytest.importorskip("triton")
from ptx.machine import executed

pytestmark = pytest.mark.compiles
ARCH = 80
FULL, HALF = torch.float32, torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def launchers():
    """Triton's launchers in the place of the CUDA C++ ops, for CPU tensors."""
    from tab import kernels

    kernels.load()
    library = torch.library.Library("tab_cuda", "IMPL")
    for name, op in OPS.items():
        if op.own and "triton" in op.kernels:
            library.impl(name, op.kernels["triton"], "CPU")
    yield
    library._destroy()


def call(op, *args):
    return OPS[op].apply("cuda", *args)


# --- cases: (f, textbook, inputs) -----------------------------------------------------------------


def moe_cases(generator):
    for c, dtypes in ((256, (FULL, torch.float16, HALF)), (32, (HALF,))):
        for dtype in dtypes:
            sizes = [3, 0, 1500, 600, 1, 0, 992, 1000]
            counts = torch.tensor(sizes)

            def exact(x, w, sizes=sizes):
                parts = zip(x.split(sizes), w, strict=True)
                return torch.cat([rows @ weight.mT for rows, weight in parts])

            x = torch.randn(sum(sizes), c, generator=generator).to(dtype)
            w = torch.randn(8, c, c, generator=generator).to(dtype) / 8
            yield lambda x, w, counts=counts: call("moe_grouped", x, w, counts), exact, (x, w)


CASES = {"moe": moe_cases}


def covered(op, seen):
    """Every launch of the op that the report knows was one of these."""
    known = {identity(launch) for launch in launches(ARCH)[op]}
    missing = known - {identity(launch) for launch in seen}
    assert not missing, f"{len(missing)} of {len(known)} launches not executed: {sorted(missing)}"


@pytest.mark.parametrize("op", CASES)
def test_every_launch(op, generator):
    seen = []
    for f, exact, x in CASES[op](generator):
        with executed(ARCH) as now:
            assert_accurate(f, exact, x)
        seen += now
    covered(op, seen)


def test_every_launch_of_batches(generator):
    images = torch.randint(256, (9, 32, 32, 3), generator=generator, dtype=torch.uint8)
    index = torch.randint(9, (16,), generator=generator)
    moves = torch.randint(-4, 5, (16, 3), generator=generator).to(torch.int8)
    moves[:, 2] = torch.arange(16) % 2
    mean, scale = torch.rand(3, generator=generator) * 100, torch.rand(3, generator=generator)
    exact = OPS["assemble"].reference(images, index, moves, mean, scale)
    with executed(ARCH) as seen, poisoned():
        given = call("assemble", images, index, moves, mean, scale)
    torch.testing.assert_close(given, exact)
    covered("batches", seen)
