"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

Every op that has a C++ kernel runs forward and backward, over sizes that leave ragged tails, four
memory layouts, each dtype and each instruction set of this machine, and must agree with its
reference in float64: each pair of these, and of these with an op's options, occurs, not all four at
once. An op whose kernel has no case here is an error. The process ends at the first
bad access; libasan and libubsan must be preloaded, because Python itself is not built with them.

Not collected by pytest; it runs alone:  python tests/support/sanitized.py [OP ...]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from proof import LAYOUTS, layout, outputs_and_gradients, poisoned
from torch import Tensor

import tab
from tab.data import host
from tab.data.host import assemble_host
from tab.ops import OPS
from tab.ops.batches import assemble

ISAS = ("baseline", "avx2", "avx512")
# B, H, N, D, Dv: one token, tails on every side, segments of one sequence, rows in registers,
# widths beyond a tile
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 63, 5, 3),
    (1, 1, 65, 16, 24),
    (1, 3, 130, 33, 40),
    (1, 1, 700, 8, 17),
    (1, 2, 131, 64, 64),
    (1, 2, 70, 256, 129),
]
# dtype -> error allowed, relative to the largest value
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-9}


def linear(b, h, n, d, dv, randn, flip):
    keys = n // 2 + 1 if flip % 3 == 2 and flip % 4 in (0, 1) else n  # cross-attention
    kv = 1 if flip % 2 else h

    def f(backend, q, k, v, s0, z0):
        o, (s, z) = tab.linear_attention(
            q, k, v, feature_map=("elu1", "relu")[flip % 2], causal=flip % 3 == 0, eps=0.5,
            key_mask=key_mask(b, keys) if flip % 4 == 1 else None, initial_state=(s0, z0),
            return_state=True, backend=backend,
        )  # fmt: skip
        return o, s, z

    q, *_ = heads(b, h, n, d, dv, randn)
    _, k, v = heads(b, kv, keys, d, dv, randn)
    return f, (q, k, v), (randn(b, kv, d, dv), randn(b, kv, d).abs())


def gated_linear(b, h, n, d, dv, randn, flip):
    kv = 1 if flip % 2 else h

    def f(backend, q, k, v, g, s0):
        # Of a head, the gradient adds up how far bfloat16 rounds the cotangents of all tokens.
        g = g.detach() if g.dim() == 1 else g
        return tab.gated_linear_attention(
            q, k, v, -g.abs(), key_mask=key_mask(b, n) if flip % 4 == 1 else None,
            initial_state=s0, return_state=True, backend=backend,
        )  # fmt: skip

    decay = randn(kv) if flip % 3 == 0 else randn(b, kv, n)
    return f, heads(b, h, n, d, dv, randn, kv), (decay, randn(b, kv, d, dv))


def performer(b, h, n, d, dv, randn, flip):
    m = (1, 24, 67)[flip % 3]
    w = tab.orthogonal_projection(m, d, generator=torch.Generator().manual_seed(0))

    def f(backend, q, k, v, s0, z0, c0):
        acc = torch.promote_types(q.dtype, torch.float32)
        return tab.performer_attention(
            q, k, v, w.to(acc), kernel=("softmax", "relu")[flip % 4 == 3], causal=flip % 2 == 0,
            key_mask=key_mask(b, n) if flip % 4 == 1 else None, eps=0.5, backend=backend,
            initial_state=(s0, z0, c0.detach()), return_state=True,
        )[0]  # fmt: skip

    kv = 1 if flip % 3 == 0 else h
    state = randn(b, kv, m, dv), randn(b, kv, m).abs(), randn(b, kv, m)
    return f, heads(b, h, n, d, dv, randn, kv), state


def local(b, h, n, d, dv, randn, flip):
    window = [(0, 0), (3, 1), (16, 40), (n, n)][flip % 4]
    rows = next(r for r in (7, 5, 3, 2, 1) if n % r == 0)
    grid = (rows, n // rows) if flip % 3 == 1 else None
    ends = None
    if flip % 3 == 2:  # packed
        b, n = 1, b * n
        ends = torch.tensor([0, n // 3, n // 3, n // 3 + n // 2, n])

    def f(backend, q, k, v):
        return tab.local_attention(
            q, k, v, window=window, causal=flip % 2 == 1, grid=grid, cu_seqlens=ends,
            return_lse=ends is not None, backend=backend,
        )  # fmt: skip

    return f, heads(b, h, n, d, dv, randn, 1 if flip % 2 else h), ()


def sparse(b, h, n, d, dv, randn, flip):
    size = (1, 7, 16, 64)[flip % 4] if n < 200 else 64
    if flip % 5 == 4:  # packed
        return packed_sparse(size, h, b * n, d, dv, randn, flip)
    if flip % 3:
        pattern = tab.BlockPattern.bigbird(n, heads=h, block_size=size, num_random=1)
    else:  # rows that see nothing
        blocks = -(-n // size)
        generator = torch.Generator().manual_seed(flip)
        mask = torch.rand(blocks, blocks, generator=generator) < 0.3
        pattern = tab.BlockPattern.from_blocks(mask, size, n)

    def f(backend, q, k, v):
        return tab.sparse_attention(q, k, v, pattern, causal=flip % 2 == 1, backend=backend)

    return f, heads(b, h, n, d, dv, randn), ()


def packed_sparse(size, h, n, d, dv, randn, flip):
    ends = torch.tensor([0, n // 3, n // 3, n // 3 + n // 2, n])

    def pattern(tokens):
        if tokens % 2:
            return tab.BlockPattern.sliding_window(tokens, window=2, sinks=1, block_size=size)
        return tab.BlockPattern.bigbird(tokens, heads=h, block_size=size + 1, num_random=1)

    def f(backend, q, k, v):
        return tab.sparse_attention(
            q, k, v, pattern, causal=flip % 2 == 1, cu_seqlens=ends, return_lse=True,
            backend=backend,
        )  # fmt: skip

    return f, heads(1, h, n, d, dv, randn, 1 if flip % 2 else h), ()


def mla(b, h, n, d, dv, randn, flip, **rules):
    rank, rope = (1, 24, 65)[flip % 3], (0, 4, 8)[flip % 3]

    def f(backend, *x):
        return tab.mla_attention(
            *x, causal=flip % 2 == 1, key_mask=key_mask(b, n) if flip % 4 == 1 else None,
            form="fused", return_lse=True, backend=backend, **rules,
        )  # fmt: skip

    return f, (randn(b, h, n, d), randn(b, h, n, rope)), latents(b, h, n, d, dv, rank, rope, randn)


def bent_mla(b, h, n, d, dv, randn, flip):
    slopes = torch.linspace(0.1, 0.5, h)
    rules = [{"softcap": 2.0}, {"alibi": slopes}, {"softcap": 2.0, "alibi": slopes}]
    return mla(b, h, n, d, dv, randn, flip, **rules[flip % 3])


def mla_decode(b, h, n, d, dv, randn, flip):
    rank, rope = (1, 24, 65)[flip % 3], (0, 4, 8)[flip % 3]
    lengths = torch.arange(b) * 40 % (n + 1) + (flip % 2)
    c, k_rope, w_uk, w_uv = latents(b, h, n, d, dv, rank, rope, randn)

    def f(backend, q, q_rope, c, k_rope, w_uk, w_uv):
        cache = torch.cat([c, k_rope], -1)
        return tab.mla_decode(
            q[:, :, -1], q_rope[:, :, -1], cache, lengths, w_uk, w_uv, backend=backend
        )[0]

    return f, (randn(b, h, n, d), randn(b, h, n, rope)), (c, k_rope, w_uk, w_uv)


def mla_decode_paged(b, h, n, d, dv, randn, flip):
    """The rows of each sequence in pages, which lie in any order."""
    rank, rope, size = (1, 24, 65)[flip % 3], (0, 4, 8)[flip % 3], (1, 7, 64, 100)[flip % 4]
    lengths = torch.arange(b) * 40 % (n + 1) + (flip % 2)
    c, k_rope, w_uk, w_uv = latents(b, h, n, d, dv, rank, rope, randn)
    pages = -(-n // size)
    table = torch.randperm(b * pages, generator=torch.Generator().manual_seed(flip)).view(b, -1)

    def f(backend, q, q_rope, c, k_rope, w_uk, w_uv):
        rows = torch.nn.functional.pad(torch.cat([c, k_rope], -1), (0, 0, 0, pages * size - n))
        pool = rows.reshape(b * pages, size, -1)[table.flatten().argsort()]
        return tab.mla_decode(
            q[:, :, -1], q_rope[:, :, -1], pool, lengths.clamp(max=n), w_uk, w_uv,
            page_table=table, backend=backend,
        )[0]  # fmt: skip

    return f, (randn(b, h, n, d), randn(b, h, n, rope)), (c, k_rope, w_uk, w_uv)


# What runs an op; x_fwd and x_bwd are run by x.
FUNCTIONS = (
    linear, gated_linear, performer, local, sparse, mla, bent_mla, mla_decode, mla_decode_paged,
)  # fmt: skip
CASES = {f.__name__: f for f in FUNCTIONS}
NO_GRADIENT = {"mla_decode", "mla_decode_paged"}
OWN_TYPE = {"linear", "gated_linear", "performer"}  # of their states


def heads(b, h, n, d, dv, randn, kv: int | None = None) -> tuple[Tensor, ...]:
    kv = h if kv is None else kv
    return randn(b, h, n, d), randn(b, kv, n, d), randn(b, kv, n, dv)


def latents(b, h, n, d, dv, rank, rope, randn) -> tuple[Tensor, ...]:
    c, k_rope = randn(b, n, rank), randn(b, n, rope)
    return c, k_rope, randn(h, d, rank) * rank**-0.5, randn(h, dv, rank) * rank**-0.5


def key_mask(b: int, n: int) -> Tensor:
    keep = torch.rand(b, n, generator=torch.Generator().manual_seed(n)) > 0.3
    keep[:, 0] = True
    return keep


def furthest(x: Tensor, truth: Tensor) -> float:
    return (x.double() - truth).abs().max().item() if truth.numel() else 0.0


def cases() -> Iterator[tuple[tuple[int, ...], torch.dtype, str, int]]:
    """(shape, dtype, layout, flip), flip in 0…11 choosing among the options. Any two of shape,
    dtype, layout, flip % 3 and flip % 4 meet."""
    for s, shape in enumerate(SHAPES):
        for t, dtype in enumerate(TOLERANCE):
            quarter, third = s % 4 ^ (0, 2, 3, 1)[t], (s // 2 + (0, 1, 2, 1)[t]) % 3
            yield shape, dtype, LAYOUTS[s % 4 ^ t], (9 * quarter + 4 * third) % 12


def check(name: str, shape: tuple[int, ...], dtype: torch.dtype, how: str, flip: int) -> None:
    """One call of `name` against its reference, inputs laid out as `how`; flip chooses options."""
    generator = torch.Generator().manual_seed(flip)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    f, moved, fixed = CASES[name](*shape, randn, flip)
    acc = torch.promote_types(dtype, torch.float32)
    states = acc if name in OWN_TYPE else dtype
    inputs = [layout(x.to(dtype), how) for x in moved]
    inputs += [x.to(states) for x in fixed]
    run = plain if name in NO_GRADIENT else outputs_and_gradients
    truth = run(lambda *x: f("reference", *x), [x.double() for x in inputs])
    with poisoned():
        given = run(lambda *x: f("cpp", *x), inputs)
    scale = max(1.0, *(t.abs().max().item() for t in truth if t.numel()))
    for i, (x, t) in enumerate(zip(given, truth, strict=True)):
        error, allowed = furthest(x, t), TOLERANCE[dtype] * scale
        if not error <= allowed and dtype.itemsize == 2:
            # Half precision alone can be that far off: then the reference is, too.
            reference = run(lambda *x: f("reference", *x), inputs)[i]
            allowed = max(allowed, 1.05 * furthest(reference, t))
        if not error <= allowed:
            case = f"{name} {shape} {dtype} {how} case {flip}"
            raise SystemExit(f"{case}: result {i} off by {error:.2g}")


def plain(f, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [f(*inputs)]


def check_batches() -> None:
    """tab._host: moved and mirrored images, against the torch version."""
    for width, height in ((1, 1), (5, 3), (32, 32)):
        generator = torch.Generator().manual_seed(width)
        images = torch.randint(0, 256, (9, height, width, 3), generator=generator).byte()
        index = torch.randint(0, 9, (17,), generator=generator)
        translate = min(width, height) - 1
        moves = host.moves(1, 2, index, translate, True)
        mean, scale = torch.rand(3, generator=generator) * 255, torch.full((3,), 0.02)
        given = images, index, moves, mean, scale
        if not torch.equal(assemble_host(*given, 3), assemble("reference", *given)):
            raise SystemExit(f"assemble: images of {height}×{width} differ")


def kernels() -> list[str]:
    """The ops that have a C++ kernel of their own, x for x_fwd and x_bwd."""
    built = [name for name, op in OPS.items() if op.own and op.why_not("cpp") is None]
    return sorted({name.removesuffix("_fwd").removesuffix("_bwd") for name in built})


def run_isa(names: list[str]) -> None:
    start, count = time.perf_counter(), 0
    check_batches()
    for name in names:
        before = time.perf_counter()
        for case in cases():
            check(name, *case)
            count += 1
        seconds = time.perf_counter() - before
        print(f"  {os.environ['TAB_ISA']} {name}: {seconds:.1f} s", flush=True)
    print(f"{os.environ['TAB_ISA']}: {count} cases right, {time.perf_counter() - start:.0f} s")


def main() -> None:
    here = Path(tab.__file__).resolve().parent
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        raise SystemExit(f"libasan is not preloaded; run `make sanitize` (this tab is in {here})")
    plain = [path.name for path in here.glob("_[Ch]*.so") if b"__asan_" not in path.read_bytes()]
    if plain:
        raise SystemExit(f"{', '.join(plain)} in {here} are built without AddressSanitizer")
    built = set(kernels())
    if uncovered := built - set(CASES):
        raise SystemExit(
            f"C++ kernels without a case in tests/support/sanitized.py: {sorted(uncovered)}"
        )
    names = [name for name in CASES if name in built and name in (sys.argv[1:] or CASES)]
    if not names:
        raise SystemExit(f"no C++ kernel of {sys.argv[1:] or 'any op'} was built into {here}")
    if "TAB_ISA" in os.environ:
        return run_isa(names)
    print(f"{here}: {', '.join(names)}; no C++ kernel: {', '.join(set(CASES) - built) or 'none'}")
    capability = torch.backends.cpu.get_cpu_capability()
    isas = [isa for isa in ISAS if isa != "avx512" or capability == "AVX512"]
    if len(isas) < len(ISAS):
        print(f"avx512: not run, this machine has {capability}", flush=True)
    command = [sys.executable, *sys.argv]
    running = [subprocess.Popen(command, env={**os.environ, "TAB_ISA": isa}) for isa in isas]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"exit codes of {', '.join(isas)}: {codes}")


if __name__ == "__main__":
    main()
