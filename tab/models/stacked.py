"""S models of one variant, one a seed, as one model: stacked weights, and images seed by seed.

Weights are (S, …). Tensors flow as (S·B, …), the images of the first seed first, so that the code
and the kernels of the layers run unchanged on S times the batch. FORMS says how a module runs:

    a form of its own (tab/models/stacked_modules.py)
                    what has weights: baddbmm for Linear, a grouped convolution, one batch norm over
                    S·C channels, S·E experts; and what keeps books over a batch
    as it is        what only calls its submodules and treats the images of a batch alike
    PerSeed         all else, layers of third parties too: each seed's own module, one by one

The S ordinary models live on: their weights are views of the stacked ones, so that each is saved,
scored and told of a step (QK-Clip, the routers' balance) as if it had been trained alone.

The other way, torch.vmap over the ordinary model, would need a rule for each autograd.Function and
for what changes buffers, and measured slower. Time of three models one by one over that of three at
once, forward and backward, one CPU thread (AVX-512, a busy machine):

    multi_head, but none for published    fair mlp  published mlp  quick mlp  quick cnn
    these forms                               0.91           0.98       1.20       0.85
    torch.vmap                                0.60           0.88       0.78       0.45
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..layers import basic, flex, kv_compression, linear, local, performer, published, sparse
from ..layers.deepseek_mla import DeepSeekMLA, LatentAttention
from ..layers.kimi_k2 import KimiK2
from ..layers.linformer import LinformerAttention
from ..layers.moe import MoE, SwiGLU
from ..layers.rope import Rope
from .backbones import CnnBackbone, MlpBackbone, Resnet9Backbone, _Add
from .image_model import Head, ImageModel, Replace, Residual
from .stacked_modules import (
    Folded,
    SeedBatchNorm,
    SeedConv,
    SeedKimi,
    SeedLayerNorm,
    SeedLinear,
    SeedLinformer,
    SeedMLA,
    SeedMoE,
    SeedPerformer,
    SeedPublishedLinformer,
    SeedPublishedPerformer,
    SeedResidual,
    SeedRMSNorm,
    SeedSparse,
    beside,
)


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


# --- any module -----------------------------------------------------------------------------------


class PerSeed(nn.Module):
    """Each seed's own module on its own images, one after the other; each draws from torch's random
    stream what it would draw alone."""

    def __init__(self, seeds: Sequence[nn.Module]):
        super().__init__()
        self.seeds = nn.ModuleList(seeds)
        self.reads_stream = getattr(seeds[0], "reads_stream", False)
        self.states: list[list[Tensor]] = []

    def start(self, numbers: Sequence[int], device: torch.device) -> None:
        """An epoch begins: torch.manual_seed(number) for each seed."""
        self.device, self.states = device, []
        for number in numbers:
            torch.manual_seed(number)
            self.states.append(self._state())

    def forward(self, x: Tensor, stream: Tensor | None = None) -> Tensor:
        count = len(self.seeds)
        streams = [] if stream is None else stream.chunk(count)
        rest = [{"stream": part} for part in streams] or [{}] * count
        parts = list(zip(x.chunk(count), rest, strict=True))
        if not self.training:
            each = zip(self.seeds, parts, strict=True)
            return torch.cat([m(part, **more) for m, (part, more) in each])
        return torch.cat([self._drawn(s, *part) for s, part in enumerate(parts)])

    def _drawn(self, s: int, x: Tensor, rest: dict[str, Tensor]) -> Tensor:
        torch.set_rng_state(self.states[s][0])
        for state in self.states[s][1:]:
            torch.cuda.set_rng_state(state, self.device)
        y = self.seeds[s](x, **rest)
        self.states[s] = self._state()
        return y

    def _state(self) -> list[Tensor]:
        host, cuda = torch.get_rng_state(), self.device.type == "cuda"
        return [host, torch.cuda.get_rng_state(self.device)] if cuda else [host]


class SeedModel(ImageModel):
    """position (S, N, C). x (S·B, 3, 32, 32) -> logits (S·B, classes)"""

    seeds: tuple[ImageModel, ...]

    def embed(self, x: Tensor) -> Tensor:
        tokens = self.backbone(x)
        if self.position is None:
            return tokens
        position, tokens = beside(self.position, tokens)
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

    def statistics(self) -> list[Tensor]:
        return [each for model in self.seeds for each in model.statistics()]


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
