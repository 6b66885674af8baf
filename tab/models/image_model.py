"""The image models: backbone → tokens → attention block → head. Any attention fits any model.

What a model is made of lies in parts.py, and in transformer.py for transformer blocks.

Tokens are (B, N, C): N cells of a feature map ("grid"), or N slices of one Linear's output.
Each part draws its initial weights from a generator of its own, seeded by (seed, part): two
variants with the same seed start from the same backbone and head, whatever lies between.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..layers import Attention, attention_options, build_attention, get_attention
from ..layers.basic import NoAttention
from ..layers.controls import FeedForward
from ..run_config import MODELS, RunConfig
from .backbones import BACKBONES
from .parts import Head, ImageModel, Replace, Residual
from .transformer import Block, TransformerModel


def build_model(config: RunConfig, classes: int) -> ImageModel:
    """The model of this run with its initial weights, on the CPU."""
    options, c = config.model_options, config.model_options.hidden
    kind, side = BACKBONES[config.model], config.data.size
    n, pool = config.tokens, kind.pool(options)
    with _own_seed(config.draws, "backbone"):
        backbone = kind.build(options, classes, side)
    position = None
    if options.position == "learned":
        with _own_seed(config.draws, "position"):
            position = nn.Parameter(nn.init.trunc_normal_(torch.empty(n, c), std=0.02))
    elif options.position == "sincos":
        position = sincos(n, c, options.places(side))
    with _own_seed(config.draws, "head"):
        into = n * c if pool == "flatten" else c
        scale = getattr(options, "logit_scale", 1.0)
        head = Head(into, c, options.head_layers, classes, pool=pool, scale=scale)
    if options.block == "pre_norm":
        blocks = [build_block(config, i) for i in range(options.depth)]
        return TransformerModel(backbone, position, blocks, head, c)
    attention = build_layer(config)
    # The control's block is the identity: no norm, no scale.
    residual = options.block == "residual" and not isinstance(attention, NoAttention)
    block = Residual(c) if residual else Replace()
    return ImageModel(backbone, position, attention, block, head)


def build_block(config: RunConfig, index: int = 0) -> Block:
    """The transformer block number `index` of this run with its initial weights."""
    options, c = config.model_options, config.model_options.hidden
    ffn = None
    if width := round(options.ffn_ratio * c):

        def ffn() -> FeedForward:
            with _own_seed(config.draws, f"ffn {index}"):
                return FeedForward(c, seq_len=config.tokens, width=width)

    return Block(build_layer(config, index), c, options.layer_scale, ffn)


def build_layer(config: RunConfig, index: int = 0) -> Attention:
    """The attention of this run, in the block number `index`, with its initial weights."""
    options, published = config.model_options, config.model_options.forms == "published"
    extra = {}
    # A layer without the option `rope` has its own rule for positions, or needs none.
    known = attention_options(config.attention, published=published)
    if options.position == "rope" and "rope" in known:
        extra["rope"] = True
    # What a config does not say is as it was when that could be left out.
    before = layer_class(config).before
    with _own_seed(config.draws, f"attention {index}" if index else "attention"):
        return build_attention(
            config.attention,
            options.hidden,
            seq_len=config.tokens,
            grid=options.grid(config.data.size),
            published=published,
            **{**before, **extra, **config.attention_options},
        )


def layer_class(config: RunConfig) -> type[Attention]:
    """Of this run's attention; a ValueError where it is not installed."""
    published = config.model_options.forms == "published"
    return get_attention(config.attention, published=published)


def sincos(n: int, c: int, grid: tuple[int, int] | None) -> Tensor:
    """Fixed positions (N, C): sin and cos of position · 10000^(-2i/C) (Vaswani et al. 2017, section
    3.5); on a grid the first half of the channels tells the row, the second the column. Tokens in
    front of those of the grid have zeros."""
    first = n - grid[0] * grid[1] if grid else 0
    token = torch.arange(n - first, dtype=torch.float64, device="cpu")
    axes = [token // grid[1], token % grid[1]] if grid else [token]
    pairs = -(-c // (2 * len(axes)))  # of sin and cos for an axis; what is over is cut off
    rate = 1e4 ** -(torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
    angle = [axis[:, None] * rate for axis in axes]
    table = torch.cat([f(a) for a in angle for f in (torch.sin, torch.cos)], 1)[:, :c]
    position = torch.zeros(n, c)
    position[first:].copy_(table)
    return position


def model_names() -> list[str]:
    """The models of images, which "all" stands for."""
    return [name for name in MODELS if name != "tokens"]


STUDY = "mlp,cnn"  # the models of a comparison or a sweep that names none


def parameter_count(module: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


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
