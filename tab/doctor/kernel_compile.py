"""Compiles a launch ahead of time, for an architecture that need not be there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .kernel_launches import Launch

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

OPTIONS = ("num_warps", "num_stages", "maxnreg")  # of a launch, that are none of its kernel


def code_of(launch: Launch, arch: int) -> CompiledKernel:
    """What Triton compiles for this launch on sm_`arch`; its cache is used, and filled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, args, options = launch
    constants = {name: value for name, value in options.items() if name not in OPTIONS}
    signature, aligned = {}, {}
    for i, (name, x) in enumerate(zip(kernel.arg_names, args, strict=False)):
        signature[name] = launch.types[i]
        if signature[name] == "constexpr":
            constants[name] = x
        elif by_16(x):
            aligned[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(kernel.arg_names[len(args) :], "constexpr")
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={name: options[name] for name in OPTIONS if name in options},
    )


def assembler(arch: int):
    """The ptxas that Triton takes for sm_`arch`: .path and .version."""
    from triton.backends.nvidia.compiler import get_ptxas

    return get_ptxas(arch)


def by_16(x) -> bool:
    """Whether Triton compiles for a multiple of 16: of an address in bytes, or of a number."""
    if isinstance(x, torch.Tensor):
        return x.device.type == "meta" or x.data_ptr() % 16 == 0
    return isinstance(x, int) and x % 16 == 0
