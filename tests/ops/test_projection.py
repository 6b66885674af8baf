"""Orthogonal random features: blocks, bias, seeds."""

import torch
from torch.testing import assert_close

from tab import orthogonal_projection


def test_projection_blocks_are_orthogonal(generator):
    w = orthogonal_projection(40, 16, generator=generator, dtype=torch.float64)
    assert w.shape == (40, 16)
    for block in w.split(16):
        gram = block @ block.T
        assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-10)


def test_projection_is_unbiased(generator):
    """E φ(q)·φ(k) = e^(q·k/√D) at D = M = 16. QR without the signs is biased by over 10
    of the standard errors here; row norms that are not χ(D) fail too."""
    d, draws = 16, 20000
    w = orthogonal_projection(d * draws, d, generator=generator, dtype=torch.float64)
    w = w.unflatten(0, (draws, d))  # its blocks are independent
    q = k = torch.eye(d, dtype=torch.float64)[0]
    truth = (q @ k / d**0.5).exp()
    logs = w @ (q + k) * d**-0.25 - (q.square().sum() + k.square().sum()) * d**-0.5 / 2
    estimates = logs.exp().mean(-1) / truth  # (draws,)
    error = estimates.std() / draws**0.5
    assert error < 0.003
    assert abs(estimates.mean() - 1) < 4 * error
    first = w.reshape(-1, d)
    assert (first.mean() / (first.std() / first.numel() ** 0.5)).abs() < 4
    assert abs(first.square().sum(-1).mean() - d) < 0.1  # χ² has mean D
    assert abs(first.square().sum(-1).var() / (2 * d) - 1) < 0.05  # and variance 2 D


def test_projection_by_seed():
    def make(**o):
        return orthogonal_projection(5, 4, generator=torch.Generator().manual_seed(3), **o)

    assert torch.equal(make(), make())
    assert_close(make(), make(dtype=torch.float64).float())
    assert make().dtype == torch.float32 and make(device="meta").device.type == "meta"
    assert not torch.equal(make(), orthogonal_projection(5, 4, generator=torch.Generator()))
