"""Integers that overflow in a kernel are told by the interpreter, as they would be by no GPU.

tests/ops/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

assert interpreter.held


@triton.jit
def sums(x, y, out, WHAT: tl.constexpr):
    a, b = tl.load(x + tl.arange(0, 4)), tl.load(y)
    if WHAT == "add":
        c = a + b
    elif WHAT == "sub":
        c = a - b
    else:
        c = a * b
    tl.store(out + tl.arange(0, 4), c)


@pytest.mark.parametrize("what, y", [("add", 1), ("sub", -1), ("mul", 2)])
def test_overflow(what, y):
    largest, smaller = torch.tensor([0, 1, 2, 2**31 - 1]), torch.tensor([0, 1, 2, 2**30 - 1])
    out, y = torch.zeros(4, dtype=torch.int64), torch.tensor([y])
    sums[(1,)](largest, y, out, what)  # in 64 bits
    assert out[3] >= 2**31
    sums[(1,)](smaller.int(), y.int(), out.int(), what)
    with pytest.raises(InterpreterError, match=f"int32.* overflows: {what}"):
        sums[(1,)](largest.int(), y.int(), out.int(), what)
