"""Triton's interpreter: launchers that run on CPU tensors, in a process with TRITON_INTERPRET=1."""

from collections.abc import Callable

import torch
import triton

from tab import kernels
from tab.ops import OPS

assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton loads"

kernels.load()


def interpreted(*ops: str, instead_of: str = "tab_cuda") -> list[Callable]:
    """What these ops run for backend="triton", the reference where the kernel takes them not; in
    this process it takes the place of the CUDA C++ ops for CPU tensors, or of `instead_of`."""
    for op in ops:
        torch.library.impl(f"{instead_of}::{op}", "CPU", OPS[op].kernels["triton"])
    return [OPS[op].kernels["triton"] for op in ops]
