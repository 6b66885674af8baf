"""What makes tokens (B, N, C) of images x (B, 3, S, S), S = data.size. Each backbone has:

pool(options)          how the head makes one vector of them
filters()              the first layer's weights as pictures, (F, 3, rows, cols)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..run_config import Cnn, Mlp, Resnet9, Tokens, Vit

PATCH = 3 * 3 * 3  # numbers in a 3×3 patch
EPSILON = 5e-4  # added to the variances of patches (Jordan 2024), so that noise is not blown up


class Backbone(nn.Module):
    """Where the tokens are no grid, the recipe says how many there are; the head takes them side by
    side."""

    undecayed: tuple[str, ...] = ()  # parameters that weight decay leaves alone
    side: int  # rows and columns of an image

    @classmethod
    def pool(cls, options: Mlp) -> str:
        return "mean" if options.tokens == "grid" else "flatten"

    @classmethod
    def build(cls, options: Mlp, classes: int, side: int) -> Backbone:
        return cls(options, side)

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def see(self, x: Tensor) -> None:
        """Is shown training images before the first step; most need none."""

    def example(self) -> Tensor:
        """One input, to count operations on."""
        return torch.zeros(1, 3, self.side, self.side)

    def filters(self) -> Tensor:
        raise NotImplementedError


class MlpBackbone(Backbone):
    """Linear(3·S² → N·C), ReLU. Pixels are flattened as S×S×3, the order in memory."""

    stacking = True  # tab/layers/_stacking.py

    def __init__(self, options: Mlp, side: int):
        super().__init__(side)
        self.count = options.tokens
        self.linear = nn.Linear(3 * side * side, options.tokens * options.hidden)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.permute(0, 2, 3, 1).flatten(1)  # (B, 3·S²)
        return self.linear(flat).relu().unflatten(1, (self.count, -1))

    def filters(self) -> Tensor:
        return self.linear.weight.unflatten(1, (self.side, self.side, 3)).permute(0, 3, 1, 2)


class CnnBackbone(Backbone):
    """Two convolutions to S/4 × S/4 cells, and as many more there as the recipe says; the cells are
    the tokens, or flatten → Linear → N tokens."""

    stacking = True  # tab/layers/_stacking.py
    folded = "convolutions"  # run on several seeds beside each other in the channels

    def __init__(self, options: Cnn, side: int):
        super().__init__(side)
        first = options.channels
        last = options.hidden if options.tokens == "grid" else 2 * first
        self.convolutions = nn.Sequential(
            *_conv(3, first, options.stem), *_conv(first, last, options.stem)
        )
        for _ in range(options.convolutions - 2):
            self.convolutions.extend(_conv(last, last, "keep"))
        self.count, self.linear = options.tokens, None
        if options.tokens != "grid":
            cells = (side // 4) ** 2 * last
            self.linear = nn.Linear(cells, options.tokens * options.hidden)

    def forward(self, x: Tensor) -> Tensor:
        cells = self.convolutions(x).permute(0, 2, 3, 1)  # (B, S/4, S/4, C)
        if self.linear is None:
            return cells.flatten(1, 2)
        return self.linear(cells.flatten(1)).unflatten(1, (self.count, -1))

    def filters(self) -> Tensor:
        return self.convolutions[0].weight


class Resnet9Backbone(Backbone):
    """Eight convolutions to cells of width C, 4×4 or 8×8 of an image of 32×32; the head is the
    ninth layer.

    The shape of Page 2018, "How to Train Your ResNet": widths c, 2c (and a residual block), 4c,
    C (and a residual block), each halved but the first; max pooling over the cells in the head.
    cells = 8 leaves out the last halving. whiten: before the first convolution, which is then 1×1,
    stands a fixed one whose outputs on 3×3 patches of training images are uncorrelated and of equal
    variance (Page 2018; Jordan 2024); training sets it once (`see`).
    """

    stacking = True  # tab/layers/_stacking.py
    folded = "convolutions"  # run on several seeds beside each other in the channels

    @classmethod
    def pool(cls, options: Resnet9) -> str:
        return "max"

    def __init__(self, options: Resnet9, side: int):
        super().__init__(side)
        c, last = options.channels, options.hidden
        first = _conv(3, c, "keep")
        if options.whiten:
            fixed = nn.Conv2d(3, PATCH, 3, padding=1, bias=False).requires_grad_(False)
            first = [fixed, nn.Conv2d(PATCH, c, 1, bias=False), *first[1:]]
        self.whitens = options.whiten
        self.convolutions = nn.Sequential(
            *first,
            *_conv(c, 2 * c, "pool"),
            _Add(2 * c),
            *_conv(2 * c, 4 * c, "pool"),
            *_conv(4 * c, last, "pool" if options.cells == 4 else "keep"),
            _Add(last),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.convolutions(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, rows·cols, C)

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """Sets the whitening layer by training images x (B, 3, 32, 32): W = Λ^(-1/2)Vᵀ of the
        covariance VΛVᵀ of their patches."""
        if not self.whitens:
            return
        patches = nn.functional.unfold(x, 3).transpose(1, 2).flatten(0, 1).double()  # (B·900, 27)
        values, vectors = torch.linalg.eigh(patches.T.cov())
        weight = (vectors / (values + EPSILON).sqrt()).T  # (27, 27), a filter a row
        self.convolutions[0].weight.copy_(weight.view(PATCH, 3, 3, 3))

    def filters(self) -> Tensor:
        return self.convolutions[0].weight


class VitBackbone(Backbone):
    """One Linear of each patch of p×p pixels, (S/p)² of them (Dosovitskiy et al. 2021), and in
    front of them a class token if the head is to read that."""

    undecayed = ("class_token",)

    @classmethod
    def pool(cls, options: Vit) -> str:
        return options.pool

    def __init__(self, options: Vit, side: int):
        super().__init__(side)
        self.patch, c = options.patch, options.hidden
        self.linear = nn.Linear(3 * self.patch**2, c)
        self.class_token = None
        if options.pool == "class":
            self.class_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(c), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch
        parts = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, 3, rows, p, cols, p)
        tokens = self.linear(parts.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        if self.class_token is None:
            return tokens
        return torch.cat([self.first(len(x)), tokens], 1)

    def first(self, count: int) -> Tensor:
        """The class token of `count` images, (B, 1, C)."""
        return self.class_token.expand(count, 1, -1)

    def filters(self) -> Tensor:
        return self.linear.weight.unflatten(1, (self.patch, self.patch, 3)).permute(0, 3, 1, 2)


class TokensBackbone(Backbone):
    """x (B, N, 2), keys 0…N and values 0…classes -> (B, N, C), the sum of their embeddings.

    Key 0 and the last value are blank and add nothing: a vector of their own, the same at most
    places, would drown in every mean over the tokens what the others hold.
    """

    stacking = True  # tab/layers/_stacking.py

    @classmethod
    def pool(cls, options: Tokens) -> str:
        return "each"

    @classmethod
    def build(cls, options: Tokens, classes: int, side: int) -> TokensBackbone:
        return cls(options, classes)

    def __init__(self, options: Tokens, classes: int):
        super().__init__(0)  # no image
        self.count, self.blank = options.tokens, classes
        self.keys = nn.Embedding(options.tokens, options.hidden)
        self.values = nn.Embedding(classes, options.hidden)

    def forward(self, x: Tensor) -> Tensor:
        key, value = x.unbind(-1)
        keys = self.keys((key - 1).clamp(min=0)) * (key > 0)[..., None]
        values = self.values(value.clamp(max=self.blank - 1)) * (value < self.blank)[..., None]
        return keys + values

    def example(self) -> Tensor:
        return torch.zeros(1, self.count, 2, dtype=torch.int64)


class _Add(nn.Module):
    """y = x + two convolutions of x"""

    stacking = True  # tab/layers/_stacking.py

    def __init__(self, c: int):
        super().__init__()
        self.branch = nn.Sequential(*_conv(c, c, "keep"), *_conv(c, c, "keep"))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _conv(into: int, out: int, size: str) -> list[nn.Module]:
    """size: "pool" and "stride" halve rows and columns, "keep" does not. Batch norm makes a bias
    redundant."""
    stride = 2 if size == "stride" else 1
    convolution = nn.Conv2d(into, out, 3, stride=stride, padding=1, bias=False)
    halve = [nn.MaxPool2d(2)] if size == "pool" else []
    return [convolution, nn.BatchNorm2d(out), nn.ReLU(), *halve]


BACKBONES: dict[str, type[Backbone]] = {
    "mlp": MlpBackbone,
    "cnn": CnnBackbone,
    "resnet9": Resnet9Backbone,
    "vit": VitBackbone,
    "tokens": TokensBackbone,
}
