"""S models of one variant, one a seed, as one model: stacked weights, and images seed by seed.

Weights are (S, …). Tensors flow as (S·B, …), the images of the first seed first, so that the code
and the kernels of the layers run unchanged on S times the batch. How a module runs, its class says
(tab/layers/_stacking.py), for PyTorch's own tab/models/stacked_modules.py:

    a form of its own
                    what has weights: baddbmm for Linear, a grouped convolution, one batch norm over
                    S·C channels, S·E experts; and what keeps books over a batch
    as it is        what only calls its submodules and treats the images of a batch alike
    PerSeed         all else, layers that say nothing too: each seed's own module, one by one

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

from ..layers._stacking import beside, stacking_of, stacks
from .parts import ImageModel
from .stacked_modules import FOLDED, TORCH, Folded, SeedBatchNorm
from .transformer import TransformerModel


def stack(seeds: Sequence[nn.Module], *, folded: bool = False) -> nn.Module:
    """The modules of S seeds -> one on (S·B, …). Their parameters become views of its own.

    folded: within `Folded`, where the seeds lie beside each other in the channels.
    """
    first = seeds[0]
    form = _form(seeds, folded)
    if isinstance(form, str):
        return PerSeed(seeds, form)
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
    beside_each_other = getattr(first, "folded", None)  # of a backbone: the name of a child
    one._modules = {
        name: None if child is None else stack(
            [m._modules[name] for m in seeds], folded=folded or name == beside_each_other
        )
        for name, child in first._modules.items()
    }  # fmt: skip
    if beside_each_other:
        one._modules[beside_each_other] = Folded(one._modules[beside_each_other], len(seeds))
    return one


def _form(seeds: Sequence[nn.Module], folded: bool) -> type[nn.Module] | str:
    """The class that runs all of them, or why there is none."""
    first, kind = seeds[0], type(seeds[0])
    known = {**TORCH, **FOLDED} if folded else TORCH
    said = known[kind] if kind in known else stacking_of(first)
    if said is not True:
        return said
    if first._parameters:
        return "it has weights of its own, and no class that stacks them (@stacks)"
    same = (torch.equal(b, m._buffers[n]) for m in seeds for n, b in first._buffers.items())
    return kind if all(same) else "its buffers are not the same for all seeds"


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
    stream what it would draw alone. why: what keeps them from running as one."""

    def __init__(self, seeds: Sequence[nn.Module], why: str):
        super().__init__()
        self.seeds, self.why = nn.ModuleList(seeds), why
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


@stacks(ImageModel)
class SeedModel(ImageModel):
    """position (S, N, C). x (S·B, 3, rows, cols) -> logits (S·B, classes)"""

    seeds: tuple[ImageModel, ...]

    def embed(self, x: Tensor) -> Tensor:
        tokens = self.backbone(x)
        if self.position is None:
            return tokens
        if "position" in self._buffers:  # a table that is the same for all
            return tokens + self.position
        position, tokens = beside(self.position, tokens)
        return (tokens + position).flatten(0, 1)

    def start(self, numbers: Sequence[int], device: torch.device) -> None:
        """An epoch begins, for which each seed alone would call torch.manual_seed(number)."""
        for module in self.one_by_one():
            module.start(numbers, device)

    def one_by_one(self) -> list[PerSeed]:
        return [module for module in self.modules() if isinstance(module, PerSeed)]

    def statement(self) -> str:
        """Which parts run seed by seed, and why; "" where all run as one."""
        parts = {f"{type(each.seeds[0]).__name__}: {each.why}" for each in self.one_by_one()}
        return f"runs one seed after the other: {'; '.join(sorted(parts))}" if parts else ""

    def train(self, mode: bool = True) -> SeedModel:
        for model in self.seeds:
            model.train(mode)
        return super().train(mode)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        return itertools.chain(*(model.buffers(recurse) for model in self.seeds))

    def statistics(self) -> list[Tensor]:
        return [each for model in self.seeds for each in model.statistics()]


@stacks(TransformerModel)
class SeedTransformer(SeedModel, TransformerModel):
    """The same with transformer blocks."""
