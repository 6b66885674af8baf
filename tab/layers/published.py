"""The attention forms that the published study in fact ran, for the recipe `published` alone.

They are reached by `model.<model>.forms = "published"`, never by a name of their own. All share
qkv and an output projection without bias; what they do between is not what their names say:

    linear          one learned φ for q and another for k, 1e-8 in the denominator
    performer       √D·orthonormal rows, no stabiliser; q and k scaled by D^(-1/4)
    linformer       projects only where N > k
    sparse          causal: the same block, or a column that is a multiple of block_size
    local           window_size // 2 tokens to either side
    kv_compression  each head keeps the keys with the largest sums of weights over all queries
    deepseek_mla    multi-head; in training, noise of standard deviation 0.01 on the scores
    kimi_k2         multi-head; 0.1·(XW)(XW)ᵀ on the scores, W (C → C/8)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._base import HeadsAttention
from ._registry import register_attention
from ._stacking import OwnAttend, beside, stacks

TINY = 1e-8  # in the denominators of linear and performer


def _in_range(name: str, value: float, low: float, high: float = torch.inf) -> None:
    if not low <= value <= high:
        raise ValueError(f"as published: {name}={value}: must be from {low} to {high}")


class _Published(HeadsAttention):
    takes_mask = False

    def __init__(
        self, dim: int, *, seq_len: int, grid: tuple[int, int] | None = None, num_heads: int = 4
    ):
        super().__init__(dim, seq_len=seq_len, grid=grid, num_heads=num_heads, output=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.scale = (dim // num_heads) ** -0.5

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        return self.mix(q, k, v)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, H, N, D) -> (B, H, N, D)"""
        return F.scaled_dot_product_attention(q, k, v, self.bias(q), scale=self.scale)

    def bias(self, q: Tensor) -> Tensor | None:
        """Added to the scores, or who sees whom, (…, N, N)."""
        return None

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        # Linear in v: attending to the unit vectors reads the weights off.
        b, h, n, _ = q.shape
        return self.mix(q, k, torch.eye(n, dtype=q.dtype, device=q.device).expand(b, h, n, n))


@register_attention("multi_head", published=True)
class PublishedMultiHead(_Published):
    """softmax(QKᵀ/√D)V"""

    stacking = True


@register_attention("deepseek_mla", published=True)
class PublishedDeepSeek(_Published):
    """softmax(QKᵀ/√D + ε)V, ε ~ N(0, 0.01²) in training, 0 otherwise"""

    stacking = "each seed draws its own noise"

    def bias(self, q: Tensor) -> Tensor | None:
        shape = (*q.shape[:-1], q.shape[-2])  # (B, H, N, N)
        return 0.01 * torch.randn(shape, dtype=q.dtype, device=q.device) if self.training else None


@register_attention("kimi_k2", published=True)
class PublishedKimi(_Published):
    """softmax(QKᵀ/√D + 0.1·(XW)(XW)ᵀ)V; the added term is one for all heads."""

    stacking = True

    def __init__(self, dim: int, *, seq_len: int, grid=None, num_heads: int = 4):
        super().__init__(dim, seq_len=seq_len, grid=grid, num_heads=num_heads)
        self.context = nn.Linear(dim, dim // 8, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The term as C/8 more dimensions of q and k, which the scale then meets too."""
        q, k, v = super().project(x)  # (B, H, N, D)
        more = self.context(x)[:, None] * (0.1 / self.scale) ** 0.5  # (B, 1, N, C/8)
        more = more.expand(-1, self.num_heads, -1, -1)
        return torch.cat([q, more], -1), torch.cat([k, more], -1), v


@register_attention("local", published=True)
class PublishedLocal(_Published):
    """softmax over |i − j| ≤ window_size // 2"""

    stacking = True

    def __init__(
        self, dim: int, *, seq_len: int, grid=None, num_heads: int = 4, window_size: int = 16
    ):
        super().__init__(dim, seq_len=seq_len, grid=grid, num_heads=num_heads)
        _in_range("window_size", window_size, 0)
        self.reach = window_size // 2

    def bias(self, q: Tensor) -> Tensor:
        i = torch.arange(q.shape[-2], device=q.device)
        return (i[:, None] - i).abs() <= self.reach


@register_attention("sparse", published=True)
class PublishedSparse(_Published):
    """softmax over j ≤ i in the block of i, and over every block_size-th j ≤ i"""

    stacking = True

    def __init__(
        self, dim: int, *, seq_len: int, grid=None, num_heads: int = 4, block_size: int = 32
    ):
        super().__init__(dim, seq_len=seq_len, grid=grid, num_heads=num_heads)
        _in_range("block_size", block_size, 1)
        self.block_size = block_size

    def bias(self, q: Tensor) -> Tensor:
        j = torch.arange(q.shape[-2], device=q.device)
        i, block = j[:, None], self.block_size
        return ((i // block == j // block) | (j % block == 0)) & (j <= i)


@register_attention("kv_compression", published=True)
class PublishedKVCompression(_Published):
    """softmax over the ⌊N·ratio⌋ keys, per image and head, with the largest Σ_i softmax_ij"""

    stacking = True

    def __init__(
        self, dim: int, *, seq_len: int, grid=None, num_heads: int = 4,
        compression_ratio: float = 0.5,
    ):  # fmt: skip
        super().__init__(dim, seq_len=seq_len, grid=grid, num_heads=num_heads)
        _in_range("compression_ratio", compression_ratio, 0, 1)
        self.compression_ratio = compression_ratio

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept = max(1, int(q.shape[2] * self.compression_ratio))
        with torch.no_grad():  # a choice
            mass = (q @ k.mT * self.scale).softmax(-1).sum(-2)  # (B, H, N)
        chosen = mass.topk(kept).indices[..., None]  # (B, H, kept, 1)
        k, v = (t.gather(2, chosen.expand(-1, -1, -1, t.shape[-1])) for t in (k, v))
        return super().mix(q, k, v)


@register_attention("linformer", published=True)
class PublishedLinformer(_Published):
    """softmax(Q(EᵀK)ᵀ/√D)(FᵀV) where N > k; else softmax(QKᵀ/√D)V, and E and F lie idle."""

    def __init__(
        self, dim: int, *, seq_len: int, grid=None, num_heads: int = 4, k: int = 64,
        max_seq_len: int = 512,
    ):  # fmt: skip
        super().__init__(dim, seq_len=seq_len, grid=grid, num_heads=num_heads)
        _in_range("k", k, 1)
        _in_range("max_seq_len", max_seq_len, seq_len if seq_len > k else 1)
        self.k = k
        self.E = nn.Linear(max_seq_len, k, bias=False)
        self.F = nn.Linear(max_seq_len, k, bias=False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[2] > self.k:
            k, v = self.shorten(self.E, k), self.shorten(self.F, v)
        return super().mix(q, k, v)

    def shorten(self, E: nn.Linear, x: Tensor) -> Tensor:
        """x (B, H, N, D) -> (B, H, k, D)"""
        return E.weight[:, : x.shape[2]] @ x


@stacks(PublishedLinformer)
class StackedPublishedLinformer(PublishedLinformer):
    """E and F of each seed are its own."""

    def shorten(self, E: nn.Linear, x: Tensor) -> Tensor:
        w, x = beside(E.weight[..., : x.shape[2]], x)
        return (w @ x).flatten(0, 1)


@register_attention("linear", published=True)
class PublishedLinear(_Published):
    """φ(q)ᵀS/(φ(q)ᵀz + 1e-8), φ(x) = elu(W x) + 1 with W (kernel_size, D), one for q, one for k"""

    stacking = True

    def __init__(
        self, dim: int, *, seq_len: int, grid=None, num_heads: int = 4, kernel_size: int = 32
    ):
        super().__init__(dim, seq_len=seq_len, grid=grid, num_heads=num_heads)
        _in_range("kernel_size", kernel_size, 1)
        self.features = nn.ModuleList(
            nn.Linear(dim // num_heads, kernel_size, bias=False) for _ in "qk"
        )

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fq, fk = (F.elu(w(t)) + 1 for w, t in zip(self.features, (q, k), strict=True))
        return _ratio(fq, fk, v)


@register_attention("performer", published=True)
class PublishedPerformer(_Published):
    """φ(x) = exp(Wx − |x|²/2)/√M of x D^(-1/4); W has min(M, D) orthonormal rows times √D."""

    def __init__(
        self, dim: int, *, seq_len: int, grid=None, num_heads: int = 4, num_features: int = 256,
        seed: int = 0,
    ):  # fmt: skip
        super().__init__(dim, seq_len=seq_len, grid=grid, num_heads=num_heads)
        _in_range("num_features", num_features, 1)
        d = dim // num_heads
        generator = torch.Generator().manual_seed(seed)
        q, _ = torch.linalg.qr(torch.randn(d, num_features, generator=generator, device="cpu"))
        self.register_buffer("projection", torch.empty(min(num_features, d), d))  # (M', D)
        self.projection.copy_(q.mT * d**0.5)
        self.num_features = num_features

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _ratio(self.feature(q), self.feature(k), v)

    def feature(self, x: Tensor) -> Tensor:
        x = x * self.scale**0.5
        exponent = x @ self.projection.mT - x.square().sum(-1, keepdim=True) / 2  # (B, H, N, M')
        return exponent.exp() / self.num_features**0.5


@stacks(PublishedPerformer)
class StackedPublishedPerformer(OwnAttend, PublishedPerformer):
    """Each seed attends by its own random features."""


def _ratio(fq: Tensor, fk: Tensor, v: Tensor) -> Tensor:
    """fq, fk (B, H, N, M), v (B, H, N, D) -> (B, H, N, D)"""
    return fq @ (fk.mT @ v) / (fq @ fk.sum(-2)[..., None] + TINY)
