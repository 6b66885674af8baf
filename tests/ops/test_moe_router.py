"""The router against a loop over tokens, in Python numbers."""

import pytest
import torch
from textbook.moe import gate

from tab.functional import noaux_tc_gate
from tab.ops.router import expert_counts


@pytest.mark.parametrize("shift", [0.0, -5.0, 5.0], ids=lambda s: f"bias {s:+}")
@pytest.mark.parametrize(
    ("experts", "top_k", "n_group", "topk_group"),
    [(1, 1, 1, 1), (8, 2, 1, 1), (8, 8, 1, 1), (12, 3, 4, 2), (12, 6, 4, 2), (6, 2, 6, 3)],
)
def test_gate(experts, top_k, n_group, topk_group, shift, generator):
    logits = torch.randn(3, 7, experts, generator=generator, dtype=torch.float64)
    bias = torch.randn(experts, generator=generator, dtype=torch.float64) * 0.3 + shift
    options = {"n_group": n_group, "topk_group": topk_group, "route_scale": 2.5}
    weights, index, counts = noaux_tc_gate(logits, bias, top_k=top_k, **options)
    assert weights.shape == index.shape == (3, 7, top_k)
    for b in range(3):
        for t in range(7):
            slow = gate(logits[b, t], bias, top_k, **options)
            given = dict(zip(index[b, t].tolist(), weights[b, t].tolist(), strict=True))
            assert given == pytest.approx(slow)
    assert counts.tolist() == torch.bincount(index.flatten(), minlength=experts).tolist()


def test_gate_gradient_passes_the_weights_only(generator):
    logits = torch.randn(5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: noaux_tc_gate(x, bias, top_k=2)[0], logits)
    weights, *_ = noaux_tc_gate(logits, bias, top_k=2)
    assert torch.autograd.grad(weights.square().sum(), bias, allow_unused=True) == (None,)


def test_gate_is_float32_in_any_company(generator):
    logits = torch.randn(4, 8, generator=generator)
    half, bias = logits.bfloat16(), torch.zeros(8)
    with torch.autocast("cpu", torch.bfloat16):
        weights, index, _ = noaux_tc_gate(half, bias, top_k=2)
    truth = noaux_tc_gate(half.double(), bias, top_k=2)
    assert weights.dtype == torch.float32
    assert torch.equal(index, truth[1])
    torch.testing.assert_close(weights.double(), truth[0], atol=1e-6, rtol=1e-6)


def test_counts_leave_padding_out():
    index = torch.tensor([[[0, 1], [1, 2]], [[1, 0], [3, 1]]])
    mask = torch.tensor([[True, False], [True, True]])
    assert expert_counts(index, 5).tolist() == [2, 4, 1, 1, 0]
    assert expert_counts(index, 5, mask).tolist() == [2, 3, 0, 1, 0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": 0}, "top_k=0: .*choose 1 to 8"),
        ({"top_k": 9}, "top_k=9: .*choose 1 to 8"),
        ({"top_k": 5, "n_group": 4, "topk_group": 2}, "top_k=5: 2 of 4 groups hold 4 of the 8"),
        ({"top_k": 1, "n_group": 3}, "n_group=3 does not divide the 8 experts; nearest choice: 2"),
        ({"top_k": 1, "n_group": 2, "topk_group": 3}, "topk_group=3: choose 1 to n_group=2"),
    ],
)
def test_gate_options(options, says):
    with pytest.raises(ValueError, match=says):
        noaux_tc_gate(torch.zeros(4, 8), torch.zeros(8), **options)


@pytest.mark.parametrize(
    ("logits", "bias"),
    [
        (torch.zeros(8), torch.zeros(8)),
        (torch.zeros(4, 8), torch.zeros(7)),
        (torch.zeros(4, 0), torch.zeros(0)),
        (torch.zeros(4, 8, dtype=torch.int64), torch.zeros(8)),
        (torch.zeros(4, 8), torch.zeros(8, device="meta")),
    ],
)
def test_gate_tensors(logits, bias):
    with pytest.raises(ValueError, match=r"noaux_tc_gate wants .* got logits \("):
        noaux_tc_gate(logits, bias, top_k=1)
