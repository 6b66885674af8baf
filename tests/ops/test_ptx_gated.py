"""The PTX of gated linear attention, executed on a CPU as in test_ptx.py."""

from __future__ import annotations

import pytest
import torch
from textbook.gated_linear import naive

pytest.importorskip("triton")
from ptx.cases import FULL, HALF, both_ways, call, heads, launchers, mask, segments_of


@pytest.fixture(scope="module", autouse=True)
def in_place():
    with launchers():
        yield


def cases(generator):
    """One launch; two segments, of which the second is cut; a head in several pieces."""
    for n, d, dtype in (
        (48, 64, FULL),
        (48, 64, HALF),
        (144, 64, FULL),
        (144, 64, HALF),
        (80, 128, FULL),
        (80, 256, torch.float16),
        (80, 256, HALF),
    ):
        q, k, v = heads(generator, n, d, d, d, dtype=dtype)
        g = -torch.rand(1, n, 2, generator=generator).transpose(1, 2)
        s0 = torch.randn(1, 2, d, d, generator=generator)
        real, scale = mask(generator, n), d**-0.5

        def ours(q, k, v, g, s0, real=real, scale=scale):
            return call("gated_linear_fwd", q, k, v, g[..., None], real, s0, scale)

        def truth(*x, real=real, scale=scale):
            return naive(*x, key_mask=real, scale=scale)

        with segments_of(128 if d == 64 else 64):
            yield ours, truth, (q, k, v, g, s0)
    for dtype in (FULL, HALF):
        q, k, v = heads(generator, 48, 64, 64, 64, dtype=dtype)
        g = -torch.rand(1, 48, 2, generator=generator).transpose(1, 2)
        real = mask(generator, 48)

        def stateless(q, k, v, g, real=real):
            return call("gated_linear_stateless_fwd", q, k, v, g[..., None], real, None, 0.125)

        def exact(*x, real=real):
            return naive(*x, key_mask=real, scale=0.125)[0]

        yield stateless, exact, (q, k, v, g)
        s0, ends = torch.randn(2, 2, 64, 64, generator=generator), torch.tensor([0, 17, 48]).int()

        def packed(q, k, v, g, s0, real=real, ends=ends):
            return call("gated_linear_packed_fwd", q, k, v, g[..., None], real, s0, ends, 0.125)

        def each(*x, real=real):
            *x, s0 = x
            parts = zip(*(y.split((17, 31), 2) for y in x), s0.split(1), strict=True)
            masks = real.split((17, 31), 1)
            outs = [naive(*y, key_mask=z, scale=0.125) for y, z in zip(parts, masks, strict=True)]
            return torch.cat([o for o, _ in outs], 2), torch.cat([s for _, s in outs])

        yield packed, each, (q, k, v, g, s0)


@both_ways
def test_every_launch_of_gated_linear(prove, generator):
    floors = {HALF: 8e-3, torch.float16: 1e-3}  # S is float32, of products of these
    prove("gated_linear", cases(generator), floors)


def normalized_cases(generator):
    """One launch and without states; two segments; a head in several pieces; a packed batch."""
    for n, d, dtype in (
        (48, 64, FULL),
        (48, 64, HALF),
        (144, 64, FULL),
        (144, 64, HALF),
        (80, 256, torch.float16),
        (80, 256, HALF),
    ):
        x, state, real = normalized_inputs(generator, n, d, dtype)

        def ours(q, k, v, g, s0=None, z0=None, real=real):
            given = q, k, v, g[..., None], real, s0, z0
            return call("gated_linear_normalized_fwd", *given)[:3]

        def stateless(q, k, v, g, real=real):
            given = q, k, v, g[..., None], real, None, None
            return call("gated_linear_normalized_stateless_fwd", *given)[0]

        def truth(*x, real=real):
            return naive(*x, normalize=True, key_mask=real)

        with segments_of(128 if d == 64 else 64):
            yield ours, truth, (*x, *state)
        if n == 48:
            yield stateless, lambda *x, truth=truth: truth(*x)[0], x
    for dtype in (FULL, HALF):
        x, state, real = normalized_inputs(generator, 48, 64, dtype, sequences=2)
        ends = torch.tensor([0, 17, 48]).int()

        def packed(q, k, v, g, s0, z0, real=real, ends=ends):
            given = q, k, v, g[..., None], real, s0, z0, ends
            return call("gated_linear_normalized_packed_fwd", *given)[:3]

        def each(*x, real=real):
            parts = zip(*(y.split((17, 31), 2) for y in x[:4]), *(y.split(1) for y in x[4:]),
                        real.split((17, 31), 1), strict=True)  # fmt: skip
            outs = [naive(*y, normalize=True, key_mask=mask) for *y, mask in parts]
            return tuple(torch.cat(y, 0 if i else 2) for i, y in enumerate(zip(*outs, strict=True)))

        yield packed, each, (*x, *state)


def normalized_inputs(generator, n, d, dtype, sequences=1):
    """q, k, v and g, S₀ and z₀, and a mask; keys and queries as a feature map leaves them."""
    q, k, v = heads(generator, n, d, d, d, dtype=dtype)
    g = -torch.rand(1, n, 2, generator=generator).transpose(1, 2)
    s0 = torch.rand(sequences, 2, d, d, generator=generator)
    return (q.abs(), k.abs(), v, g), (s0, s0[..., 0].clone()), mask(generator, n)


@both_ways
def test_every_launch_of_normalized(prove, generator):
    floors = {HALF: 8e-3, torch.float16: 1e-3}
    prove("gated_linear_normalized", normalized_cases(generator), floors)
