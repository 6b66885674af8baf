"""FAVOR+ within PyTorch: gradcheck, opcheck, torch.compile, meta tensors, autocast, errors."""

import pytest
import torch
from backends import reference_and_cpp
from proof import outputs_and_gradients
from textbook.performer import KERNELS, call, draw
from torch.testing import assert_close

from tab import orthogonal_projection, performer_attention
from tab.ops import OPS, use_backend

BACKENDS = reference_and_cpp("performer_fwd")
each_backend = pytest.mark.usefixtures("backend")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


@each_backend
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", (False, True))
def test_gradcheck(generator, causal, kernel):
    q, k, v, w = draw(generator, b=1, h=2, n=5, d=4, dv=3, m=6, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(call(w, causal=causal, kernel=kernel), leaves)


@pytest.mark.parametrize("kernel", (0, 1))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("state", (False, True))
def test_opcheck(generator, causal, kernel, state):
    q, k, v, w = draw(generator, n=9)
    mask = torch.rand(2, 9, generator=generator) < 0.7
    first = (torch.rand(2, 3, 12, 8), torch.rand(2, 3, 12), torch.zeros(2, 3, 12))
    first = first if state else (None, None, None)
    forward = (q, k, v, w, mask, *first, kernel, causal, 0.0)
    saved = OPS["performer_fwd"].overload(*forward)
    ds, dz = (torch.randn_like(x) if state else None for x in saved[1:3])
    backward = (
        torch.randn_like(saved[0]),
        ds,
        dz,
        q,
        k,
        v,
        w,
        *saved,
        mask,
        *first,
        kernel,
        causal,
    )
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS["performer_fwd"].overload, forward, test_utils=tests)
    torch.library.opcheck(OPS["performer_bwd"].overload, backward, test_utils=tests)


def test_compile_meta_autocast(generator):
    q, k, v, w = draw(generator, n=16)

    def f(q, k, v, w):
        o, (s, z, c) = performer_attention(q, k, v, w, causal=True, return_state=True)
        return performer_attention(o, k, v, w, causal=True, initial_state=(s, z, c))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for result, plain in zip(
        outputs_and_gradients(lambda *x: compiled(*x, w), (q, k, v)),
        outputs_and_gradients(lambda *x: f(*x, w), (q, k, v)),
        strict=True,
    ):
        assert_close(result, plain)
    meta = performer_attention(*(x.to("meta") for x in (q, k, v, w)))
    assert meta.shape == v.shape and meta.transpose(1, 2).is_contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        assert performer_attention(q, k, v, w).dtype == torch.bfloat16


def test_errors(generator):
    q, k, v, w = draw(generator, n=4)
    b, h, m, dv = 2, 3, 12, 8
    state = torch.zeros(b, h, m, dv), torch.zeros(b, h, m), torch.zeros(b, h, m)
    for bad, words in (
        (lambda: performer_attention(q, k, v, w[:, :-1]), r"D = 8.*\(12, 7\)"),
        (lambda: performer_attention(q, k, v, w.double()), "float32.*float64"),
        (lambda: performer_attention(q, k, v, w.clone().requires_grad_()), "detach"),
        (lambda: performer_attention(q, k, v, w, kernel="cosine"), "softmax, relu"),
        (lambda: performer_attention(q, k, v, w, eps=-1), "eps ≥ 0"),
        (lambda: performer_attention(q[0], k, v, w), r"\(B, H, N, D\)"),
        (lambda: performer_attention(q, k, v, w, key_mask=torch.ones(2, 5).bool()), r"\(2, 4\)"),
        (lambda: performer_attention(q, k, v, w, backend="fast"), "choose one of"),
        (
            lambda: performer_attention(q, k, v, w, initial_state=(*state[:2], state[2].double())),
            "initial_state",
        ),
        (lambda: orthogonal_projection(0, 4), "num_features ≥ 1"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()
    with pytest.raises(RuntimeError, match="runs on cuda"):
        performer_attention(q, k, v, w, backend="triton")
