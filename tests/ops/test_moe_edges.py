"""Router and experts at the edge of what they take: no tokens, broken scores, wrong counts."""

import pytest
import torch
from textbook.moe import experts

from tab import moe_experts, noaux_tc_gate

T, E, C, F, K = 5, 4, 6, 3, 2


@pytest.fixture
def problem(generator):
    x = torch.randn(T, C, generator=generator, dtype=torch.float64)
    w13 = torch.randn(E, 2 * F, C, generator=generator, dtype=torch.float64)
    w2 = torch.randn(E, C, F, generator=generator, dtype=torch.float64)
    logits = torch.randn(T, E, generator=generator, dtype=torch.float64)
    return x, w13, w2, *noaux_tc_gate(logits, torch.zeros(E), top_k=K)


@pytest.mark.parametrize("wrong", [-1, E, 99])
def test_an_index_of_no_expert_is_named(problem, wrong):
    *tensors, weights, index, counts = problem
    index[0, 0] = wrong
    with pytest.raises(ValueError, match=rf"index holds .*{wrong}.*there are {E} experts"):
        moe_experts(*tensors, weights, index, counts)


def test_counts_of_another_index_are_refused(problem):
    *tensors, weights, index, _ = problem
    counts = torch.bincount(index.flatten(), minlength=E)
    assert not torch.equal(counts, counts.flip(0))
    with pytest.raises(ValueError, match="as they come from noaux_tc_gate"):
        moe_experts(*tensors, weights, index, counts.flip(0))  # the same sum


def test_no_tokens(problem):
    _, w13, w2, *_ = problem
    x = torch.zeros(0, C, dtype=torch.float64, requires_grad=True)
    w13, w2 = w13.requires_grad_(), w2.requires_grad_()
    logits = torch.zeros(0, E, dtype=torch.float64, requires_grad=True)
    weights, index, counts = noaux_tc_gate(logits, torch.zeros(E), top_k=K)
    assert weights.shape == index.shape == (0, K) and counts.tolist() == [0] * E
    y = moe_experts(x, w13, w2, weights, index, counts)
    assert y.shape == (0, C)
    y.sum().backward()
    assert x.grad.shape == x.shape and logits.grad.shape == logits.shape
    assert not w13.grad.any() and not w2.grad.any()


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_an_expert_that_cannot_be_chosen_is_no_number(bad):
    """Three of four experts are broken, two are to be chosen."""
    bias = torch.tensor([bad, bad, bad, 0.0])
    assert noaux_tc_gate(torch.zeros(1, E), bias, top_k=2)[0].isnan().any()
    broken = torch.tensor([[bad, bad, bad, 0.0], [0.0, 1.0, 2.0, 3.0]])
    if bad != bad:
        weights = noaux_tc_gate(broken, torch.zeros(E), top_k=2)[0]
        assert weights[0].isnan().any() and not weights[1].isnan().any()


def test_an_expert_that_is_shut_is_left_out():
    bias = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0])
    weights, index, _ = noaux_tc_gate(torch.zeros(3, E), bias, top_k=2)
    assert sorted(index[0].tolist()) == [1, 3] and torch.allclose(weights.sum(-1), torch.ones(3))


def test_second_derivatives(problem):
    x, w13, w2, weights, index, counts = problem

    def run(x, w13, w2, weights):
        return moe_experts(x, w13, w2, weights, index, counts)

    leaves = [t.detach().clone().requires_grad_() for t in (x, w13, w2, weights)]
    torch.testing.assert_close(run(*leaves), experts(index)(*leaves))
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_transforms(problem):
    x, w13, w2, weights, index, counts = problem

    def loss(x):
        return moe_experts(x, w13, w2, weights, index, counts).square().sum()

    want = torch.func.grad(lambda x: experts(index)(x, w13, w2, weights).square().sum())(x)
    torch.testing.assert_close(torch.func.grad(loss)(x), want)


def test_a_graph_has_no_break(problem):
    x, w13, w2, weights, index, counts = problem
    run = torch.compile(moe_experts, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        run(x, w13, w2, weights, index, counts), experts(index)(x, w13, w2, weights)
    )
