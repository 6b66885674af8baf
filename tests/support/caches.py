"""Caches beside the function of a whole sequence, for every mechanism on q, k and v."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import tab

N, D, DV = 41, 8, 5


@dataclass(frozen=True)
class Kind:
    cache: Callable[[], tab.DecodeCache]
    whole: Callable[..., Tensor]  # causal, (q, k, v) -> o
    heads: int = 4  # of k and v, at most; q has 4
    chunks: bool = True  # a prompt in chunks gives what it gives in one


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def local(window: int) -> Kind:
    return Kind(
        lambda: tab.LocalCache(window=window),
        lambda *x: tab.local_attention(*x, window=window, causal=True, backend="reference"),
    )


def linear(**options) -> Kind:
    return Kind(
        lambda: tab.LinearCache(**options),
        lambda *x: tab.linear_attention(*x, causal=True, backend="reference", **options),
    )


def performer(kernel: str) -> Kind:
    def projection(dtype=torch.float32):
        return tab.orthogonal_projection(16, D, generator=torch.Generator().manual_seed(1)).to(
            dtype
        )

    class Cast(tab.PerformerCache):
        """Takes the projection in the type of the first tokens, for tests in float64."""

        def _attend(self, q, k, v, *more):
            self.projection = self.projection.to(tab.ops.accumulate(q))
            return super()._attend(q, k, v)

    def whole(q, k, v):
        w = projection(tab.ops.accumulate(q))
        return tab.performer_attention(q, k, v, w, kernel=kernel, causal=True, backend="reference")

    return Kind(lambda: Cast(projection(), kernel=kernel), whole)


def sparse(pattern: tab.BlockPattern) -> Kind:
    return Kind(
        lambda: tab.SparseCache(pattern),
        lambda *x: tab.sparse_attention(*x, pattern, causal=True, backend="reference"),
    )


def random_blocks(heads: int | None) -> tab.BlockPattern:
    """Rows that see nothing, or not their own block, among others."""
    g = torch.Generator().manual_seed(3)
    shape = (11, 11) if heads is None else (heads, 11, 11)
    return tab.BlockPattern.from_blocks(torch.rand(shape, generator=g) < 0.3, 4, N)


KINDS = {
    "kv": Kind(tab.KVCache, sdpa),
    "linear": linear(),
    "linear-relu": linear(feature_map="relu", eps=0.1),
    "performer": performer("softmax"),
    "performer-relu": performer("relu"),
    "local-0": local(0),
    "local-5": local(5),
    "local-all": local(N + 3),
    "sparse-window": sparse(tab.BlockPattern.sliding_window(N, window=2, sinks=1, block_size=4)),
    "sparse-strided": sparse(tab.BlockPattern.strided(N, stride=3, block_size=3)),
    "sparse-bigbird": sparse(tab.BlockPattern.bigbird(N, heads=4, block_size=4, num_random=2)),
    "sparse-random": sparse(random_blocks(None)),
    "sparse-random-heads": sparse(random_blocks(4)),
    "h2o": Kind(
        lambda: tab.H2OCache(heavy=3, recent=4),
        lambda *x: tab.h2o_attention(*x, heavy=3, recent=4, causal=True, block=1),
        chunks=False,
    ),
}
CHUNKED = {name: kind for name, kind in KINDS.items() if kind.chunks}


def draw(generator, heads=4, b=2, n=N, dtype=torch.float64) -> list[Tensor]:
    """q (B, 4, N, D), k (B, heads, N, D), v (B, heads, N, Dv)"""
    shapes = (b, 4, n, D), (b, heads, n, D), (b, heads, n, DV)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def parts(x: list[Tensor], lengths) -> Iterator[list[Tensor]]:
    """The tokens of q, k and v in stretches of these lengths."""
    yield from zip(*(t.split(list(lengths), 2) for t in x), strict=True)


def decode(cache, x: list[Tensor], first: int = 0) -> Tensor:
    """Token by token, from `first` on."""
    n = x[0].shape[2]
    steps = [cache.step(*(t[:, :, i : i + 1] for t in x)) for i in range(first, n)]
    return torch.cat(steps, 2)
