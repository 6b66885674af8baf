"""Fewer heads of k and v than of q, for the ops that sum over keys.

A group is the heads of q that share one of k and v. The kernels in C++ take whole groups; those
in Triton and the references take one head of each and are wrapped here; CUDA C++ is given one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps

import torch
from torch import Tensor

from ._op import Op


def by_query_head(op: Op, backend: str, q: Tensor, k: Tensor, *rest) -> tuple[Tensor, ...]:
    """`op` on q (B, H, N, D) and k (B, H_kv, N, D) -> o (B, H, N, Dv) and the state (B, H_kv, …).

    One call for each head of a group, on a view of q; k and v are read in place by every call, and
    their gradients add up over the calls. All calls end in the same state.
    """
    group = q.shape[1] // k.shape[1]
    if group == 1:
        return op.apply(backend, q, k, *rest)
    calls = [op.apply(backend, x, k, *rest) for x in _each(q, q.shape[1], group)]
    return _together(o for o, *_ in calls), *calls[0][1:]


def by_group(op: Op, backend: str, q: Tensor, *rest) -> tuple[Tensor, ...]:
    """The same as one call where the kernels take whole groups: all but those in CUDA C++."""
    if backend == "cuda":
        return by_query_head(op, backend, q, *rest)
    return op.apply(backend, q, *rest)


def groups_forward(reference: Callable, lse: bool = False) -> Callable:
    """What computes a forward op, (q, k, …) -> o and the state, by one head of each group; of lse,
    where it is the last result, every head of q has its own."""

    @wraps(reference)
    def run(q, k, *rest):
        heads, kv = q.shape[1], k.shape[1]
        if heads == kv:
            return reference(q, k, *rest)
        group = heads // kv
        o, *results = zip(*(reference(x, k, *rest) for x in _each(q, heads, group)), strict=True)
        state = [x[0] for x in (results[:-1] if lse else results)]
        last = [torch.stack(results[-1], 2).flatten(1, 2)] if lse else []
        return _together(o), *state, *last

    return run


def groups_backward(reference: Callable, states: int = 2) -> Callable:
    """The same of a backward op, (do, cotangents of so many states, q, k, …) -> dq and what adds
    up."""

    @wraps(reference)
    def run(do, *args):
        dstates, (q, k, *rest) = args[:states], args[states:]
        heads, kv = q.shape[1], k.shape[1]
        if heads == kv:
            return reference(do, *args)
        group = heads // kv
        columns = zip(*(_each(x, heads, group) for x in (do, q, k, *rest)), strict=True)
        calls = []
        for do_g, *own in columns:
            calls.append(reference(do_g, *dstates, *own))
            dstates = (None,) * states  # the state is one, and its cotangents count once
        dq, *shared = zip(*calls, strict=True)
        return _together(dq), *(sum(x[1:], x[0]) for x in shared)

    return run


def _each(x, heads: int, group: int) -> list:
    """What each call is given of x: its heads of q, or all of it. Split once, so that there is one
    gradient for all; slices would have one each."""
    if isinstance(x, Tensor) and x.dim() > 2 and x.shape[1] == heads:
        return list(x.unflatten(1, (-1, group)).unbind(2))
    return [x] * group


def _together(o: Iterable[Tensor]) -> Tensor:
    """(B, H, N, Dv), token-major, of the outputs of each call."""
    x = torch.stack([x.transpose(1, 2) for x in o], 3)  # (B, N, H_kv, H/H_kv, Dv)
    return x.flatten(2, 3).transpose(1, 2)
