"""Fewer heads of k and v than of q, for the ops that sum over keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ._op import Op


def by_query_head(op: Op, backend: str, q: Tensor, k: Tensor, *rest) -> tuple[Tensor, ...]:
    """`op` on q (B, H, N, D) and k (B, H_kv, N, D) -> o (B, H, N, Dv) and the state (B, H_kv, …).

    One call for each head of a group, on a view of q; k and v are read in place by every call, and
    their gradients add up over the calls. All calls end in the same state.
    """
    group = q.shape[1] // k.shape[1]
    if group == 1:
        return op.apply(backend, q, k, *rest)
    each = q.unflatten(1, (-1, group)).unbind(2)  # one gradient for all; slices would have one each
    calls = [op.apply(backend, x, k, *rest) for x in each]
    o = torch.stack([o.transpose(1, 2) for o, *_ in calls], 3)  # (B, N, H_kv, H/H_kv, Dv)
    return o.flatten(2, 3).transpose(1, 2), *calls[0][1:]
