"""The vector helpers under every CPU kernel, seen through linear's op, which adds nothing to them:

φ(k) of one token is z exactly, v times φ(k) = 1 is S exactly, and S over z = 1 is o but rounded.
"""

import math

import pytest
import torch
from backends import needs_cpp

import tab
from tab.ops.linear import linear_fwd

# The arithmetic of one and the same binary, whatever torch loads it.
pytestmark = [needs_cpp("linear_fwd"), pytest.mark.any_torch]
ELU1, IDENTITY = 0, 2
HALVES = (torch.float16, torch.bfloat16)


def through_exp(x):
    """exp(x) for x (rows, 256) ≤ 0, as φ of elu + 1."""
    k = x[:, None, None, :]  # (B, 1, 1, D)
    v = x.new_ones(x.shape[0], 1, 1, 1)
    return linear_fwd("cpp", k, k, v, None, None, None, ELU1, False, 0.0)[2][:, 0]


def ulps(given, exact):
    """|given − exact| in units of the last place of `given`'s type; exact in float64."""
    tiny = torch.finfo(given.dtype).tiny
    spacing = torch.finfo(given.dtype).eps * torch.exp2(exact.clamp_min(tiny).log2().floor())
    return ((given.double() - exact).abs() / spacing).max().item()


@pytest.mark.each_isa
def test_exp_float32():
    x = torch.linspace(-104, 0, 256 * 8192, dtype=torch.float64).float().view(-1, 256)
    x = torch.cat([x, -torch.logspace(-30, 0, 256 * 64).view(-1, 256)])
    assert ulps(through_exp(x), x.double().exp()) < 1.6


@pytest.mark.each_isa
def test_exp_float64():
    x = torch.linspace(-700, 0, 256 * 256, dtype=torch.float64).view(-1, 256)
    assert ulps(through_exp(x), x.exp()) < 2.5  # torch's own exp may be half a unit off


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_exp_at_the_edges(dtype):
    x = torch.tensor([-torch.inf, -1e30, torch.nan, -0.0, 0.0], dtype=dtype).repeat(1, 52)
    given = through_exp(x)[0, :5]
    assert torch.equal(given[:2], torch.zeros(2, dtype=dtype)) and given[2].isnan()
    assert torch.equal(given[3:], torch.ones(2, dtype=dtype))


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", HALVES)
def test_loads_every_half(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    v = bits.view(dtype).view(256, 1, 1, 256)
    one = torch.ones(256, 1, 1, 1, dtype=dtype)
    s = linear_fwd("cpp", one, one, v, None, None, None, IDENTITY, False, 0.0)[1]
    want = v.float() * 1.0
    assert torch.equal(s.isnan(), want.isnan())
    assert torch.equal(s.nan_to_num(0.5), want.nan_to_num(0.5))


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", HALVES)
def test_stores_round_to_nearest_even(dtype, generator):
    bits = torch.randint(-(2**31), 2**31, (2**20,), generator=generator).to(torch.int32)
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    values = values[values.isfinite()]
    ties = (values[1:] + values[:-1]) / 2  # halfway between neighbours
    edges = torch.tensor([65503.9, 65504.0, 65519.9, 65520.0, 3.4e38, torch.inf, torch.nan, 0.0])
    x = torch.cat([bits.view(torch.float32), values, ties, edges, -edges])
    x = torch.nn.functional.pad(x, (0, -len(x) % 256)).view(-1, 1, 1, 256)  # (B, H, D = 1, Dv)
    x = torch.where(x.abs() < 1e-37, torch.zeros_like(x), x)
    one = torch.ones(len(x), 1, 1, 1, dtype=dtype)
    hidden = torch.zeros(len(x), 1, dtype=torch.bool)
    state = x, torch.ones(len(x), 1, 1)
    v = torch.zeros(len(x), 1, 1, 256, dtype=dtype)
    o = linear_fwd("cpp", one, one, v, hidden, *state, IDENTITY, False, 0.0)[0]
    want = x.to(dtype)
    assert torch.equal(o.isnan(), want.isnan())
    assert torch.equal(o.nan_to_num(0.5), want.nan_to_num(0.5))


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_no_weight_of_a_softmax_is_all_but_subnormal(dtype):
    """2^x, seen through local attention: the second of two keys has the weight o, almost 2^x."""
    bits = {torch.float32: 99.5, torch.float64: 969.5}[dtype]
    x = -torch.linspace(1, 1.6 * bits, 2000, dtype=torch.float64)
    q = torch.stack([torch.zeros_like(x), x * math.log(2)], 1)[:, None, :, None]  # (B, 1, 2, 1)
    k, v = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=dtype).view(2, 1, 1, 2, 1)
    with torch.no_grad():
        o = tab.local_attention(
            q.to(dtype), k.expand(len(x), -1, -1, -1), v.expand(len(x), -1, -1, -1),
            window=1, scale=1.0, backend="cpp",
        )[:, 0, 1, 0].double()  # fmt: skip
    exact = x.exp2() / (1 + x.exp2())
    assert (o[x < -bits - 0.01] == 0).all() and (x < -bits).any()
    assert ((o / exact - 1).abs()[x > 0.01 - bits] < 1e-4).all()
