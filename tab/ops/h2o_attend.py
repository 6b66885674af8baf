"""Attention to the tokens that H2O chose, for all queries at once (formula: tab/ops/h2o.py).

Queries come in blocks. Those of block t attend the tokens chosen for it and, where `own` says so,
their own block; inside such a tile it is softmax attention (tab/ops/_softmax.py). Several blocks
are worked on together, as many as keep the copies of chosen keys about as large as k itself:
(budget + block)/block rounds or so, whatever N is. Where N is hardly more than the budget and a
block, one tile of all tokens, under a mask, takes no more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ._check import accumulate, token_major
from ._op import Op
from ._softmax import (
    empty_heads,
    empty_outputs,
    may_look,
    row_sums,
    softmax_backward,
    softmax_forward,
)


def _blocks(x: Tensor, block: int) -> Tensor:
    """(B, H, N, …) -> (B, H, T, block, …), padded with zeros."""
    tail = -x.shape[2] % block
    return F.pad(x, (0, 0) * (x.dim() - 3) + (0, tail)).unflatten(2, (-1, block))


def _tokens(x: Tensor, n: int) -> Tensor:
    """The inverse of `_blocks`."""
    return x.flatten(2, 3)[:, :, :n]


def _one_tile(chosen: Tensor, n: int, own: bool, block: int) -> bool:
    """Whether one tile of all tokens costs no more than copies of the chosen."""
    return n <= 2 * (chosen.shape[3] + block * own)


def _mask(
    chosen: Tensor, key_mask: Tensor | None, n: int, own: bool, causal: bool, block: int
) -> Tensor:
    """Who attends whom, (B, H, N, N)"""
    seen = torch.zeros(*chosen.shape[:3], n + 1, dtype=torch.bool, device=chosen.device)
    seen = seen.scatter(-1, chosen.masked_fill(chosen < 0, n), True)[..., :n]
    far = _tokens(seen[:, :, :, None].expand(-1, -1, -1, block, -1), n)
    if not own:  # a causal choice holds nothing later
        return far
    token = torch.arange(n, device=chosen.device)
    near = token[:, None] // block == token // block  # (N, N)
    near = near & (token <= token[:, None]) if causal else near
    return far | (near if key_mask is None else near & key_mask[:, None, None, :])


def _rounds(chosen: Tensor, n: int, own: bool, block: int) -> Iterator[slice]:
    """Which blocks are worked on together."""
    blocks, width = chosen.shape[2], chosen.shape[3] + block * own
    step = max(1, 2 * n // width)
    return (slice(t, min(t + step, blocks)) for t in range(0, blocks, step))


def _gather(x: Tensor, now: slice, chosen: Tensor, own: bool, block: int) -> Tensor:
    """x (B, H, N, D) -> (B, H, c, S (+ block), D): the chosen tokens, then those of the blocks."""
    at = chosen[:, :, now].clamp(min=0)[..., None].expand(-1, -1, -1, -1, x.shape[-1])
    picked = x[:, :, None].expand(-1, -1, at.shape[2], -1, -1).gather(3, at)
    return torch.cat([picked, _blocks(x, block)[:, :, now]], 3) if own else picked


def _allowed(
    now: slice, chosen: Tensor, key_mask: Tensor | None, n: int, own: bool, causal: bool, block: int
) -> Tensor:
    """Who attends whom of what was gathered, (B, H, c, block, S (+ block))"""
    far = (chosen[:, :, now] >= 0)[..., None, :].expand(-1, -1, -1, block, -1)
    if not own:
        return far
    blocks = chosen.shape[2]
    token = torch.arange(blocks * block, device=chosen.device).view(1, 1, blocks, block)
    real = token < n
    if key_mask is not None:
        real = real & _blocks(key_mask[:, None], block)  # (B, 1, T, block)
    near = real[..., None, :].expand(-1, -1, -1, block, -1)
    if causal:
        near = near & (token[..., None, :] <= token[..., None])
    return torch.cat([far, near[:, :, now].expand(*far.shape[:4], -1)], -1)


def _tile(q, k, v, allowed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `softmax_forward`: -> o, lse"""
    if (found := _weights(q, k, allowed, scale, v)) is None:
        return softmax_forward(q, k, v, allowed, scale)[:2]
    p, s = found
    top = p.detach().amax(-1)
    lse = (s.detach().amax(-1) - top.log()).masked_fill(top == 0, -torch.inf)
    return p @ v, lse


def _tile_backward(do, q, k, v, lse, delta, allowed: Tensor, scale: float) -> tuple[Tensor, ...]:
    """As `softmax_backward`: -> dq, dk, dv"""
    if (found := _weights(q, k, allowed, scale, v, do)) is None:
        return softmax_backward(do, q, k, v, lse, delta, allowed, scale)
    p, _ = found
    ds = p * (do @ v.mT - delta[..., None]) * scale
    return ds @ k, ds.mT @ q, p.mT @ do


def _weights(
    q: Tensor, k: Tensor, allowed: Tensor, scale: float, *others: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The weights P and the scores, on the CPU and where all is finite; None elsewhere. There a sum
    hides what is not allowed: filling by a mask, and exp(−∞), take a CPU five times a product."""
    if not (q.numel() and may_look(q)):
        return None
    s = q @ k.mT * scale
    if not (s.detach().abs().amax() < 1e30 and all(x.detach().sum().isfinite() for x in others)):
        return None
    one = allowed.to(s.dtype)
    s = s + (one - 1) * 1e35
    return s.softmax(-1) * one, s


def attend_reference(q, k, v, chosen, key_mask, own, causal, block, scale):
    """q, k (B, H, N, D), v (B, H, N, Dv), chosen (B, H, T, S) int64 with T = ⌈N/block⌉, -1 for none
    -> o (B, H, N, Dv), lse (B, H, N) in the accumulation type, −∞ for a query that sees nothing."""
    acc, n = accumulate(q), q.shape[2]
    if q.is_meta:
        return empty_outputs(q, v, acc)
    if n == 0:
        o, lse, _ = softmax_forward(q, k, v, None, scale)
        return token_major(o), lse.to(acc).detach()
    parts, (qa, ka, va) = [], (x.to(acc) for x in (q, k, v))
    if _one_tile(chosen, n, own, block):
        mask = _mask(chosen, key_mask, n, own, causal, block)
        o, lse = _tile(qa, ka, va, mask, scale)
        return token_major(o.to(v.dtype)), lse.detach()
    queries = _blocks(qa, block)
    for now in _rounds(chosen, n, own, block):
        allowed = _allowed(now, chosen, key_mask, n, own, causal, block)
        keys, values = (_gather(x, now, chosen, own, block) for x in (ka, va))
        parts.append(_tile(queries[:, :, now], keys, values, allowed, scale))
    o, lse = (_tokens(torch.cat(x, 2), n) for x in zip(*parts, strict=True))
    return token_major(o.to(v.dtype)), lse.contiguous().detach()


def attend_bwd_reference(do, q, k, v, o, lse, chosen, key_mask, own, causal, block, scale):
    """-> dq, dk, dv"""
    if q.is_meta or q.shape[2] == 0:
        return empty_heads(q), empty_heads(k), empty_heads(v)
    acc, n = accumulate(q), q.shape[2]
    doa, qa, ka, va = (x.to(acc) for x in (do, q, k, v))
    delta = row_sums(doa, o.to(acc))  # (B, H, N)
    if _one_tile(chosen, n, own, block):
        mask = _mask(chosen, key_mask, n, own, causal, block)
        grads = _tile_backward(doa, qa, ka, va, lse, delta, mask, scale)
        return tuple(token_major(x.to(q.dtype)) for x in grads)
    rows = [_blocks(x, block) for x in (doa, qa, lse, delta)]
    dq, sums = [], [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (ka, va)]
    for now in _rounds(chosen, n, own, block):
        allowed = _allowed(now, chosen, key_mask, n, own, causal, block)
        keys, values = (_gather(x, now, chosen, own, block) for x in (ka, va))
        dob, qb, lb, delta = (x[:, :, now] for x in rows)
        got = _tile_backward(dob, qb, keys, values, lb, delta, allowed, scale)
        dq.append(got[0])
        for total, part in zip(sums, got[1:], strict=True):
            _add(total, part, now, chosen, own, block)
    grads = _tokens(torch.cat(dq, 2), n), *sums
    return tuple(token_major(x.to(q.dtype)) for x in grads)


def _add(total: Tensor, part: Tensor, now: slice, chosen: Tensor, own: bool, block: int) -> None:
    """The reverse of `_gather`: total (B, H, N, D) += part (B, H, c, S (+ block), D). The chosen go
    block by block: within one no token comes twice (but for token 0 in the place of none, which
    gets 0), so that no two addends meet, and the sums have one order on a GPU too."""
    slots = chosen.shape[3]
    for c, t in enumerate(range(now.start, now.stop)):
        at = chosen[:, :, t].clamp(min=0)[..., None].expand(-1, -1, -1, part.shape[-1])
        total.scatter_add_(2, at, part[:, :, c, :slots])
    if own:
        near = total[:, :, now.start * block : now.stop * block]
        near += part[:, :, :, slots:].flatten(2, 3)[:, :, : near.shape[2]]


def _pairs(q, chosen, own, block) -> int:
    """Query-key pairs; block t can have t·block tokens before it, at most S."""
    (b, h, n, _), slots = q, chosen[3]
    if not own:
        return b * h * n * slots
    blocks = [min(block, n - start) for start in range(0, n, block)]
    return b * h * sum(size * (size + min(slots, t * block)) for t, size in enumerate(blocks))


def _flops(q, k, v, chosen, key_mask, own, causal, block, *_, **__) -> int:
    """Scores and sums: 2·(D + Dv) a pair."""
    return 2 * _pairs(q, chosen, own, block) * (q[-1] + v[-1])


def _backward_flops(do, q, k, v, o, lse, chosen, key_mask, own, causal, block, *_, **__) -> int:
    """Scores, do·v, dq, dk and dv: 2·(3·D + 2·Dv) a pair."""
    return 2 * _pairs(q, chosen, own, block) * (3 * q[-1] + 2 * v[-1])


_OPERANDS = "Tensor q, Tensor k, Tensor v, "
_CHOICE = "Tensor chosen, Tensor? key_mask, bool own, bool causal, SymInt block, float scale"
h2o_attend = Op(
    "h2o_attend",
    f"({_OPERANDS}{_CHOICE}) -> (Tensor o, Tensor lse)",
    attend_reference,
    flops=_flops,
)
h2o_attend_bwd = Op(
    "h2o_attend_bwd",
    f"(Tensor do, {_OPERANDS}Tensor o, Tensor lse, {_CHOICE}) -> (Tensor dq, Tensor dk, Tensor dv)",
    attend_bwd_reference,
    flops=_backward_flops,
)


def _gradients(backend, grads, q, k, v, chosen, key_mask, o, lse, *options):
    if grads[0] is None:
        return ()
    return h2o_attend_bwd.below(backend, grads[0], q, k, v, o, lse, chosen, key_mask, *options)


h2o_attend.differentiable(_gradients, by=h2o_attend_bwd, constant=1)
