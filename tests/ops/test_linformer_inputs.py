"""Linformer's inputs at the edge: what a masked token holds, no batch and no tokens, a learned
scale, autocast of mixed types, second derivatives."""

import math

import pytest
import torch
from proof import assert_accurate
from torch.testing import assert_close

from tab import linformer_attention

B, H, N, D, K = 2, 2, 7, 4, 3


@pytest.fixture
def problem(generator):
    """q, k, v, E, F in float64"""
    sizes = [(B, H, N, D)] * 3 + [(N + 2, K)] * 2
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]


@pytest.fixture
def mask():
    real = torch.ones(B, N, dtype=torch.bool)
    real[0, 5:] = False
    real[1, 0] = False
    return real


def run(tensors, mask):
    """o at the real tokens, and the gradients of a loss on them."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    o = linformer_attention(*leaves, key_mask=mask).transpose(1, 2)[mask]
    o.square().sum().backward()
    return [o.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
@pytest.mark.parametrize("which", [0, 1, 2], ids="qkv")
def test_a_masked_token_reaches_nobody(problem, mask, which, value):
    clean = run(problem, mask)
    problem[which].transpose(1, 2)[~mask] = value
    for a, b in zip(run(problem, mask), clean, strict=True):
        assert_close(a, b)


def test_the_output_of_a_masked_token(problem, mask):
    q, k, v, E, F = problem
    q.transpose(1, 2)[~mask] = math.nan
    o = linformer_attention(q, k, v, E, F, key_mask=mask)
    rows = F[:N].mT @ v.masked_fill(~mask[:, None, :, None], 0.0)  # (B, H, K, Dv)
    want = rows.mean(-2, keepdim=True).expand_as(v)
    assert_close(o.transpose(1, 2)[~mask], want.transpose(1, 2)[~mask])


@pytest.mark.parametrize(("b", "n"), [(0, N), (B, 0), (0, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_to_attend_to(problem, b, n, masked):
    leaves = [x[:b, :, :n].clone().requires_grad_() for x in problem[:3]]
    leaves += [x.clone().requires_grad_() for x in problem[3:]]
    key_mask = torch.ones(b, n, dtype=torch.bool) if masked else None
    o = linformer_attention(*leaves, key_mask=key_mask)
    assert o.shape == (b, H, n, D)
    o.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in leaves)
    assert not leaves[3].grad.any() and not leaves[4].grad.any()


@pytest.mark.parametrize("learned", [True, False])
def test_a_learned_scale_is_refused(problem, learned):
    scale = torch.tensor(0.3, requires_grad=learned)
    with pytest.raises(TypeError, match=r"'scale' must be float, not Tensor.*pass q . scale"):
        linformer_attention(*problem, scale=scale)


def test_autocast_of_mixed_types(problem):
    """Projections in bfloat16, E and F in float32, as in a model under autocast."""
    q, k, v, E, F = (x.float() for x in problem)
    low = [x.bfloat16() for x in (q, k, v, E, F)]
    with pytest.raises(ValueError, match=r"one dtype.*q.*bfloat16.*E.*float32"):
        linformer_attention(*low[:3], E, F)
    with torch.autocast("cpu", torch.bfloat16):
        o = linformer_attention(*low[:3], E, F)
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, linformer_attention(*low))


@pytest.mark.parametrize("masked", [False, True])
def test_second_derivatives(problem, mask, masked):
    def attend(*x):
        return linformer_attention(*x, key_mask=mask if masked else None)

    leaves = [x[:, :1].clone().requires_grad_() if x.dim() == 4 else x for x in problem]
    leaves[3:] = [x.requires_grad_() for x in leaves[3:]]
    assert torch.autograd.gradcheck(attend, leaves)
    assert torch.autograd.gradgradcheck(attend, leaves)


def test_one_tensor_in_every_role(problem):
    """q = k = v: three gradients in one tensor."""
    x, E = problem[0], problem[3]

    def written_out(x, E):
        short = E[:N].mT @ x
        return (x @ short.mT * D**-0.5).softmax(-1) @ short

    assert_accurate(lambda x, E: linformer_attention(x, x, x, E), written_out, [x, E], floor=1e-12)
