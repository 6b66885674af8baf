"""What `tab bench` has to know of retention."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from tab.bench.benchmark import Benchmark, eager_and_compiled

from .layer import RetentionAttention
from .op import rates, retention, retention_fwd


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By the N×N weights, for there is no better in plain PyTorch."""
    i = torch.arange(q.shape[2], device=q.device)
    gamma = torch.tensor(rates(q.shape[1]), dtype=q.dtype, device=q.device)[:, None, None]
    return ((q @ k.mT) * (gamma ** (i[:, None] - i).clamp(min=0)).tril()) @ v


class Retention(Benchmark):
    op, causal = retention_fwd, (True,)

    def ours(self, p, backend):
        return partial(retention, backend=backend)

    def flops(self, p):
        b, h, n, d = p.case.shape
        return 4 * d * d * b * h * n, 12 * d * d * b * h * n

    def pytorch(self, p):
        return eager_and_compiled(eager)

    def part(self, layer):
        return layer if isinstance(layer, RetentionAttention) else None

    def use_pytorch(self, part):
        def attend(q, k, v, key_mask):
            o = eager(q * q.shape[-1] ** -0.5, k, v)
            return F.rms_norm(o, o.shape[-1:])

        part.attend = attend


benchmark = Retention()
