"""Gradients that belong to the op: whoever calls it, by whatever route, gets them.

One autograd.Function for all ops. The public functions apply it in Python, which is the fast way in
eager use; the same Function stands on the op's Autograd key, for those who call the op itself:
graphs of torch.compile, torch.export and torch.jit.trace, opcheck.

First derivatives come from the backward op. Higher ones (`create_graph=True`) come from the
reference, which PyTorch differentiates as often as one likes; so do all derivatives under
torch.func transforms. The backward op has no derivative of its own, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ._check import full_precision

if TYPE_CHECKING:
    from ._op import Op


below_autograd = torch._C._AutoDispatchBelowAutograd
tracing = torch._C._get_tracing_state  # None, but inside torch.jit.trace


def transforming() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which know no TAB kernel."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def plain(reference: Callable, args: tuple):
    """The reference as PyTorch operators, each with the derivatives that PyTorch gives it."""
    with full_precision(args[0]):
        return reference(*args)


def function(op: Op, gradients: Callable, constant: int) -> Callable:
    """`op` by its autograd.Function; `Op.differentiable` says what the arguments are. The Function
    is given what is not a tensor as one argument: each costs its share of the call, and a gradient
    of None."""
    n, outputs = op.tensors, op.overload._schema.returns
    below, one, keep = op.below, len(outputs) == 1, len(outputs) - constant

    def forward(ctx, call, *tensors):
        backend, options, others = ctx.call = call
        outs = below(backend, *tensors, *options)
        ctx.save_for_backward(*tensors, *((outs,) if one else outs))
        ctx.set_materialize_grads(False)
        if constant:  # handed on past autograd: an output of a node costs two microseconds
            others += outs[keep:]
            return outs[:keep]
        return outs

    def backward(ctx, *grads):
        saved, (backend, options, _) = ctx.saved_tensors, ctx.call
        if torch.is_grad_enabled():  # create_graph=True
            got = _again(op, (*saved[:n], *options), grads, ctx.needs_input_grad[1:])
        else:
            got = gradients(backend, grads, *saved, *options)
        return None, *got, *(None,) * (n - len(got))

    name = "".join(word.capitalize() for word in op.name.removesuffix("_fwd").split("_"))
    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    apply = cast(type[Function], type(name, (Function,), body)).apply

    def run(backend, *args):
        if not constant:
            return apply((backend, args[n:], None), *args[:n])
        others = []
        return *apply((backend, args[n:], others), *args[:n]), *others

    return run


def _again(
    op: Op, args: tuple, grads: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients with a graph of their own. Each operand is a view, a node of its own: q and k may
    be one tensor, or made from each other."""
    tensors, options = args[: op.tensors], args[op.tensors :]
    with torch.enable_grad():
        tensors = tuple(
            x.view_as(x) if need else x for x, need in zip(tensors, needed, strict=True)
        )
        outs = plain(op.reference, (*tensors, *options))
        outs = (outs,) if isinstance(outs, Tensor) else outs
    pairs = [(o, g) for o, g in zip(outs, grads, strict=False) if g is not None and o.requires_grad]
    wanted = [x for x, need in zip(tensors, needed, strict=True) if need]
    got = iter(
        torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g for _, g in pairs],
            create_graph=True, allow_unused=True,
        )
    )  # fmt: skip
    return tuple(next(got) if need else None for need in needed)


def register(op: Op, apply: Callable) -> None:
    """`apply(backend, *args)` on the Autograd key of the op, in both namespaces."""

    def kernel(backend):
        def run(*args):
            if transforming():
                return plain(op.reference, args)
            return apply(backend, *args) if torch.is_grad_enabled() else op.below(backend, *args)

        return run

    for namespace, backend in (("tab", "auto"), ("tab_cuda", "cuda")):
        torch.library.impl(f"{namespace}::{op.name}", "Autograd", kernel(backend))


def once_only(op: Op, instead: str) -> type[Function]:
    """The Function of a backward op: a second derivative through it is an error, never zeros."""

    def forward(ctx, backend, *args):
        return op.below(backend, *args)

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"tab::{op.name} has no derivative of its own. For second derivatives call "
            f"tab::{instead}, or the function that does, in eager mode: create_graph=True goes "
            "through its PyTorch reference"
        )

    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(op.name, (Function,), body)


def exporting() -> bool:
    """torch.compiler.is_exporting(), whose flag it reads: Dynamo of torch 2.11 takes the function
    for True in every compilation, so that compiled training would count nothing."""
    return torch.compiler._is_exporting_flag
