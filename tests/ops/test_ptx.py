"""The PTX that Triton compiles for sm_80, executed on a CPU (tests/support/ptx): every launch of
linear, local, sparse, latent decoding, experts, batches and H2O's choices that `tab doctor
--kernels` knows, at small shapes, against float64. Bounds, alignment and races are watched; shared
memory and outputs start as NaN."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from proof import assert_accurate, outputs_and_gradients, poisoned
from textbook import linear, softmax

from tab import BlockPattern
from tab.doctor.kernel_launches import identity, launches
from tab.ops import OPS
from tab.ops.h2o_choice import choose_reference
from tab.ops.mla_decode import decode_reference

pytest.importorskip("triton")
from ptx.machine import executed

pytestmark = pytest.mark.compiles
ARCH = 80
FULL, HALF = torch.float32, torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def launchers():
    """Triton's launchers in the place of the CUDA C++ ops, for CPU tensors."""
    from tab.kernels._launch import load

    load()
    library = torch.library.Library("tab_cuda", "IMPL")
    for name, op in OPS.items():
        if op.own and "triton" in op.kernels:
            library.impl(name, op.kernels["triton"], "CPU")
    yield
    library._destroy()


def call(op, *args):
    return OPS[op].apply("cuda", *args)


def heads(generator, n, *sizes, dtype, h=2, scale=1.0):
    """(1, H, N, size) each, laid out by tokens as projections give them"""
    drawn = (scale * torch.randn(1, n, h, size, generator=generator) for size in sizes)
    return [x.to(dtype).transpose(1, 2) for x in drawn]


def mask(generator, n):
    some = torch.rand(1, n, generator=generator) > 0.3
    some[:, 0] = True
    return some


# --- cases: (f, textbook, inputs), N a multiple of 16 as in the launchers' own, and of no tile ----


def linear_cases(generator):
    for n, d, causal, dtypes in (
        (48, 64, False, (FULL, HALF)),
        (48, 128, False, (FULL,)),
        (272, 64, False, (HALF,)),
        (272, 64, True, (FULL, HALF)),  # two segments
        (272, 256, True, (FULL,)),
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


def rules(generator, n, told, h=2):
    if not told:
        return {"key_mask": None, "slopes": None}, 0.0
    return {"key_mask": mask(generator, n), "slopes": 0.3 / (1 + torch.arange(h)) ** 2}, 30.0


def local_cases(generator):
    for d, dtype, window, told in (
        (64, HALF, (32, 48, 0, 0, False), False),
        (64, HALF, (16, 16, 16, 32, True), False),  # a causal grid
        (64, HALF, (32, 48, 0, 0, False), True),
        (64, FULL, (32, 48, 0, 0, False), False),
        (128, HALF, (32, 48, 0, 0, False), False),
        (256, HALF, (32, 48, 0, 0, False), False),
        (64, HALF, (2, 2, 8, 8, False), False),  # one tile
    ):
        left, right, rows, cols, causal = window
        n = rows * cols or 208
        given, cap = rules(generator, n, told)
        seen = softmax.in_window(n, left, right, causal, cols)
        yield softmax_case("local_fwd", seen, given, cap, (), window, n, d, dtype, generator)
        if (d, dtype, cols, told) == (64, HALF, 0, False):  # each head of k for four of q
            x = n, d, dtype, generator, 8
            yield softmax_case("local_fwd", seen, given, cap, (), window, *x)


def sparse_cases(generator):
    for n, size, d, dtype, h, told in (
        (192, 64, 64, HALF, 2, False),
        (192, 64, 64, HALF, 4, True),  # each head of k for two of q
        (192, 64, 64, FULL, 2, False),
        (192, 64, 128, HALF, 2, False),
        (192, 64, 256, HALF, 2, False),
        (64, 8, 64, HALF, 2, False),  # one tile
        (64, 8, 64, HALF, 2, True),
        (64, 8, 64, FULL, 2, False),
    ):
        causal = size == 64
        listed = torch.rand(2, n // size, n // size, generator=generator) > 0.3
        listed[:, -1] = listed[..., 0] = True  # long lists, of rows and of columns
        pattern = BlockPattern.from_blocks(listed, size, n)
        seen = softmax.blocks(pattern, causal).repeat_interleave(h // 2, 0)
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
            sizes = [3, 0, 1500, 600, 1, 0, 992, 1000]
            counts = torch.tensor(sizes)

            def exact(x, w, sizes=sizes):
                parts = zip(x.split(sizes), w, strict=True)
                return torch.cat([rows @ weight.mT for rows, weight in parts])

            x = torch.randn(sum(sizes), c, generator=generator).to(dtype)
            w = torch.randn(8, c, c, generator=generator).to(dtype) / 8
            yield lambda x, w, counts=counts: call("moe_grouped", x, w, counts), exact, (x, w)


CASES = {"linear": linear_cases, "local": local_cases, "sparse": sparse_cases, "moe": moe_cases}


def covered(op, seen):
    """Every launch of the op that the report knows was one of these."""
    known = {identity(launch) for launch in launches(ARCH)[op]}
    missing = known - {identity(launch) for launch in seen}
    assert not missing, f"{len(missing)} of {len(known)} launches not executed: {sorted(missing)}"


@pytest.mark.parametrize("op", CASES)
def test_every_launch(op, generator, monkeypatch):
    from tab.kernels import sparse

    monkeypatch.setattr(sparse, "CUT", 2)  # lists of three blocks are long
    seen = []
    for f, exact, x in CASES[op](generator):
        with executed(ARCH) as now:
            assert_accurate(f, exact, x)
        seen += now
    covered(op, seen)


def within(given, exact, dtype):
    """Of one sum after another, as accurate as the dtype."""
    bound = 5e-6 if dtype == FULL else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(given.double(), exact, rtol=bound, atol=bound)


def test_every_launch_of_mla_decode(generator):
    """A sequence in three parts, one of them empty for the other."""
    seen = []
    for h, r, dtypes in ((64, 512, (FULL, HALF)), (16, 64, (HALF,)), (64, 576, (FULL, HALF))):
        for dtype in dtypes:
            q, q_rope, cache = (
                torch.randn(shape, generator=generator).to(dtype)
                for shape in ((2, h, 128), (2, h, 64), (2, 528, r + 64))
            )
            weights = [
                (torch.randn(h, 128, r, generator=generator) / r**0.5).to(dtype) for _ in range(2)
            ]
            lengths = torch.tensor([500, 37], dtype=torch.int32)
            with executed(ARCH) as now, poisoned():
                given = call("mla_decode", q, q_rope, cache, lengths, *weights, 0.02)
            exact = decode_reference(
                *(x.double() for x in (q, q_rope, cache)),
                lengths,
                *(w.double() for w in weights),
                0.02,
            )
            for a, b in zip(given, exact, strict=True):
                within(a, b, dtype)
            seen += now
    covered("mla_decode", seen)


def test_every_launch_of_h2o(generator):
    """The choices, few slots and many."""
    seen = []
    for n, half, block in ((64, 16, 16), (640, 224, 64)):
        for dtype in (FULL, HALF):
            # Large scores: their sums lie apart, and no choice turns on a rounding.
            q, k = heads(generator, n, 64, 64, dtype=dtype, scale=2.0)
            options = mask(generator, n), half, half, True, block, 0.1
            with executed(ARCH) as now, poisoned():
                given = call("h2o_choose", q, k, *options)
            exact = choose_reference(q.double(), k.double(), *options)
            assert torch.equal(given.sort(-1).values, exact.sort(-1).values)
            seen += now
    covered("h2o", seen)


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


def test_the_order_of_warps_does_not_matter(generator):
    """The last warp and block first: the same bits."""
    f, _, x = next(iter(local_cases(generator)))
    results = []
    for reverse in (False, True):
        with executed(ARCH, reverse), poisoned():
            results.append(outputs_and_gradients(f, x))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
