"""Triton's interpreter: launchers that run on CPU tensors, in a process with TRITON_INTERPRET=1."""

from collections.abc import Callable

import numpy as np
import torch
import triton
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tab import kernels
from tab.ops import OPS

assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton loads"

kernels.load()

exact = InterpreterBuilder.create_dot


def create_dot(builder, a, b, d, input_precision, most):
    """As tensor cores do it: of a float32 operand of a tf32 product the last 13 bits are dropped,
    not rounded. (The interpreter multiplies exactly.)"""
    if input_precision == ir.INPUT_PRECISION.TF32:
        a, b = truncated(a), truncated(b)
    return exact(builder, a, b, d, input_precision, most)


def truncated(x: TensorHandle) -> TensorHandle:
    if x.data.dtype != np.float32:
        return x
    return TensorHandle((x.data.view(np.uint32) & 0xFFFFE000).view(np.float32), x.dtype)


InterpreterBuilder.create_dot = create_dot


def interpreted(*ops: str, instead_of: str = "tab_cuda") -> list[Callable]:
    """What these ops run for backend="triton", the reference where the kernel takes them not; in
    this process it takes the place of the CUDA C++ ops for CPU tensors, or of `instead_of`."""
    for op in ops:
        torch.library.impl(f"{instead_of}::{op}", "CPU", OPS[op].kernels["triton"])
    return [OPS[op].kernels["triton"] for op in ops]
