"""Decoding with a latent cache: against the causal forward, at ragged lengths, and its errors."""

import pytest
import torch
from backends import reference_and_cpp
from proof import assert_accurate
from textbook.mla import NAMES, operands, textbook

from tab.functional import mla_attention, mla_decode
from tab.ops.mla_decode import mla_decode_op


def test_decode_token_by_token_is_the_causal_forward(generator):
    qn, qr, c, kr, uk, uv = x = operands((2, 3, 11, 8, 4, 6, 5), generator, torch.float64)
    o, lse = mla_attention(*x, causal=True, return_lse=True)
    cache = torch.full((2, 16, 10), torch.nan, dtype=torch.float64)  # unused rows hold anything
    for i in range(11):
        cache[:, i] = torch.cat([c[:, i], kr[:, i]], -1)
        length = torch.full((2,), i + 1)
        step, step_lse = mla_decode(qn[:, :, i], qr[:, :, i], cache, length, uk, uv)
        torch.testing.assert_close(step, o[:, :, i])
        torch.testing.assert_close(step_lse, lse[:, :, i])


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode_lengths_and_dtypes(dtype, generator):
    """Ragged lengths, an empty sequence, one longer than the cache."""
    x = operands((4, 3, 7, 8, 4, 6, 5), generator, dtype)
    qn, qr, c, kr, uk, uv = x
    cache = torch.cat([c, kr], -1)
    lengths = torch.tensor([0, 1, 5, 99], dtype=torch.int32)
    o, lse = mla_decode(qn[:, :, 0], qr[:, :, 0], cache, lengths, uk, uv, scale=0.4)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    assert (o[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    for b, n in ((1, 1), (2, 5), (3, 7)):
        cut = [t.double() for t in (qn[b : b + 1], qr[b : b + 1], c[b : b + 1], kr[b : b + 1])]
        cut = [t[..., :n, :] for t in cut]
        truth, truth_lse = textbook(scale=0.4)(*cut, uk.double(), uv.double())
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(o[b].double(), truth[0, :, 0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse[b].double(), truth_lse[0, :, 0], atol=1e-5, rtol=1e-5)


def test_decode_gradients_meta_compile(generator):
    qn, qr, c, kr, uk, uv = operands((2, 2, 3, 3, 2, 3, 2), generator, torch.float64)
    x = [t.requires_grad_() for t in (qn[:, :, 0], qr[:, :, 0], torch.cat([c, kr], -1), uk, uv)]
    lengths = torch.tensor([2, 3])

    def f(qn, qr, cache, uk, uv):
        return mla_decode(qn, qr, cache, lengths, uk, uv)

    assert torch.autograd.gradcheck(f, x)
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(*x)
        for a, b in zip(compiled, f(*x), strict=True):
            torch.testing.assert_close(a, b)
        args = (*(t.detach() for t in x[:3]), lengths, *(t.detach() for t in x[3:]), 0.4)
        torch.library.opcheck(
            mla_decode_op.overload, args, test_utils=("test_schema", "test_faketensor")
        )
        meta = mla_decode(*(t.to("meta") for t in args[:-1]))
    assert [t.shape for t in meta] == [(2, 2, 2), (2, 2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", reference_and_cpp("mla_decode"))
def test_decode_gradients_are_those_of_the_causal_forward(backend, dtype, generator):
    """The last token of each sequence, every tensor, o and lse."""

    def last(f):
        def attend(qn, qr, c, kr, uk, uv):
            o, lse = f(qn, qr, c, kr, uk, uv)
            return o[:, :, -1], lse[:, :, -1]

        return attend

    def decode(qn, qr, c, kr, uk, uv):
        cache, lengths = torch.cat([c, kr], -1), torch.full((len(c),), c.shape[1])
        return mla_decode(qn[:, :, -1], qr[:, :, -1], cache, lengths, uk, uv, backend=backend)

    x = operands((2, 3, 9, 8, 4, 6, 5), generator, dtype)
    assert_accurate(decode, last(textbook(causal=True)), x, names=NAMES)


def test_bad_decode(generator):
    qn, qr, c, kr, uk, uv = operands((2, 3, 9, 8, 4, 8, 6), generator)
    cache, n = torch.cat([c, kr], -1), torch.tensor([1, 2])
    qn, qr = qn[:, :, 0], qr[:, :, 0]
    with pytest.raises(ValueError, match=r"cache rows of R \+ Dr = 8 \+ 4.*cache \(2, 9, 11\)"):
        mla_decode(qn, qr, cache[..., 1:], n, uk, uv)
    with pytest.raises(ValueError, match=r"seqlens \(B,\) int32 or int64.*float32"):
        mla_decode(qn, qr, cache, n.float(), uk, uv)
    with pytest.raises(ValueError, match=r"q_nope \(B, H, Dn\).*q_nope \(2, 3, 1, 8\)"):
        mla_decode(qn[:, :, None], qr, cache, n, uk, uv)
    with pytest.raises(ValueError, match=r"w_uk \(3, 8, 8\) to fit"):
        mla_decode(qn, qr, cache, n, uk[:, :7], uv)
