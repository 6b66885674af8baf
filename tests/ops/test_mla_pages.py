"""`mla_decode` over pages: what it gives over the same rows in one piece."""

import pytest
import torch
from backends import needs_cpp, reference_and_cpp
from textbook.mla import operands
from torch.testing import assert_close

from tab.functional import mla_decode
from tab.ops.mla_decode import mla_decode_paged

SIZE = B, H, N, DN, DR, R, DV = 3, 4, 150, 8, 4, 10, 6


def paged(cache, size, generator, junk=torch.nan):
    """The rows of cache (B, N, W) strewn over a pool, between pages of junk, and their table."""
    b, n, width = cache.shape
    most = -(-n // size)
    pool = torch.full((2 * b * most + 1, size, width), junk, dtype=cache.dtype)
    table = torch.randperm(len(pool), generator=generator)[: b * most].view(b, most)
    rows = torch.nn.functional.pad(cache, (0, 0, 0, most * size - n), value=junk)
    pool[table] = rows.unflatten(1, (most, size))
    return pool, table


def inputs(generator, dtype=torch.float64):
    qn, qr, c, kr, uk, uv = operands(SIZE, generator, dtype)
    return qn[:, :, 0], qr[:, :, 0], torch.cat([c, kr], -1), uk, uv


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("backend", reference_and_cpp("mla_decode_paged"))
@pytest.mark.parametrize("size", (1, 7, 64, 100, 256))
def test_pages_are_the_rows(size, backend, dtype, generator):
    qn, qr, cache, uk, uv = inputs(generator, dtype)
    more = N if N % size else 2 * N  # counts as all that the table has
    for lengths in ([N, 1, 64], [0, 65, more]):
        seqlens = torch.tensor(lengths, dtype=torch.int32)
        pool, table = paged(cache, size, generator)
        given = mla_decode(qn, qr, pool, seqlens, uk, uv, page_table=table, backend=backend)
        wanted = mla_decode(qn, qr, cache, seqlens, uk, uv, backend="reference")
        tolerance = 4 * torch.finfo(dtype).eps
        for a, b in zip(given, wanted, strict=True):
            assert_close(a, b, rtol=tolerance, atol=tolerance)


@needs_cpp("mla_decode_paged")
def test_bits_are_those_of_one_piece(generator):
    """Where tiles are whole pages; the table in either type of integers, and not contiguous."""
    qn, qr, cache, uk, uv = inputs(generator, torch.float32)
    seqlens = torch.tensor([N, 1, 64])
    pool, table = paged(cache, 64, generator)
    wanted = mla_decode(qn, qr, cache, seqlens, uk, uv, backend="cpp")
    for t in (table, table.int(), table.int().t().contiguous().t()):
        given = mla_decode(qn, qr, pool, seqlens, uk, uv, page_table=t, backend="cpp")
        assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


@pytest.mark.parametrize("backend", reference_and_cpp("mla_decode_paged"))
def test_gradients(backend, generator):
    """Those of every row that is in use; none of junk."""
    qn, qr, cache, uk, uv = inputs(generator)
    pool, table = paged(cache, 7, generator, junk=0.0)
    seqlens = torch.tensor([N, 1, 64])
    x = [t.requires_grad_() for t in (qn, qr, pool, uk, uv)]
    o, lse = mla_decode(*x[:3], seqlens, *x[3:], page_table=table, backend=backend)
    grads = torch.autograd.grad(o.sin().sum() + lse.sum(), x)
    rows = pool[table].flatten(1, 2)[:, :N].detach().requires_grad_()
    y = [x[0], x[1], rows, x[3], x[4]]
    o, lse = mla_decode(*y[:3], seqlens, *y[3:], backend="reference")
    wanted = torch.autograd.grad(o.sin().sum() + lse.sum(), y)
    for i, (a, b) in enumerate(zip(grads, wanted, strict=True)):
        assert_close(a[table].flatten(1, 2)[:, :N] if i == 2 else a, b)


def test_compiled_meta_and_schema(generator):
    qn, qr, cache, uk, uv = inputs(generator)
    pool, table = paged(cache, 64, generator)
    seqlens = torch.tensor([N, 1, 64])

    def f(*x):
        return mla_decode(*x[:3], seqlens, *x[3:], page_table=table)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, b in zip(compiled(qn, qr, pool, uk, uv), f(qn, qr, pool, uk, uv), strict=True):
            assert_close(a, b)
    args = (qn, qr, pool, table, seqlens, uk, uv, 0.4)
    torch.library.opcheck(
        mla_decode_paged.overload, args, test_utils=("test_schema", "test_faketensor")
    )
    meta = mla_decode(
        *(t.to("meta") for t in (qn, qr, pool, seqlens, uk, uv)), page_table=table.to("meta")
    )
    assert [t.shape for t in meta] == [(B, H, DV), (B, H)]


def test_bad_pages(generator):
    qn, qr, cache, uk, uv = inputs(generator)
    pool, table = paged(cache, 64, generator)
    seqlens = torch.tensor([N, 1, 64])

    def f(pool=pool, table=table):
        return mla_decode(qn, qr, pool, seqlens, uk, uv, page_table=table)

    gone = table.clone()
    gone[1, 1:] = -1  # behind the end: anything
    assert_close(f(table=gone), f())
    gone[0, 2] = len(pool)
    for bad, words in (
        (lambda: f(table=gone), rf"found page_table\[0, 2\] = {len(pool)}"),
        (lambda: f(table=table.float()), r"page_table \(B, M\) int32 or int64; got .*float32"),
        (lambda: f(table=table[0]), r"\(B, M\)"),
        (lambda: f(table=table[:2]), "of the same sequences"),
        (lambda: f(pool=pool[:0]), "at least one page"),
        (lambda: f(pool=pool[..., 1:]), r"cache rows of R \+ Dr = 10 \+ 4"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()


@needs_cpp("mla_decode_paged")
def test_the_kernel_reads_no_page_that_is_not_there(generator):
    qn, qr, cache, uk, uv = inputs(generator)
    pool, table = paged(cache, 64, generator)
    for page in (-1, len(pool)):
        table[2, 0] = page
        with pytest.raises(RuntimeError, match=rf"page_table\[2, 0\] is {page}, and the cache has"):
            mla_decode_paged.overload(qn, qr, pool, table, torch.tensor([N, 1, 64]), uk, uv, 0.4)
