"""Packed batches of gated linear attention: equal to the loop over their sequences."""

import pytest
import torch
from backends import reference_and_cpp
from packs import DV, LENGTHS, D, H, cu, results
from torch.testing import assert_close

from tab import gated_linear_attention
from tab.ops import OPS, _packed_op

T = sum(LENGTHS)
DECAYS = {"head": (), "token": (T,), "channel": (T, D)}


def draw(decay, heads=H, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shape = (heads,) if decay == "head" else (1, heads, *DECAYS[decay])
    x = [torch.randn(1, h, T, d, generator=g) for h, d in ((H, D), (heads, D), (heads, DV))]
    x.append(-torch.rand(shape, generator=g))
    return [t.to(dtype).requires_grad_() for t in x]


def parts(x, lengths=LENGTHS):
    every = [t.split(list(lengths), 2) if t.dim() > 1 else [t] * len(lengths) for t in x]
    return list(zip(*every, strict=True))


def loop(x, **options):
    outs = [gated_linear_attention(*part, return_state=True, **options) for part in parts(x)]
    states = [s if isinstance(s, tuple) else (s,) for _, s in outs]
    return torch.cat([o for o, _ in outs], 2), *map(torch.cat, zip(*states, strict=True))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("heads", [H, 2])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("backend", reference_and_cpp("gated_linear_fwd"))
def test_the_loop(decay, heads, normalize, backend):
    backend = "reference" if decay == "channel" else backend  # C++ has no channels
    options = {"normalize": normalize, "backend": backend}
    x = draw(decay, heads)

    def positive(x):
        return [x[0].exp(), x[1].exp(), *x[2:]] if normalize else x

    def packed(*x):
        return gated_linear_attention(
            *positive(x), cu_seqlens=cu(LENGTHS), return_state=True, **options
        )

    got = results(packed, x)
    want = results(lambda *x: loop(positive(x), **options), x)
    assert got[1].shape == (len(LENGTHS), heads, D, DV)
    assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decay", DECAYS)
def test_what_one_sequence_holds_reaches_no_other(decay):
    x = draw(decay)
    poisoned = [t.detach().clone() for t in x]
    for t in poisoned[:3]:
        t[:, :, 5:8] = torch.nan
    given, want = (gated_linear_attention(*y, cu_seqlens=cu(LENGTHS)) for y in (poisoned, x))
    others = torch.tensor([*range(5), *range(8, T)])
    assert torch.equal(given[:, :, others], want[:, :, others]) and given[:, :, 5:8].isnan().all()


@pytest.mark.parametrize("decay", DECAYS)
def test_from_states_and_to_them(decay):
    """One without tokens keeps its own."""
    x = draw(decay)
    start = torch.randn(len(LENGTHS), H, D, DV, generator=torch.Generator().manual_seed(1))
    o, last = gated_linear_attention(
        *x, cu_seqlens=cu(LENGTHS), initial_state=start, return_state=True
    )
    for i, (part, alone) in enumerate(zip(o.split(list(LENGTHS), 2), parts(x), strict=True)):
        want = gated_linear_attention(*alone, initial_state=start[i : i + 1], return_state=True)
        assert_close((part, last[i : i + 1]), want)
    assert torch.equal(last[1], start[1])
    with pytest.raises(ValueError, match=r"wants initial_state S \(8, 4, 8, 5\)"):
        gated_linear_attention(*x, cu_seqlens=cu(LENGTHS), initial_state=start[:1])


@pytest.mark.parametrize("decay", DECAYS)
def test_derivatives_of_any_order(decay):
    x = draw(decay, dtype=torch.float64)
    x = [(t[:, :, :7] if t.dim() > 1 else t).detach().requires_grad_() for t in x]

    def f(*x):
        return gated_linear_attention(*x, cu_seqlens=cu((2, 0, 3, 1, 1)), return_state=True)

    assert torch.autograd.gradcheck(f, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, x, fast_mode=True)


def test_nested_and_in_the_other_layout():
    x = draw("token")
    want = gated_linear_attention(*x, cu_seqlens=cu(LENGTHS))
    turned = [t.transpose(1, 2) for t in x]
    o = gated_linear_attention(*turned, cu_seqlens=cu(LENGTHS), layout="bnhd")
    assert torch.equal(o.transpose(1, 2), want)
    offsets = cu(LENGTHS, torch.int64)
    q, k, v = (torch.nested.nested_tensor_from_jagged(t[0], offsets) for t in turned[:3])
    o = gated_linear_attention(q, k, v, turned[3], layout="bnhd")
    assert torch.equal(o.values(), want[0].transpose(0, 1))


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_opcheck(decay):
    """Strides too: the gradient of a decay lies as that of a key."""
    q, k, v, g = (t.detach() for t in draw(decay))
    name, g = ("gated_linear", g[..., None]) if decay == "token" else ("channel_gated_linear", g)
    inputs, rest = (q, k, v, g, None, None), (cu(LENGTHS), 0.3)
    torch.library.opcheck(OPS[f"{name}_packed_fwd"].overload, (*inputs, *rest))
    s = torch.ones(len(LENGTHS), H, D, DV)
    torch.library.opcheck(OPS[f"{name}_packed_bwd"].overload, (*inputs, v, s, v, None, *rest))


@pytest.mark.parametrize("way", ["fwd", "bwd"])
def test_ends_are_read_once(way, monkeypatch):
    """To read them waits for the GPU; also where one launch does not take the batch."""
    read, op = [], OPS[f"gated_linear_packed_{way}"]
    q, k, v, g = (t.detach() for t in draw("token"))
    s = torch.ones(len(LENGTHS), H, D, DV)
    given = q, k, v, g[..., None], None, s, *((v, s, v, s) if way == "bwd" else ())
    given = *given, cu(LENGTHS), 0.3
    want = op.reference(*given)
    check = _packed_op.check_ends
    monkeypatch.setattr(_packed_op, "check_ends", lambda *x: read.append(x) or check(*x))
    monkeypatch.setattr(op, "together", lambda ends, *_: None)
    assert_close(op.kernels["triton"](*given), want)
    assert len(read) == 1
