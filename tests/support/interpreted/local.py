"""The Triton kernels of `local`, run by Triton's interpreter on CPU tensors against float64.

tests/ops/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import pytest
import torch
from interpreter import interpreted
from proof import LAYOUTS, assert_accurate, layout
from textbook.softmax import in_window, naive

from tab.ops._softmax import lse_as_column
from tab.ops.local import backward_reference, forward_reference, local_fwd

forward, backward = interpreted("local_fwd", "local_bwd")

NAMES = "o dq dk dv"


def check(x, left, right, rows=0, cols=0, causal=False, scale=0.4, floor=2e-6):
    n, options = x[0].shape[2], (left, right, rows, cols, causal)
    assert_accurate(
        lambda *x: local_fwd.apply("cuda", *x, None, None, *options, scale, 0.0)[0],
        naive(in_window(n, left, right, causal, cols), scale),
        x,
        floor=floor,
        names=NAMES,
    )


def inputs(n, d, dv, generator, dtype=torch.float32, h=2):
    shapes = ((1, h, n, d), (1, h, n, d), (1, h, n, dv))
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


@pytest.mark.parametrize(
    "n, left, right",
    [(1, 0, 0), (5, 0, 0), (33, 1, 1), (63, 100, 100), (130, 5, 40), (131, 70, 0), (97, 33, 95)],
)
def test_line(n, left, right, generator):
    check(inputs(n, 8, 12, generator), left, right)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "rows, cols, left, right", [(8, 8, 1, 1), (3, 21, 0, 2), (65, 1, 7, 3), (7, 10, 9, 9)]
)
def test_grid(rows, cols, left, right, causal, generator):
    check(inputs(rows * cols, 8, 4, generator), left, right, rows, cols, causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [9, 150])
def test_dtypes(dtype, n, generator):
    check(inputs(n, 16, 16, generator, dtype), 20, 3)


@pytest.mark.parametrize("d, dv", [(80, 3), (3, 130)])
def test_wide_heads(d, dv, generator):
    """Several tiles across a head, and tiles that its end cuts."""
    check(inputs(40, d, dv, generator, h=1), 10, 10, scale=0.2)


@pytest.mark.any_torch
def test_far_scores(generator):
    """Scores in the hundreds, where exp overflows without the running maximum; the saved L of that
    size has lost as many digits."""
    check([12 * x for x in inputs(70, 4, 4, generator)], 10, 10, floor=2e-5)


@pytest.mark.any_torch
@pytest.mark.parametrize("how", LAYOUTS[1:])
def test_layouts(how, generator):
    """The launchers read strides: the values come out as for contiguous inputs, to the bit."""
    q, k, v, do = (torch.randn(2, 2, 35, 8, generator=generator) for _ in range(4))
    x, results = [layout(t, how) for t in (q, k, v, do)], []
    options = None, None, 4, 2, 5, 7, True, 0.3, 0.0
    for q, k, v, do in (x, [t.contiguous() for t in x]):
        o, lse = forward(q, k, v, *options)
        results.append((o, lse, *backward(do, q, k, v, o, lse, *options)))
    for strided, plain in zip(*results, strict=True):
        assert torch.equal(strided, plain)
        assert strided.stride() == plain.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows, cols", [(0, 0), (4, 9)])
def test_like_the_reference(dtype, rows, cols, generator):
    """lse, strides and types too, causal on a line too; float64 is the reference's."""
    q, k, v, do = (torch.randn(1, 2, 36, 8, generator=generator).to(dtype) for _ in range(4))
    options = None, None, 3, 1, rows, cols, True, 0.3, 0.0
    given, wanted = forward(q, k, v, *options), forward_reference(q, k, v, *options)
    given += backward(do, q, k, v, *wanted, *options)
    wanted += backward_reference(do, q, k, v, *wanted, *options)
    for x, y in zip(given, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        assert x.stride() == y.stride()


def test_gradient_through_lse(generator):
    """As one more column of do, v and o."""
    x = inputs(40, 8, 12, generator)
    do, dlse = (torch.randn(1, 2, 40, *w, generator=generator) for w in ((12,), ()))
    options = None, None, 7, 3, 0, 0, False, 0.4, 0.0
    exact = [t.double().requires_grad_() for t in x]
    scores = (exact[0] @ exact[1].mT * 0.4).masked_fill(~in_window(40, 7, 3), -torch.inf)
    truth = scores.softmax(-1) @ exact[2], scores.logsumexp(-1)
    wanted = torch.autograd.grad(truth, exact, (do.double(), dlse.double()))
    o, lse = forward(*x, *options)
    do, v, o = lse_as_column(do, dlse, x[2], o)
    dq, dk, dv = backward(do, *x[:2], v, o, lse, *options)
    for got, want in zip((dq, dk, dv[..., :-1]), wanted, strict=True):
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)
