"""How an op is proven, at its smallest: python -m pytest examples/retention/test_retention.py"""

import pytest
import torch
from retention.op import retention, retention_bwd, retention_fwd

from tab.layers import build_attention
from tab.ops import Op, choose, no_flops

H, GAMMA = 3, [0.5, 0.9, 1.0]
LENGTHS = [1, 63, 64, 65, 200]  # around a chunk, and several


def qkv(n, d=8, dv=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, H, n, w, generator=generator).to(dtype) for w in (d, d, dv)]


def truth(q, k, v):
    """The recurrence, word for word."""
    state, outs = 0.0, []
    for i in range(q.shape[2]):
        gamma = torch.tensor(GAMMA, dtype=q.dtype)[:, None, None]
        state = gamma * state + k[:, :, i, :, None] * v[:, :, i, None]
        outs.append((q[:, :, i, None] @ state)[:, :, 0])
    return torch.stack(outs, 2)


def gradients(f, xs):
    leaves = [x.detach().requires_grad_() for x in xs]
    o = f(*leaves)
    return o, *torch.autograd.grad((o * torch.linspace(-1, 1, o.shape[-1])).sum(), leaves)


@pytest.mark.parametrize("n", LENGTHS)
def test_output_and_gradients_are_those_of_the_recurrence(n):
    found = gradients(lambda *x: retention(*x, gamma=GAMMA), qkv(n))
    for a, b in zip(found, gradients(truth, qkv(n)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_near_as_a_naive_one(dtype):
    """‖o − truth‖ ≤ 2 · ‖naive − truth‖ + floor, forward and each gradient."""
    low = qkv(200, dtype=dtype)
    exact = gradients(truth, [x.double() for x in low])
    naive, found = (gradients(f, low) for f in (truth, lambda *x: retention(*x, gamma=GAMMA)))
    for a, b, t in zip(found, naive, exact, strict=True):
        size = t.abs().max()
        assert (a - t).abs().max() <= 2 * (b - t).abs().max() + 1e-6 * size


def test_any_strides():
    xs = [x.transpose(1, 2).contiguous().transpose(1, 2)[:, :, ::2] for x in qkv(130)]
    torch.testing.assert_close(retention(*xs, gamma=GAMMA), truth(*xs))


def test_operator_and_higher_derivatives():
    q, k, v = (x.requires_grad_() for x in qkv(5, 3, 2))
    torch.library.opcheck(retention_fwd.overload, (q, k, v, GAMMA))
    do = torch.randn(2, H, 5, 2, dtype=q.dtype)
    torch.library.opcheck(retention_bwd.overload, (do, *(x.detach() for x in (q, k, v)), GAMMA))
    f = lambda *x: retention(*x, gamma=GAMMA)  # noqa: E731
    assert torch.autograd.gradcheck(f, (q, k, v)) and torch.autograd.gradgradcheck(f, (q, k, v))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_token_reaches_no_earlier_one(which, value):
    xs = qkv(130)
    right = retention(*xs, gamma=GAMMA)
    xs[which][:, :, 70] = value
    broken = retention(*xs, gamma=GAMMA)
    assert torch.equal(broken[:, :, :70], right[:, :, :70])
    assert not broken[:, :, 70].isfinite().any()


def test_nothing_is_nothing():
    assert retention(*(x[:, :, :0] for x in qkv(4)), gamma=GAMMA).shape == (2, H, 0, 5)


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match=r"each of 3 heads, got \[0\.5\]"):
        retention(*qkv(4), gamma=[0.5])
    with pytest.raises(RuntimeError, match="retention_fwd has no cpp kernel"):
        retention(*qkv(4), backend="cpp")


def test_a_kernel_that_is_registered_later_is_found():
    op, x = Op("twice", "(Tensor x) -> Tensor", lambda x: 2 * x, flops=no_flops), torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="twice has no cpp kernel"):
        choose("cpp", op, x)
    op.implement("cpp", lambda x: x + x, lambda x: None if len(x) < 9 else "only 8 rows")
    assert choose("cpp", op, x) == "cpp"
    with pytest.raises(RuntimeError, match="only 8 rows"):
        choose("cpp", op, torch.ones(9, 3))


def test_the_layer_keeps_the_rule_for_masks():
    layer = build_attention("retention", 16, seq_len=6)
    x, mask = torch.randn(2, 6, 16), torch.ones(2, 6, dtype=torch.bool)
    mask[:, 2] = False
    dirty = x.clone()
    dirty[:, 2] = torch.nan
    y = layer(dirty, mask)
    torch.testing.assert_close(y, layer(x, mask))
    assert not y[:, 2].any()
    rows = layer.attention_matrix(x)
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 4, 6))
    assert not rows.triu(1).any()
