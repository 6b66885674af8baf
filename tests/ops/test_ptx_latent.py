"""The PTX of latent attention and of its decoding, executed on a CPU as in test_ptx.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from proof import poisoned
from textbook.mla import operands, textbook

from tab.ops.mla_decode import decode_reference

pytest.importorskip("triton")
from ptx.cases import ARCH, FULL, HALF, call, covered, every_launch, launchers, mask
from ptx.machine import executed

pytestmark = pytest.mark.compiles


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


def test_every_launch_of_mla(generator):
    every_launch("mla", mla_cases(generator))


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
