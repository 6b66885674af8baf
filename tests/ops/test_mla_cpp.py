"""The C++ kernels of MLA where test_mla.py does not reach: how work is cut."""

import pytest
import torch
from backends import needs_cpp
from proof import assert_accurate, outputs_and_gradients, poisoned
from tasks import threads
from textbook.mla import NAMES, operands, ours, textbook

from tab.functional import mla_attention, mla_decode
from tab.ops.mla import mla_bwd, mla_fwd
from tab.ops.mla_decode import mla_decode_op

pytestmark = needs_cpp("mla_fwd")


@pytest.fixture
def three_threads():
    with threads(3):
        yield


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "size",
    [(1, 1, 600, 16, 8, 24, 16), (1, 5, 300, 8, 1, 16, 8), (70, 2, 5, 4, 3, 6, 33)],
    ids=["queries", "heads", "batch"],
)
def test_cut_for_threads(size, causal, generator):
    """By queries, heads and batch entries; a strip of many keys."""
    x = operands(size, generator)
    assert_accurate(ours("cpp", causal=causal), textbook(causal), x, names=NAMES, floor=5e-6)
    peak = mla_attention(*x, form="fused", backend="cpp", causal=causal, return_max_logits=True)[1]
    truth = mla_attention(*x, form="expand", causal=causal, return_max_logits=True)[1]
    torch.testing.assert_close(peak, truth)


def test_same_bits_on_any_number_of_threads(generator):
    x = operands((5, 3, 70, 8, 4, 8, 8), generator)
    results = []
    for number in (1, 2, 3, 3):
        with threads(number):
            results.append(outputs_and_gradients(ours("cpp", causal=True), x))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_large_scores(generator):
    """Scores in the thousands: the maximum is taken off first."""
    x = operands((2, 2, 33, 8, 4, 8, 8), generator, torch.float64)
    x = [t * 60 if i < 2 else t for i, t in enumerate(x)]
    with poisoned():
        given = outputs_and_gradients(ours("cpp"), x)
    truth = outputs_and_gradients(textbook(), x)
    for a, b in zip(given, truth, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "size", [(1, 8, 1500, 16, 8, 64, 16), (3, 17, 700, 33, 5, 40, 17)], ids=str
)
def test_decode_is_the_reference(size, dtype, generator):
    """Split and ragged; a cache of other strides with NaN past the end; odd and even sizes."""
    b, h, n, dn, dr, r, dv = size
    shapes = (b, h, dn), (b, h, dr), (b, n, 2 * (r + dr)), (h, dn, r), (h, dv, r)
    qn, qr, cache, uk, uv = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    uk, uv, cache = uk / r**0.5, uv / r**0.5, cache[..., : r + dr]
    lengths = torch.tensor([n, 0, 300], dtype=torch.int32)[:b]
    for i, used in enumerate(lengths):
        cache[i, used:] = torch.nan
    x = qn, qr, cache, uk, uv
    truth = mla_decode(
        *(t.double() for t in x[:3]), lengths, uk.double(), uv.double(), backend="reference"
    )
    plain = mla_decode(*x[:3], lengths, uk, uv, backend="reference")
    with poisoned():
        given = mla_decode(*x[:3], lengths, uk, uv, backend="cpp")
    for a, low, exact in zip(given, plain, truth, strict=True):
        assert (a.dtype, a.stride()) == (low.dtype, low.stride())
        assert ((exact == -torch.inf) == (a == -torch.inf)).all()
        error, bound = ((t - exact).nan_to_num(nan=0.0).abs().max().item() for t in (a, low))
        assert error <= 2 * bound + 2e-6


def test_decode_guards_its_memory(generator):
    shapes = (2, 3, 4), (2, 3, 2), (2, 9, 8), (3, 4, 6), (3, 5, 6)
    qn, qr, cache, uk, uv = (torch.randn(s, generator=generator) for s in shapes)
    n = torch.tensor([1, 2])
    for args, says in (
        ((qn, qr, cache[..., 1:], n, uk, uv), "cache has the wrong shape"),
        ((qn, qr, cache, n[:1], uk, uv), "seqlens has the wrong shape"),
        ((qn, qr, cache, n.float(), uk, uv), "seqlens are int32 or int64"),
        ((qn, qr, cache, n, uk.double(), uv), "wrong dtype"),
        ((qn, qr, cache, n, uk, uv[:, :, :5]), "w_uv has the wrong shape"),
    ):
        with pytest.raises(RuntimeError, match=says):
            mla_decode_op.overload(*args, 0.3)


def test_op_guards_its_memory(generator):
    x = operands((2, 3, 9, 8, 4, 8, 6), generator)
    o, lse, _ = mla_fwd("cpp", *x, None, 0.3, False)

    def broken(position, tensor, args):
        return [tensor if i == position else t for i, t in enumerate(args)]

    forward, backward = (*x, None, 0.3, False), (o, None, *x, o, lse, None, 0.3, False)
    with pytest.raises(RuntimeError, match="k_rope has the wrong shape"):
        mla_fwd.overload(*broken(3, x[3][:, :5], forward))
    with pytest.raises(RuntimeError, match="wrong dtype"):
        mla_fwd.overload(*broken(4, x[4].double(), forward))
    with pytest.raises(RuntimeError, match="key_mask has the wrong shape"):
        mla_fwd.overload(*broken(6, torch.ones(2, 8, dtype=torch.bool), forward))
    with pytest.raises(RuntimeError, match="empty dimension"):
        mla_fwd.overload(*(t[:0] if i < 4 else t for i, t in enumerate(x)), None, 0.3, False)
    with pytest.raises(RuntimeError, match="lse has the wrong shape"):
        mla_bwd.overload(*broken(9, lse[:1], backward))
    with pytest.raises(RuntimeError, match="do has the wrong dtype"):
        mla_bwd.overload(*broken(0, o.double(), backward))
