"""Small things that every op file needs: checks whose errors print the shapes, types, layout."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate(*tensors: Tensor) -> torch.dtype:
    """float32 for half types, else the type itself: sums and softmaxes run in it."""
    return torch.promote_types(tensors[0].dtype, torch.float32)


def token_major(x: Tensor) -> Tensor:
    """x (B, H, N, D) laid out in memory as (B, N, H, D), so that merging the heads costs nothing.

    Every op returns its (B, H, N, D) tensors like this, from every backend.
    """
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts floating tensors to the autocast type when autocast is on for their device."""
    device = tensors[0].device.type
    # is_autocast_available does not trace on torch 2.11, so meta is asked for by name.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x is not None and x.is_floating_point() else x for x in tensors)


def full_precision(x: Tensor) -> torch.autocast:
    """A block in which autocast is off for x's device: sums run in the type they were cast to."""
    device = x.device.type
    return torch.autocast("cpu" if device == "meta" else device, enabled=False)


def shapes(**tensors: Tensor | None) -> str:
    """'q (2, 4, 64, 32) float32 cpu, …' for error messages."""
    return ", ".join(
        f"{name} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} {x.device}"
        for name, x in tensors.items()
        if x is not None
    )


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k (B, H, N, D) and v (B, H, N, Dv): one floating dtype, one device, N ≥ 1."""
    rule = None
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        rule = "q, k (B, H, N, D) and v (B, H, N, Dv)"
    elif q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        rule = "q and k of one shape, v with the same B, H, N"
    elif 0 in q.shape or 0 in v.shape:
        rule = "no empty dimension"
    if rule:
        raise ValueError(f"{op} wants {rule}; got {shapes(q=q, k=k, v=v)}")
    same(op, q=q, k=k, v=v)


def same(op: str, **tensors: Tensor | None) -> None:
    """One floating dtype and one device for all, or a ValueError that prints them."""
    present = [x for x in tensors.values() if x is not None]
    if len({x.device for x in present}) > 1 or len({x.dtype for x in present}) > 1:
        raise ValueError(f"{op} wants one dtype and one device, got {shapes(**tensors)}")
    if not present[0].is_floating_point():
        raise ValueError(f"{op} wants floating tensors, got {shapes(**tensors)}")


def check_key_mask(op: str, key_mask: Tensor | None, k: Tensor) -> None:
    """key_mask (B, N) bool, True where a token is real."""
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool or key_mask.shape != (k.shape[0], k.shape[2]):
        raise ValueError(
            f"{op} wants key_mask (B, N) = {(k.shape[0], k.shape[2])} bool, True where a token "
            f"is real; got {shapes(key_mask=key_mask)}"
        )
    if key_mask.device != k.device:
        raise ValueError(f"{op} wants one device, got {shapes(k=k, key_mask=key_mask)}")
