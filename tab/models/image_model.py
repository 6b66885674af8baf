"""The image models: backbone → tokens → attention block → head. Any attention fits any model.

Tokens are (B, N, C): N cells of a feature map ("grid"), or N slices of one Linear's output.
Each part draws its initial weights from a generator of its own, seeded by (seed, part): two
variants with the same seed start from the same backbone and head, whatever lies between.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..layers import Attention, attention_options, build_attention
from ..layers.basic import NoAttention
from ..run_config import MODELS, RunConfig
from .backbones import BACKBONES


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

    def statistics(self) -> list[Tensor]:
        """What a step counts beside the buffers."""
        return self.attention.statistics()

    def filters(self) -> Tensor:
        """The first layer's weights as pictures, (F, 3, rows, cols)."""
        return self.backbone.filters()


def build_model(config: RunConfig, classes: int) -> ImageModel:
    """The model of this run with its initial weights, on the CPU."""
    options, c = config.model_options, config.model_options.hidden
    kind = BACKBONES[config.model]
    grid, n = kind.grid(options), tokens_of(config)
    with _own_seed(config.draws, "backbone"):
        backbone = kind(options)
    with _own_seed(config.draws, "position"):
        learned = options.position == "learned"
        position = nn.Parameter(nn.init.trunc_normal_(torch.empty(n, c), std=0.02))
    attention = build_layer(config)
    # The control's block is the identity: no norm, no scale.
    residual = options.block == "residual" and not isinstance(attention, NoAttention)
    block = Residual(c) if residual else Replace()
    with _own_seed(config.draws, "head"):
        pool = kind.pool if grid else "flatten"
        head = Head(c if grid else n * c, c, options.head_layers, classes, pool=pool)
    return ImageModel(backbone, position if learned else None, attention, block, head)


def build_layer(config: RunConfig) -> Attention:
    """The attention of this run with its initial weights."""
    options, published = config.model_options, config.model_options.forms == "published"
    extra = {}
    # A layer without the option `rope` has its own rule for positions, or needs none.
    known = attention_options(config.attention, published=published)
    if options.position == "rope" and "rope" in known:
        extra["rope"] = True
    with _own_seed(config.draws, "attention"):
        return build_attention(
            config.attention,
            options.hidden,
            seq_len=tokens_of(config),
            grid=BACKBONES[config.model].grid(options),
            published=published,
            **{**extra, **config.attention_options},
        )


def tokens_of(config: RunConfig) -> int:
    """N, the tokens that the attention sees."""
    grid = BACKBONES[config.model].grid(config.model_options)
    return grid[0] * grid[1] if grid else config.model_options.tokens


def model_names() -> list[str]:
    return list(MODELS)


STUDY = "mlp,cnn"  # the models of a comparison or a sweep that names none


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# --- parts ----------------------------------------------------------------------------------------


class Replace(nn.Module):
    """y = A(x)"""

    stacking = True  # tab/layers/_stacking.py

    def before(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        return attention(x)


class Residual(nn.Module):
    """y = x + γ ⊙ A(norm(x)), γ (C,) = 0 at first: the block starts as the identity.

    Pre-norm: Xiong et al. 2020. A zero scale on the branch: Bachlechner et al. 2021 (ReZero), here
    one per channel; it fits every layer, with an output projection or without. deepseek_mla and
    kimi_k2 have a residual within, x + a, and read x for it, not norm(x).
    """

    def __init__(self, c: int):
        super().__init__()
        self.norm = nn.LayerNorm(c)
        self.scale = nn.Parameter(torch.zeros(c))

    def before(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        return x + self.scale * self.branch(x, attention)

    def branch(self, x: Tensor, attention: Attention) -> Tensor:
        """A(norm(x))"""
        if attention.reads_stream:
            return attention(self.norm(x), stream=x)
        return attention(self.norm(x))


POOLS = {
    "mean": lambda x: x.mean(1),
    "max": lambda x: x.amax(1),
    "flatten": lambda x: x.flatten(1),
}


class Head(nn.Module):
    """(B, N, C) -> logits. pool: "mean" or "max" over the cells of a grid; "flatten" lays other
    tokens side by side."""

    stacking = True  # tab/layers/_stacking.py

    def __init__(self, into: int, hidden: int, layers: int, classes: int, *, pool: str):
        super().__init__()
        self.pool = pool
        widths = [into, *[hidden] * layers]
        parts = [
            part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())
        ]
        self.layers = nn.Sequential(*parts, nn.Linear(widths[-1], classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(POOLS[self.pool](x))


# --- seeds ----------------------------------------------------------------------------------------


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
