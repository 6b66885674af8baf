"""Packed batches at the public functions: sequences of any lengths one behind the other, without
padding, as `cu_seqlens` cuts them or as jagged nested tensors hold them.

A packed batch is dense, (1, H, T, D) with T = Σ N_s tokens, and cu_seqlens (S + 1,) says where the
sequences end: 0, N_1, N_1 + N_2, …, T. A jagged nested tensor (S, H, N_s, D) is that with the name
offsets, so it is taken apart without a copy, and o is put together like it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._check import Layout, accumulate, as_given, check_tensors, heads_first, shapes


class Packing(NamedTuple):
    """How the batch is packed."""

    cu_seqlens: Tensor  # (S + 1,)
    nested: bool  # given as nested tensors: returned as such


def unpack(
    op: str, layout: Layout, cu_seqlens: Tensor | None, **tensors: Tensor
) -> tuple[tuple[Tensor, ...], Packing | None]:
    """Views (B, H, N, ·) of what the caller gave, or (1, H, T, ·) and how they are packed."""
    nested = False
    try:
        for x in tensors.values():  # any() over a generator costs half a microsecond more
            nested = nested or x.is_nested
    except AttributeError:
        check_tensors(op, **tensors)
        raise
    if nested:
        if cu_seqlens is not None:
            raise ValueError(f"{op} got cu_seqlens and nested tensors, whose offsets these are")
        heads_first(op, layout)  # is there such a layout
        offsets = _offsets(op, layout, tensors)
        dense = heads_first(op, layout, *(x.values()[None] for x in tensors.values()))
        return dense, Packing(offsets, True)
    dense = tuple(tensors.values())
    if layout != "bhnd":
        dense = heads_first(op, layout, *dense)
    if cu_seqlens is None:
        return dense, None
    first = dense[0]
    if (
        not isinstance(cu_seqlens, Tensor)
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
        or cu_seqlens.dim() != 1
        or cu_seqlens.shape[0] < 1
        or cu_seqlens.device != first.device
    ):
        given = shapes(cu_seqlens=cu_seqlens) if isinstance(cu_seqlens, Tensor) else cu_seqlens
        raise ValueError(
            f"{op} wants cu_seqlens (S + 1,) int32 or int64 on {first.device}, the ends of S "
            f"sequences with a 0 before them; got {given}"
        )
    tokens = {x.shape[2 if x.dim() == 4 else 1] for x in dense if x.dim() > 2}
    if first.dim() != 4 or len(tokens) != 1 or any(x.shape[:1] != (1,) for x in dense):
        raise ValueError(
            f"{op} with cu_seqlens wants the sequences one behind the other in one batch entry, "
            f"q (1, {'H, T' if layout == 'bhnd' else 'T, H'}, D), and as many tokens of all; for "
            f'(T, H, D) pass q[None] and so on with layout="bnhd"; got {shapes(**tensors)}'
        )
    return dense, Packing(cu_seqlens, False)


def pack(layout: Layout, x: Tensor, packing: Packing | None) -> Tensor:
    """An output (B, H, N, ·), token-major as from every op, as the caller gave q: a view."""
    if packing is None or not packing.nested:
        return as_given(layout, x)
    x = torch.nested.nested_tensor_from_jagged(x[0].transpose(0, 1), packing.cu_seqlens)
    return x if layout == "bnhd" else x.transpose(1, 2)


def pack_rows(x: Tensor, packing: Packing | None) -> Tensor:
    """One number a query (B, H, N), which lies like this in both layouts."""
    return x if packing is None or not packing.nested else pack("bhnd", x, packing)


def sequences(k: Tensor, packing: Packing | None) -> int:
    """B, or S of a packed batch: of how many sequences there are states."""
    return k.shape[0] if packing is None else packing.cu_seqlens.shape[0] - 1


def refuse_packed(op: str, packing: Packing | None, option: str, why: str) -> None:
    """Refuses an option that belongs to one length."""
    if packing is not None:
        raise ValueError(f"{op} takes no {option} with cu_seqlens or nested tensors: {why}")


def _offsets(op: str, layout: Layout, tensors: dict[str, Tensor]) -> Tensor:
    """Of all tensors, or a ValueError."""
    for name, x in tensors.items():
        if not x.is_nested or x.layout != torch.jagged:
            name = name if x.is_nested else next(n for n, y in tensors.items() if y.is_nested)
            raise ValueError(
                f"{op} wants all of {', '.join(tensors)} dense or all nested in jagged layout; "
                f"{name} is nested: torch.nested.nested_tensor({name}.unbind(), "
                f"layout=torch.jagged) is jagged, torch.nested.to_padded_tensor({name}, 0.0) dense"
            )
        ragged = 2 if x.dim() == 4 and layout == "bhnd" else 1
        lies = x._ragged_idx  # type: ignore[attr-defined]
        if lies != ragged:
            raise ValueError(
                f'{op} with layout="{layout}" wants the lengths of nested {name} in dimension '
                f"{ragged}, they are in dimension {lies}; transpose it, or say "
                f'layout="{"bnhd" if layout == "bhnd" else "bhnd"}"'
            )
        if x.lengths() is not None:  # type: ignore[attr-defined]
            raise ValueError(f"{op}: nested {name} has holes; pass {name}.contiguous()")
    first, *others = (x.offsets() for x in tensors.values())  # type: ignore[attr-defined]
    for name, x in zip([*tensors][1:], others, strict=True):
        if x is not first and not torch.equal(x, first):
            raise ValueError(
                f"{op} wants nested tensors of the same lengths: {next(iter(tensors))} has offsets "
                f"{first.tolist()}, {name} {x.tolist()}"
            )
    return first


def softmax_tokens(k: Tensor, key_mask: Tensor | None, packing: Packing | None) -> Tensor:
    """softmax of k (B, H, N, D) over the real tokens of each sequence."""
    hidden = None if key_mask is None else ~key_mask[:, None, :, None]
    if hidden is not None:
        k = k.masked_fill(hidden, -torch.inf)
    k = k.softmax(-2) if packing is None else _softmax_within(k, packing.cu_seqlens)
    # A row of nothing but padding would be 0/0.
    return k if hidden is None else k.masked_fill(hidden, 0.0)


def _softmax_within(k: Tensor, cu_seqlens: Tensor) -> Tensor:
    """By sums over the tokens of each sequence, so that no length has to be known."""
    x = k.to(accumulate(k))
    which = torch.searchsorted(
        cu_seqlens[1:].contiguous(), torch.arange(k.shape[2], device=k.device), right=True
    )  # (T,): the sequence of a token
    # The ends may be wrong, which the op says.
    count = max(cu_seqlens.shape[0] - 1, 1)
    which, sums = which.clamp(max=count - 1), (1, k.shape[1], count, k.shape[3])
    peak = x.new_full(sums, -torch.inf).scatter_reduce(
        2, which[None, None, :, None].expand_as(x), x.detach(), "amax"
    )
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    e = (x - peak.index_select(2, which)).exp()
    total = x.new_zeros(sums).index_add(2, which, e)
    return (e / total.index_select(2, which)).to(k.dtype)
