"""How a kernel is proven: float64 truth, each gradient, odd layouts, memory that starts as NaN."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LAYOUTS = ("contiguous", "token_major", "sliced", "expanded")


def layout(x: Tensor, how: str) -> Tensor:
    """The values of x (B, H, N, D) in other strides ("expanded" repeats batch entry 0)."""
    if how == "token_major":  # what a layer's projection gives
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "sliced":  # one of three, as from a fused projection
        return torch.cat([x, x + 1, x - 1], -1)[..., : x.shape[-1]]
    if how == "expanded":
        return x[:1].expand_as(x)
    return x.contiguous()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN inside: whatever a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def outputs_and_gradients(f: Callable, inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """f's floating outputs, then the gradient of each floating input under random cotangents."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    out = f(*leaves)
    flat = [out] if isinstance(out, Tensor) else [o for o in _flatten(out) if o.is_floating_point()]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype)
        for o in flat
    ]
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(flat, wanted, cotangents, allow_unused=True)
    return [
        *flat,
        *(g if g is not None else torch.zeros_like(x) for g, x in zip(grads, wanted, strict=True)),
    ]


def assert_accurate(
    f: Callable, naive: Callable, inputs: Sequence[Tensor], *, floor: float = 2e-6, names: str = ""
) -> None:
    """‖f − truth‖∞ ≤ 2·‖naive in the same precision − truth‖∞ + floor·scale, for each output and
    gradient; truth is `naive`, the textbook formula, in float64. scale is the largest ‖truth‖∞ of
    them all, at least 1: a small gradient is a difference of products as large as the others.
    `naive` runs in the same precision, which takes as long again, where the floor is not enough."""
    truth = outputs_and_gradients(naive, [_as(x, torch.float64) for x in inputs])
    plain: list[Tensor] = []
    with poisoned():
        given = outputs_and_gradients(f, inputs)
    assert len(given) == len(truth), f"{len(given)} results, {len(truth)} expected"
    scale = max(1.0, *(exact.abs().max().item() for exact in truth))
    labels = names.split() or [f"result {i}" for i in range(len(truth))]
    for i, (label, x, exact) in enumerate(zip(labels, given, truth, strict=False)):
        assert x.shape == exact.shape, f"{label}: shape {tuple(x.shape)}, not {tuple(exact.shape)}"
        error, bound = _distance(x, exact), floor * scale
        if not error <= bound:
            plain = plain or outputs_and_gradients(naive, inputs)
            bound += 2 * _distance(plain[i], exact)
        assert error <= bound, f"{label}: error {error:.3g} over the bound {bound:.3g}"


class Largest(TorchDispatchMode):
    """The largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
        return out


def _distance(x: Tensor, truth: Tensor) -> float:
    return (x.double() - truth).abs().max().item()


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _flatten(tree) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [x for part in tree for x in _flatten(part)]
