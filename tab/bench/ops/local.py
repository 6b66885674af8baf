"""Local attention: a window on each side of a token."""

from __future__ import annotations

import importlib
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ...layers.local import LocalAttention
from ...ops.local import local_attention, local_fwd
from ...ops.local_reference import in_window
from ..benchmark import Benchmark, Problem, eager_and_compiled, peer
from ._softmax import masked, under

WINDOW = 128  # tokens on each side
FEW = 8  # of 256 tokens and fewer, where the wider one would be nearly dense


def chunked(q, k, v, *, window: int, causal: bool = False) -> Tensor:
    """Blocks of w queries against three blocks of keys: the usual PyTorch sliding window."""
    w, n = window, q.shape[2]
    pad = -n % w
    q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
    blocks = (n + pad) // w
    around = [F.pad(x, (0, 0, w, w)).unfold(2, 3 * w, w) for x in (k, v)]
    kb, vb = (x.transpose(-1, -2) for x in around)  # (B, H, blocks, 3w, D)
    qb = q.unflatten(2, (blocks, w))
    i = torch.arange(blocks, device=q.device)[:, None, None] * w
    i = i + torch.arange(w, device=q.device)[:, None]
    j = torch.arange(blocks, device=q.device)[:, None, None] * w - w
    j = j + torch.arange(3 * w, device=q.device)
    keep = (i - j <= w) & (j - i <= (0 if causal else w)) & (j >= 0) & (j < n)
    keep = keep | (i >= n)  # padding rows: any key, thrown away below
    o = F.scaled_dot_product_attention(qb, kb, vb, attn_mask=keep)
    return o.flatten(2, 3)[:, :, :n]


class Local(Benchmark):
    op = local_fwd

    def problem(self, case, draw):
        found = super().problem(case, draw)
        found.fixed["window"] = WINDOW if case.shape[2] > 2 * WINDOW else FEW
        return found

    def ours(self, p, backend):
        options = {"window": p.fixed["window"], "causal": p.case.causal, "backend": backend}
        return partial(local_attention, **options)

    def flops(self, p):
        """4·D a pair of query and key within the window, and twice that backward."""
        (b, h, n, d), w, i = p.case.shape, p.fixed["window"], torch.arange(p.case.shape[2])
        last = (i + _right(p)).clamp(max=n - 1)
        pairs = b * h * int((last - (i - w).clamp(min=0) + 1).sum())
        return 4 * d * pairs, 8 * d * pairs

    def pytorch(self, p):
        w, right, (_, _, n, _) = p.fixed["window"], _right(p), p.case.shape
        yield from eager_and_compiled(
            partial(chunked, window=w, causal=p.case.causal), name="chunked"
        )

        def mask() -> Tensor:  # N² bytes, and no more while it is made
            return torch.ones(n, n, dtype=torch.bool, device=p.case.device).tril_(right).triu_(-w)

        yield from under(p, mask, lambda: lambda b, h, qi, kj: (qi - kj <= w) & (kj - qi <= right))

    def peers(self, p):
        yield peer("local-attention", "local_attention", _local_attention, p)
        yield peer("flash-attn", "flash_attn", _flash_attn, p, gpu_only=True)
        yield peer("xformers", "xformers", _xformers, p, gpu_only=True)
        other = "its window moves inwards at both ends: another function unless causal"
        other = None if p.case.causal else other
        yield peer("natten", "natten", _natten, p, gpu_only=True, other=other)

    def part(self, layer):
        return layer if isinstance(layer, LocalAttention) else None

    def use_pytorch(self, part):
        i = torch.arange(part.seq_len, device=part.qkv.weight.device)
        cols = part.window_grid[1] if part.window_grid else 0
        mask = in_window(i[:, None], i, part.reach, part.reach, cols, False)  # (N, N)
        part.attend = lambda q, k, v, key_mask: masked(q, k, v, mask=mask)


def _right(p: Problem) -> int:
    """How many tokens after its own a query sees."""
    return 0 if p.case.causal else p.fixed["window"]


def _local_attention(p: Problem):
    module, w = importlib.import_module("local_attention"), p.fixed["window"]
    attention = module.LocalAttention(
        window_size=w,
        look_backward=1,
        look_forward=0 if p.case.causal else 1,
        causal=p.case.causal,
        exact_windowsize=True,
        use_rotary_pos_emb=False,
        autopad=True,
    ).to(p.case.device)
    b, _, n, _ = p.inputs[0].shape
    if n % w == 0:
        return attention
    real = torch.ones(b, n, dtype=torch.bool, device=p.case.device)
    return lambda q, k, v: attention(q, k, v, mask=real)  # else its own padding takes part


def _flash_attn(p: Problem):
    module = importlib.import_module("flash_attn")
    window = (p.fixed["window"], _right(p))

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = module.flash_attn_func(q, k, v, causal=p.case.causal, window_size=window)
        return o.transpose(1, 2)

    return attend


def _xformers(p: Problem):
    ops = importlib.import_module("xformers.ops")
    bias = importlib.import_module("xformers.ops.fmha.attn_bias")
    mask = bias.LocalAttentionFromBottomRightMask(p.fixed["window"], _right(p))

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return ops.memory_efficient_attention(q, k, v, attn_bias=mask).transpose(1, 2)

    return attend


def _natten(p: Problem):
    module, w = importlib.import_module("natten"), p.fixed["window"]

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return module.na1d(q, k, v, kernel_size=w + 1, is_causal=True).transpose(1, 2)

    return attend


benchmark = Local()
