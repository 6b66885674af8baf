"""What a call may ask of the scores beside a scale, checked: a cap, ALiBi's slopes, sinks."""

from __future__ import annotations

import math

from torch import Tensor

from ._check import accumulate, check_tensors, shapes
from ._options import number


def check_sinks(op: str, sinks: Tensor | None, q: Tensor) -> None:
    """sinks (H,) for q (B, H, N, ·), floating, on its device; None is none."""
    if sinks is not None:
        _each_head(op, "sinks", "a logit", sinks, q)


def check_scores(
    op: str, q: Tensor, sinks: Tensor | None, softcap: float | None, alibi: Tensor | None
) -> tuple[float, Tensor | None]:
    """-> the cap, 0 for none, and the slopes (H,) in the accumulation type."""
    if sinks is None and softcap is None and alibi is None:
        return 0.0, None
    check_sinks(op, sinks, q)
    cap = 0.0 if softcap is None else number(op, "softcap", softcap)
    if softcap is not None and not 0 < cap < math.inf:
        raise ValueError(f"{op} wants softcap > 0, or None for none; got softcap={softcap}")
    if alibi is None:
        return cap, None
    _each_head(op, "alibi", "a slope", alibi, q)
    if alibi.requires_grad:
        raise ValueError(
            f"{op} gives the slopes of alibi no gradient; pass alibi.detach(), or learn a bias "
            "with the layer flex"
        )
    return cap, alibi.to(accumulate(q)).contiguous()


def _each_head(op: str, name: str, what: str, x: Tensor, q: Tensor) -> None:
    check_tensors(op, **{name: x})
    if x.shape != q.shape[1:2] or not x.is_floating_point() or x.device != q.device:
        raise ValueError(
            f"{op} wants {name} (H,) = ({q.shape[1]},), floating, on {q.device}: {what} for each "
            f"head; got {shapes(**{name: x})}"
        )
