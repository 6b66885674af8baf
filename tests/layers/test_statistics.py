"""What deepseek_mla and kimi_k2 count: broken numbers move no weight. And where they differ from
other code: residuals, balance loss, epsilon, each against its formula."""

import copy

import pytest
import torch

from tab.layers import build_attention
from tab.layers.moe import MoE
from tab.models.image_model import Residual

N, C = 12, 16
KINDS = {
    "deepseek": ("deepseek_mla", {"q_rank": 6}),
    "mha": ("kimi_k2", {"attention": "mha"}),
    "mla": ("kimi_k2", {"attention": "mla", "q_rank": 6}),
}
kinds = pytest.mark.parametrize("kind", KINDS)
clips = pytest.mark.parametrize("kind", ["mha", "mla"])


def build(kind, **more):
    name, options = KINDS[kind]
    torch.manual_seed(0)
    return build_attention(name, C, seq_len=N, **options, **more)


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@kinds
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, 1e15])
@pytest.mark.parametrize("where", ["one number", "a token", "all"])
def test_a_broken_batch_moves_no_weight(kind, bad, where):
    """Its gradients are thrown away, as by a scaler that skips the step; the statistics remain."""
    layer, x = build(kind), tokens(3, N, C)
    before, clean = copy.deepcopy(layer.state_dict()), layer.eval()(x)
    y = x.clone()
    y[{"one number": (0, 0, 0), "a token": (0, 0), "all": ()}[where]] = bad
    layer.train()(y)
    layer.after_step()
    for name, value in layer.state_dict().items():
        if name == "moe.bias":
            assert value.abs().max() <= 1.001e-3
        else:
            assert torch.equal(value, before[name]), name
    layer.moe.bias.zero_()
    assert torch.equal(layer.eval()(x), clean)


@clips
def test_the_rest_of_a_broken_batch_still_counts(kind):
    layer, x = build(kind, tau=0.1), tokens(3, N, C)
    layer(x[1:])
    peak = layer.peak.clone()
    assert (peak > 0.1).all()
    layer.peak.fill_(-torch.inf)
    x[0], x[0, 3] = x[0] * 0.01, torch.nan  # what is left of it is no larger
    layer(x)
    torch.testing.assert_close(layer.peak, peak)
    layer.after_step()
    layer(x[1:])
    torch.testing.assert_close(layer.peak, torch.full((4,), 0.1), atol=1e-4, rtol=1e-3)


@clips
@pytest.mark.parametrize(("score", "counts"), [(1e8, True), (1e9, False)])
def test_the_largest_score_that_counts(kind, score, counts):
    """τ over float32's epsilon, 8.4e8 at τ = 100: beyond it γ would be below that epsilon."""
    layer = build(kind)
    layer.note(torch.full((2, 4), score))
    assert layer.peak.isfinite().all() == counts
    layer.after_step()
    assert all(p.isfinite().all() and p.any() for p in layer.parameters())


def test_tokens_with_broken_scores_count_for_no_expert():
    moe = MoE(C, num_experts=4, top_k=2, bias_speed=0.1)
    x = tokens(2, N, C)
    moe(x[1:])
    load = moe.load.clone()
    moe.load.zero_()
    x[0] = torch.nan
    moe(x)
    assert torch.equal(moe.load, load) and load.sum() == 2 * N


# --- differences from other code ------------------------------------------------------------------


@kinds
@torch.no_grad()
def test_experts_read_the_stream(kind):
    """h = x + A(norm x), y = h + MoE(RMSNorm(h)): both residuals are the stream's."""
    layer, block, x = build(kind).eval(), Residual(C), 3 * tokens(2, N, C)
    block.scale.fill_(1.0)
    block.norm.weight.copy_(tokens(C, seed=2))
    a = layer.attend(block.norm(x), None)
    h = x + a
    rms = h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * layer.norm.weight
    torch.testing.assert_close(block(x, layer), h + layer.moe(rms))
    # By itself the layer takes its input for the stream; its mask covers the stream too.
    torch.testing.assert_close(layer(x, stream=x), layer(x))
    mask, other = torch.arange(N).expand(2, N) < 9, x.clone()
    other[:, 9:] = torch.nan
    assert torch.equal(layer(other, mask, stream=other), layer(x, mask, stream=x))


def test_balance_loss_takes_f_without_the_bias():
    """DeepSeek-V3 2024, eq. 17-20: f counts the best K of s, not of s + b."""
    moe, x = MoE(C, num_experts=8, top_k=2, balance_alpha=0.5), tokens(2, N, C)
    s = (x @ moe.router.weight.T).sigmoid()
    total = 0.0
    for b in range(2):
        for e in range(8):
            f = 8 / (2 * N) * sum(e in t.topk(2).indices for t in s[b])
            total += 0.5 * f * (s[b, :, e] / s[b].sum(-1)).mean() / 2
    for bias in (torch.zeros(8), torch.linspace(-1, 1, 8)):
        moe.bias.copy_(bias)
        moe(x)
        torch.testing.assert_close(moe.auxiliary_loss(), total)


@torch.no_grad()
def test_epsilon_is_deepseeks():
    """It shows at inputs of 1e-3, where machine epsilon would not."""
    layer, x = build("deepseek").eval(), 1e-3 * tokens(2, N, C)

    def normed(t):
        return t * (t.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    at = layer.attention
    c = at.kv_down(x)[..., : at.kv_rank]
    torch.testing.assert_close(at.project(x)[2].double(), normed(c), atol=1e-6, rtol=1e-5)
    q = at.q_up(normed(at.q_down(x)).float()).unflatten(-1, (4, -1)).transpose(1, 2)
    torch.testing.assert_close(at.project(x)[0], q[..., : at.nope_dim], atol=1e-6, rtol=1e-5)
    assert layer.norm.eps == 1e-6
