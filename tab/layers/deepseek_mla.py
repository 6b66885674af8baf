"""DeepSeek-V3's block as a layer: multi-head latent attention, then a mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops._check import accumulate
from ..ops.mla import mla_attention
from ._base import Attention
from ._registry import register_attention
from ._repr import Shown
from ._sizes import check_heads
from ._stacking import stacks
from .moe import MoE
from .rope import Rope

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed import ProcessGroup

EPS = 1e-6  # of every RMSNorm, as in DeepSeek's own code


class LatentAttention(Shown):
    """MLA (DeepSeek-V2 2024, eq. 9-19), x (B, N, C) -> (B, N, C).

        c_q = RMSNorm(W_dq x), q_h = [q_n | RoPE(q_r)] = W_uq,h c_q     (no W_dq where q_rank is 0)
        [c | k_r] = W_dkv x, c = RMSNorm(c), k_h = [W_uk,h c | RoPE(k_r)], v_h = W_uv,h c

    inner_dim: H·D, the width of all heads together, `dim` if None; V3's is wider than its tokens.
    Sizes that are None follow V3's proportions at D = inner_dim/H: nope_dim + rope_dim = D with a
    quarter rotary (rounded down to a multiple of 4, at least 4 each), v_dim = D, kv_rank = C/4. A
    token's cache is kv_rank + rope_dim numbers, where multi-head attention keeps 2·inner_dim.
    """

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None,
        num_heads: int,
        inner_dim: int | None = None,
        q_rank: int = 0,
        kv_rank: int | None = None,
        nope_dim: int | None = None,
        rope_dim: int | None = None,
        v_dim: int | None = None,
        theta: float = 1e4,
    ):
        super().__init__()
        what, inner = ("dim", dim) if inner_dim is None else ("inner_dim", inner_dim)
        check_heads(type(self).__name__, inner, num_heads, what)
        head = inner // num_heads
        rope_dim = max(4, head // 16 * 4) if rope_dim is None else rope_dim
        nope_dim = max(4, head - rope_dim) if nope_dim is None else nope_dim
        v_dim = head if v_dim is None else v_dim
        kv_rank = max(1, dim // 4) if kv_rank is None else kv_rank
        if min(kv_rank, nope_dim, v_dim) < 1 or min(q_rank, rope_dim) < 0:
            raise ValueError(
                "latent attention wants kv_rank, nope_dim, v_dim ≥ 1 and q_rank, rope_dim ≥ 0; got "
                f"kv_rank={kv_rank}, nope_dim={nope_dim}, v_dim={v_dim}, q_rank={q_rank}, "
                f"rope_dim={rope_dim}"
            )
        self.num_heads, self.inner_dim, self.kv_rank = num_heads, inner, kv_rank
        self.nope_dim, self.rope_dim, self.v_dim = nope_dim, rope_dim, v_dim
        self.rope = Rope(rope_dim, seq_len, grid=grid, theta=theta)
        self.q_down = nn.Linear(dim, q_rank, bias=False) if q_rank else nn.Identity()
        self.q_norm = nn.RMSNorm(q_rank, eps=EPS) if q_rank else nn.Identity()
        self.q_up = nn.Linear(q_rank or dim, num_heads * (nope_dim + rope_dim), bias=False)
        self.kv_down = nn.Linear(dim, kv_rank + rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(kv_rank, eps=EPS)
        self.w_uk = nn.Parameter(torch.empty(num_heads, nope_dim, kv_rank))
        self.w_uv = nn.Parameter(torch.empty(num_heads, v_dim, kv_rank))
        for w in (self.w_uk, self.w_uv):  # as nn.Linear draws its weight
            nn.init.uniform_(w, -(kv_rank**-0.5), kv_rank**-0.5)
        self.out = nn.Linear(num_heads * v_dim, dim, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, N, C) -> q_n (B, H, N, Dn), q_r (B, H, N, Dr), c (B, N, R), k_r (B, N, Dr)."""
        q = self.q_up(self.q_norm(self.q_down(x))).unflatten(-1, (self.num_heads, -1))
        q_nope, q_rope = q.transpose(1, 2).split([self.nope_dim, self.rope_dim], -1)
        c, k_rope = self.kv_down(x).split([self.kv_rank, self.rope_dim], -1)
        return q_nope, self.rope(q_rope), self.kv_norm(c), self.rope(k_rope)

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, max_logits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """-> y (B, N, C) and, where asked for, the largest score of each head, (B, H)."""
        o: Any = mla_attention(
            *self.project(x),
            self.w_uk,
            self.w_uv,
            key_mask=key_mask,
            return_max_logits=max_logits,
        )
        o, peak = o if max_logits else (o, None)
        return self.out(o.transpose(1, 2).flatten(2)), peak

    def weights(self, x: Tensor) -> Tensor:
        """softmax(S), (B, H, N, N)"""
        parts = self.project(x)
        acc = accumulate(*parts)
        q_nope, q_rope, c, k_rope = (t.to(acc) for t in parts)
        s = q_nope @ (c[:, None] @ self.w_uk.to(acc).mT).mT + q_rope @ k_rope[:, None].mT
        return (s * (self.nope_dim + self.rope_dim) ** -0.5).softmax(-1)


@stacks(LatentAttention)
class StackedLatentAttention(LatentAttention):
    """w_uk (S, H, Dn, R), w_uv (S, H, Dv, R): the kernel runs once a seed."""

    def forward(
        self, x: Tensor, key_mask: None = None, max_logits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        parts = [t.chunk(len(self.seeds)) for t in self.project(x)]
        found: list[Any] = [
            mla_attention(*own, return_max_logits=max_logits)
            for own in zip(*parts, self.w_uk, self.w_uv, strict=True)
        ]
        peak = torch.cat([p for _, p in found]) if max_logits else None  # (S·B, H)
        o = torch.cat([o[0] for o in found] if max_logits else found)  # (S·B, H, N, Dv)
        return self.out(o.transpose(1, 2).flatten(2)), peak


class LatentMoE(Attention):
    """a = attention(x), y = a + MoE(RMSNorm(s + a)), s the residual stream.

    A transformer block of the paper has two residuals: the attention's, h = s + attention(norm(s)),
    and the experts', h + MoE(RMSNorm(h)). With x = norm(s) the second is s + y: a block that norms
    the tokens before the layer gives it s too (`stream`), and adds s around it. By itself the layer
    takes x for s, so that the attention's residual is x + a, inside, and the experts' is a + MoE.
    With num_experts = 0 there is the attention alone, y = a.
    Subclasses set `attention`, and call `add_experts`.
    """

    fine_size, reads_stream = "expert_dim", True
    size_options = ("expert_dim", "inner_dim")
    attention: Shown
    norm: Any  # nn.RMSNorm, or None without experts
    moe: MoE | None

    @classmethod
    def size_option(cls, options: Mapping[str, object]) -> str:
        return "inner_dim" if options.get("num_experts") == 0 else "expert_dim"

    def __init__(self, dim: int):
        super().__init__()
        self.dim, self._width, self.norm = dim, dim, nn.RMSNorm(dim, eps=EPS)

    def add_experts(self, **options) -> None:
        """options: of `MoE`; num_experts = 0 leaves it out, and its norm."""
        if options["num_experts"] == 0:
            self.norm, self.moe, self.reads_stream = None, None, False
        else:
            self.moe = MoE(self.dim, **options)

    def attend(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """x (B, N, C) -> (B, N, C)"""
        raise NotImplementedError

    def compute(self, x: Tensor, key_mask: Tensor | None, stream: Tensor | None = None) -> Tensor:
        a = self.attend(x, key_mask)
        if self.moe is None:
            return a
        return a + self.moe(self.norm((x if stream is None else stream) + a), key_mask)

    def after_step(self, group: ProcessGroup | None = None) -> None:
        if self.moe is not None:
            self.moe.after_step(group)

    def auxiliary_loss(self) -> Tensor | None:
        return None if self.moe is None else self.moe.auxiliary_loss()

    def statistics(self) -> list[Tensor]:
        return [] if self.moe is None else [self.moe.load]


@register_attention("deepseek_mla")
class DeepSeekMLA(LatentMoE):
    """Latent attention and experts of DeepSeek-V3 (2024, sections 2.1.1 and 2.1.2), with the
    residuals of `LatentMoE`: the experts read the stream and not only what attention made of it.

    Options: `LatentAttention` (num_heads, inner_dim, q_rank, kv_rank, nope_dim, rope_dim, v_dim)
    and `MoE` (num_experts, 0: attention alone; top_k, n_group, topk_group, route_scale, expert_dim,
    balance_alpha, bias_speed).
    Positions are rotary, in two dimensions when a grid is given.

    Raises ValueError: sizes below 1, heads that do not divide the width, or a router that cannot
    choose (top_k above num_experts, groups that do not divide them).

    >>> layer = build_attention("deepseek_mla", 32, seq_len=64, num_experts=4)
    >>> layer(x).shape, layer.statistics()[0].sum()  # 2 · 64 tokens, two experts each
    (torch.Size([2, 64, 32]), tensor(256))
    """

    title, colour, stacking = "DeepSeek MLA", 8, True

    def __init__(
        self,
        dim: int,
        *,
        seq_len: int,
        grid: tuple[int, int] | None = None,
        num_heads: int = 4,
        inner_dim: int | None = None,
        q_rank: int = 0,
        kv_rank: int | None = None,
        nope_dim: int | None = None,
        rope_dim: int | None = None,
        v_dim: int | None = None,
        num_experts: int = 8,
        top_k: int = 2,
        n_group: int = 1,
        topk_group: int = 1,
        route_scale: float = 1.0,
        expert_dim: int | None = None,
        balance_alpha: float = 0.0,
        bias_speed: float = 1e-3,
    ):
        super().__init__(dim)
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
        )
        self.add_experts(
            num_experts=num_experts,
            top_k=top_k,
            n_group=n_group,
            topk_group=topk_group,
            route_scale=route_scale,
            expert_dim=expert_dim,
            balance_alpha=balance_alpha,
            bias_speed=bias_speed,
        )

    def attend(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        return self.attention(x, key_mask)[0]

    def attention_matrix(self, x: Tensor) -> Tensor:
        return self.attention.weights(x)
