"""The Triton kernels of `mla`, run by Triton's interpreter on CPU tensors against float64.

tests/ops/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import pytest
import torch
from interpreter import interpreted
from proof import LAYOUTS, assert_accurate, outputs_and_gradients, poisoned
from textbook.mla import NAMES, operands, textbook

from tab.ops.mla import backward_reference, bent_mla_fwd, forward_reference, mla_fwd

forward, backward = interpreted("mla_fwd", "mla_bwd")
interpreted("bent_mla_fwd", "bent_mla_bwd")

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


SLOPES = torch.tensor([0.3, 0.02, 0.1])


@pytest.mark.parametrize("dtype, size", CASES[:4:3] + CASES[1:3], ids=str)
@pytest.mark.parametrize("softcap, alibi", [(0.7, False), (0.0, True), (0.7, True)])
def test_capped_and_biased(softcap, alibi, dtype, size, generator):
    x, (b, h, n, *_) = operands(size, generator, dtype), size
    mask, slopes = torch.rand(b, n, generator=generator) > 0.3, SLOPES[:h] if alibi else None
    mask[:, 0] = True
    for causal in (False, True):
        tail = mask, slopes, 0.4, causal, softcap
        truth = textbook(causal, mask, 0.4, softcap, slopes)
        assert_accurate(
            lambda *x, tail=tail: bent_mla_fwd.apply("cuda", *x, *tail)[:2], truth, x, names=NAMES
        )
        exact = [t.double() for t in x]
        peak, want = bent_mla_fwd.apply("cuda", *x, *tail)[2], bent_mla_fwd.reference(*exact, *tail)
        torch.testing.assert_close(peak.double(), want[2], rtol=1e-2, atol=1e-5)


@pytest.mark.any_torch
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
            given = forward(*operands_, *options)
        wanted = forward_reference(*operands_, *options)
        do, lse = torch.randn(wanted[0].shape, generator=generator), wanted[1]
        for dlse in (None, torch.randn(lse.shape, generator=generator)):
            tail = do, dlse, *operands_, *wanted[:2], *options
            with poisoned():
                given += backward(*tail)
            wanted += backward_reference(*tail)
        for a, b in zip(given, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
            assert a.stride() == b.stride()


@pytest.mark.any_torch
@pytest.mark.parametrize("how", LAYOUTS[1:])
def test_layouts(how, generator):
    """The launchers read strides: the values come out as for contiguous inputs, to the bit."""
    x = operands((2, 2, 33, 8, 4, 8, 8), generator, torch.float32, how)
    f = launchers(causal=True)
    pairs = outputs_and_gradients(f, x), outputs_and_gradients(f, [t.contiguous() for t in x])
    for strided, plain in zip(*pairs, strict=True):
        assert torch.equal(strided, plain)


def test_the_reference_outside_the_range(generator):
    cases = [(torch.float64, 4, 2), (torch.float32, 129, 2), (torch.float32, 4, 129)]
    for dtype, dn, dr in cases:
        x = operands((1, 2, 3, dn, dr, 3, 2), generator, dtype)
        given, wanted = (
            forward(*x, None, 0.1, False),
            forward_reference(*x, None, 0.1, False),
        )
        tail = given[0], None, *x, *given[:2], None, 0.1, False
        given += backward(*tail)
        wanted += backward_reference(*tail)
        for a, b in zip(given, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
