"""The softmax ops as functions of their tensors alone, on every backend: what their tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tab import BlockPattern, local_attention, sparse_attention
from tab.functional import mla_attention
from tab.ops import OPS

BLOCK = 8
FORMS = ("fused", "expand", "absorb")


def where(*names: str, backends: tuple[str, ...] = ("reference", "cpp")) -> list:
    """(name, backend) for the reference and, where it is built, C++."""
    reason = OPS["local_fwd"].why_not("cpp")
    skip = pytest.mark.skipif(bool(reason), reason=str(reason))
    return [
        pytest.param(name, backend, marks=skip if backend == "cpp" else (), id=f"{name}-{backend}")
        for name in names
        for backend in backends
    ]


def band(n: int) -> BlockPattern:
    """Blocks that see themselves and the one before, the first nothing before it."""
    nb = -(-n // BLOCK)
    blocks = torch.ones(nb, nb, dtype=torch.bool)
    return BlockPattern.from_blocks(blocks.tril() & blocks.triu(-1), BLOCK, n)


def softmax_op(name: str, backend: str, n: int, **options) -> Callable:
    """f(q, k, v) -> what one of `NAMES` gives for n tokens under these options."""
    kind = {
        "line": {"window": (3, 2)},
        "causal line": {"window": 4, "causal": True},
        "grid": {"window": 1, "grid": (n // 4, 4)},
        "blocks": {"pattern": band(n)},
        "causal blocks": {"pattern": band(n), "causal": True},
    }[name]
    f = sparse_attention if "pattern" in kind else local_attention
    return lambda *x, **more: f(*x, backend=backend, **kind, **options, **more)


NAMES = ("line", "causal line", "grid", "blocks", "causal blocks")


def sees(name: str, n: int) -> Tensor:
    """(n, n): who sees whom."""
    i = torch.arange(n)
    step = i - i[:, None]
    if name == "grid":
        down, across = i // 4 - i[:, None] // 4, i % 4 - i[:, None] % 4
        return (down.abs() <= 1) & (across.abs() <= 1)
    if "blocks" in name:
        seen = band(n).to_dense()[0]
    else:
        seen = (step >= -3) & (step <= 2) if name == "line" else step.abs() <= 4
    return seen & (step <= 0) if "causal" in name else seen


def mla(form: str, backend: str, **options) -> Callable:
    """mla_attention; a backend is only the fused form's."""
    options = {"form": form, **options, **({"backend": backend} if form == "fused" else {})}
    return lambda *x: mla_attention(*x, **options)


def qkv(n: int, b: int = 2, h: int = 2, d: int = 8, dv: int = 8, **kwargs) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    return [torch.randn(b, h, n, w, generator=g, **kwargs) for w in (d, d, dv)]


def latents(n: int, b: int = 2, h: int = 2, r: int = 6, **kwargs) -> list[Tensor]:
    """q_nope, q_rope, c_kv, k_rope, w_uk, w_uv"""
    g = torch.Generator().manual_seed(n)
    shapes = (b, h, n, 4), (b, h, n, 2), (b, n, r), (b, n, 2), (h, 4, r), (h, 5, r)
    return [torch.randn(s, generator=g, **kwargs) for s in shapes]


def as_heads(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv):
    """The q, k and v (B, H, N, ·) that latent attention comes to."""
    c = c_kv[:, None]
    rotary = k_rope[:, None].expand(-1, q_nope.shape[1], -1, -1)
    return torch.cat([q_nope, q_rope], -1), torch.cat([c @ w_uk.mT, rotary], -1), c @ w_uv.mT


def masks(n: int, b: int = 4) -> Tensor:
    """(4, N): padding, padding in front, tokens here and there, nobody."""
    i, g = torch.arange(n), torch.Generator().manual_seed(5)
    return torch.stack([i < n // 2, i > 20, torch.rand(n, generator=g) < 0.5, i < 0])[:b]


def seen_lse(call):
    """o and L, in which −∞ is 0, to be compared."""

    def both(*x, **more):
        o, lse = call(*x, **more)
        return o, lse.masked_fill(lse.isneginf(), 0.0)

    return both
