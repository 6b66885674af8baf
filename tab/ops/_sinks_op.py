"""An op whose softmax has a sink in every row: the op, and what it gives scaled.

    L' = log(e^L + e^s_h),  o' = e^(L − L') o
    ds_h = −Σ_bi e^(s_h − L'_bi) Δ_bi,  Δ = Σ do'∘o' − dL'

The weights of the keys are e^(S − L'), so the backward op of the op itself, given o' and L', gives
the gradients of its tensors: a sink costs one pass over o and, backward, one over o' and do'.
`merge_sinks` gives the same from outside, but needs the gradient of L, for which kernels copy v, o
and do. Gradients of second and higher order are those of that formula.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._check import accumulate, token_major
from ._op import Op
from ._softmax import may_look, row_sums
from .merge import shares


class Sunk(Op):
    """`base` with the argument sinks (H,) behind its tensors; its kernels are those of `base`."""

    def __init__(self, base: Op, name: str, schema: str, reference: Callable, flops: Callable):
        self.base = base
        q = base.overload._schema.arguments[0].name
        shapes = f"{q}: B H N D\n sinks: H"
        super().__init__(name, schema, reference, flops=flops, shapes=shapes)
        self.own = False

    def find_kernels(self) -> None:
        self.reasons = self.base.reasons


def with_sinks(base: Op) -> None:
    """Makes the op `x_sinks_fwd` beside `base`, x_fwd, for `attend`. It returns o and lse first."""
    name, schema, n = base.name.removesuffix("_fwd"), str(base.overload._schema), base.tensors
    arguments, returns = schema.split("(", 1)[1].split(") -> ")
    every = arguments.split(", ")
    schema = f"({', '.join([*every[:n], 'Tensor sinks', *every[n:]])}) -> {returns}"

    def reference(*args):
        o, lse, *others = base.reference(*args[:n], *args[n + 1 :])
        acc = accumulate(o)
        share, _, lse = shares(lse, args[n].to(acc)[:, None])
        return token_major((o.to(acc) * share[..., None]).to(o.dtype)), lse, *others

    def scaled(backend: str) -> Callable:
        def run(*args):
            o, lse, *others = base.below(backend, *args[:n], *args[n + 1 :])
            sinks = args[n].to(lse.dtype)[:, None]
            share = (lse - sinks).sigmoid().nan_to_num_(1.0)  # NaN: neither, or o is NaN already
            return o.mul_(share[..., None]), lse.logaddexp(sinks), *others

        return run

    def flops(*args, **options) -> int:
        return base.flops(*args[:n], *args[n + 1 :], **options)

    if hasattr(base.flops, "_get_raw"):
        flops._get_raw = True  # type: ignore[attr-defined]

    def gradients(backend, grads, *saved):
        do, dlse = grads
        if do is None and dlse is None:
            return ()
        tensors, sinks, (o, lse, *others) = saved[:n], saved[n], saved[n + 1 :]
        got = base.gradients(backend, grads, *tensors, o, lse, *others)
        return *got, *(None,) * (n - len(got)), sink_gradient(do, dlse, o, lse, sinks)

    op = Sunk(base, f"{name}_sinks_fwd", schema, reference, flops)
    for backend in ("cpp", "triton"):
        op.implement(backend, scaled("auto"))
    op.implement("cuda", scaled("cuda"))
    op.differentiable(gradients, constant=base.constant)
    base.sunk = op


def attend(op: Op, backend: str, sinks: Tensor | None, *args) -> tuple[Tensor, ...]:
    """`op`, with sinks if there are any."""
    if sinks is None:
        return op.apply(backend, *args)
    return op.sunk.apply(backend, *args[: op.tensors], sinks, *args[op.tensors :])


def sink_gradient(
    do: Tensor | None, dlse: Tensor | None, o: Tensor, lse: Tensor, sinks: Tensor
) -> Tensor:
    """ds (H,) of do, o (B, H, N, Dv), dlse and lse (B, H, N), of which one of do and dlse may be
    missing. A row whose L is not finite gives nothing, as in `merge_sinks`, nor one whose output
    nobody used, whatever it holds."""
    delta = torch.zeros_like(lse)
    if do is not None:
        do = do.to(lse.dtype)
        delta = (do * o).sum(-1) if may_look(do) else row_sums(do, o)
        if may_look(do) and not delta.isfinite().all():
            delta = row_sums(do, o)
    if dlse is not None:
        delta = delta - dlse
    each = -(sinks.to(lse.dtype)[:, None] - lse).exp() * delta
    return torch.where(lse.isfinite() & (delta != 0), each, 0.0).sum((0, 2)).to(sinks.dtype)
