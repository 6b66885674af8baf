"""The Triton kernels of `mla`, run by Triton's interpreter on CPU tensors against float64.

tests/ops/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import pytest
import torch
import triton
from proof import LAYOUTS, assert_accurate, outputs_and_gradients, poisoned
from textbook.mla import NAMES, operands, textbook

from tab.kernels import mla as kernels
from tab.kernels import mla_backward
from tab.kernels import mla_decode as decoding
from tab.ops.mla import backward_reference, forward_reference, mla_fwd
from tab.ops.mla_decode import decode_reference

assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton loads"

# The launchers take the place of the CUDA C++ ops for CPU tensors, in this process only.
torch.library.impl("tab_cuda::mla_fwd", "CPU", kernels.forward)
torch.library.impl("tab_cuda::mla_bwd", "CPU", mla_backward.backward)

CASES = [  # dtype, (B, H, N, Dn, Dr, R, Dv): one token, one tile, several tiles and chunks of R
    (torch.float32, (2, 1, 1, 4, 2, 3, 5)),
    (torch.float32, (1, 3, 31, 12, 4, 7, 20)),
    (torch.float32, (1, 2, 35, 5, 4, 40, 70)),
    (torch.bfloat16, (1, 2, 9, 8, 4, 8, 8)),
    (torch.bfloat16, (1, 2, 67, 16, 4, 70, 24)),
    (torch.float16, (1, 2, 35, 16, 4, 40, 24)),
]


def launchers(causal=False, key_mask=None, scale=None):
    def f(*x):
        s = scale or (x[0].shape[-1] + x[1].shape[-1]) ** -0.5
        return mla_fwd.apply("cuda", *x, key_mask, s, causal)[:2]

    return f


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype, size", CASES, ids=str)
def test_sizes(dtype, size, causal, generator):
    x = operands(size, generator, dtype)
    assert_accurate(launchers(causal), textbook(causal), x, names=NAMES)


@pytest.mark.parametrize("n", [9, 20])
@pytest.mark.parametrize("causal", [False, True])
def test_like_the_reference(n, causal, generator):
    """Key masks, largest scores, queries that see nothing, no rotary part, no gradient of lse."""
    x = operands((3, 2, n, 8, 4, 6, 5), generator)
    mask = torch.rand(3, n, generator=generator) > 0.4
    mask[1], mask[2] = False, True
    mask[0, :3] = False
    plain = [t[..., :0] if i in (1, 3) else t for i, t in enumerate(x)]
    for operands_, key_mask in ((x, mask), (plain, None)):
        options = key_mask, 0.3, causal
        with poisoned():
            given = kernels.forward(*operands_, *options)
        wanted = forward_reference(*operands_, *options)
        do, lse = torch.randn(wanted[0].shape, generator=generator), wanted[1]
        for dlse in (None, torch.randn(lse.shape, generator=generator)):
            tail = do, dlse, *operands_, *wanted[:2], *options
            with poisoned():
                given += mla_backward.backward(*tail)
            wanted += backward_reference(*tail)
        for a, b in zip(given, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts(how, generator):
    """The launchers read strides: the values come out as for contiguous inputs, to the bit."""
    x = operands((2, 2, 33, 8, 4, 8, 8), generator, torch.float32, how)
    f = launchers(causal=True)
    pairs = outputs_and_gradients(f, x), outputs_and_gradients(f, [t.contiguous() for t in x])
    for strided, plain in zip(*pairs, strict=True):
        assert torch.equal(strided, plain)


DECODE = [  # dtype, H, Dn, Dr, R, Dv
    (torch.float32, 3, 5, 4, 7, 6),
    (torch.float32, 17, 8, 0, 35, 4),
    (torch.bfloat16, 18, 16, 4, 24, 8),
    (torch.float16, 2, 16, 4, 40, 8),
]


@pytest.mark.parametrize("part, whole", [(16, 16), (256, 512)])
@pytest.mark.parametrize("dtype, h, dn, dr, r, dv", DECODE, ids=str)
def test_decode(dtype, h, dn, dr, r, dv, part, whole, generator, monkeypatch):
    """Ragged lengths, an empty sequence, one longer than the cache, rows that hold NaN; divided
    sequences with empty parts, and ranks over one tile."""
    monkeypatch.setattr(decoding, "PART", part)
    monkeypatch.setattr(decoding, "WHOLE", whole)
    monkeypatch.setattr(decoding, "COLUMNS", 16)
    qn, qr, c, kr, uk, uv = operands((4, h, 40, dn, dr, r, dv), generator, dtype)
    lengths = torch.tensor([0, 1, 37, 99], dtype=torch.int32)
    cache = torch.cat([c, kr], -1)
    truth_cache = cache.clone()
    for b, length in enumerate(lengths):
        cache[b, length:] = torch.nan
    operands_ = qn[:, :, 0], qr[:, :, 0], uk, uv
    with poisoned():
        given = decoding.decode(*operands_[:2], cache, lengths, *operands_[2:], 0.4)
    reference = decode_reference(*operands_[:2], cache, lengths, *operands_[2:], 0.4)
    exact = [t.double() for t in operands_]
    truth = decode_reference(*exact[:2], truth_cache.double(), lengths, *exact[2:], 0.4)
    assert (given[0][0] == 0).all()
    assert (given[1][0] == -torch.inf).all()
    eps = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for a, b, c in zip(given, truth, reference, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (c.dtype, c.shape, c.stride())
        torch.testing.assert_close(a.double()[1:], b[1:], rtol=eps, atol=eps)


def test_the_reference_outside_the_range(generator):
    cases = [(torch.float64, 4, 2), (torch.float32, 129, 2), (torch.float32, 4, 129)]
    for dtype, dn, dr in cases:
        x = operands((1, 2, 3, dn, dr, 3, 2), generator, dtype)
        given, wanted = (
            kernels.forward(*x, None, 0.1, False),
            forward_reference(*x, None, 0.1, False),
        )
        tail = given[0], None, *x, *given[:2], None, 0.1, False
        given += mla_backward.backward(*tail)
        wanted += backward_reference(*tail)
        qn, qr, c, kr, uk, uv = x
        step = qn[:, :, 0], qr[:, :, 0], torch.cat([c, kr], -1), torch.tensor([2]), uk, uv, 0.1
        given += decoding.decode(*step)
        wanted += decode_reference(*step)
        for a, b in zip(given, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
