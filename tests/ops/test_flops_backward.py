"""What a training step costs: PyTorch counts the formula, written out and differentiated, and TAB's
op counts that and what its backward pass has to form again."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tab import (
    BlockPattern,
    gated_linear_attention,
    h2o_attention,
    linear_attention,
    local_attention,
    moe_experts,
    sparse_attention,
)
from tab.functional import mla_attention, mla_decode, performer_attention
from tab.ops import OPS

B, H, N, D, DV, M, R, DR = 2, 3, 8, 4, 5, 6, 7, 2
PAIRS = B * H * N * N


def counted(f, *shapes):
    """FLOPs of f and of its gradients in tensors of these shapes."""
    mapping = {getattr(torch.ops.tab, name): op.flops for name, op in OPS.items()}
    leaves = [torch.rand(s, requires_grad=True) for s in shapes]
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        f(*leaves).sum().backward()
    return counter.get_total_flops()


QKV = (B, H, N, D), (B, H, N, D), (B, H, N, DV)
LATENTS = (B, H, N, D), (B, H, N, DR), (B, N, R), (B, N, DR), (H, D, R), (H, DV, R)
DECODE = (B, H, D), (B, H, DR), (B, N, R + DR), (H, D, R), (H, DV, R)
W = torch.rand(M, D)


def softmax(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def features(q, k, v):
    return (q @ W.T) @ ((k @ W.T).mT @ v)


def latents(q_nope, q_rope, c, k_rope, w_uk, w_uv):
    c, k_rope = c[:, None], k_rope[:, None].expand(-1, H, -1, -1)
    k = torch.cat([c @ w_uk.mT, k_rope], -1)
    return softmax(torch.cat([q_nope, q_rope], -1), k, c @ w_uv.mT)


def absorbed(q_nope, q_rope, cache, w_uk, w_uv):
    q = torch.cat([torch.einsum("bhd,hdr->bhr", q_nope, w_uk), q_rope], -1)
    return torch.einsum("bhr,hvr->bhv", softmax(q, cache, cache[..., :R]), w_uv)


def decode(q_nope, q_rope, cache, w_uk, w_uv):
    used = torch.full((B,), N)
    return mla_decode(q_nope, q_rope, cache, used, w_uk, w_uv)[0]


WHOLE = BlockPattern.from_blocks(torch.ones(2, 2, dtype=torch.bool), N // 2, N)
CASES = {  # op, formula, shapes, multiply-adds formed again
    "linear": (linear_attention, lambda q, k, v: q @ (k.mT @ v), QKV, 0),
    "gated_linear": (
        lambda *x: gated_linear_attention(*x, torch.zeros(H)),
        lambda q, k, v: q @ (k.mT @ v), QKV, 0,
    ),
    "performer": (
        lambda *x: performer_attention(*x, W), features, QKV, 2 * B * H * N * M * D,
    ),
    "local": (lambda *x: local_attention(*x, window=N), softmax, QKV, PAIRS * D),
    "sparse": (lambda *x: sparse_attention(*x, WHOLE), softmax, QKV, PAIRS * D),
    "mla": (
        lambda *x: mla_attention(*x, form="fused"), latents, LATENTS,
        B * H * N * R * (D + DV) + PAIRS * (D + DR),
    ),
    "mla_decode": (decode, absorbed, DECODE, B * H * (R * D + N * (R + DR) + N * R)),
}  # fmt: skip


CROSS = (B, H, 5, D), *QKV[1:]


@pytest.mark.parametrize("name", ["linear", "performer"])
def test_a_step_of_cross_attention(name):
    op, formula, _, again = CASES[name]
    assert counted(op, *CROSS) == counted(formula, *CROSS) + 2 * again * (5 + N) // (2 * N)


@pytest.mark.parametrize("name", ["linear", "performer"])
def test_a_step_of_grouped_heads(name):
    """The keys are summed once for the heads of q that share them."""

    def grouped(q, k, v):
        if name == "performer":
            q, k = q @ W.T, k @ W.T
        return q.unflatten(1, (2, 3)) @ (k.mT @ v)[:, :, None]

    few = (B, 6, N, D), (B, 2, N, D), (B, 2, N, DV)
    again = B * (6 + 2) * N * M * D if name == "performer" else 0
    assert counted(CASES[name][0], *few) == counted(grouped, *few) + 2 * again


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_attention(case):
    op, formula, shapes, again = CASES[case]
    assert counted(op, *shapes) == counted(formula, *shapes) + 2 * again


def test_a_step_of_h2o():
    """The first block of 4 sees itself, the second the 4 tokens of the cache too."""
    pairs = B * H * (4 * 4 + 4 * 8)
    given = counted(lambda *x: h2o_attention(*x, heavy=2, recent=2, block=4), *QKV)
    assert given == 3 * 2 * pairs * (D + DV) + 2 * pairs * D  # the scores again


def test_a_step_of_experts():
    """Every token by k of E experts: forward, and the gradients of rows and weights."""
    t, e, k, c, f = 6, 4, 2, 5, 3
    index = torch.arange(t * k).reshape(t, k) % e
    counts = torch.bincount(index.flatten(), minlength=e)
    given = counted(
        lambda x, w13, w2, weights: moe_experts(x, w13, w2, weights, index, counts),
        (t, c), (e, 2 * f, c), (e, c, f), (t, k),
    )  # fmt: skip
    assert given == 3 * 2 * t * k * (2 * f * c + c * f)
