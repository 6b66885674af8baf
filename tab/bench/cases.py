"""What is measured: an op at a size, its inputs, its work in FLOPs and bytes.

The work is the least that any implementation must do: `bytes` counts each input read once and each
output written once, `flops` the multiply-adds of the formula, nothing recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

import tab

from ..layers.linformer import LinformerAttention

SIZES: dict[str, dict[str, int]] = {
    "cifar": {"B": 512, "H": 4, "N": 64, "D": 64},
    "vision": {"B": 32, "H": 8, "N": 1024, "D": 64},
    "long": {"B": 1, "H": 8, "N": 8192, "D": 64},
    "window": {"B": 4, "H": 8, "N": 2048, "D": 64},
    "bigbird": {"B": 1, "H": 8, "N": 4096, "D": 64},
    "decode": {"B": 16, "H": 8, "N": 4096, "D": 64},  # one query after N tokens
    "tiny": {"B": 2, "H": 2, "N": 65, "D": 16},
    # for peak memory against N
    **{f"n{n}": {"B": 1, "H": 4, "N": n, "D": 64} for n in (1024, 2048, 4096, 8192, 16384)},
}
DECODES = ("linear", "mla")  # ops whose `decode` size is measured
FEATURES = 256  # M of performer
WINDOW = 128  # tokens on each side in local
BLOCK = 64  # sparse
RANK, ROPE = 64, 16  # R and Dr of mla
ROWS = 256  # K of linformer, a quarter of N where that is less
NOT_CAUSAL = ("linformer",)  # its projection mixes all tokens
SHARED = {"mla": 2, "linformer": 2}  # how many of the last inputs are weights, without a batch
CIFAR_WINDOW, CIFAR_BLOCK = 8, 8  # at 64 tokens the wider ones would be dense


@dataclass(frozen=True)
class Case:
    """One op at one size. The name, "linear/vision/causal/float32", identifies it across runs."""

    op: str
    size: str
    causal: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def name(self) -> str:
        kind = "causal" if self.causal else "full"
        return f"{self.op}/{self.size}/{kind}/{str(self.dtype).removeprefix('torch.')}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        size = SIZES[self.size]
        return size["B"], size["H"], size["N"], size["D"]

    @property
    def decode(self) -> bool:
        """One query per sequence: linear from its state, mla from its cache of latents."""
        return self.size == "decode"

    @property
    def window(self) -> int:
        return WINDOW if self.shape[2] > 2 * WINDOW else CIFAR_WINDOW

    @property
    def block(self) -> int:
        return BLOCK if self.shape[2] > 4 * BLOCK else CIFAR_BLOCK

    def with_dtype(self, dtype: torch.dtype) -> Case:
        return replace(self, dtype=dtype)


@dataclass(frozen=True)
class Problem:
    """The tensors of a case. `inputs` carry gradients, `fixed` are what the op needs besides."""

    case: Case
    inputs: tuple[Tensor, ...]
    fixed: dict[str, object]

    def sliced(self, dtype: torch.dtype) -> Problem:
        """One batch entry and all heads, in another type: for the check against float64."""
        batched = len(self.inputs) - SHARED.get(self.case.op, 0)
        cut = tuple(
            _at_least(x[:1] if i < batched else x, dtype) for i, x in enumerate(self.inputs)
        )
        fixed = {
            name: _at_least(x, dtype) if isinstance(x, Tensor) else x
            for name, x in self.fixed.items()
        }
        return Problem(self.case.with_dtype(dtype), cut, fixed)


def _at_least(x: Tensor, dtype: torch.dtype) -> Tensor:
    """States and projections stay in float32 beside half types."""
    return x.detach().to(torch.promote_types(x.dtype, dtype))


def cases(ops, sizes, causal=(False,), dtype=torch.float32, device="cpu") -> list[Case]:
    """Each op at each size; only some have a `decode` form, which is causal by itself."""
    every = [Case(op, size, c, dtype, device) for op in ops for size in sizes for c in causal]
    every = [case for case in every if not (case.causal and case.op in NOT_CAUSAL)]
    some = [c for c in every if not c.decode or (c.op in DECODES and c.causal == causal[0])]
    if not some:
        raise ValueError(
            f"{', '.join(ops)}: nothing to measure; size decode is for {', '.join(DECODES)}, and "
            f"{', '.join(NOT_CAUSAL)} has no causal form"
        )
    return some


def problem(case: Case, seed: int = 0) -> Problem:
    """Random tensors, unit variance, (B, H, N, D) contiguous."""
    generator = torch.Generator().manual_seed(seed)
    b, h, n, d = case.shape

    acc = torch.promote_types(case.dtype, torch.float32)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=generator) * scale
        return x.to(case.device, case.dtype)

    if case.op == "linear" and case.decode:
        one = [randn(b, h, 1, d) for _ in range(3)]
        state = randn(b, h, d, d).to(acc), randn(b, h, d).to(acc).abs()
        return Problem(case, (*one, *state), {})
    nope, value = d // 2, d // 2
    if case.op == "mla" and case.decode:
        up = (randn(h, width, RANK, scale=RANK**-0.5) for width in (nope, value))
        inputs = randn(b, h, nope), randn(b, h, ROPE), randn(b, n, RANK + ROPE), *up
        return Problem(case, inputs, {})
    if case.op == "mla":
        inputs = (
            randn(b, h, n, nope),
            randn(b, h, n, ROPE),
            randn(b, n, RANK),
            randn(b, n, ROPE),
            randn(h, nope, RANK, scale=RANK**-0.5),
            randn(h, value, RANK, scale=RANK**-0.5),
        )
        return Problem(case, inputs, {})
    if case.op == "linformer":  # from the tokens on: Eᵀ(XW) is best computed as (EᵀX)W
        x, qkv = randn(b, n, h * d), randn(3 * h * d, h * d, scale=(h * d) ** -0.5)
        return Problem(case, (x, qkv, randn(n, min(ROWS, -(-n // 4)), scale=n**-0.5)), {})
    inputs = (randn(b, h, n, d), randn(b, h, n, d), randn(b, h, n, d))
    fixed: dict[str, object] = {}
    if case.op == "performer":
        projection = tab.orthogonal_projection(FEATURES, d, generator=generator)
        fixed["projection"] = projection.to(case.device, acc)
    if case.op == "sparse":
        pattern = tab.BlockPattern.bigbird(n, heads=h, block_size=case.block)
        fixed["pattern"] = pattern.to(case.device)
    return Problem(case, inputs, fixed)


def ours(p: Problem, backend: str) -> Callable[..., Tensor]:
    """TAB's own op on the inputs of `p`."""
    causal = p.case.causal
    if p.case.op == "linear" and p.case.decode:
        return lambda q, k, v, *state: tab.linear_attention(
            q, k, v, causal=True, initial_state=state, return_state=True, backend=backend
        )
    if p.case.op == "mla" and p.case.decode:
        rows = torch.full((p.inputs[2].shape[0],), p.case.shape[2], device=p.case.device)
        return lambda q_nope, q_rope, cache, *w: tab.mla_decode(
            q_nope, q_rope, cache, rows, *w, backend=backend
        )
    if p.case.op == "linear":
        return lambda q, k, v: tab.linear_attention(q, k, v, causal=causal, backend=backend)
    if p.case.op == "linformer":
        return _linformer_layer(p)  # a composition: no backends to choose from
    if p.case.op == "performer":
        w = p.fixed["projection"]
        return lambda q, k, v: tab.performer_attention(q, k, v, w, causal=causal, backend=backend)
    if p.case.op == "local":
        window = p.case.window
        return lambda q, k, v: tab.local_attention(
            q, k, v, window=window, causal=causal, backend=backend
        )
    if p.case.op == "sparse":
        pattern = p.fixed["pattern"]
        return lambda q, k, v: tab.sparse_attention(
            q, k, v, pattern, causal=causal, backend=backend
        )
    form = "auto" if backend == "auto" else "fused"
    return lambda *x: tab.mla_attention(*x, causal=causal, form=form, backend=backend)


def _linformer_layer(p: Problem) -> Callable[..., Tensor]:
    """What the layer does with tokens x (B, N, C), up to its projection out."""
    _, h, n, d = p.case.shape
    layer = LinformerAttention(h * d, seq_len=n, num_heads=h, k=p.inputs[2].shape[1])
    return lambda x, qkv, e: F.scaled_dot_product_attention(
        *layer.with_weights(x, qkv, e[None], None)
    )


def work(p: Problem) -> dict[str, tuple[float, float]]:
    """{"forward": (FLOPs, bytes), "backward": …, "both": …}"""
    b, h, n, d = p.case.shape
    element = p.inputs[0].element_size()
    tokens = b * h * n
    moved = sum(x.nbytes for x in p.inputs)
    if p.case.decode:
        return {"forward": _decode_work(p, moved)}
    if p.case.op == "linear":
        out, forward, backward = d, 4 * d * d * tokens, 8 * d * d * tokens
    elif p.case.op == "performer":
        out, forward, backward = d, 8 * d * FEATURES * tokens, 16 * d * FEATURES * tokens
    elif p.case.op == "linformer":
        out, rows = d, p.inputs[2].shape[1]
        width = h * d
        forward = 2 * b * n * width * (width + rows) + 4 * b * rows * width**2
        forward += 4 * d * rows * tokens
        backward = 2 * forward
    elif p.case.op == "mla":
        nope, value = p.inputs[0].shape[-1], d // 2
        pairs = b * h * n * (n + 1) // 2 if p.case.causal else b * h * n * n
        expand = 2 * RANK * (nope + value) * tokens
        score, weigh = 2 * (nope + ROPE) * pairs, 2 * value * pairs
        out, forward, backward = value, expand + score + weigh, 2 * (expand + score + weigh)
    else:
        pairs = b * _pairs(p)
        out, forward, backward = d, 4 * d * pairs, 8 * d * pairs
    written = tokens * out * element
    # backward: inputs, output and its gradient read, input gradients written
    return {
        "forward": (forward, moved + written),
        "backward": (backward, 2 * moved + 2 * written),
        "both": (forward + backward, 3 * moved + 3 * written),
    }


def _decode_work(p: Problem, moved: int) -> tuple[float, float]:
    b, h, n, d = p.case.shape
    element = p.inputs[0].element_size()
    if p.case.op == "linear":  # the state is written back
        return 4 * d * d * b * h, moved + p.inputs[3].nbytes + p.inputs[
            4
        ].nbytes + b * h * d * element
    up, each = 2 * RANK * (d // 2 + d // 2), 2 * n * (RANK + ROPE) + 2 * n * RANK
    return b * h * (up + each), moved + b * h * (d // 2) * element


def _pairs(p: Problem) -> int:
    """Query-key pairs of one batch entry that the pattern holds, over all heads."""
    _, h, n, _ = p.case.shape
    if p.case.op == "local":
        left, right = p.case.window, 0 if p.case.causal else p.case.window
        i = torch.arange(n)
        return h * int(((i + right).clamp(max=n - 1) - (i - left).clamp(min=0) + 1).sum())
    density = p.fixed["pattern"].density
    return int(h * n * n * density * (0.5 if p.case.causal else 1.0))
