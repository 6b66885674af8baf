"""What the Triton kernels share: reading tiles, products of known precision, launching.

A tile is read with float32 values and zeros outside the tensor; token offsets are 64-bit.
"""

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# How tl.dot multiplies, by input type. float32: three tf32 products of split factors. float16 goes
# through tf32: as many mantissa bits, and sums over many tokens do not overflow.
PRECISION = {torch.float32: "tf32x3", torch.float16: "tf32", torch.bfloat16: "bf16"}
FEW = 16  # tokens up to which bfloat16 takes tf32 too: rounding errors do not average out yet
# Triton 3.6 fails on the causal tiles of 64 tokens of performer for sm_100; 3.8 compiles them.
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(x):
    """float32 x rounded to bfloat16, as float32. Triton's interpreter truncates instead when it
    casts, and multiplies the bits of bfloat16 as integers: there the bits are rounded by hand."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a (m, k) · b (k, n) -> (m, n) float32"""
    if PRECISION == "bf16":
        a, b = rounded(a), rounded(b)
        return tl.dot(a, b) if INTERPRETED else tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def head(ptr, bh, H, stride_b, stride_h):
    """The first element of batch entry bh // H, head bh % H."""
    return ptr + (bh // H).to(tl.int64) * stride_b + (bh % H).to(tl.int64) * stride_h


@triton.jit
def tile(ptr, stride, rows, n, first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """x[rows, first : first + BLOCK] of x (n, SIZE), unit stride along SIZE."""
    cols = first + tl.arange(0, BLOCK)
    inside = (rows < n)[:, None] & (cols < SIZE)[None, :]
    at = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def put(ptr, stride, rows, n, first, x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of `tile`."""
    cols = first + tl.arange(0, BLOCK)
    inside = (rows < n)[:, None] & (cols < SIZE)[None, :]
    at = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if ptr.dtype.element_ty == tl.bfloat16:
        x = rounded(x)
    tl.store(at, x.to(ptr.dtype.element_ty), mask=inside)


_recorder = None


@contextlib.contextmanager
def recording(recorder):
    """Within the block, launches call recorder(kernel, grid, *args, **options) and run nothing."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """kernel[grid](*args) on the device of the first tensor. One place, so that
    `tab.kernel_report` can compile ahead what would run."""
    if _recorder is not None:
        return _recorder(kernel, grid, *args, **options)
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **options)


def block(size: int, most: int = 64) -> int:
    """The tile length for a dimension: a power of two from 16, the least that tl.dot takes."""
    return min(most, max(16, triton.next_power_of_2(size)))


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; without a GPU (interpreter, compiling ahead) a Hopper's 132."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision(x: Tensor) -> str:
    """How products with x (B, H, N, D) are computed."""
    few = x.dtype == torch.bfloat16 and x.shape[2] <= FEW
    return "tf32" if few else PRECISION[x.dtype]


def outside(x: Tensor, most: int | None = None, **sizes: int) -> str | None:
    """Why a kernel that takes sizes up to `most` does not take x's dtype or `sizes`, or None.

    A launcher then runs the reference, for "auto"; `Op.limits` refuses what asks for it by name.
    """
    if x.dtype not in PRECISION:
        return f"it takes float32, bfloat16 and float16, got {str(x.dtype).removeprefix('torch.')}"
    wide = {name: size for name, size in sizes.items() if size > most}
    return next((f"it takes {name} up to {most}, got {wide[name]}" for name in wide), None)


def hide(key_mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """k and v (B, H, N, ·), or latents (B, N, ·), with 0 where a token is masked: its weight of 0
    would not hide a NaN."""
    if key_mask is None:
        return tensors
    masks = {3: ~key_mask[:, :, None], 4: ~key_mask[:, None, :, None]}
    return tuple(x.masked_fill(masks[x.dim()], 0.0) for x in tensors)


def rows(x: Tensor) -> Tensor:
    """x with unit stride in its last dimension: itself, else one copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def token_major_empty(like: Tensor) -> Tensor:
    """Uninitialised (B, H, N, D), laid out as (B, N, H, D)."""
    return like.new_empty([like.shape[i] for i in (0, 2, 1, 3)]).transpose(1, 2)
