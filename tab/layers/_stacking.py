"""How a layer runs for several seeds of a run at once (`tab compare --batch-seeds`).

Weights are stacked, (S, …), and tensors flow as (S·B, …), the images of the first seed first
(tab/models/stacked.py). A class says in its attribute `stacking` what that makes of it:

    True      it has no weights of its own and treats the images of a batch alike: with its
              submodules stacked it runs unchanged on S times the batch
    a class   its subclass whose weights are (S, …), declared by `@stacks(Layer)`. `seeds` are the
              S ordinary layers, whose weights are views of its own
    a text    why it cannot: the seeds then run one after the other, and the text says so

An instance may narrow it. A subclass does not inherit it: what it adds may treat images otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._base import NOT_SAID, HeadsAttention

if TYPE_CHECKING:
    Kind = type[nn.Module]


def stacks(layer: Any) -> Callable[[Kind], Kind]:
    """Class decorator: this subclass of `layer` is what S of them run as.

    >>> class Mine(tab.layers.HeadsAttention):
    ...     pass
    >>> @tab.layers.stacks(Mine)
    ... class StackedMine(Mine):
    ...     pass
    >>> Mine.stacking is StackedMine
    True
    """

    def register(form: Kind) -> Kind:
        if not issubclass(form, layer):
            raise TypeError(
                f"@stacks({layer.__name__}) {form.__name__}: the stacked form must be a subclass "
                f"of {layer.__name__}, as its attributes are copied from one"
            )
        layer.stacking = form
        return form

    return register


def stacking_of(module: nn.Module) -> bool | str | Kind:
    """What this module says, or what is said where it says nothing."""
    return vars(module).get("stacking", vars(type(module)).get("stacking", NOT_SAID))


def beside(p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """p (S, P…), x (S·B, …, X…) -> (S, 1, …, P…) and (S, B, …, X…), which broadcast."""
    x = x.unflatten(0, (len(p), -1))
    return p.view(len(p), *[1] * (x.dim() - p.dim()), *p.shape[1:]), x


class Products(torch.autograd.Function):
    """y_s = x_s W_sᵀ + b_s; x (S, M, I), W (S, O, I), b (S, O) or None -> (S, M, O).

    baddbmm's own backward gives dW as (S, I, O), and putting that in W's layout takes as long as
    the product: dW_s = g_sᵀ x_s is in it.
    """

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return torch.bmm(x, w.mT) if b is None else torch.baddbmm(b[:, None], x, w.mT)

    @staticmethod
    def backward(ctx, g):
        (x, w), (need_x, need_w, need_b) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            torch.bmm(g, w) if need_x else None,
            torch.bmm(g.mT, x) if need_w else None,
            g.sum(1) if need_b else None,
        )


class OwnAttend(HeadsAttention):
    """Mix-in of stacked forms: what lies between the projections is each seed's own, such as random
    features and random blocks."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        parts = (t.chunk(len(self.seeds)) for t in (q, k, v))
        own = zip(self.seeds, *parts, strict=True)
        # Token-major, as each part is: (S·B, N, H, D) in memory.
        found = [layer.attend(*qkv, None).transpose(1, 2) for layer, *qkv in own]
        return torch.cat(found).transpose(1, 2)
