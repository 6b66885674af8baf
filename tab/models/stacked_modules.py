"""The forms of modules whose weights are those of S seeds, (S, …), for tab/models/stacked.py.

Each is made from the module it derives from: `seeds` are the S ordinary ones, whose weights are
views of its own. Tensors are (S·B, …), the images of the first seed first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import performer, published, sparse
from ..layers._base import HeadsAttention
from ..layers.deepseek_mla import LatentAttention
from ..layers.kimi_k2 import KimiK2
from ..layers.linformer import LinformerAttention
from ..layers.moe import MoE
from ..ops._check import accumulate, autocast, full_precision
from ..ops.mla import mla_attention
from ..ops.moe import moe_experts
from .image_model import Residual


def beside(p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """p (S, P…), x (S·B, …, X…) -> (S, 1, …, P…) and (S, B, …, X…), which broadcast."""
    x = x.unflatten(0, (len(p), -1))
    return p.view(len(p), *[1] * (x.dim() - p.dim()), *p.shape[1:]), x


class _Products(torch.autograd.Function):
    """y_s = x_s W_sᵀ + b_s; x (S, M, I), W (S, O, I), b (S, O) or None -> (S, M, O).

    baddbmm's own backward gives dW as (S, I, O), and putting that in W's layout takes as long as
    the product: dW_s = g_sᵀ x_s is in it.
    """

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return torch.bmm(x, w.mT) if b is None else torch.baddbmm(b[:, None], x, w.mT)

    @staticmethod
    def backward(ctx, g):
        (x, w), (need_x, need_w, need_b) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            torch.bmm(g, w) if need_x else None,
            torch.bmm(g.mT, x) if need_w else None,
            g.sum(1) if need_b else None,
        )


class SeedLinear(nn.Linear):
    """weight (S, O, I), bias (S, O); x (S·B, …, I)"""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(len(self.weight), -1, x.shape[-1])  # (S, B·…, I)
        y = _Products.apply(*autocast(flat, self.weight, self.bias))
        return y.view(*x.shape[:-1], -1)


class SeedLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        w, y = beside(self.weight, F.layer_norm(x, self.normalized_shape, eps=self.eps))
        return torch.addcmul(beside(self.bias, x)[0], y, w).flatten(0, 1)


class SeedRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        w, y = beside(self.weight, F.rms_norm(x, self.normalized_shape, eps=self.eps))
        return (y * w).flatten(0, 1)


class SeedConv(nn.Conv2d):
    """weight (S, O, I, 3, 3), bias (S, O) or None; within `Folded`, x (B, S·I, rows, cols)"""

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight.flatten(0, 1), None if self.bias is None else self.bias.flatten()
        return F.conv2d(x, w, b, self.stride, self.padding, groups=len(self.weight))


class SeedBatchNorm(nn.BatchNorm2d):
    """All (S, C); within `Folded`, x (B, S·C, rows, cols)"""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        mean, var, w, b = (
            t.flatten() for t in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return F.batch_norm(x, mean, var, w, b, self.training, self.momentum, self.eps)


class Folded(nn.Module):
    """x (S·B, I, rows, cols) -> (S·B, O, rows', cols') by `inner` on seeds beside each other in the
    channels; channels_last throughout, one copy on each side."""

    def __init__(self, inner: nn.Module, seeds: int):
        super().__init__()
        self.inner, self.count = inner, seeds

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).unflatten(0, (self.count, -1))  # (S, B, rows, cols, I)
        x = self.inner(x.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2))
        x = x.permute(0, 2, 3, 1).unflatten(-1, (self.count, -1))  # (B, rows', cols', S, O)
        return x.permute(3, 0, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)


class SeedResidual(Residual):
    """scale (S, C)"""

    def forward(self, x: Tensor, attention: nn.Module) -> Tensor:
        scale, y = beside(self.scale, self.branch(x, attention))
        return x + (scale * y).flatten(0, 1)


# --- attention ------------------------------------------------------------------------------------


class SeedMLA(LatentAttention):
    """w_uk (S, H, Dn, R), w_uv (S, H, Dv, R): the kernel runs once a seed."""

    def forward(
        self, x: Tensor, key_mask: None = None, max_logits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        parts = [t.chunk(len(self.seeds)) for t in self.project(x)]
        found = [
            mla_attention(*own, return_max_logits=max_logits)
            for own in zip(*parts, self.w_uk, self.w_uv, strict=True)
        ]
        peak = torch.cat([p for _, p in found]) if max_logits else None  # (S·B, H)
        o = torch.cat([o[0] for o in found] if max_logits else found)  # (S·B, H, N, Dv)
        return self.out(o.transpose(1, 2).flatten(2)), peak


class _OwnAttend(HeadsAttention):
    """What lies between the projections is each seed's own: random features, random blocks."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: None) -> Tensor:
        parts = (t.chunk(len(self.seeds)) for t in (q, k, v))
        own = zip(self.seeds, *parts, strict=True)
        # Token-major, as each part is: (S·B, N, H, D) in memory.
        found = [layer.attend(*qkv, None).transpose(1, 2) for layer, *qkv in own]
        return torch.cat(found).transpose(1, 2)


class SeedPerformer(_OwnAttend, performer.PerformerAttention):
    pass


class SeedSparse(_OwnAttend, sparse.SparseAttention):
    pass


class SeedPublishedPerformer(_OwnAttend, published.PublishedPerformer):
    pass


class SeedLinformer(LinformerAttention):
    """E and F (S, 1 or H, N_max, K)"""

    def compressed(self, x: Tensor) -> tuple[Tensor, ...]:
        weights = [w for w in (self.qkv.weight, self.E, self.F) if w is not None]
        x = x.unflatten(0, (len(self.E), -1))

        def one(x: Tensor, qkv: Tensor, E: Tensor, F_: Tensor | None = None) -> tuple[Tensor, ...]:
            return self.with_weights(x, qkv, E, F_)

        return tuple(t.flatten(0, 1) for t in torch.vmap(one)(x, *weights))


class SeedPublishedLinformer(published.PublishedLinformer):
    def shorten(self, E: nn.Linear, x: Tensor) -> Tensor:
        w, x = beside(E.weight[..., : x.shape[2]], x)
        return (w @ x).flatten(0, 1)


class SeedMoE(MoE):
    """Routers one by one, then the experts of all seeds as S·E in one grouped product."""

    def forward(self, x: Tensor, key_mask: None = None) -> Tensor:
        with full_precision(x):
            # Not the router's own forward: its scores are float32 whatever autocast says.
            acc = accumulate(x)
            flat = x.to(acc).reshape(len(self.seeds), -1, x.shape[-1])
            logits = _Products.apply(flat, self.router.weight.to(acc), None)
            logits = logits.view(*x.shape[:-1], -1)  # (S·B, N, E)
        routed = []
        for s, (moe, own) in enumerate(zip(self.seeds, logits.chunk(len(self.seeds)), strict=True)):
            weights, index, counts = moe._gate(own)
            moe.note(own, index, None)
            routed.append((weights, index + s * len(counts), counts))
        weights, index, counts = (torch.cat(parts) for parts in zip(*routed, strict=True))
        experts = self.w13.flatten(0, 1), self.w2.flatten(0, 1)  # (S·E, 2F, C), (S·E, C, F)
        return self.shared(x) + moe_experts(x, *experts, weights, index, counts)


class SeedKimi(KimiK2):
    def note(self, peak: Tensor) -> None:
        for layer, own in zip(self.seeds, peak.chunk(len(self.seeds)), strict=True):
            layer.note(own)
