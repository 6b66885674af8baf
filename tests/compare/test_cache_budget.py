"""A trained model's cache is cut to a budget: what is kept, and the model is left as it was."""

import pytest
import torch

from tab.analysis.cache_budget import BUDGETS, budget_curves, fits, kept
from tab.data.batches import Batches
from tab.data.load import Split
from tab.layers.basic import MultiHeadAttention

B, N, DIM, HEADS = 3, 16, 8, 2


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return MultiHeadAttention(DIM, seq_len=N, num_heads=HEADS).double()


def textbook(layer, x, keep):
    """Attention over the kept tokens alone; keep (B, H, N) bool."""
    q, k, v = layer.project(x)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~keep[:, :, None], -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_heavy_keeps_what_is_attended_most_and_the_latest(layer, share):
    x, budget = torch.randn(B, N, DIM, dtype=torch.float64), int(share * N)
    q, k, _ = layer.project(x)
    credit = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).sum(2)  # (B, H, N)
    keep = torch.zeros(B, HEADS, N, dtype=torch.bool)
    keep[..., N - (budget - budget // 2) :] = True
    order = credit.masked_fill(keep, -1).argsort(-1, descending=True)[..., : budget // 2]
    keep.scatter_(2, order, True)
    with kept(layer, "heavy", share, 0):
        found = layer.attend(*layer.project(x), None)
    torch.testing.assert_close(found, textbook(layer, x, keep))


@pytest.mark.parametrize("policy", ["recent", "random"])
def test_controls_keep_as_many(layer, policy):
    x = torch.randn(B, N, DIM, dtype=torch.float64)
    with kept(layer, policy, 0.25, 1):
        q, k, _ = layer.project(x)
        unit = torch.eye(N, dtype=torch.float64).expand(B, HEADS, N, N)
        weights = layer.attend(q, k, unit, None)  # reads the weights off
    keep = weights.amax(2) > 0
    assert (keep.sum(-1) == 4).all() and (keep == keep[:1]).all()
    if policy == "recent":
        assert keep[..., -4:].all()
    torch.testing.assert_close(weights, textbook_weights(q, k, keep))


def textbook_weights(q, k, keep):
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~keep[:, :, None], -torch.inf).softmax(-1)


def test_the_whole_budget_is_the_model_and_afterwards_it_is_as_before(layer):
    x = torch.randn(B, N, DIM, dtype=torch.float64)
    before = layer(x)
    for policy in ("heavy", "recent", "random"):
        with kept(layer, policy, 1.0, 0):
            torch.testing.assert_close(layer(x), before)
    assert "attend" not in vars(layer) and torch.equal(layer(x), before)


class Seer(torch.nn.Module):
    """Answers by the first channel of the mean token, through attention."""

    def __init__(self):
        super().__init__()
        self.attention = MultiHeadAttention(3, seq_len=64, num_heads=1)

    def forward(self, x):
        return self.attention(x.flatten(2).mT).mean(1)


def test_curves_have_a_number_for_each_budget():
    torch.manual_seed(1)
    images = torch.randint(256, (20, 8, 8, 3)).byte()
    split = Split(images, torch.arange(20) % 3)
    mean = torch.full((3,), 127.5)
    test = Batches(split, batch_size=7, mean=mean, std=mean)
    model = Seer().eval()
    found = budget_curves(model, test, 1000)
    assert all(len(found[key]) == len(BUDGETS) for key in ("accuracy", "recent", "random"))
    assert found["accuracy"][0] == found["recent"][0] == found["random"][0]
    right = sum((model(x).argmax(-1) == y).sum() for x, y in test.epoch(0))
    assert found["accuracy"][0] == float(right) / 20 and found["images"] == 20


def test_a_model_without_such_a_layer_is_refused():
    assert fits("multi_head", "library")
    assert not (fits("linear", "library") or fits("multi_head", "published"))
    with (
        pytest.raises(ValueError, match="no multi_head layer"),
        kept(torch.nn.ReLU(), "heavy", 1, 0),
    ):
        pass
