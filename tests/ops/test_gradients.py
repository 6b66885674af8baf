"""Derivatives of every order: first by the kernels, higher ones by the reference."""

import pytest
import torch
from backends import reference_and_cpp
from torch.autograd import gradcheck, gradgradcheck

from tab import linear_attention, orthogonal_projection, performer_attention
from tab.ops.linear import linear_bwd, linear_fwd

BACKENDS = reference_and_cpp("linear_fwd")
KEEP = torch.tensor([[True, True, False, True, True]])


def right(f, x):
    """Both orders, in random directions of the Jacobian."""
    return gradcheck(f, x, fast_mode=True) and gradgradcheck(f, x, fast_mode=True)


def draw(generator, *shapes):
    """float64 leaves, away from the kink of relu."""
    x = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [(t + 0.05 * t.sign()).requires_grad_() for t in x]


def qkv(generator):
    return draw(generator, (1, 2, 5, 3), (1, 2, 5, 3), (1, 2, 5, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("feature_map", ("elu1", "relu", "softmax"))
def test_linear(backend, causal, feature_map, generator):
    if feature_map == "softmax" and causal:
        return
    options = {"causal": causal, "feature_map": feature_map, "eps": 0.5, "backend": backend}
    for key_mask in (None, KEEP):
        x = qkv(generator)

        def f(*x):
            return linear_attention(*x, key_mask=key_mask, **options)  # noqa: B023

        assert right(f, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", (False, True))
def test_linear_states(backend, causal, generator):
    def f(q, k, v, s, z):
        o, state = linear_attention(
            q, k, v, causal=causal, initial_state=(s, z.exp()), return_state=True, backend=backend
        )
        return o, *state

    x = [*qkv(generator), *draw(generator, (1, 2, 3, 2), (1, 2, 3))]
    assert right(f, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("kernel", ("softmax", "relu"))
@pytest.mark.parametrize("state", (False, True))
def test_performer(backend, causal, kernel, state, generator):
    w = orthogonal_projection(6, 3, generator=generator, dtype=torch.float64)
    c0 = torch.rand(1, 2, 6, generator=generator, dtype=torch.float64) * (kernel == "softmax")
    # eps stands beside the shifted denominator, whose shift is a constant to the gradient: only
    # "relu", which has none, can be compared with differences.
    options = {"eps": 0.5 * (kernel == "relu"), "causal": causal, "backend": backend}

    def f(q, k, v, s=None, z=None):
        first = None if s is None else (s, z.exp(), c0)
        o, (s, z, c) = performer_attention(
            q, k, v, w, kernel=kernel, key_mask=KEEP, initial_state=first, return_state=True,
            **options,
        )  # fmt: skip
        return o, s * c.exp()[..., None], z * c.exp()

    x = [*qkv(generator), *(draw(generator, (1, 2, 6, 2), (1, 2, 6)) if state else ())]
    assert right(f, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_that_are_one_tensor(backend, generator):
    """q, k and v the same, or made from each other: each path counts once."""
    (x,) = draw(generator, (1, 2, 5, 3))
    assert gradgradcheck(lambda x: linear_attention(x, x, x, backend=backend), [x])
    assert gradgradcheck(lambda x: linear_attention(x, x * x, x, backend=backend), [x])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_denominator_has_no_second_derivative(backend, generator):
    q, k, v = qkv(generator)
    nobody = torch.zeros(1, 5, dtype=torch.bool)
    w = orthogonal_projection(6, 3, generator=generator, dtype=torch.float64)
    for o in (
        linear_attention(q, k, v, key_mask=nobody, backend=backend),
        performer_attention(q, k, v, w, key_mask=nobody, backend=backend),
    ):
        first = torch.autograd.grad(o.square().sum(), (q, k, v), create_graph=True)
        for x in torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v)):
            assert torch.equal(x, torch.zeros_like(x))


def test_transforms(generator):
    """torch.func: grad, vmap, jvp, hessian, gradients of single samples."""
    q, k, v = (x.detach() for x in draw(generator, *[(3, 2, 5, 4)] * 3))
    w = orthogonal_projection(6, 4, generator=generator, dtype=torch.float64)
    for attention in (linear_attention, lambda q, k, v: performer_attention(q, k, v, w)):

        def loss(q, k=k, v=v, attention=attention):
            return attention(q, k, v).sin().sum()

        leaf = q.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(loss)(q), grad)
        torch.testing.assert_close(torch.func.jvp(loss, (q,), (k,))[1], (grad * k).sum())
        hessian = torch.autograd.functional.hessian(loss, q)
        torch.testing.assert_close(torch.func.hessian(loss)(q), hessian)
        assert hessian.abs().max() > 0.01
        each = torch.func.vmap(torch.func.grad(lambda *x: loss(*(t[None] for t in x))))(q, k, v)
        torch.testing.assert_close(each, grad)


def test_the_backward_op_says_that_it_is_the_last(generator):
    q, k, v = qkv(generator)
    rest = None, None, None, 0, False, 0.0
    o, s, z = linear_fwd.overload(q, k, v, *rest)
    assert o.requires_grad
    dq = linear_bwd.overload(o.detach(), None, None, q, k, v, o, s, z, *rest)[0]
    with pytest.raises(NotImplementedError, match=r"linear_bwd has no derivative.*create_graph"):
        dq.sum().backward()
