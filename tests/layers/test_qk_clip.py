"""QK-Clip of kimi_k2: no score of the next forward lies above τ, and nothing else moves."""

import copy

import pytest
import torch
from small_experts import build, tokens


@pytest.mark.parametrize("kind", ["kimi-mha", "kimi-mla"])
@torch.no_grad()
def test_clip_brings_the_largest_score_to_tau(kind):
    x = tokens(2, 20, 24)
    quiet = build(kind)
    quiet(x)
    before = copy.deepcopy(quiet.state_dict())
    assert 0 < quiet.peak.max() < 100
    quiet.after_step()
    for name, value in quiet.state_dict().items():
        if "moe.bias" not in name:
            assert torch.equal(value, before[name]), name  # below tau nothing changes

    layer = build(kind)
    layer(x)
    scores = layer.peak.clone()
    tau = scores.median().item()
    layer = build(kind, tau=tau)
    layer(x)
    torch.testing.assert_close(layer.peak, scores)
    shared = layer.attention.kv_down.weight.clone() if layer.latent else None
    p = layer.attention_matrix(x)
    layer.after_step()
    assert (layer.peak == -torch.inf).all()
    layer(x)
    torch.testing.assert_close(layer.peak, scores.clamp(max=tau), atol=1e-4, rtol=1e-4)
    # Each score of a clipped head is γ times what it was: the matrix is the softmax of that.
    gamma = (tau / scores).clamp(max=1)[:, None, None]
    expected = (p.log() * gamma).softmax(-1)
    torch.testing.assert_close(layer.attention_matrix(x), expected, atol=1e-5, rtol=1e-4)
    if layer.latent:  # k_r and c belong to all heads
        assert torch.equal(layer.attention.kv_down.weight, shared)


@pytest.mark.parametrize("kind", ["kimi-mha", "kimi-mla"])
def test_a_step_clips_as_the_rule_says(kind):
    """Beside the same step without a limit: q and k of the heads above τ are smaller by just their
    share of γ, to the last weight, and nothing else is."""
    x = tokens(2, 20, 24)
    free, bound = build(kind, tau=1e6), build(kind)
    free(x)
    scores = free.peak.clone()
    bound.tau = scores.median().item()  # of three heads
    for layer in (free, bound):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
        layer.peak.fill_(-torch.inf)
        layer(x).square().sum().backward()
        optimizer.step()
        layer.after_step()
    gamma = (bound.tau / scores).clamp(max=1)
    assert (gamma < 1).sum() == 1 and gamma.min() < 0.99
    root, at = gamma.sqrt(), bound.attention
    if bound.latent:
        of_q = torch.cat(
            [root[:, None].expand(3, at.nope_dim), gamma[:, None].expand(3, at.rope_dim)], 1
        )
        shrunk = {
            "attention.q_up.weight": of_q.flatten()[:, None],
            "attention.w_uk": root[:, None, None],
        }
    else:
        of_qkv = torch.stack([root, root, torch.ones(3)]).flatten().repeat_interleave(at.head_dim)
        shrunk = {"attention.qkv.weight": of_qkv[:, None]}
    known = dict(free.named_parameters())
    for name, value in bound.named_parameters():
        torch.testing.assert_close(value, known[name] * shrunk.get(name, 1.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["kimi-mha", "kimi-mla"])
def test_clip_holds_scores_that_training_drives_up(kind):
    """Weights of q that grow by a tenth in each step: free, scores grow without end; clipped, none
    of the next forward is above τ."""
    x, tau = tokens(2, 20, 24), 0.5
    for limit in (1e6, tau):
        layer = build(kind, tau=limit)
        grown = layer.attention.q_up if layer.latent else layer.attention.qkv
        for _ in range(20):
            with torch.no_grad():
                grown.weight *= 1.1
                layer(x)
                seen = layer.peak.clone()
                layer.after_step()
        layer(x)
        if limit == tau:
            assert seen.max() > 1.05 * tau  # the rule still has to act
            assert layer.peak.max() <= tau * (1 + 1e-5)
        else:
            assert layer.peak.max() > 4 * tau


def test_clip_sees_negative_scores_and_no_forward():
    layer = build("kimi-mha", tau=1.0)
    weights = layer.attention.qkv.weight.clone()
    layer.after_step()  # before any forward
    layer.peak.fill_(-7.0)
    layer.after_step()
    assert torch.equal(layer.attention.qkv.weight, weights)
