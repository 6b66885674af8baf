"""Compiles a launch ahead of time, for an architecture that need not be there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .kernel_launches import Launch

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

# An older ptxas may write registers that a product of matrices on sm_90 still reads (release notes
# of CUDA 13.3; triton-lang/triton, issue 9433).
SOUND = 13, 3
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


def doubt(arch: int) -> str | None:
    """Why what Triton's ptxas makes for sm_`arch` may be wrong, and the way out; None if it is not
    known to be."""
    tool, newest = assembler(arch), assembler(100)
    if arch != 90 or _number(tool) >= SOUND:
        return None
    path = newest.path if _number(newest) >= SOUND else "PATH, that of a newer one"
    return (
        f"Triton takes ptxas {tool.version} for sm_90. Before 13.3 it may overwrite what a product "
        "of matrices still reads. TAB's tests find no such place in its kernels, but look at no "
        f"others: set TRITON_PTXAS_PATH={path}"
    )


def _number(tool) -> tuple[int, ...]:
    return tuple(map(int, tool.version.split(".")[:2]))


def by_16(x) -> bool:
    """Whether Triton compiles for a multiple of 16: of an address in bytes, or of a number."""
    if isinstance(x, torch.Tensor):
        return x.device.type == "meta" or x.data_ptr() % 16 == 0
    return isinstance(x, int) and x % 16 == 0
