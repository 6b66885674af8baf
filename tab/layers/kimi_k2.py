"""Kimi K2's block as a layer: attention with QK-Clip, then experts without groups.

Kimi Team 2025, "Kimi K2", section 2.1 (QK-Clip) and 2.3 (architecture). K2 itself has 384 experts,
8 per token, 64 heads and latent attention; the defaults here are for image-sized models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.mla_forms import max_logits
from ._registry import register_attention
from ._sizes import check_number
from ._stacking import stacks
from ._state import Stateful, over_ranks, own_weight, scale_rows
from .basic import MultiHeadAttention
from .deepseek_mla import LatentAttention, LatentMoE
from .rope import Rope

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

THETA = 5e4  # K2's rotary base
EPSILON = torch.finfo(torch.float32).eps


@register_attention("kimi_k2")
class KimiK2(Stateful, LatentMoE):
    """Latent attention with rotary positions, and K2's experts, each with its residual.

    attention: "mla", latent, which is K2's; or "mha", multi-head, as the published study has under
    this name, which its recipes keep. The residuals are those of `LatentMoE`: the experts read the
    stream and not only what attention made of it.

    QK-Clip, after each optimizer step, per head: with S the largest score seen since the last step
    and γ = min(1, tau/S), the weights of q_n and k_n are scaled by √γ and those of q_r by γ; k_r
    belongs to all heads and stays. In "mha" all of q and k is a head's own: √γ each. A score that
    is not finite, or so large that γ would be below float32's machine epsilon (1.2e-7), tells of a
    broken batch and not of weights that grew: the largest score of that batch entry and head is
    not counted.

    inner_dim: the width of Q, K and V, all heads together.
    kv_rank, q_rank, nope_dim, rope_dim, v_dim: of `LatentAttention`, used by "mla" only.
    num_experts (0: attention alone), top_k, route_scale, expert_dim, balance_alpha, bias_speed: of
    `MoE`.

    Raises ValueError: another attention, a tau that is not above 0, and what its parts refuse.

    >>> layer = build_attention("kimi_k2", 32, seq_len=64, tau=50.0)
    >>> layer(x).shape, layer.peak.shape  # the largest score of each head
    (torch.Size([2, 64, 32]), torch.Size([4]))
    """

    title, colour, before = "Kimi K2", 9, {"attention": "mha"}

    counters = ("peak",)

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        num_heads: int = 4,
        inner_dim: int | None = None,
        attention: str = "mla",
        tau: float = 100.0,
        q_rank: int = 0,
        kv_rank: int | None = None,
        nope_dim: int | None = None,
        rope_dim: int | None = None,
        v_dim: int | None = None,
        num_experts: int = 8,
        top_k: int = 2,
        route_scale: float = 2.827,
        expert_dim: int | None = None,
        balance_alpha: float = 0.0,
        bias_speed: float = 1e-3,
    ):
        super().__init__(dim)
        if attention not in ("mha", "mla"):
            raise ValueError(f"kimi_k2: attention={attention!r}: choose mha or mla")
        check_number("kimi_k2", "tau", tau, more="; 1e9 is no limit")
        self.tau, self.latent = tau, attention == "mla"
        if self.latent:
            self.attention = LatentAttention(
                dim,
                seq_len=seq_len,
                grid=grid,
                num_heads=num_heads,
                inner_dim=inner_dim,
                q_rank=q_rank,
                kv_rank=kv_rank,
                nope_dim=nope_dim,
                rope_dim=rope_dim,
                v_dim=v_dim,
                theta=THETA,
            )
        else:
            self.attention = MultiHeadAttention(
                dim, seq_len=seq_len, grid=grid, num_heads=num_heads, inner_dim=inner_dim
            )
            head = self.attention.head_dim
            self.attention.rope = Rope(head, seq_len, grid=grid, theta=THETA)
        self.add_experts(
            num_experts=num_experts,
            top_k=top_k,
            route_scale=route_scale,
            expert_dim=expert_dim,
            balance_alpha=balance_alpha,
            bias_speed=bias_speed,
        )
        # The largest score of each head since the last step.
        self.peak = torch.full((num_heads,), -torch.inf, device="cpu")

    def attend(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        observes = self.observes(x)
        if self.latent:
            y, peak = self.attention(x, key_mask, max_logits=observes)
        else:
            q, k, v = self.attention.project(x)  # (B, H, N, D)
            y = self.attention.attend(q, k, v, key_mask)
            y = self.attention.out(y.transpose(1, 2).flatten(2))
            scale = q.shape[-1] ** -0.5
            peak = max_logits(q, k, scale, key_mask=key_mask) if observes else None
        if peak is not None:
            self.note(peak)
        return y

    def note(self, peak: Tensor) -> None:
        """peak (B, H): the largest score of each head in this batch."""
        known = self.counter("peak", peak.device)
        peak = peak.where(peak <= self.tau / EPSILON, -torch.inf)  # NaN is not ≤ either
        known.copy_(known.maximum(peak.amax(0)))

    def attention_matrix(self, x: Tensor) -> Tensor:
        return self.attention.weights(x) if self.latent else self.attention.attention_matrix(x)

    def after_step(self, group: ProcessGroup | None = None) -> None:
        super().after_step(group)
        self.clip(group)

    def statistics(self) -> list[Tensor]:
        return [*super().statistics(), self.peak]

    @torch.no_grad()
    def clip(self, group: ProcessGroup | None = None) -> None:
        """QK-Clip (Kimi K2 2025, algorithm 1, lines 13-20); heads below tau are multiplied by 1."""
        at = self.attention
        peak = self.counter("peak", at.out.weight.device)
        gamma = self.tau / over_ranks(peak, "MAX", group).clamp(min=self.tau)  # (H,)
        peak.fill_(-torch.inf)
        root = gamma.sqrt()
        if self.latent:
            rows = [root[:, None].expand(-1, at.nope_dim), gamma[:, None].expand(-1, at.rope_dim)]
            scale_rows(own_weight(at.q_up), torch.cat(rows, 1).flatten())  # (H·(Dn+Dr), r)
            scale_rows(at.w_uk, root)  # (H, Dn, R)
        else:
            of_qkv = torch.stack([root, root, torch.ones_like(root)])  # (3, H)
            scale_rows(own_weight(at.qkv), of_qkv.flatten().repeat_interleave(at.head_dim))


@stacks(KimiK2)
class StackedKimiK2(KimiK2):
    """Each seed keeps its own largest scores."""

    def note(self, peak: Tensor) -> None:
        for layer, own in zip(self.seeds, peak.chunk(len(self.seeds)), strict=True):
            layer.note(own)
