"""S models of one variant, one a seed, as one model: stacked weights, and images seed by seed.

Weights are (S, …). Tensors flow as (S·B, …), the images of the first seed first, so that the code
and the kernels of the layers run unchanged on S times the batch. Each module has a form here that
knows its seeds, or none:

    its own form    what has weights: baddbmm for Linear, a grouped convolution, one batch norm over
                    S·C channels, S·E experts; and what keeps books over a batch
    as it is        what only calls its submodules and treats the images of a batch alike
    PerSeed         all else, layers of third parties too: each seed's own module, one by one

The S ordinary models live on: their weights are views of the stacked ones, so that each is saved,
scored and told of a step (QK-Clip, the routers' balance) as if it had been trained alone.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones import CnnBackbone, MlpBackbone, Resnet9Backbone, _Add
from .layers import basic, flex, kv_compression, linear, local, performer, published, sparse
from .layers._base import HeadsAttention
from .layers.deepseek_mla import DeepSeekMLA, LatentAttention
from .layers.kimi_k2 import KimiK2
from .layers.linformer import LinformerAttention
from .layers.moe import MoE, SwiGLU
from .layers.rope import Rope
from .models import Head, ImageModel, Replace, Residual
from .ops._check import autocast, full_precision
from .ops.mla import mla_attention
from .ops.moe import moe_experts


def stack(seeds: Sequence[nn.Module]) -> nn.Module:
    """The modules of S seeds -> one on (S·B, …). Their parameters become views of its own."""
    first = seeds[0]
    form = FORMS.get(type(first))
    if form is None or (form is type(first) and first._parameters) or not _alike(seeds):
        return PerSeed(seeds)
    one = copy.copy(first)
    one.__class__ = form
    one.seeds = tuple(seeds)  # a tuple: no submodules
    one._parameters = {
        name: None if p is None else _leaf([m._parameters[name] for m in seeds])
        for name, p in first._parameters.items()
    }
    one._buffers = dict(first._buffers)
    if form is SeedBatchNorm:
        for name in one._buffers:
            one._buffers[name] = _joined([m._buffers[name] for m in seeds])
            for m, part in zip(seeds, one._buffers[name], strict=True):
                m._buffers[name] = part
    one._modules = {
        name: None if child is None else stack([m._modules[name] for m in seeds])
        for name, child in first._modules.items()
    }
    if isinstance(one, (CnnBackbone, Resnet9Backbone)):
        one._modules["convolutions"] = Folded(one.convolutions, len(seeds))
    return one


def _alike(seeds: Sequence[nn.Module]) -> bool:
    """Whether the module of the first seed can stand for all where it has no form of its own."""
    first = seeds[0]
    if isinstance(first, flex.FlexAttention) and first.score_mod is not None:
        return False  # it may ask which image of the batch it sees
    if FORMS[type(first)] is not type(first):
        return True
    same = (torch.equal(b, m._buffers[n]) for m in seeds for n, b in first._buffers.items())
    return all(same)


def _leaf(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """(S, …), whose parts the given parameters become."""
    leaf = nn.Parameter(_joined(parameters), requires_grad=parameters[0].requires_grad)
    for parameter, part in zip(parameters, leaf.detach(), strict=True):
        parameter.data = part
    leaf.seeds = tuple(parameters)
    return leaf


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """torch.stack in the memory layout of its parts."""
    first = tensors[0]
    shape, strides = (len(tensors), *first.shape), (first.numel(), *first.stride())
    joined = torch.empty_strided(shape, strides, dtype=first.dtype, device=first.device)
    for part, tensor in zip(joined, tensors, strict=True):
        part.copy_(tensor.detach())
    return joined


def _beside(p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """p (S, P…), x (S·B, …, X…) -> (S, 1, …, P…) and (S, B, …, X…), which broadcast."""
    x = x.unflatten(0, (len(p), -1))
    return p.view(len(p), *[1] * (x.dim() - p.dim()), *p.shape[1:]), x


# --- any module -----------------------------------------------------------------------------------


class PerSeed(nn.Module):
    """Each seed's own module on its own images, one after the other; each draws from torch's random
    stream what it would draw alone."""

    def __init__(self, seeds: Sequence[nn.Module]):
        super().__init__()
        self.seeds = nn.ModuleList(seeds)
        self.states: list[list[Tensor]] = []

    def start(self, numbers: Sequence[int], device: torch.device) -> None:
        """An epoch begins: torch.manual_seed(number) for each seed."""
        self.device, self.states = device, []
        for number in numbers:
            torch.manual_seed(number)
            self.states.append(self._state())

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.seeds))
        if not self.training:
            return torch.cat([m(part) for m, part in zip(self.seeds, parts, strict=True)])
        return torch.cat([self._drawn(s, part) for s, part in enumerate(parts)])

    def _drawn(self, s: int, x: Tensor) -> Tensor:
        torch.set_rng_state(self.states[s][0])
        for state in self.states[s][1:]:
            torch.cuda.set_rng_state(state, self.device)
        y = self.seeds[s](x)
        self.states[s] = self._state()
        return y

    def _state(self) -> list[Tensor]:
        host, cuda = torch.get_rng_state(), self.device.type == "cuda"
        return [host, torch.cuda.get_rng_state(self.device)] if cuda else [host]


# --- what has weights -----------------------------------------------------------------------------


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
        w, y = _beside(self.weight, F.layer_norm(x, self.normalized_shape, eps=self.eps))
        return torch.addcmul(_beside(self.bias, x)[0], y, w).flatten(0, 1)


class SeedRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        w, y = _beside(self.weight, F.rms_norm(x, self.normalized_shape, eps=self.eps))
        return (y * w).flatten(0, 1)


class SeedConv(nn.Conv2d):
    """weight (S, O, I, 3, 3); within `Folded`, x (B, S·I, rows, cols)"""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.flatten(0, 1)
        return F.conv2d(x, w, None, self.stride, self.padding, groups=len(self.weight))


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
        scale, y = _beside(self.scale, attention(self.norm(x)))
        return x + (scale * y).flatten(0, 1)


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

    def compressed(self, x: Tensor, key_mask: None = None) -> tuple[Tensor, ...]:
        weights = [w for w in (self.qkv.weight, self.E, self.F) if w is not None]
        x = x.unflatten(0, (len(self.E), -1))

        def one(x: Tensor, qkv: Tensor, E: Tensor, F_: Tensor | None = None) -> tuple[Tensor, ...]:
            return self.with_weights(x, x, qkv, E, F_)

        return tuple(t.flatten(0, 1) for t in torch.vmap(one)(x, *weights))


class SeedPublishedLinformer(published.PublishedLinformer):
    def shorten(self, E: nn.Linear, x: Tensor) -> Tensor:
        w, x = _beside(E.weight[..., : x.shape[2]], x)
        return (w @ x).flatten(0, 1)


class SeedMoE(MoE):
    """Routers one by one, then the experts of all seeds as S·E in one grouped product."""

    def forward(self, x: Tensor, key_mask: None = None) -> Tensor:
        with full_precision(x):
            # Not the router's own forward: its scores are float32 whatever autocast says.
            flat = x.float().reshape(len(self.seeds), -1, x.shape[-1])
            logits = _Products.apply(flat, self.router.weight.float(), None)
            logits = logits.view(*x.shape[:-1], -1)  # (S·B, N, E)
        routed = []
        for s, (moe, own) in enumerate(zip(self.seeds, logits.chunk(len(self.seeds)), strict=True)):
            weights, index, counts = moe._gate(own)
            if self.training:
                moe.load += counts
            moe.balance = moe._balance_loss(own, index, None) if self.training else None
            routed.append((weights, index + s * len(counts), counts))
        weights, index, counts = (torch.cat(parts) for parts in zip(*routed, strict=True))
        experts = self.w13.flatten(0, 1), self.w2.flatten(0, 1)  # (S·E, 2F, C), (S·E, C, F)
        return self.shared(x) + moe_experts(x, *experts, weights, index, counts)


class SeedKimi(KimiK2):
    def note(self, peak: Tensor) -> None:
        for layer, own in zip(self.seeds, peak.chunk(len(self.seeds)), strict=True):
            layer.note(own)


class SeedModel(ImageModel):
    """position (S, N, C). x (S·B, 3, 32, 32) -> logits (S·B, classes)"""

    seeds: tuple[ImageModel, ...]

    def embed(self, x: Tensor) -> Tensor:
        tokens = self.backbone(x)
        if self.position is None:
            return tokens
        position, tokens = _beside(self.position, tokens)
        return (tokens + position).flatten(0, 1)

    def start(self, numbers: Sequence[int], device: torch.device) -> None:
        """An epoch begins, for which each seed alone would call torch.manual_seed(number)."""
        for module in self.one_by_one():
            module.start(numbers, device)

    def one_by_one(self) -> list[PerSeed]:
        return [module for module in self.modules() if isinstance(module, PerSeed)]

    def train(self, mode: bool = True) -> SeedModel:
        for model in self.seeds:
            model.train(mode)
        return super().train(mode)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        return itertools.chain(*(model.buffers(recurse) for model in self.seeds))


OWN = {
    nn.Linear: SeedLinear,
    nn.LayerNorm: SeedLayerNorm,
    nn.RMSNorm: SeedRMSNorm,
    nn.Conv2d: SeedConv,
    nn.BatchNorm2d: SeedBatchNorm,
    Residual: SeedResidual,
    LatentAttention: SeedMLA,
    MoE: SeedMoE,
    KimiK2: SeedKimi,
    performer.PerformerAttention: SeedPerformer,
    sparse.SparseAttention: SeedSparse,
    published.PublishedPerformer: SeedPublishedPerformer,
    ImageModel: SeedModel,
    LinformerAttention: SeedLinformer,
    published.PublishedLinformer: SeedPublishedLinformer,
}
AS_IT_IS = (
    *(nn.Sequential, nn.ModuleList, nn.Identity, nn.ReLU, nn.MaxPool2d),
    *(MlpBackbone, CnnBackbone, Resnet9Backbone, _Add, Head, Replace, Rope, SwiGLU),
    *(basic.NoAttention, basic.SelfAttention, basic.MultiHeadAttention, DeepSeekMLA),
    *(linear.LinearAttention, local.LocalAttention, flex.FlexAttention),
    kv_compression.KVCompressionAttention,
    *(published.PublishedMultiHead, published.PublishedKimi, published.PublishedLocal),
    *(published.PublishedSparse, published.PublishedKVCompression, published.PublishedLinear),
)
FORMS: dict[type, type] = {**OWN, **{kind: kind for kind in AS_IT_IS}}
