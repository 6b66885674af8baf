"""Linformer, from the tokens on: Eᵀ(XW) is best computed as (EᵀX)W."""

from __future__ import annotations

import importlib
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.linformer import LinformerAttention
from ..benchmark import Benchmark, Problem, eager_and_compiled, peer

ROWS = 256  # K, a quarter of N where that is less


def eager(x, qkv, e, *, heads: int) -> Tensor:
    """softmax(q (eᵀk)ᵀ/√D) eᵀv with q, k, v from x (B, N, C) by qkv (3C, C); e (N, K). Tokens are
    projected first, which costs less."""
    wq, wk, wv = qkv.chunk(3)
    short = e.mT @ x  # (B, K, C)
    q, k, v = (
        F.linear(y, w).unflatten(-1, (heads, -1)).transpose(1, 2)
        for y, w in ((x, wq), (short, wk), (short, wv))
    )
    return ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v


class Linformer(Benchmark):
    causal = (False,)  # its projection mixes all tokens

    def problem(self, case, draw):
        b, h, n, d = case.shape
        x, qkv = draw(b, n, h * d), draw(3 * h * d, h * d, scale=(h * d) ** -0.5)
        e = draw(n, min(ROWS, -(-n // 4)), scale=n**-0.5)
        return Problem(case, self, (x, qkv, e), weights=2)

    def ours(self, p, backend):
        """What the layer does with tokens x (B, N, C), up to its projection out. A composition: it
        has no backends."""
        _, h, n, d = p.case.shape
        layer = LinformerAttention(h * d, seq_len=n, num_heads=h, k=p.inputs[2].shape[1])
        return lambda x, qkv, e: F.scaled_dot_product_attention(
            *layer.with_weights(x, qkv, e[None], None)
        )

    def flops(self, p):
        (b, h, n, d), rows = p.case.shape, p.inputs[2].shape[1]
        width = h * d
        forward = 2 * b * n * width * (width + rows) + 4 * b * rows * width**2
        forward += 4 * d * rows * b * h * n
        return forward, 2 * forward

    def pytorch(self, p):
        return eager_and_compiled(partial(eager, heads=p.case.shape[1]))

    def peers(self, p):
        yield peer("linformer", "linformer", _linformer, p)


def _linformer(p: Problem):
    module = importlib.import_module("linformer.linformer")
    (_, h, n, d), rows = p.case.shape, p.inputs[2].shape[1]
    layer = module.LinformerSelfAttention(h * d, n, k=rows, heads=h).to(p.case.device)
    # The weights are ours, and its projection out is taken away.
    layer.to_out = nn.Identity()
    del layer.to_q, layer.to_k, layer.to_v, layer.proj_k, layer.proj_v

    def attend(x, qkv, e):
        layer.proj_k = layer.proj_v = e
        layer.to_q, layer.to_k, layer.to_v = (partial(F.linear, weight=w) for w in qkv.chunk(3))
        return layer(x).unflatten(-1, (h, d)).transpose(1, 2)

    return attend


benchmark = Linformer()
