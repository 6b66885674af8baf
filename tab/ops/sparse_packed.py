"""Block-sparse attention on a packed batch: each sequence under the pattern of its own length.

The blocks of a sequence begin at its first token, so that they lie as in a batch of this one
sequence, whatever lies before it; the last block of a sequence may be shorter. On a CPU C++ runs
all sequences in one call; elsewhere neighbours of one length are a call of the dense op.

The patterns of all lengths lie one behind the other, each of their four tensors flat, and `plan`
(S, 5) says of each sequence: block size, patterns Hp, where its row_ptr and its col begin, and the
length of the latter. It and cu_seqlens are on the CPU: who reads them waits for no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ._check import accumulate
from ._extensions import why_not
from ._op import Backend, Op, choose
from ._packed_op import check_ends, each_group
from ._sinks_op import attend, with_sinks
from ._softmax import empty_heads, empty_outputs, plain_softmax
from .pattern import BlockPattern

PatternOf = Callable[[int], BlockPattern]
Patterns = dict[int, tuple[int, list[Tensor]]]  # by length: block size; row_ptr, col, col_ptr, row

# --- ops ------------------------------------------------------------------------------------------

TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor row_ptr, Tensor col, Tensor col_ptr, Tensor row, "
    "Tensor? key_mask, Tensor? slopes, Tensor plan"
)
OPTIONS = "Tensor cu_seqlens, bool causal, float scale, float softcap"


class Packed(Op):
    """Beside C++, its kernels are those of `base`, which it calls for each length."""

    def __init__(self, base: Op, name: str, schema: str, each: Callable):
        self.base = base
        super().__init__(name, schema, each("reference"), flops=_flops_of(base))
        self.implement("triton", each("auto"))
        self.implement("cuda", each("cuda"))
        self.takes, self.own = base.takes, False

    def find_kernels(self) -> None:
        super().find_kernels()
        self.reasons.update({x: why_not(self.base.name, x) for x in ("triton", "cuda")})


def packed(op: Op, by: Op, gradients: Callable) -> Op:
    """sparse_packed_fwd beside sparse_fwd, differentiable; `by` and `gradients` are those of it."""

    def forward(backend: str) -> Callable:
        def run(q, k, v, *rest):
            if q.is_meta:  # lengths are values
                return empty_outputs(q, v, accumulate(q))
            *patterns, key_mask, slopes, plan, cu_seqlens, causal, scale, softcap = rest
            of = _patterns(*patterns, plan, cu_seqlens)

            def one(n, q, k, v, key_mask, slopes, *options):
                size, tensors = of.get(n, (1, [None] * 4))
                args = q, k, v, *tensors, key_mask, slopes, size, *options
                return op.below(backend if n else "reference", *args)

            given = ["q", "k", "v", "key_mask", "slopes"]
            args = q, k, v, key_mask, slopes, cu_seqlens, causal, scale, softcap
            return each_group(op.name, one, given, ["o", "lse"], None, *args)

        return run

    def backward(backend: str) -> Callable:
        def run(q, k, v, *rest):
            if q.is_meta:
                return empty_heads(q), empty_heads(k), empty_heads(v)
            *patterns, key_mask, slopes, plan = rest[:7]
            of = _patterns(*patterns, plan, rest[11])

            def one(n, q, k, v, key_mask, slopes, o, lse, do, dlse, *options):
                if not n:
                    return [torch.zeros_like(x) for x in (q, k, v)]
                size, tensors = of[n]
                saved = q, k, v, *tensors, key_mask, slopes, o, lse, size, *options
                return gradients(backend, (do, dlse), *saved)

            given = ["q", "k", "v", "key_mask", "slopes", *["o", "lse"] * 2]
            args = q, k, v, key_mask, slopes, *rest[7:]
            return each_group(by.name, one, given, ["q", "k", "v"], None, *args)

        return run

    schema = f"({TENSORS}, {OPTIONS}) -> (Tensor o, Tensor lse)"
    fwd = Packed(op, "sparse_packed_fwd", schema, forward)
    schema = (
        f"({TENSORS}, Tensor o, Tensor lse, Tensor? do, Tensor? dlse, {OPTIONS}) "
        "-> (Tensor dq, Tensor dk, Tensor dv)"
    )
    bwd = Packed(by, "sparse_packed_bwd", schema, backward)

    def all_gradients(backend, grads, *saved):
        if all(x is None for x in grads):
            return ()
        *tensors, cu_seqlens, o, lse, causal, scale, softcap = saved
        return bwd.below(backend, *tensors, o, lse, *grads, cu_seqlens, causal, scale, softcap)

    fwd.differentiable(all_gradients, by=bwd)
    with_sinks(fwd)
    return fwd


def _patterns(row_ptr, col, col_ptr, row, plan, cu_seqlens) -> Patterns:
    """The pattern of every length, cut out of those of all."""
    found: Patterns = {}
    ends = cu_seqlens.tolist()
    for (a, b), (size, hp, at, entry, entries) in zip(pairwise(ends), plan.tolist(), strict=True):
        if b > a and b - a not in found:
            lines = -(-(b - a) // size) + 1
            pointers = (x[at : at + hp * lines].view(hp, lines) for x in (row_ptr, col_ptr))
            places = (x[entry : entry + entries] for x in (col, row))
            (r, t), (c, w) = pointers, places
            found[b - a] = size, [r, c, t, w]
    return found


def _flops_of(base: Op) -> Callable:
    """The sum of those of the sequences."""
    wanted = [x.name for x in base.overload._schema.arguments]

    def flops(q, k, v, *rest, **_) -> int:
        row_ptr, col, col_ptr, row, _, _, plan = rest[:7]
        cu_seqlens, total = rest[-4], 0
        of = _patterns(row_ptr, col, col_ptr, row, plan, cu_seqlens)
        for n in filter(None, cu_seqlens.diff().tolist()):
            size, tensors = of[n]
            names = dict(zip(("row_ptr", "col", "col_ptr", "row"), tensors, strict=True))
            shapes = {name: x.shape for name, x in names.items()}
            for name, x in (("q", q), ("k", k), ("v", v)):
                shapes[name] = torch.Size([*x.shape[:2], n, x.shape[3]])
            total += base.flops(*map({**shapes, "block_size": size}.get, wanted))
        return total

    flops._get_raw = True  # type: ignore[attr-defined]  # the counter gives tensors, not shapes
    return flops


# --- what the public function calls ---------------------------------------------------------------


def packed_attention(*given) -> tuple[Tensor, Tensor]:
    """What _packed_attention returns, and never in a compiled graph: it reads the lengths, and
    calls the caller's function with them."""
    return (_uncompiled if torch.compiler.is_compiling() else _packed_attention)(*given)


def _packed_attention(
    op: Op, make: PatternOf, cu_seqlens: Tensor, q: Tensor, k: Tensor, v: Tensor,
    key_mask: Tensor | None, slopes: Tensor | None, sinks: Tensor | None, causal: bool,
    scale: float, cap: float, want_lse: bool, backend: Backend,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> o and lse of q (1, H, T, D); want_lse: whether that is of use."""
    if q.is_meta:  # lengths are values
        return empty_outputs(q, v, accumulate(q))
    ends = check_ends("sparse_attention", cu_seqlens, q.shape[2])
    lengths = [b - a for a, b in pairwise(ends)]
    tensors = joined(make, lengths, q)
    x = k, v, *tensors[:4], key_mask, slopes, tensors[4], cu_seqlens.cpu(), causal, scale, cap
    few = q.is_cuda and plain_softmax(q, k, v, key_mask, slopes, cap) is None and not want_lse
    o, lse = attend(op, choose(backend, op, q, *x, cuda=few), sinks, q, *x)
    return o, lse


# torch.compiler.disable would import Dynamo here and now: two thirds again of what torch takes.
_uncompiled = _disable_dynamo(_packed_attention)


def joined(make: PatternOf, lengths: list[int], q: Tensor) -> list[Tensor]:
    """row_ptr, col, col_ptr and row of the patterns of all lengths, and the plan."""
    parts: list[tuple[Tensor, ...]] = []
    lines, at, entry = {0: (1, 1, 0, 0, 0)}, 0, 0
    for n in dict.fromkeys(lengths):
        if n:
            pattern = pattern_of(make, n, q.shape[1]).to(q.device)
            hp, entries = pattern.row_ptr.shape[0], pattern.col.shape[0]
            lines[n] = pattern.block_size, hp, at, entry, entries
            at, entry = at + pattern.row_ptr.numel(), entry + entries
            parts.append(tuple(x.flatten() for x in pattern.tensors))
    none = q.new_empty(0, dtype=torch.int32)
    every = [torch.cat(x) for x in zip(*parts, strict=True)] or [none] * 4
    plan = torch.tensor([lines[n] for n in lengths], dtype=torch.int64, device="cpu")
    return [*every, plan.reshape(-1, 5)]


def pattern_of(make: PatternOf, n: int, heads: int) -> BlockPattern:
    """What the caller's function gives for n tokens, checked."""
    pattern = make(n)
    if not isinstance(pattern, BlockPattern) or (pattern.n, pattern.n_keys) != (n, n):
        raise ValueError(
            f"sparse_attention wants of pattern({n}) a BlockPattern for {n} queries and as many "
            f"keys; got {pattern!r}"
        )
    check_pattern(pattern, n, n, heads)
    return pattern


def check_pattern(pattern: BlockPattern, n: int, keys: int, heads: int) -> None:
    """A ValueError where it is for other tokens or heads."""
    if pattern.n != n or pattern.n_keys != keys or pattern.heads not in (None, heads):
        raise ValueError(
            f"sparse_attention got a pattern for N = {pattern.n}, N_k = {pattern.n_keys}, "
            f"H = {pattern.heads or 'any'} and tensors of N = {n}, N_k = {keys}, H = {heads}; make "
            "the pattern for these"
        )
