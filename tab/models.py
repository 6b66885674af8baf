"""The two image models: backbone → tokens → attention block → head. Any attention fits any model.

Tokens are (B, N, C): N cells of the CNN's feature map ("grid"), or N slices of one Linear's output.
Each part draws its initial weights from a generator of its own, seeded by (seed, part): two
variants with the same seed start from the same backbone and head, whatever lies between.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .config import MODELS, Cnn, Mlp, RunConfig
from .layers import Attention, attention_options, build_attention

IMAGE = 32  # rows and columns
GRID = (IMAGE // 4, IMAGE // 4)  # of the CNN's last feature map


class ImageModel(nn.Module):
    """x (B, 3, 32, 32) -> logits (B, classes)"""

    def __init__(self, backbone: nn.Module, position, attention: Attention, block, head):
        super().__init__()
        self.backbone, self.position, self.block, self.head = backbone, position, block, head
        self.attention = attention

    def embed(self, x: Tensor) -> Tensor:
        """The backbone's tokens with their positions, (B, N, C)."""
        tokens = self.backbone(x)
        return tokens if self.position is None else tokens + self.position

    def tokens(self, x: Tensor) -> Tensor:
        """The tokens that enter the attention, (B, N, C)."""
        return self.block.before(self.embed(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x), self.attention))

    def filters(self) -> Tensor:
        """The first layer's weights as pictures, (F, 3, rows, cols)."""
        return self.backbone.filters()


def build_model(config: RunConfig, classes: int) -> ImageModel:
    """The model of this run with its initial weights, on the CPU."""
    options, c = config.model_options, config.model_options.hidden
    grid = GRID if options.tokens == "grid" else None
    n = GRID[0] * GRID[1] if grid else options.tokens
    with _own_seed(config.seed, "backbone"):
        backbone = _BACKBONES[config.model](options)
    with _own_seed(config.seed, "position"):
        learned = options.position == "learned"
        position = nn.Parameter(nn.init.trunc_normal_(torch.empty(n, c), std=0.02))
    extra = {}
    # A layer without the option `rope` has its own rule for positions, or needs none.
    if options.position == "rope" and "rope" in attention_options(config.attention):
        extra["rope"] = True
    with _own_seed(config.seed, "attention"):
        attention = build_attention(
            config.attention, c, seq_len=n, grid=grid, **{**extra, **config.attention_options}
        )
    # The control's block is the identity: no norm, no scale.
    residual = options.block == "residual" and config.attention != "none"
    block = Residual(c) if residual else Replace()
    with _own_seed(config.seed, "head"):
        head = Head(c if grid else n * c, c, options.head_layers, classes, mean=grid is not None)
    return ImageModel(backbone, position if learned else None, attention, block, head)


def model_names() -> list[str]:
    return list(MODELS)


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# --- parts ----------------------------------------------------------------------------------------


class MlpBackbone(nn.Module):
    """Linear(3072 → N·C), ReLU. Pixels are flattened as 32×32×3, the order in memory."""

    def __init__(self, options: Mlp):
        super().__init__()
        self.tokens = options.tokens
        self.linear = nn.Linear(3 * IMAGE * IMAGE, options.tokens * options.hidden)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.permute(0, 2, 3, 1).flatten(1)  # (B, 3072)
        return self.linear(flat).relu().unflatten(1, (self.tokens, -1))

    def filters(self) -> Tensor:
        return self.linear.weight.unflatten(1, (IMAGE, IMAGE, 3)).permute(0, 3, 1, 2)


class CnnBackbone(nn.Module):
    """Two convolutions to 8×8 cells; the cells are the tokens, or flatten → Linear → N tokens."""

    def __init__(self, options: Cnn):
        super().__init__()
        first = options.channels
        last = options.hidden if options.tokens == "grid" else 2 * first
        pool = options.stem == "pool"
        self.convolutions = nn.Sequential(*_conv(3, first, pool), *_conv(first, last, pool))
        self.tokens, self.linear = options.tokens, None
        if options.tokens != "grid":
            cells = GRID[0] * GRID[1] * last
            self.linear = nn.Linear(cells, options.tokens * options.hidden)

    def forward(self, x: Tensor) -> Tensor:
        cells = self.convolutions(x).permute(0, 2, 3, 1)  # (B, 8, 8, C)
        if self.linear is None:
            return cells.flatten(1, 2)
        return self.linear(cells.flatten(1)).unflatten(1, (self.tokens, -1))

    def filters(self) -> Tensor:
        return self.convolutions[0].weight


_BACKBONES = {"mlp": MlpBackbone, "cnn": CnnBackbone}


def _conv(into: int, out: int, pool: bool) -> list[nn.Module]:
    """Halves rows and columns. Batch norm makes a bias redundant."""
    convolution = nn.Conv2d(into, out, 3, stride=1 if pool else 2, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(out), nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]


class Replace(nn.Module):
    """y = A(x)"""

    def before(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        return attention(x)


class Residual(nn.Module):
    """y = x + γ ⊙ A(norm(x)), γ (C,) = 0 at first: the block starts as the identity.

    Pre-norm: Xiong et al. 2020. A zero scale on the branch: Bachlechner et al. 2021 (ReZero), here
    one per channel; it fits every layer, with an output projection or without.
    """

    def __init__(self, c: int):
        super().__init__()
        self.norm = nn.LayerNorm(c)
        self.scale = nn.Parameter(torch.zeros(c))

    def before(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        return x + self.scale * attention(self.norm(x))


class Head(nn.Module):
    """(B, N, C) -> logits. Cells of a grid are averaged, other tokens are laid side by side."""

    def __init__(self, into: int, hidden: int, layers: int, classes: int, *, mean: bool):
        super().__init__()
        self.mean = mean
        widths = [into, *[hidden] * layers]
        parts = [
            part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())
        ]
        self.layers = nn.Sequential(*parts, nn.Linear(widths[-1], classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.mean(1) if self.mean else x.flatten(1))


# --- seeds and widths -----------------------------------------------------------------------------


@contextlib.contextmanager
def _own_seed(seed: int, part: str) -> Iterator[None]:
    """torch's initialisers draw from the global CPU generator: lend it to one part, give it back.

    Not torch.manual_seed, which would also reseed every GPU.
    """
    generator = torch.default_generator
    before = generator.get_state()
    digest = hashlib.sha256(f"{seed} {part}".encode()).digest()
    generator.manual_seed(int.from_bytes(digest[:8]) >> 1)
    try:
        yield
    finally:
        generator.set_state(before)


def match_width(config: RunConfig, target: int) -> RunConfig:
    """The config with the `hidden` whose model comes nearest to `target` parameters.

    Widths that the layer refuses (heads that do not divide it) are passed over.
    """

    def size(hidden: int) -> int | None:
        try:
            return parameters_of(_with(config, hidden))
        except ValueError:
            return None

    def valid(hidden: int) -> int:
        """The next width from `hidden` on that the layer takes."""
        width = next((h for h in range(hidden, hidden + 257) if size(h) is not None), hidden)
        parameters_of(_with(config, width))  # raises what is wrong, if none is
        return width

    low, high = 1, 2
    while size(valid(high)) < target:
        low, high = high, 2 * high
    while high - low > 1:  # size(valid(low)) < target ≤ size(valid(high)), but for low = 1
        middle = (low + high) // 2
        low, high = (middle, high) if size(valid(middle)) < target else (low, middle)
    best = min((valid(low), valid(high)), key=lambda h: abs(size(h) - target))
    return _with(config, best)


def parameters_of(config: RunConfig, classes: int = 10) -> int:
    """The number of parameters of this run's model; the same for every seed."""
    same = {k: v for k, v in config.attention_options.items() if k != "seed"}
    config = dataclasses.replace(config, seed=0, attention_options=same)
    return _parameters_of(json.dumps(config.to_dict()), classes)


@functools.cache
def _parameters_of(config: str, classes: int) -> int:
    run = RunConfig.from_dict(json.loads(config))
    try:
        with torch.device("meta"):  # counted without being drawn
            return parameter_count(build_model(run, classes))
    except (RuntimeError, NotImplementedError):  # a layer that looks at its values when built
        return parameter_count(build_model(run, classes))


def _with(config: RunConfig, hidden: int) -> RunConfig:
    options = dataclasses.replace(config.model_options, hidden=hidden)
    return dataclasses.replace(config, model_options=options)
