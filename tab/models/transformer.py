"""Transformer blocks as they are usually built, with any layer in the place of the attention.

    x ← x + γ₁ ⊙ A(norm(x))          A: an attention, or a control; nothing at all if it is `none`
    x ← x + γ₂ ⊙ FFN(norm(x))        only with an FFN

Pre-norm: Xiong et al. 2020. γ (C,) is LayerScale (Touvron et al. 2021, "Going deeper with image
transformers"): it starts small, where the recipe says, and learns at a rate of its own. An
attention that brings a mixture of experts (deepseek_mla, kimi_k2) has it in the place of the FFN.

In front of the head stands one more norm, without weights: the head's first layer has those.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..layers import Attention
from ..layers.basic import NoAttention
from ..layers.deepseek_mla import LatentMoE
from .parts import Branch, Head, ImageModel


class Block(nn.Module):
    """x (B, N, C) -> (B, N, C); `ffn` makes the feed-forward part, None for a block without."""

    gates = ("gate", "ffn_gate")

    def __init__(
        self, layer: Attention, c: int, gate: float, ffn: Callable[[], nn.Module] | None = None
    ):
        super().__init__()
        self.layer = layer
        # The experts that the layer brings: whole with their norm, and run by this block.
        self.own_experts = isinstance(layer, LatentMoE) and layer.moe is not None
        mixes = not isinstance(layer, NoAttention)
        self.norm = nn.LayerNorm(c) if mixes else None
        self.gate = nn.Parameter(torch.full((c,), gate)) if mixes else None
        own = ffn is not None and not self.own_experts
        self.ffn_norm, self.ffn = (nn.LayerNorm(c), ffn()) if own else (None, None)
        some = own or self.own_experts
        self.ffn_gate = nn.Parameter(torch.full((c,), gate)) if some else None

    def before(self, x: Tensor) -> Tensor:
        """What the layer takes."""
        return x if self.norm is None else self.norm(x)

    def mix(self, x: Tensor) -> Tensor:
        """A(norm(x))"""
        if self.own_experts:
            return self.layer.attend(self.norm(x), None)
        if self.layer.reads_stream:
            return self.layer(self.norm(x), stream=x)
        return self.layer(self.norm(x))

    def feed(self, x: Tensor) -> Tensor:
        """FFN(norm(x))"""
        if self.own_experts:
            return self.layer.moe(self.layer.norm(x))
        return self.ffn(self.ffn_norm(x))

    def scaled(self, gate: Tensor, y: Tensor) -> Tensor:
        return gate * y

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            x = x + self.scaled(self.gate, self.mix(x))
        if self.ffn_gate is not None:
            x = x + self.scaled(self.ffn_gate, self.feed(x))
        return x

    def branches(self, x: Tensor) -> tuple[Tensor, list[Branch]]:
        """The same, and what each branch adds."""
        found = []
        for kind, gate, f in (
            ("attention", self.gate, self.mix),
            ("ffn", self.ffn_gate, self.feed),
        ):
            if gate is not None:
                y = self.scaled(gate, f(x))
                found.append(Branch(kind, x, y, gate))
                x = x + y
        return x, found


class TransformerModel(ImageModel):
    """backbone → positions → blocks → norm → head; x (B, 3, S, S) -> logits (B, classes)"""

    def __init__(
        self, backbone: nn.Module, position: Tensor | None, blocks: list[Block], head: Head, c: int
    ):
        nn.Module.__init__(self)
        self.backbone, self.blocks, self.head = backbone, nn.ModuleList(blocks), head
        self.set_position(position)
        self.norm = nn.LayerNorm(c, elementwise_affine=False)

    @property
    def attention(self) -> Attention:
        """The layer of the first block."""
        return self.blocks[0].layer

    def layers(self) -> list[Attention]:
        return [block.layer for block in self.blocks]

    def block_parameters(self) -> int:
        return sum(p.numel() for p in self.blocks.parameters() if p.requires_grad)

    def tokens(self, x: Tensor) -> Tensor:
        return self.blocks[0].before(self.embed(x))

    def body(self, x: Tensor) -> Tensor:
        """The backbone's tokens (B, N, C) -> what the head takes, (B, N, C)."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def branches(self, x: Tensor) -> list[Branch]:
        x, found = self.embed(x), []
        for block in self.blocks:
            x, own = block.branches(x)
            found += own
        return found
