"""Small things that every op file needs: checks whose errors print the shapes, types, layout."""

from __future__ import annotations

from typing import Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

CAST = (torch.float32, torch.bfloat16, torch.float16)  # what autocast changes
DTYPES = (*CAST, torch.float64)
_autocast_enabled = torch._C._is_any_autocast_enabled
Given = TypeVar("Given", bound=Tensor | None)
Layout = Literal["bhnd", "bnhd"]  # of what a public function takes and returns


def accumulate(*tensors: Tensor) -> torch.dtype:
    """float32 for half types, else the type itself: sums and softmaxes run in it.

    >>> tab.ops.accumulate(torch.zeros(1, dtype=torch.bfloat16))
    torch.float32
    """
    return torch.promote_types(tensors[0].dtype, torch.float32)


def token_major(x: Tensor) -> Tensor:
    """x (B, H, N, D) laid out in memory as (B, N, H, D), so that merging the heads costs nothing.

    Every op returns its (B, H, N, D) tensors like this, from every backend.

    >>> tab.ops.token_major(torch.zeros(1, 4, 16, 8)).stride()
    (512, 8, 32, 1)
    """
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def check_tensors(op: str, **given: object) -> None:
    """A TypeError for the first that is none, as PyTorch's operators raise."""
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{op}(): argument {name!r} must be Tensor, not {type(x).__name__}"
                + ("" if x is None else f"; torch.as_tensor({name}) makes one")
            )


def operands(op: str, layout: Layout = "bhnd", /, **tensors: Given) -> tuple[Given, ...]:
    """The floating operands as they are computed with: dense, of a dtype that TAB takes, and under
    autocast cast to its type before anything is compared, as PyTorch's operators do. Like theirs,
    float64 stays float64."""
    for x in tensors.values():
        if not isinstance(x, Tensor):
            check_tensors(op, **tensors)
        elif x.is_nested or x.dtype not in DTYPES:
            _refuse(op, next(name for name, given in tensors.items() if given is x), x, layout)
    return autocast(*tensors.values())


def _refuse(op: str, name: str, x: Tensor, layout: Layout) -> None:
    if x.is_nested:
        raise ValueError(
            f"{op} wants dense tensors, {name} is nested: call it for each of {name}.unbind(), or "
            f"pad with torch.nested.to_padded_tensor({name}, 0.0) and, where the operator takes a "
            "key_mask, hide the padding with it"
        )
    raise ValueError(
        f"{op} wants float16, bfloat16, float32 or float64, got {shapes(layout, **{name: x})}; "
        f"convert it, for example {name}.to(torch.bfloat16)"
    )


def autocast(*tensors: Given) -> tuple[Given, ...]:
    """Casts float16, bfloat16 and float32 to the autocast type when it is on for their device."""
    if not _autocast_enabled():
        return tensors
    device = next(x.device.type for x in tensors if x is not None)
    # is_autocast_available does not trace on torch 2.11, so meta is asked for by name.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        cast(Given, x.to(dtype)) if x is not None and x.dtype in CAST else x for x in tensors
    )


def real(key_mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Keys and values (B, H, N, ·) with masked tokens replaced by 0: 0 · NaN would be NaN."""
    if key_mask is None:
        return tensors
    hidden = ~key_mask[:, None, :, None]
    return tuple(x.masked_fill(hidden, 0.0) for x in tensors)


def answered(
    key_mask: Tensor | None, do: Tensor, *tensors: Tensor, fill: float = 0.0
) -> tuple[Tensor, ...]:
    """In a backward pass: what belongs to queries (B, H, N, ·), replaced by `fill` at masked tokens
    whose outputs have no cotangent do. Like `real`, so that 0 · NaN is 0."""
    if key_mask is None:
        return tensors
    if key_mask.shape[1] != do.shape[2]:  # of other tokens
        return tensors
    idle = ~key_mask[:, None, :, None] & (do == 0).all(-1, keepdim=True)  # (B, H, N, 1)
    return tuple(x.masked_fill(idle, fill) for x in tensors)


def full_precision(x: Tensor) -> torch.autocast:
    """A block in which autocast is off for x's device: sums run in the type they were cast to."""
    device = x.device.type
    return torch.autocast("cpu" if device == "meta" else device, enabled=False)


def heads_first(op: str, layout: Layout, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Views (B, H, N, ·) of what the caller gave; errors are told the layout, and print that."""
    if layout == "bhnd":
        return tensors
    if layout not in get_args(Layout):
        raise ValueError(f"{op}: layout={layout!r}: choose one of {', '.join(get_args(Layout))}")
    return tuple(
        x.transpose(1, 2) if isinstance(x, Tensor) and x.dim() == 4 and not x.is_nested else x
        for x in tensors
    )


def as_given(layout: Layout, o: Tensor) -> Tensor:
    """(B, H, N, ·) in the caller's layout, a view; an output is token-major, as from every op."""
    return o if layout == "bhnd" else o.transpose(1, 2)


def shapes(layout: Layout = "bhnd", /, **tensors: Tensor | None) -> str:
    """'q (2, 4, 64, 32) float32 cpu, …' for error messages: what has heads as the caller gave it,
    before `heads_first`."""
    given = {
        name: as_given(layout, x) if x.dim() == 4 else x
        for name, x in tensors.items()
        if x is not None
    }
    return ", ".join(
        f"{name} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} {x.device}"
        for name, x in given.items()
    )


def check_qkv(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grouped: bool = False,
    cross: bool = False,
    layout: Layout = "bhnd",
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (B, H, N, D) and v (B, H, N, Dv), cast under autocast: one floating dtype, one device.
    B and N may be 0. grouped: k and v may have fewer heads, H_kv, which divides H. cross: they may
    have another N. layout: in which the caller gave them, for the errors.

    >>> q = torch.zeros(1, 4, 16, 8)
    >>> q, k, v = tab.ops.check_qkv("mine", q, q, q)
    >>> tab.ops.check_qkv("mine", q, q, q[0])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: mine wants q, k (B, H, N, D) and v (B, H, N, Dv); got q (1, 4, 16, 8) float32 ...
    """
    # What nearly every call gives needs no more than these questions.
    try:
        nested = q.is_nested or k.is_nested or v.is_nested
    except AttributeError:
        check_tensors(op, q=q, k=k, v=v)
        raise
    alike = q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
    usual = alike and not nested and q.dtype in DTYPES and not _autocast_enabled()
    if not usual:
        q, k, v = operands(op, layout, q=q, k=k, v=v)
    rule, shape, wide = None, q.shape, v.shape
    if len(shape) != 4 or k.dim() != 4 or len(wide) != 4:
        rule = "q, k (B, H, N, D) and v (B, H, N, Dv)"
    else:
        (b, h, n, d), (*rows, dv) = shape, wide
        heads, n = k.shape[1] if grouped else h, k.shape[2] if cross else n
        if heads and h % heads:
            rule = f"a number of heads of k and v that divides the {h} of q"
        elif k.shape != (b, heads, n, d) or [b, heads, n] != rows:
            few = ", or both with fewer heads than q" if grouped else ""
            few += ", or both with another N" if cross else ""
            rule = f"q and k of one shape, v with the same B, H, N{few}"
        elif not (h and heads and d and dv):
            rule = "at least one head and D, Dv ≥ 1"
    if rule:
        rule = rule if layout == "bhnd" else rule.replace("B, H, N", "B, N, H")
        raise ValueError(f"{op} wants {rule}; got {shapes(layout, q=q, k=k, v=v)}")
    if not usual:
        same(op, layout, q=q, k=k, v=v)
    return q, k, v


def check_lengths(op: str, q: Tensor, k: Tensor, causal: bool) -> None:
    """Causal, each query is one of the keys."""
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"{op}: causal wants as many queries as keys, got N_q = {q.shape[2]} and N_k = "
            f"{k.shape[2]}; for queries at the end of a sequence pass what the keys before them "
            "leave (return_state=True) as initial_state"
        )


def one_length(q: Tensor, k: Tensor, *_) -> str | None:
    """Why a kernel for as many queries as keys does not take these, or None."""
    if q.shape[2] == k.shape[2]:
        return None
    return f"it takes as many keys as queries, got {k.shape[2]} and {q.shape[2]}"


def same(op: str, layout: Layout = "bhnd", /, **tensors: Tensor | None) -> None:
    """One dtype and one device for all, or a ValueError that prints them."""
    first, *others = [x for x in tensors.values() if x is not None]
    dtype, device = first.dtype, first.device
    if any(x.dtype != dtype or x.device != device for x in others):
        raise ValueError(f"{op} wants one dtype and one device, got {shapes(layout, **tensors)}")
    if dtype not in DTYPES:
        raise ValueError(
            f"{op} wants float16, bfloat16, float32 or float64, got {shapes(layout, **tensors)}"
        )


def check_key_mask(op: str, key_mask: Tensor | None, k: Tensor) -> None:
    """key_mask (B, N) bool, True where a token is real; None hides nothing.

    >>> k = torch.zeros(1, 4, 16, 8)
    >>> tab.ops.check_key_mask("mine", torch.ones(1, 16, dtype=torch.bool), k)
    >>> tab.ops.check_key_mask("mine", torch.ones(1, 16), k)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: mine wants key_mask (B, N) = (1, 16) bool, True where a token is real; got ...
    """
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor):
        check_tensors(op, key_mask=key_mask)
    if key_mask.dtype != torch.bool or key_mask.shape != (k.shape[0], k.shape[2]):
        raise ValueError(
            f"{op} wants key_mask (B, N) = {(k.shape[0], k.shape[2])} bool, True where a token "
            f"is real; got {shapes(key_mask=key_mask)}"
        )
    if key_mask.device != k.device:
        raise ValueError(f"{op} wants one device, got {shapes(k=k, key_mask=key_mask)}")


def check_state(op: str, state: object, like: Tensor, **want: tuple[int, ...]) -> tuple:
    """The parts of an initial_state, of these names and shapes, in the accumulation type of `like`
    and on its device."""
    acc = accumulate(like)
    wanted = ", ".join(f"{name} {shape}" for name, shape in want.items())
    wanted = wanted if len(want) == 1 else f"({wanted})"
    rule = f"{op} wants initial_state {wanted} in {str(acc).removeprefix('torch.')} on "
    rule += f"{like.device}, as return_state=True returns it; got "
    given = (state,) if isinstance(state, Tensor) and len(want) == 1 else state
    if not isinstance(given, (tuple, list)) or len(given) != len(want):
        size = f" of {len(given)}" if isinstance(given, (tuple, list)) else ""
        raise ValueError(f"{rule}{type(given).__name__}{size}")
    named = dict(zip(want, given, strict=True))
    check_tensors(op, **named)
    if any(
        (x.shape, x.dtype, x.device) != (want[name], acc, like.device) for name, x in named.items()
    ):
        raise ValueError(rule + shapes(**named))
    return tuple(given)
