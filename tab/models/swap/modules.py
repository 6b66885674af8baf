"""What takes the place of an attention of torch or timm: called as that was, it runs TAB's layer.

Each says what it cannot keep (`refuse`, at the swap) and where the projections are that it can.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...layers import Attention
from ...ops._softmax import may_look


class _Swapped(nn.Module):
    """Calls `layer` as what it replaced was called. name: of the mechanism."""

    def __init__(self, layer: Attention, name: str, old: nn.Module):
        super().__init__()
        self.layer, self.name, self.num_heads = layer, name, old.num_heads

    def refuse_masks(self, attn_mask: Tensor | None, is_causal: bool) -> None:
        if attn_mask is not None or is_causal:
            raise ValueError(
                f"{self.name} takes no attn_mask and no is_causal: every token attends to all that "
                "key_padding_mask leaves"
            )


class TorchAttention(_Swapped):
    """In the place of an nn.MultiheadAttention, with its `forward`."""

    in_proj_bias, _qkv_same_embed_dim = None, False  # to nn.TransformerEncoder: no fast path

    def __init__(self, layer: Attention, name: str, old: nn.MultiheadAttention):
        super().__init__(layer, name, old)
        self.embed_dim, self.batch_first = old.embed_dim, old.batch_first

    @staticmethod
    def refuse(old: nn.MultiheadAttention, model: nn.Module, name: str) -> None:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerDecoderLayer) and parent.multihead_attn is old:
            raise ValueError(
                "it attends to another sequence, which no layer of TAB does: name the others, "
                "with modules"
            )
        if old.dropout:
            raise ValueError(
                f"it drops attention weights (dropout={old.dropout:g}), which no layer of TAB "
                "does: set its `dropout` to 0.0 to go on without, or build the model so"
            )
        if not old._qkv_same_embed_dim or old.bias_k is not None or old.add_zero_attn:
            raise ValueError("kdim, vdim, add_bias_kv and add_zero_attn cannot be kept")

    @staticmethod
    def projections(old: nn.MultiheadAttention) -> tuple[nn.Linear, nn.Linear]:
        weight, bias = old.in_proj_weight, old.in_proj_bias
        qkv = nn.Linear(old.embed_dim, 3 * old.embed_dim, bias is not None, device="meta")
        qkv.weight, qkv.bias = weight, bias
        return qkv, old.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """(B, N, C), or (N, B, C) without batch_first, or (N, C) -> the same, and no weights.

        key_padding_mask (B, N) or (N,): bool, True where a token is padding, or 0 and -inf.
        """
        self.refuse_masks(attn_mask, is_causal)
        if key is not query or value is not query:
            raise ValueError(
                f"{self.name} takes q, k and v from one sequence: give it one tensor as query, key "
                "and value"
            )
        if need_weights:
            raise ValueError(f"{self.name} returns no weights here: call with need_weights=False")
        if query.is_nested:
            raise ValueError(f"{self.name} takes no nested tensor: give a key_padding_mask")
        mask = None if key_padding_mask is None else _real(key_padding_mask)
        if query.dim() == 2:
            return self.layer(query[None], None if mask is None else mask[None])[0], None
        if self.batch_first:
            return self.layer(query, mask), None
        return self.layer(query.transpose(0, 1), mask).transpose(0, 1), None


def _real(padding: Tensor) -> Tensor:
    """True where a token is real."""
    if padding.dtype == torch.bool:
        return ~padding
    known, text = (padding == 0) | (padding == -torch.inf), "key_padding_mask: give 0 and -inf only"
    if not may_look(padding):
        torch._assert_async(known.all(), text)
    elif not known.all():
        raise ValueError(f"{text}, or bool; weights in between cannot be kept")
    return padding == 0


class TimmAttention(_Swapped):
    """In the place of a timm.layers.attention.Attention, with its `forward`."""

    def __init__(self, layer: Attention, name: str, old: nn.Module):
        super().__init__(layer, name, old)
        self.proj_drop = old.proj_drop

    @staticmethod
    def refuse(old: nn.Module, model: nn.Module, name: str) -> None:
        if old.attn_drop.p:
            raise ValueError(
                f"it drops attention weights (attn_drop={old.attn_drop.p:g}), which no layer of "
                "TAB does: set its `attn_drop.p` to 0.0 to go on without, or build the model so"
            )
        parts = ("q_norm", "k_norm", "norm", "gate")
        if kept := [x for x in parts if not isinstance(getattr(old, x, None), nn.Identity | None)]:
            raise ValueError(f"its {', '.join(kept)} cannot be kept: no layer of TAB has it")

    @staticmethod
    def projections(old: nn.Module) -> tuple[nn.Linear, nn.Linear]:
        for linear in (old.qkv, old.proj):
            if type(linear) is not nn.Linear:
                raise ValueError(f"its projection is a {type(linear).__name__}, no nn.Linear")
        return old.qkv, old.proj

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        self.refuse_masks(attn_mask, is_causal)
        return self.proj_drop(self.layer(x))
