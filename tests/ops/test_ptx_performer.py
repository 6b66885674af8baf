"""The PTX of performer, executed on a CPU as in test_ptx.py."""

from __future__ import annotations

import pytest
import torch
from proof import outputs_and_gradients, poisoned
from textbook.performer import draw, naive

from tab.ops import OPS

pytest.importorskip("triton")
from ptx.cases import ARCH, FULL, HALF, both_ways, call, launchers, mask, segments_of
from ptx.machine import executed


@pytest.fixture(scope="module", autouse=True)
def in_place():
    with launchers():
        yield


def performer(w, key_mask, c0, causal):
    """-> o and the true sums S·e^c, z·e^c, from those of before at a shift c0; what the op returns,
    and what the paper has, where features carry the root of M that cancels in o."""

    def ours(q, k, v, s0, z0):
        o, s, z, c, _ = call("performer_fwd", q, k, v, w, key_mask, s0, z0, c0, 0, causal, 0.0)
        return o, s * c.exp()[..., None], z * c.exp()

    def paper(q, k, v, s0, z0):
        part = c0.to(s0.dtype).exp() / w.shape[0] ** 0.5
        state = s0 * part[..., None], z0 * part
        o, s, z = naive(q, k, v, *state, w=w, causal=causal, key_mask=key_mask)
        return o, s * w.shape[0] ** 0.5, z * w.shape[0] ** 0.5

    return ours, paper


def cases(generator, half=HALF):
    """One launch, and two segments of which the second is cut; of one tile across D, and of two."""
    for n, d, features, causal, dtype in (
        (48, 64, 256, False, half),
        (48, 64, 256, False, FULL),
        (80, 64, 256, True, half),
        (80, 128, 256, True, half),
        (48, 256, 512, True, FULL),
    ):
        q, k, v, w = draw(generator, 1, 2, n, d, d, features, dtype, 0.5)
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        s0 = torch.randn(1, 2, features, d, generator=generator)
        z0 = torch.rand(1, 2, features, generator=generator) + 1
        c0 = 0.1 * torch.randn(1, 2, features, generator=generator)
        x = q, k, v, s0, z0
        with segments_of(32 if causal and dtype == FULL else 64):
            yield *performer(w, mask(generator, n), c0, causal), x


@both_ways
def test_every_launch_of_performer(prove, generator):
    prove("performer", cases(generator))


@pytest.mark.compiles
def test_pairs_one_by_one(generator):
    """Keys whose shift rises by hundreds within a tile, and from tile to tile of a segment."""
    q, k, v, w = draw(generator, 1, 2, 64, 16, 16, 32, torch.bfloat16)
    k[:, :, :7] *= 8
    k[:, :, 32:40] *= 8

    def f(backend):
        return lambda *x: OPS["performer_fwd"].apply(
            backend, *x, w.to(torch.promote_types(x[0].dtype, torch.float32)), *(None,) * 4, 0,
            True, 0.0,
        )[0]  # fmt: skip

    with executed(ARCH) as seen, poisoned():
        given = outputs_and_gradients(f("cuda"), (q, k, v))
    assert "performer_pull" in {launch.kernel.__name__ for launch in seen}
    exact = outputs_and_gradients(f("reference"), [x.double() for x in (q, k, v)])
    for x, y in zip(given, exact, strict=True):
        assert (x.double() - y).abs().max() <= 0.05 * max(1.0, y.abs().max())
