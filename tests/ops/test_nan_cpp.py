"""NaN and ∞ in the C++ kernels: seen by whoever sees the token that holds them, and by nobody else.

Who sees whom is a matrix, so the rows that must turn NaN, forward and backward, follow from it.
"""

import math

import pytest
import torch
from backends import needs_cpp

import tab

# The arithmetic of one and the same binary, whatever torch loads it.
pytestmark = [needs_cpp("linear_fwd"), pytest.mark.any_torch]
B, H, D = 2, 2, 8
PATTERN = {
    n: tab.BlockPattern.bigbird(n, heads=H, block_size=4, window=1, num_global=0, num_random=0)
    for n in (20, 130)
}
LINEAR, PERFORMER, LOCAL = tab.linear_attention, tab.performer_attention, tab.local_attention
GRID = {20: (4, 5), 130: (13, 10)}
OPS = {
    "linear": lambda q, k, v, **o: LINEAR(q, k, v, **o),
    "linear relu": lambda q, k, v, **o: LINEAR(q, k, v, feature_map="relu", **o),
    "linear identity": lambda q, k, v, **o: LINEAR(q, k, v, feature_map="identity", **o),
    "performer": lambda q, k, v, **o: PERFORMER(q, k, v, projection(q), **o),
    "performer relu": lambda q, k, v, **o: PERFORMER(q, k, v, projection(q), kernel="relu", **o),
}
SUMS = [(name, causal) for name in OPS for causal in (False, True)]
WINDOWS = {
    "all": lambda n: ({"window": n}, torch.ones(n, n, dtype=torch.bool)),
    "line": lambda n: ({"window": (2, 1)}, band(n, 2, 1)),
    "causal": lambda n: ({"window": 2, "causal": True}, band(n, 2, 0)),
    "grid": lambda n: ({"window": 1, "grid": GRID[n]}, grid(*GRID[n])),
}


def projection(q):
    dtype, seed = torch.promote_types(q.dtype, torch.float32), torch.Generator().manual_seed(0)
    return tab.orthogonal_projection(16, q.shape[-1], generator=seed, dtype=dtype)


def band(n, left, right):
    apart = torch.arange(n) - torch.arange(n)[:, None]
    return (apart >= -left) & (apart <= right)


def grid(rows, cols):
    cell = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
    return ((cell - cell[:, None]).abs() <= 1).all(-1)


def operands(n, generator, d=D, dtype=torch.float32):
    return [torch.randn(B, H, n, d, generator=generator).to(dtype) for _ in range(3)]


def broken_rows(f, xs, which, at, value):
    """Rows of o, dq, dk, dv of head (0, 0) that are not finite with `value` in one number."""
    xs = [x.clone() for x in xs]
    xs[which][0, 0, at, 2] = value
    leaves = [x.requires_grad_() for x in xs]
    o = f(*leaves)
    cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.dtype)
    found = [o, *torch.autograd.grad(o, leaves, cotangent)]
    assert all(x[1].isfinite().all() and x[0, 1].isfinite().all() for x in found)  # other heads
    return [~x[0, 0].isfinite().all(-1) for x in found]


def expected_rows(seen, which, at):
    """The same out of seen (N, N), whether query i sees key j."""
    row = torch.zeros(len(seen), dtype=torch.bool)
    row[at] = True
    queries = row if which == 0 else seen[:, at]  # whose outputs, and dq, are NaN
    keys = seen[queries].any(0)  # what they read: dk, and dv unless only v held it
    return [queries, queries, keys, keys if which < 2 else torch.zeros_like(row)]


@pytest.mark.each_isa
@pytest.mark.parametrize("n", (20, 130))
@pytest.mark.parametrize(("name", "causal"), SUMS)
def test_nan_is_seen_by_those_who_see_the_token(name, causal, n, generator):
    xs = operands(n, generator)
    seen = torch.ones(n, n, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    for which in range(3):
        for at in (5, n - 3):
            given = broken_rows(
                lambda *x: OPS[name](*x, causal=causal, backend="cpp"), xs, which, at, math.nan
            )
            for a, b in zip(given, expected_rows(seen, which, at), strict=True):
                assert torch.equal(a, b), (which, at)


@pytest.mark.each_isa
@pytest.mark.parametrize("n", (20, 130))
@pytest.mark.parametrize("kind", (*WINDOWS, "sparse"))
def test_nan_stays_in_its_window(kind, n, generator):
    """A tile of the product holds tokens outside the window too, at weight 0: 0·NaN is NaN."""
    xs = operands(n, generator)
    if kind == "sparse":
        seen = PATTERN[n].to_dense()[0][:n, :n]
        call = lambda *x: tab.sparse_attention(*x, PATTERN[n], backend="cpp")  # noqa: E731
    else:
        options, seen = WINDOWS[kind](n)
        call = lambda *x: LOCAL(*x, **options, backend="cpp")  # noqa: E731
    for which in range(3):
        for at in (5, n - 3):
            given = broken_rows(call, xs, which, at, math.nan)
            for a, b in zip(given, expected_rows(seen, which, at), strict=True):
                assert torch.equal(a, b), (which, at)
    outside = broken_rows(call, xs, 2, 5, math.inf)[0]  # 0·∞ is NaN too
    assert torch.equal(outside, seen[:, 5])


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_nan_of_any_bits(dtype, generator):
    """Memory filled with ones is NaN too; an exponential made of shifted bits could lose that."""
    n = 70
    xs = operands(n, generator, 64, dtype)
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    nan = torch.tensor([-1], dtype=whole).view(dtype)
    for f in (*OPS.values(), lambda q, k, v, **o: LOCAL(q, k, v, window=n, **o)):
        for which in range(3):
            changed = [x.clone() for x in xs]
            changed[which][0, 0, 5, 2:3] = nan
            o = f(*changed, backend="cpp")[0, 0].isnan().all(-1 if which < 2 else 0)
            assert o.nonzero().flatten().tolist() == (
                [5] if which == 0 else list(range(n)) if which == 1 else [2]
            )


def masked(n):
    mask = torch.ones(B, n, dtype=torch.bool)
    mask[0, n * 2 // 3 :] = False
    mask[0, 1] = False
    return mask


def real_results(f, xs, mask):
    """Outputs and gradients of the real tokens under a loss that reads only them."""
    leaves = [x.clone().requires_grad_() for x in xs]
    o = f(*leaves)
    cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.dtype)
    keep = mask[:, None, :, None]
    loss = (o.masked_fill(~keep, 0) * cotangent).sum()
    found = [o, *torch.autograd.grad(loss, leaves)]
    each = mask if found[0].dim() == 3 else mask[:, None].expand(B, H, -1)
    return [x[each if x.dim() == 4 else mask] for x in found]


@pytest.mark.parametrize("size", ((20, 8), (150, 64)))
@pytest.mark.parametrize("value", (math.nan, math.inf, 1e30))
@pytest.mark.parametrize(("name", "causal"), SUMS)
def test_masked_tokens_reach_nobody(name, causal, value, size, generator):
    n, d = size
    xs, mask = operands(n, generator, d), masked(n)
    call = lambda *x: OPS[name](*x, causal=causal, key_mask=mask, backend="cpp")  # noqa: E731
    clean = real_results(call, xs, mask)
    assert all(x.isfinite().all() for x in clean)
    for where in ("k", "v", "kv", "q"):
        dirty = [
            x.masked_fill(~mask[:, None, :, None], value) if letter in where else x
            for letter, x in zip("qkv", xs, strict=True)
        ]
        for a, b in zip(real_results(call, dirty, mask), clean, strict=True):
            assert torch.equal(a, b), where


def latents(n, generator):
    shapes = (B, H, n, D), (B, H, n, 2), (B, n, 6), (B, n, 2), (H, D, 6), (H, 5, 6)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.each_isa
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("n", (20, 130))
def test_mla(n, causal, generator):
    q, qr, c, kr, *w = latents(n, generator)
    mask = masked(n)

    def call(q, c, kr, mask=None):
        return tab.mla_attention(
            q, qr, c, kr, *w, key_mask=mask, causal=causal, form="fused", return_max_logits=True,
            backend="cpp",
        )  # fmt: skip

    clean = real_results(lambda *x: call(*x, mask)[0], (q, c, kr), mask)
    peak = call(q, c, kr, mask)[1]
    for value in (math.nan, math.inf, 1e30):
        for where in (1,), (2,), (1, 2), (0,):
            dirty = [
                x.masked_fill(~(mask[:, None, :, None] if x.dim() == 4 else mask[..., None]), value)
                if i in where
                else x
                for i, x in enumerate((q, c, kr))
            ]
            given = real_results(lambda *x: call(*x, mask)[0], dirty, mask)
            assert all(torch.equal(a, b) for a, b in zip(given, clean, strict=True)), (value, where)
            assert torch.equal(call(*dirty, mask)[1], peak)

    seen = torch.ones(n, n, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    broken = q.clone()
    broken[0, 0, 5, 2] = math.nan
    o, peak = call(broken, c, kr)
    assert o[0, 0].isnan().any(-1).nonzero().tolist() == [[5]]
    assert peak.isnan().tolist() == [[True, False], [False, False]]  # max_logits sees it
    broken = c.clone().requires_grad_()
    with torch.no_grad():
        broken[0, 5, 2] = math.nan
    leaf = q.clone().requires_grad_()
    o, peak = call(leaf, broken, kr)
    (dq,) = torch.autograd.grad(o.sum(), leaf)
    assert torch.equal(o[0, 0].isnan().any(-1), seen[:, 5])
    assert torch.equal(dq[0, 0].isnan().any(-1), seen[:, 5])
    assert peak.isnan().tolist() == [[True, True], [False, False]]
