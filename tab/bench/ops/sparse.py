"""Block-sparse attention, in BigBird's pattern."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ...layers.sparse import SparseAttention
from ...ops.pattern import BlockPattern
from ...ops.sparse import sparse_attention, sparse_fwd
from ..benchmark import Benchmark
from ._softmax import masked, under

BLOCK = 64  # tokens
FEW = 8  # of 256 tokens and fewer, where the pattern of wider ones would be dense


class Sparse(Benchmark):
    op = sparse_fwd

    def problem(self, case, draw):
        found, (_, h, n, _) = super().problem(case, draw), case.shape
        block = BLOCK if n > 4 * BLOCK else FEW
        pattern = BlockPattern.bigbird(n, heads=h, block_size=block)
        found.fixed["pattern"] = pattern.to(case.device)
        return found

    def ours(self, p, backend):
        pattern, causal = p.fixed["pattern"], p.case.causal
        return partial(sparse_attention, pattern=pattern, causal=causal, backend=backend)

    def flops(self, p):
        """4·D a pair of query and key in the pattern, and twice that backward."""
        b, h, n, d = p.case.shape
        density = p.fixed["pattern"].density * (0.5 if p.case.causal else 1.0)
        pairs = b * int(h * n * n * density)
        return 4 * d * pairs, 8 * d * pairs

    def pytorch(self, p):
        (_, h, n, _), causal = p.case.shape, p.case.causal

        def mask() -> Tensor:
            dense = p.fixed["pattern"].to_dense().to(p.case.device)
            return dense.tril_() if causal else dense

        def rule():
            dense = mask().expand(h, n, n)
            return lambda b, h, qi, kj: dense[h, qi, kj]

        yield from under(p, mask, rule)

    def part(self, layer):
        return layer if isinstance(layer, SparseAttention) else None

    def use_pytorch(self, part):
        mask = part.pattern(part.seq_len).to_dense().to(part.qkv.weight.device)  # (Hp, N, N)
        part.attend = lambda q, k, v, key_mask: masked(q, k, v, mask=mask)


benchmark = Sparse()
