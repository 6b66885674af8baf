"""What all Triton kernels share on the device: tiles, and products of known precision.

A tile is read with float32 values and zeros outside the tensor; token offsets are 64-bit.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
NEITHER = tl.constexpr("")  # a default that is a text must be one already (Triton 3.6)


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
def tf32(x):
    """float32 x rounded to tf32, ties away from 0. Tensor cores would drop the bits instead."""
    if INTERPRETED:
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -8192
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        bits = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1
        )
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, LOADED: tl.constexpr = NEITHER):
    """a (m, k) · b (k, n) -> (m, n) float32. "fp16" is for what cannot overflow it.

    LOADED: "a", "b" or "ab", which hold 16-bit numbers as they were loaded: tf32 holds those, and
    what need not be rounded can stay in shared memory.
    """
    if PRECISION == "fp16":
        return tl.dot(a.to(tl.float16), b.to(tl.float16))
    elif PRECISION == "bf16":
        a, b = rounded(a), rounded(b)
        return tl.dot(a, b) if INTERPRETED else tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif PRECISION == "tf32":
        if LOADED != "a" and LOADED != "ab":
            a = tf32(a)
        if LOADED != "b" and LOADED != "ab":
            b = tf32(b)
        return tl.dot(a, b, input_precision="tf32")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def head(ptr, bh, H, stride_b, stride_h):
    """The first element of batch entry bh // H, head bh % H."""
    return ptr + (bh // H).to(tl.int64) * stride_b + (bh % H).to(tl.int64) * stride_h


@triton.jit
def key_head(ptr, bh, H, KV, stride_b, stride_h):
    """The same of k or v (B, KV, …), for head bh % H of q."""
    return head(ptr, bh // H * KV + bh % H // (H // KV), KV, stride_b, stride_h)


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


# --- what hidden tokens hold ----------------------------------------------------------------------
#
# Σ_n p_mn x_n over a tile in which m may not see all n: p is 0 there, but 0·NaN is NaN. So a row of
# x that is not finite is left out, and its p is NaN for those who see it. Only tiles that the edge
# of what is seen cuts have to ask: what the others hold is seen by all or by nobody.


@triton.jit
def sound(ptr, stride, rows, n, first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """For a tile that is read again afterwards, so that no registers hold it in between -> `rows`
    with n, which reads zeros, for those that are not finite; NaN for those, else 0."""
    x = tile(ptr, stride, rows, n, first, SIZE, BLOCK)
    odd = tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1) == 0
    return tl.where(odd, n, rows), tl.where(odd, float("nan"), 0.0)


@triton.jit
def hide(p, x, seen, hides):
    """p (m, n), x (n, k), seen (m, n) -> p and x whose product is right, if the tile hides."""
    if hides:
        odd = tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1) == 0
        p = tl.where(seen, p + tl.where(odd, float("nan"), 0.0)[None, :], 0.0)
        x = tl.where(odd[:, None], 0.0, x)
    return p, x
