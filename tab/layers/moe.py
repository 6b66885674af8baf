"""The mixture-of-experts feed-forward part of deepseek_mla and kimi_k2.

    y = shared(x) + Σ_i w_i E_i(x),  (w, i) from the router's sigmoid scores; all experts are SwiGLU

DeepSeek-V3 2024, eq. 12-20. Balance comes from the bias b (E,), which only steers the selection:
after each optimizer step b += γ·sign(mean(count) − count), with the counts of all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._autograd import exporting
from ..ops._check import accumulate, full_precision
from ..ops.moe import moe_experts
from ..ops.router import expert_counts, noaux_tc_gate
from ._repr import Shown
from ._sizes import check_number
from ._stacking import Products, stacks
from ._state import Stateful, is_plain, over_ranks, recomputing


class SwiGLU(Shown):
    """W2(silu(W1 x) ∘ W3 x) (Shazeer 2020), the shared expert."""

    stacking = True

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.w13 = nn.Linear(dim, 2 * width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate) * up)


class MoE(Shown, Stateful):
    """One shared expert and top_k of num_experts routed ones, x (B, N, C) -> (B, N, C).

    No residual and no norm: y is what the experts say, and `LatentMoE` or the transformer block
    around them adds it to the stream.
    expert_dim: the width F of each expert, dim // 2 when None: with one shared and two routed
    experts a token meets 1.5·C hidden units.
    bias_speed: γ, how far b moves per step. balance_alpha: α of the sequence-wise balance loss.
    A token whose scores are not finite counts for no expert.
    """

    exact, counters = ("bias",), ("load",)

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int,
        top_k: int,
        n_group: int = 1,
        topk_group: int = 1,
        route_scale: float = 1.0,
        expert_dim: int | None = None,
        balance_alpha: float = 0.0,
        bias_speed: float = 1e-3,
    ):
        super().__init__()
        width = max(1, dim // 2) if expert_dim is None else expert_dim
        if num_experts < 1 or width < 1:
            raise ValueError(
                f"the mixture of experts wants num_experts ≥ 1 and expert_dim ≥ 1, "
                f"got {num_experts} and {width}"
            )
        moe = "the mixture of experts"
        check_number(moe, "route_scale", route_scale)
        check_number(moe, "balance_alpha", balance_alpha, zero=True)
        check_number(moe, "bias_speed", bias_speed, zero=True)
        self.route: dict[str, Any] = {
            "top_k": top_k,
            "n_group": n_group,
            "topk_group": topk_group,
            "route_scale": route_scale,
        }
        self.expert_dim, self.balance_alpha, self.bias_speed = width, balance_alpha, bias_speed
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.shared = SwiGLU(dim, width)
        self.w13 = nn.Parameter(torch.empty(num_experts, 2 * width, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, width))
        for w in (self.w13, self.w2):  # as nn.Linear draws its weight
            nn.init.uniform_(w, -(w.shape[-1] ** -0.5), w.shape[-1] ** -0.5)
        self.register_buffer("bias", torch.zeros(num_experts))  # b
        # Tokens per expert since the last step.
        self.load = torch.zeros(num_experts, dtype=torch.int64, device="cpu")
        self.balance: Tensor | None = None
        self.balance_weight: Tensor | None = None
        self._gate(torch.zeros(1, num_experts))  # the router's options are checked now

    def __getstate__(self) -> dict:
        # A loss that still holds its graph can be neither copied nor pickled.
        return {**self.__dict__, "balance": None, "balance_weight": None}

    def _gate(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return noaux_tc_gate(logits, self.bias, **self.route)

    def _logits(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, E), in x's type, whatever that of the router is."""
        if is_plain(self.router):
            return F.linear(x, self.router.weight.to(x.dtype))
        given = {name: p.to(x.dtype) for name, p in self.router.named_parameters()}
        return torch.func.functional_call(self.router, given, (x,))

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """key_mask (B, N): tokens that are not real are computed like all, but not counted."""
        with full_precision(x):
            logits = self._logits(x.to(accumulate(x)))
        weights, index, counts = self._gate(logits)
        y = self.shared(x) + moe_experts(x, self.w13, self.w2, weights, index, counts)
        self.note(logits, index, key_mask)
        if self.balance is not None and recomputing():
            y = _Attach.apply(y, self.balance, self.balance_weight)
            self.balance = self.balance.detach()
        return y

    # --- balance ----------------------------------------------------------------------------------

    def note(self, logits: Tensor, index: Tensor, key_mask: Tensor | None) -> None:
        """Counts the experts chosen, and has the balance loss of this batch ready."""
        if self.observes(logits):
            with torch.no_grad():
                real = logits.isfinite().all(-1)  # (B, N)
                real = real if key_mask is None else real & key_mask
                load = self.counter("load", logits.device)
                load += expert_counts(index, load.shape[0], real)
        wanted = self.training and self.balance_alpha != 0 and not exporting()
        self.balance = self._balance_loss(logits, key_mask) if wanted else None
        if not recomputing():
            self.balance_weight = None

    def auxiliary_loss(self) -> Tensor | None:
        """The balance loss of the latest forward in training, with its gradient."""
        loss = self.balance
        if loss is None or loss.requires_grad or not torch.is_grad_enabled():
            return loss
        # A reentrant checkpoint ran the forward without a graph, and will run it again within
        # backward: by then the loss has told with which weight it stands in the sum.
        return _Weigh.apply(loss.detach().requires_grad_(), self)

    def _balance_loss(self, logits: Tensor, key_mask: Tensor | None) -> Tensor:
        """α Σ_e f_e P_e per sequence, averaged (eq. 17-20): f_e the share of expert e among the
        best top_k of the scores, without b, times E; P_e its mean normalised score; 1·α when
        perfectly even."""
        scores, top_k = logits.sigmoid(), self.route["top_k"]
        real = torch.ones_like(scores[..., 0], dtype=torch.bool) if key_mask is None else key_mask
        length = real.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
        share = F.normalize(scores, p=1, dim=-1) * real[..., None]  # (B, N, E)
        p = share.sum(1) / length  # (B, E)
        best = scores.topk(top_k, -1).indices
        hits = torch.zeros_like(scores).scatter(-1, best, 1.0) * real[..., None]
        f = hits.sum(1) * (scores.shape[-1] / top_k) / length  # (B, E)
        return self.balance_alpha * (f * p).sum(-1).mean()

    @torch.no_grad()
    def after_step(self, group=None) -> None:
        """b += γ·sign(mean(count) − count), over all tokens of all ranks since the last call.

        Under DDP or FSDP2 every rank calls after_step()."""
        load = self.counter("load", self.bias.device)
        seen = over_ranks(load, "SUM", group).double()
        self.bias += self.bias_speed * (seen.mean() - seen).sign().to(self.bias.dtype)
        load.zero_()
        self.balance = None


@stacks(MoE)
class StackedMoE(MoE):
    """Routers one by one, then the experts of all seeds as S·E in one grouped product."""

    def forward(self, x: Tensor, key_mask: None = None) -> Tensor:
        with full_precision(x):
            # Not the router's own forward: its scores are float32 whatever autocast says.
            acc = accumulate(x)
            flat = x.to(acc).reshape(len(self.seeds), -1, x.shape[-1])
            logits = Products.apply(flat, self.router.weight.to(acc), None)
            logits = logits.view(*x.shape[:-1], -1)  # (S·B, N, E)
        routed = []
        for s, (moe, own) in enumerate(zip(self.seeds, logits.chunk(len(self.seeds)), strict=True)):
            weights, index, counts = moe._gate(own)
            moe.note(own, index, None)
            routed.append((weights, index + s * len(counts), counts))
        weights, index, counts = (torch.cat(parts) for parts in zip(*routed, strict=True))
        experts = self.w13.flatten(0, 1), self.w2.flatten(0, 1)  # (S·E, 2F, C), (S·E, C, F)
        return self.shared(x) + moe_experts(x, *experts, weights, index, counts)


class _Weigh(torch.autograd.Function):
    """The loss as it is; its backward leaves at the module the gradient that it is given. It runs
    before that of the checkpoint, whose node is older: autograd takes the youngest node first."""

    @staticmethod
    def forward(ctx, loss, moe):
        ctx.moe = moe
        return loss.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.moe.balance_weight = g
        return None, None


class _Attach(torch.autograd.Function):
    """y as it is; the loss gets `weight` for its gradient, nothing if it entered no sum."""

    @staticmethod
    def forward(ctx, y, loss, weight):
        ctx.weight = weight
        return y.view_as(y)

    @staticmethod
    def backward(ctx, g):
        return g, ctx.weight, None
