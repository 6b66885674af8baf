"""The launches that the kernel report compiles: each op's launchers, called on meta tensors once
for each way they go and for each kind of kernel they choose."""

from __future__ import annotations

from collections.abc import Callable

import torch


def _batches() -> None:
    from ..kernels import batches

    shapes = ((50000, 32, 32, 3), torch.uint8), ((512,), torch.int64), ((512, 3), torch.int8)
    x = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes]
    batches.assemble(*x, *torch.empty(2, 3, device="meta"))


def _linear() -> None:
    """Calls the launchers of `linear` once for each way they go."""
    from ..kernels import linear, linear_backward

    both, full = (torch.float32, torch.bfloat16), (torch.float32,)
    cases = [  # B, H, N, D, Dv, causal, types
        (512, 8, 64, 64, 64, False, both),  # one launch
        (512, 8, 64, 128, 128, False, full),  # one launch forward, split backward
        (1, 8, 8192, 64, 64, True, both),  # one tile across D
        (1, 8, 8192, 256, 256, True, full),  # several
    ]
    for b, h, n, d, dv, causal, dtypes in cases:
        for dtype in dtypes:
            q = torch.empty(b, n, h, d, dtype=dtype, device="meta").transpose(1, 2)
            v = torch.empty(b, n, h, dv, dtype=dtype, device="meta").transpose(1, 2)
            mask = torch.empty(b, n, dtype=torch.bool, device="meta")
            s0 = torch.empty(b, h, d, dv, device="meta")
            z0 = torch.empty(b, h, d, device="meta")
            o, s, z = linear.forward(q, q, v, mask, s0, z0, 0, causal, 0.0)
            linear_backward.backward(o, s, z, q, q, v, o, s, z, mask, s, z, 0, causal, 0.0)


def _performer() -> None:
    """Calls the launchers of `performer` once for each way they go."""
    from ..kernels import performer, performer_backward

    half, full = torch.bfloat16, torch.float32
    cases = [  # B, H, N, D, Dv, M, causal, type
        (512, 8, 64, 64, 64, 256, False, half),  # one launch
        (512, 8, 64, 64, 64, 256, False, full),
        (1, 8, 8192, 64, 64, 256, True, half),  # segments
        (1, 8, 8192, 256, 256, 512, True, full),  # several tiles of everything
    ]
    for b, h, n, d, dv, m, causal, dtype in cases:
        q = torch.empty(b, n, h, d, dtype=dtype, device="meta").transpose(1, 2)
        v = torch.empty(b, n, h, dv, dtype=dtype, device="meta").transpose(1, 2)
        w = torch.empty(m, d, device="meta")
        mask = torch.empty(b, n, dtype=torch.bool, device="meta")
        z0 = torch.empty(b, h, m, device="meta")
        state = torch.empty(b, h, m, dv, device="meta"), z0, z0
        o, s, z, c, lse = performer.forward(q, q, v, w, mask, *state, 0, causal, 0.0)
        performer_backward.backward(o, s, z, q, q, v, w, o, s, z, c, lse, mask, *state, 0, causal)


def _heads(n: int, *sizes: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Token-major (2, 8, n, size) without memory."""
    return [torch.empty(2, n, 8, s, dtype=dtype, device="meta").transpose(1, 2) for s in sizes]


SOFTMAX = (  # D = Dv, type: a head in one tile and in several
    (64, torch.bfloat16),
    (64, torch.float32),
    (128, torch.bfloat16),
    (256, torch.bfloat16),
)


def _local() -> None:
    """Line and causal grid."""
    from ..kernels import local

    for d, dtype in SOFTMAX:
        q, lse = *_heads(8192, d, dtype=dtype), torch.empty(2, 8, 8192, device="meta")
        for rows, cols in ((0, 0), (128, 64))[: 2 if (d, dtype) == SOFTMAX[0] else 1]:
            options = 64, 64, rows, cols, cols > 0, 0.1
            local.forward(q, q, q, *options)
            local.backward(q, q, q, q, q, lse, *options)


def _sparse() -> None:
    """Causal, with long rows."""
    from ..kernels import sparse, sparse_backward

    ptr, entries = (torch.empty(n, dtype=torch.int32, device="meta") for n in ((8, 129), 9999))
    for d, dtype in SOFTMAX:
        q, lse = *_heads(8192, d, dtype=dtype), torch.empty(2, 8, 8192, device="meta")
        options = ptr, entries, ptr, entries, 64, True, 0.1
        sparse.forward(q, q, q, *options)
        sparse_backward.backward(q, q, q, q, q, lse, *options)


def _mla() -> None:
    """Calls the launchers of `mla` once for each way they go."""
    from ..kernels import mla, mla_backward, mla_decode

    both, half = (torch.float32, torch.bfloat16), (torch.bfloat16,)
    cases = [  # B, H, N, Dn, Dr, R, Dv, causal, types
        (512, 8, 64, 48, 16, 128, 64, False, both),  # bfloat16: one tile
        (1, 128, 256, 128, 64, 512, 128, True, half),  # DeepSeek-V3
        (1, 8, 256, 128, 64, 512, 128, True, (torch.float32,)),  # float32's widest
        (1, 8, 256, 256, 128, 512, 256, True, (torch.float16, torch.bfloat16)),  # and the halves'
    ]
    for b, h, n, dn, dr, r, dv, causal, dtypes in cases:
        for dtype in dtypes:
            shapes = (b, h, n, dn), (b, h, n, dr), (b, n, r), (b, n, dr), (h, dn, r), (h, dv, r)
            x = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
            mask = torch.empty(b, n, dtype=torch.bool, device="meta")
            o, lse, _ = mla.forward(*x, mask, 0.1, causal)
            mla_backward.backward(o, lse, *x, o, lse, mask, 0.1, causal)
    for h, r, dtypes in ((128, 512, both), (16, 64, half), (128, 576, both)):
        for dtype in dtypes:
            shapes = (1, h, 128), (1, h, 64), (1, 8192, r + 64), (1,), (h, 128, r), (h, 128, r)
            x = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
            x[3] = x[3].int()
            mla_decode.decode(*x, 0.1)


def _h2o() -> None:
    """Few slots and many."""
    from ..kernels import h2o

    for n, half, block in ((64, 16, 16), (8192, 224, 64)):
        mask = torch.empty(2, n, dtype=torch.bool, device="meta")
        for dtype in (torch.float32, torch.bfloat16):
            (q,) = _heads(n, 64, dtype=dtype)
            h2o.choose(q, q, mask, half, half, True, block, 0.1)


def _moe() -> None:
    """Both ways that weights lie; sums in one part and in several."""
    from ..kernels import moe

    counts = torch.empty(8, dtype=torch.int64, device="meta")
    for n, c, dtype in (
        (65536, 256, torch.float32),
        (65536, 256, torch.float16),
        (65536, 256, torch.bfloat16),
        (4096, 32, torch.bfloat16),
    ):
        x, w = (torch.empty(*s, c, dtype=dtype, device="meta") for s in ((n,), (8, c)))
        moe.grouped(x, w, counts)
        moe.grouped(x, w.mT, counts)
        moe.grouped_outer(x, x, counts)


LAUNCHERS: dict[str, Callable[[], None]] = {
    "batches": _batches,
    "h2o": _h2o,
    "linear": _linear,
    "performer": _performer,
    "local": _local,
    "sparse": _sparse,
    "mla": _mla,
    "moe": _moe,
}
