"""The PTX of latent attention and of its decoding, executed on a CPU as in test_ptx.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from textbook.mla import operands, textbook

from tab.ops.mla_decode import decode_reference

pytest.importorskip("triton")
from ptx.cases import FULL, HALF, both_ways, call, launchers, mask


@pytest.fixture(scope="module", autouse=True)
def in_place():
    with launchers():
        yield


def latent(*x, key_mask, scale, causal):
    return call("mla_fwd", *x, key_mask, scale, causal)[:2]


def bent(*x, key_mask, slopes, scale, causal, softcap):
    return call("bent_mla_fwd", *x, key_mask, slopes, scale, causal, softcap)[:2]


def mla_cases(generator):
    """One tile, and several of which the last is cut; the heads of kernels/mla.py."""
    for n, dn, dr, r, dv, causal, dtype in (
        (48, 48, 16, 128, 64, False, FULL),
        (48, 48, 16, 128, 64, False, HALF),
        (80, 128, 64, 512, 128, True, HALF),
        (24, 128, 64, 512, 128, True, FULL),
        (24, 256, 128, 512, 256, True, torch.float16),
        (24, 256, 128, 512, 256, True, HALF),
    ):
        x = operands((1, 2, n, dn, dr, r, dv), generator, dtype)
        options = {"causal": causal, "key_mask": mask(generator, n), "scale": (dn + dr) ** -0.5}
        if dtype == HALF and dn < 256:  # also capped and biased
            more = {"slopes": torch.tensor([0.3, 0.02]), "softcap": 3.0, **options}
            yield partial(bent, **more), textbook(**more), x
        yield partial(latent, **options), textbook(**options), x


@both_ways
def test_every_launch_of_mla(prove, generator):
    prove("mla", mla_cases(generator))


def decode_cases(generator):
    """A sequence in three parts, one of them empty for the other."""
    lengths = torch.tensor([500, 37], dtype=torch.int32)
    for h, r, dtypes in ((64, 512, (FULL, HALF)), (16, 64, (HALF,)), (64, 576, (FULL, HALF))):
        for dtype in dtypes:
            x = [
                torch.randn(shape, generator=generator).to(dtype)
                for shape in ((2, h, 128), (2, h, 64), (2, 528, r + 64))
            ]
            weights = [
                (torch.randn(h, 128, r, generator=generator) / r**0.5).to(dtype) for _ in range(2)
            ]

            def exact(x=x, weights=weights, dtype=dtype):
                doubled = [[t.double() for t in given] for given in (x, weights)]
                out = decode_reference(*doubled[0], lengths, *doubled[1], 0.02)
                return [(y, dtype) for y in out]

            yield partial(call, "mla_decode", *x, lengths, *weights, 0.02), exact, ()


@both_ways
def test_every_launch_of_mla_decode(prove, generator):
    def same(given, exact):
        """Of one sum after another, as accurate as the dtype."""
        for x, (y, dtype) in zip(given, exact, strict=True):
            bound = 5e-6 if dtype == FULL else 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(x.double(), y, rtol=bound, atol=bound)

    prove("mla_decode", decode_cases(generator), None, same)
