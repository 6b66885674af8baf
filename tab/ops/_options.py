"""Options of operators that are no tensors, checked: numbers, and one option of two names."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

NUMBERS = {  # option -> what to do where it was to be learned
    "scale": "a learned scale multiplies q: pass q * scale, and scale=1.0",
    "eps": "it gets no gradient; pass float(eps)",
    "softcap": "it gets no gradient; pass float(softcap)",
    "route_scale": "pass a number",
}


def number(op: str, name: str, value: float) -> float:
    """`value` as a float, or a TypeError: a tensor would lose its gradient here in silence. (Inside
    torch.jit.trace what is made of a shape is a tensor.)"""
    if isinstance(value, (int, float)):
        return float(value)
    tensor = isinstance(value, Tensor) and (value.requires_grad or not torch.jit.is_tracing())
    if tensor or not hasattr(value, "__float__"):
        raise TypeError(
            f"{op}(): argument {name!r} must be float, not {type(value).__name__}; {NUMBERS[name]}"
        )
    return float(value)


def finite(op: str, name: str, value: float) -> float:
    """As `number`; a ValueError for NaN and infinity, of which nothing but NaN would come."""
    x = number(op, name, value)
    if not -math.inf < x < math.inf:
        raise ValueError(f"{op} wants a finite {name}, got {value}")
    return x


def whole(op: str, name: str, value: int) -> int:
    """A whole number, or a TypeError as from PyTorch's operators; of NumPy's, Python's."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{op}(): argument {name!r} must be int, not {type(value).__name__}")
    return operator.index(value)


def check_eps(op: str, eps: float) -> float:
    """What is added to a denominator: 0 or more."""
    eps = finite(op, "eps", eps)
    if eps < 0:
        raise ValueError(f"{op} wants eps ≥ 0, got {eps}")
    return eps


def boolean(op: str, name: str, value: bool) -> bool:
    """True or False, or a TypeError as from PyTorch's operators: "no" would count as True. (What
    torch.export makes of a comparison of shapes is a SymBool.)"""
    if value is True or value is False:
        return value
    if isinstance(value, torch.SymBool):
        return bool(value)
    raise TypeError(
        f"{op}(): argument {name!r} must be bool, not {type(value).__name__}; got {value!r}"
    )


def check_causal(op: str, causal: bool, is_causal: bool | None) -> bool:
    """The option under either of its names."""
    causal = boolean(op, "causal", causal)
    if is_causal is None:
        return causal
    if not boolean(op, "is_causal", is_causal) and causal:
        raise ValueError(
            f"{op} got causal={causal} and is_causal={is_causal}, two names of one option; "
            "pass one of them"
        )
    return is_causal
