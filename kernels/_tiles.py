"""What all Triton kernels share on the device: tiles, and products of known precision.

A tile is read with float32 values and zeros outside the tensor; token offsets are 64-bit.
"""

import triton
import triton.language as tl

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


@triton.jit
def finite(x):
    """−∞ -> 0, so that −∞ − x is −∞ and never NaN."""
    return tl.where(x == float("-inf"), 0.0, x)
