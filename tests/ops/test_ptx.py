"""The PTX that Triton compiles for sm_80, executed on a CPU (tests/support/ptx): the launches that
stand for those of linear, local, sparse, experts, batches and H2O's choices (see
chosen in tab/doctor/kernel_launches.py), at small shapes, against float64. Bounds, alignment and
races are watched; shared memory and outputs start as NaN."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from proof import assert_accurate, outputs_and_gradients, poisoned
from textbook import linear, softmax

from tab import BlockPattern
from tab.ops import OPS
from tab.ops.h2o_choice import choose_reference

pytest.importorskip("triton")
from ptx.cases import (
    ARCH,
    FULL,
    HALF,
    both_ways,
    call,
    heads,
    launchers,
    mask,
    segments_of,
)
from ptx.machine import executed


@pytest.fixture(scope="module", autouse=True)
def in_place():
    with launchers():
        yield


# --- cases: N a multiple of 16 as in the launchers' own, and of no tile ---------------------------


def linear_cases(generator, half=HALF):
    for n, d, causal, dtypes in (
        (48, 64, False, (FULL, half)),
        (48, 128, False, (FULL,)),
        (144, 64, False, (half,)),
        (144, 64, True, (FULL, half)),  # two segments
        (144, 256, True, (FULL,)),
    ):
        for dtype in dtypes:
            x = heads(generator, n, d, d, d, dtype=dtype)
            x += (
                torch.rand(1, 2, d, d, generator=generator),
                torch.rand(1, 2, d, generator=generator),
            )
            real = mask(generator, n)
            yield (
                lambda q, k, v, s, z, real=real, causal=causal: call(
                    "linear_fwd", q, k, v, real, s, z, 0, causal, 0.0
                ),
                partial(linear.naive, causal=causal, key_mask=real),
                x,
            )

    for d, dtype in ((64, FULL), (64, half), (128, FULL)):
        real = mask(generator, 48)
        options = real, None, None, 0, False, 0.0

        def stateless(*x, options=options):
            """Its value; gradients are those of the op with a state."""
            o = call("linear_fwd", *x, *options)[0]
            with torch.no_grad():
                more = call("linear_stateless_fwd", *x, *options) - o
            return o + more

        def exact(*x, real=real):
            return linear.naive(*x, key_mask=real)[0]

        yield stateless, exact, heads(generator, 48, d, d, d, dtype=dtype)


def rules(generator, n, told, h=2):
    if not told:
        return {"key_mask": None, "slopes": None}, 0.0
    return {"key_mask": mask(generator, n), "slopes": 0.3 / (1 + torch.arange(h)) ** 2}, 30.0


def local_cases(generator, half=HALF):
    line = 80, 96, 0, 0, False  # both edges, and a tile between them
    for d, dtype, window, told in (
        (64, half, line, False),
        (64, half, (16, 16, 16, 32, True), False),  # a causal grid
        (64, half, line, True),
        (64, FULL, (32, 48, 0, 0, False), False),
        (128, half, line, False),
        (256, half, line, False),
        (64, half, (2, 2, 8, 8, False), False),  # one tile
    ):
        left, right, rows, cols, causal = window
        n = rows * cols or 144
        given, cap = rules(generator, n, told)
        seen = softmax.in_window(n, left, right, causal, cols)
        yield softmax_case("local_fwd", seen, given, cap, (), window, n, d, dtype, generator)
        if (d, dtype, cols, told) == (64, half, 0, False):  # each head of k for four of q
            x = n, d, dtype, generator, 8
            yield softmax_case("local_fwd", seen, given, cap, (), window, *x)


def sparse_cases(generator, half=HALF):
    for n, size, d, dtype, h, told in (
        (144, 64, 64, half, 2, False),
        (144, 64, 64, half, 4, True),  # each head of k for two of q
        (144, 64, 64, FULL, 2, False),
        (144, 64, 128, half, 2, False),
        (144, 64, 256, half, 2, False),
        (64, 8, 64, half, 2, False),  # one tile
        (64, 8, 64, half, 2, True),
        (64, 8, 64, FULL, 2, False),
    ):
        causal = size == 64
        count = -(-n // size)
        listed = torch.rand(h, count, count, generator=generator) > 0.3
        listed[:, -1] = listed[..., 0] = True  # long lists, of rows and of columns
        pattern = BlockPattern.from_blocks(listed, size, n)
        seen = softmax.blocks(pattern, causal)
        given, cap = rules(generator, n, told, h)
        x = n, d, dtype, generator, h
        yield softmax_case("sparse_fwd", seen, given, cap, pattern.tensors, (size, causal), *x)


def softmax_case(op, seen, given, cap, pattern, options, n, d, dtype, generator, h=2):
    def f(*x):
        return call(op, *x, *pattern, *given.values(), *options, d**-0.5, cap)[0]

    truth = softmax.ruled(seen, **given, softcap=cap or None, scale=d**-0.5)
    q = heads(generator, n, d, dtype=dtype, h=h)
    return f, lambda *x: truth(*x)[0], q + heads(generator, n, d, d, dtype=dtype)


def moe_cases(generator):
    for c, dtypes in ((256, (FULL, torch.float16, HALF)), (32, (HALF,))):
        for dtype in dtypes:
            sizes = [x * {256: 4, 32: 16}[c] for x in (3, 0, 94, 37, 1, 0, 59, 62)]
            counts = torch.tensor(sizes)

            def exact(x, w, sizes=sizes):
                parts = zip(x.split(sizes), w, strict=True)
                return torch.cat([rows @ weight.mT for rows, weight in parts])

            x = torch.randn(sum(sizes), c, generator=generator).to(dtype)
            w = torch.randn(8, c, c, generator=generator).to(dtype) / 8
            yield lambda x, w, counts=counts: call("moe_grouped", x, w, counts), exact, (x, w)


CASES = {"linear": linear_cases, "local": local_cases, "sparse": sparse_cases, "moe": moe_cases}


@both_ways
@pytest.mark.parametrize("op", CASES)
def test_every_launch(op, prove, generator, monkeypatch):
    from tab.kernels import moe, sparse

    monkeypatch.setattr(sparse, "CUT", 2)  # lists of three blocks are long
    monkeypatch.setattr(moe, "STEPS", 1)  # few rows are summed in two parts
    with segments_of(128):
        prove(op, CASES[op](generator))


def h2o_cases(generator):
    """The choices, few slots and many."""
    for n, half, block in ((64, 16, 16), (640, 224, 64)):
        for dtype in (FULL, HALF):
            # Large scores: their sums lie apart, and no choice turns on a rounding.
            q, k = heads(generator, n, 64, 64, dtype=dtype, scale=2.0)
            options = mask(generator, n), half, half, True, block, 0.1
            yield (
                partial(call, "h2o_choose", q, k, *options),
                partial(choose_reference, q.double(), k.double(), *options),
                (),
            )


@both_ways
def test_every_launch_of_h2o(prove, generator):
    def same(given, exact):
        assert torch.equal(given.sort(-1).values, exact.sort(-1).values)

    prove("h2o", h2o_cases(generator), None, same)


@both_ways
def test_every_launch_of_batches(prove, generator):
    images = torch.randint(256, (9, 32, 32, 3), generator=generator, dtype=torch.uint8)
    index = torch.randint(9, (16,), generator=generator)
    moves = torch.randint(-4, 5, (16, 3), generator=generator).to(torch.int8)
    moves[:, 2] = torch.arange(16) % 2
    mean, scale = torch.rand(3, generator=generator) * 100, torch.rand(3, generator=generator)
    x = images, index, moves, mean, scale
    case = partial(call, "assemble", *x), partial(OPS["assemble"].reference, *x), ()
    prove("batches", [case])


@pytest.mark.compiles
@pytest.mark.parametrize("op", ["linear", "local", "sparse"])
def test_float16(op, generator):
    """It is not among the kernels' own cases, and some of its numbers are compared unwidened."""
    found = (x for x in CASES[op](generator, torch.float16) if x[2][0].dtype == torch.float16)
    f, exact, x = next(found)
    with executed(ARCH) as seen:
        assert_accurate(f, exact, x)
    assert seen and all("*fp16" in launch.types for launch in seen)


@pytest.mark.compiles
def test_the_order_of_warps_does_not_matter(generator):
    """The last warp and block first: the same bits."""
    f, _, x = next(iter(local_cases(generator)))
    results = []
    for reverse in (False, True):
        with executed(ARCH, reverse), poisoned():
            results.append(outputs_and_gradients(f, x))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
