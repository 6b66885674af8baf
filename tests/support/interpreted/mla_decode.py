"""The Triton kernels of `mla_decode`, run by Triton's interpreter on CPU tensors against float64.

tests/ops/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import pytest
import torch
from interpreter import interpreted
from proof import poisoned
from textbook.mla import operands

from tab.kernels import mla_decode as kernels
from tab.ops.mla_decode import decode_reference

(decode,) = interpreted("mla_decode")

CASES = [  # dtype, H, Dn, Dr, R, Dv
    (torch.float32, 3, 5, 4, 7, 6),
    (torch.float32, 17, 8, 0, 35, 4),
    (torch.bfloat16, 18, 16, 4, 24, 8),
    (torch.float16, 2, 16, 4, 40, 8),
]


@pytest.mark.parametrize("part, whole", [(16, 16), (256, 512)])
@pytest.mark.parametrize("dtype, h, dn, dr, r, dv", CASES, ids=str)
def test_sizes(dtype, h, dn, dr, r, dv, part, whole, generator, monkeypatch):
    """Ragged lengths, an empty sequence, one longer than the cache, rows that hold NaN; divided
    sequences with empty parts, and ranks over one tile."""
    monkeypatch.setattr(kernels, "PART", part)
    monkeypatch.setattr(kernels, "WHOLE", whole)
    monkeypatch.setattr(kernels, "COLUMNS", 16)
    qn, qr, c, kr, uk, uv = operands((4, h, 40, dn, dr, r, dv), generator, dtype)
    lengths = torch.tensor([0, 1, 37, 99], dtype=torch.int32)
    cache = torch.cat([c, kr], -1)
    truth_cache = cache.clone()
    for b, length in enumerate(lengths):
        cache[b, length:] = torch.nan
    operands_ = qn[:, :, 0], qr[:, :, 0], uk, uv
    with poisoned():
        given = decode(*operands_[:2], cache, lengths, *operands_[2:], 0.4)
    reference = decode_reference(*operands_[:2], cache, lengths, *operands_[2:], 0.4)
    exact = [t.double() for t in operands_]
    truth = decode_reference(*exact[:2], truth_cache.double(), lengths, *exact[2:], 0.4)
    assert (given[0][0] == 0).all()
    assert (given[1][0] == -torch.inf).all()
    eps = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for a, b, c in zip(given, truth, reference, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (c.dtype, c.shape, c.stride())
        torch.testing.assert_close(a.double()[1:], b[1:], rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype, dr", [(torch.float64, 2), (torch.float32, 129)])
def test_the_reference_outside_the_range(dtype, dr, generator):
    qn, qr, c, kr, uk, uv = operands((1, 2, 3, 4, dr, 3, 2), generator, dtype)
    step = qn[:, :, 0], qr[:, :, 0], torch.cat([c, kr], -1), torch.tensor([2]), uk, uv, 0.1
    for a, b in zip(decode(*step), decode_reference(*step), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
