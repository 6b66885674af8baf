"""What an image model is made of: the model itself, its older blocks, its head.

The blocks here are `replace`, the attention in place of a layer, and `residual`. transformer.py has
the usual ones.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers import Attention


class Branch(NamedTuple):
    """One residual branch on a batch: x ← x + y with y = gate ⊙ f(x)."""

    kind: str  # "attention" or "ffn"
    stream: Tensor  # x (B, N, C)
    output: Tensor  # y (B, N, C)
    gate: Tensor  # (C,)


def shares(branches: list[Branch]) -> dict[str, float | None]:
    """How far the residual branches got, means over the blocks; None where there is none.

    branch_share, ffn_share: ‖y‖/‖x‖ of the attention's branch and the FFN's, over all tokens.
    branch_gate: the mean |γ| of the attention's branch.
    """

    def mean(values: list[Tensor]) -> float | None:
        return torch.stack(values).mean().item() if values else None

    def share(kind: str) -> float | None:
        mine = [b for b in branches if b.kind == kind]
        return mean([b.output.float().norm() / b.stream.float().norm() for b in mine])

    gates = [b.gate.float().abs().mean() for b in branches if b.kind == "attention"]
    return {
        "branch_share": share("attention"),
        "branch_gate": mean(gates),
        "ffn_share": share("ffn"),
    }


class ImageModel(nn.Module):
    """x (B, 3, S, S) -> logits (B, classes)"""

    undecayed = ("position",)  # parameters that weight decay leaves alone

    def __init__(self, backbone: nn.Module, position, attention: Attention, block, head):
        super().__init__()
        self.backbone, self.block, self.head = backbone, block, head
        self.set_position(position)
        self.attention = attention

    def set_position(self, position: Tensor | None) -> None:
        """(N, C): a parameter if it is to be learned, else a fixed table."""
        if position is None or isinstance(position, nn.Parameter):
            self.position = position
        else:
            self.register_buffer("position", position)

    def embed(self, x: Tensor) -> Tensor:
        """The backbone's tokens with their positions, (B, N, C)."""
        tokens = self.backbone(x)
        return tokens if self.position is None else tokens + self.position

    def tokens(self, x: Tensor) -> Tensor:
        """The tokens that enter the first attention, (B, N, C)."""
        return self.block.before(self.embed(x))

    def body(self, x: Tensor) -> Tensor:
        """The embedded tokens (B, N, C) -> what the head takes, (B, N, C)."""
        return self.block(x, self.attention)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)))

    def layers(self) -> list[Attention]:
        """The attentions, one a block."""
        return [self.attention]

    def branches(self, x: Tensor) -> list[Branch]:
        """What each residual branch adds to the stream on images x."""
        x = self.embed(x)
        return self.block.branches(x, self.attention)

    def block_parameters(self) -> int | None:
        """Those of the transformer blocks; None where there is none."""
        return None

    def after_step(self) -> None:
        for layer in self.layers():
            layer.after_step()

    def auxiliary_loss(self) -> Tensor | None:
        terms = [loss for layer in self.layers() if (loss := layer.auxiliary_loss()) is not None]
        return sum(terms[1:], terms[0]) if terms else None

    def statistics(self) -> list[Tensor]:
        """What a step counts beside the buffers."""
        return [each for layer in self.layers() for each in layer.statistics()]

    def filters(self) -> Tensor:
        """The first layer's weights as pictures, (F, 3, rows, cols)."""
        return self.backbone.filters()


class Replace(nn.Module):
    """y = A(x)"""

    stacking = True  # tab/layers/_stacking.py

    def before(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        return attention(x)

    def branches(self, x: Tensor, attention: Attention) -> list[Branch]:
        return []


class Residual(nn.Module):
    """y = x + γ ⊙ A(norm(x)), γ (C,) = 0 at first: the block starts as the identity.

    Pre-norm: Xiong et al. 2020. A zero scale on the branch: Bachlechner et al. 2021 (ReZero), here
    one per channel; it fits every layer, with an output projection or without. deepseek_mla and
    kimi_k2 have a residual within, x + a, and read x for it, not norm(x).
    """

    gates = ("scale",)

    def __init__(self, c: int):
        super().__init__()
        self.norm = nn.LayerNorm(c)
        self.scale = nn.Parameter(torch.zeros(c))

    def before(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        return x + self.scale * self.branch(x, attention)

    def branches(self, x: Tensor, attention: Attention) -> list[Branch]:
        y = self.scale * self.branch(x, attention)
        return [Branch("attention", x, y, self.scale)]

    def branch(self, x: Tensor, attention: Attention) -> Tensor:
        """A(norm(x))"""
        if attention.reads_stream:
            return attention(self.norm(x), stream=x)
        return attention(self.norm(x))


POOLS = {
    "mean": lambda x: x.mean(1),
    "max": lambda x: x.amax(1),
    "class": lambda x: x[:, 0],
    "each": lambda x: x,
    "flatten": lambda x: x.flatten(1),
}


class Head(nn.Module):
    """(B, N, C) -> logits. pool: "mean" or "max" over the tokens, "class" for the first alone;
    "flatten" lays them side by side; "each" answers at each token, (B, N, classes).
    scale: of the logits. Where it is small SGD changes them less in a step (Page 2018)."""

    stacking = True  # tab/layers/_stacking.py

    def __init__(
        self, into: int, hidden: int, layers: int, classes: int, *, pool: str, scale: float = 1.0
    ):
        super().__init__()
        self.pool, self.scale = pool, scale
        widths = [into, *[hidden] * layers]
        parts = [
            part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())
        ]
        self.layers = nn.Sequential(*parts, nn.Linear(widths[-1], classes))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.layers(POOLS[self.pool](x))
        return logits if self.scale == 1 else logits * self.scale
