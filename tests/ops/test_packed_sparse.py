"""Packed batches of sparse attention: sequences of any lengths, each under a pattern of its own."""

import functools

import pytest
import torch
from backends import needs_cpp, reference_and_cpp
from packs import cu
from proof import assert_accurate, outputs_and_gradients
from softmax_cases import seen_lse
from tasks import threads
from textbook.softmax import blocks, draw, ruled
from torch.utils.flop_counter import FlopCounterMode

from tab import BlockPattern, sparse_attention
from tab.ops import OPS, sparse_packed

BACKENDS = reference_and_cpp("sparse_fwd")
LENGTHS = [5, 20, 20, 0, 33]
CU = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)


@functools.cache
def near(n):
    return BlockPattern.bigbird(n, heads=4, block_size=4, num_random=1)


@functools.cache
def mixed(n):
    """Blocks of several sizes, and patterns that heads share or have each its own."""
    if n % 2:
        return BlockPattern.sliding_window(n, window=2, sinks=1, block_size=3 + n % 3)
    return BlockPattern.bigbird(n, heads=4, block_size=5, num_random=2)


def one_by_one(x, keep=None, lengths=LENGTHS, pattern=near, **options):
    """The loop over sequences; q, k, v (1, H, T, D)."""
    lengths = list(lengths)
    outs, masks = [], [None] * len(lengths) if keep is None else keep.split(lengths, 1)
    for mask, *part in zip(masks, *(t.split(lengths, 2) for t in x), strict=True):
        if n := part[0].shape[2]:
            outs.append(sparse_attention(*part, pattern(n), key_mask=mask, **options))
    return tuple(torch.cat(t, 2) for t in zip(*outs, strict=True))


def drawn_mask(tokens):
    return torch.rand(1, tokens, generator=torch.Generator().manual_seed(3)) < 0.7


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_loop_over_sequences(causal, masked, backend):
    x = draw(1, 4, sum(LENGTHS), 8, 12, kv=2)
    keep = torch.arange(sum(LENGTHS))[None] % 5 != 0 if masked else None
    options = {"causal": causal, "backend": backend, "return_lse": True, "softcap": 3.0}
    options.update(alibi=torch.linspace(0.1, 0.5, 4), sinks=torch.linspace(-1, 1, 4))
    given, want = (
        outputs_and_gradients(f, x)
        for f in (
            lambda *x: sparse_attention(*x, near, cu_seqlens=CU, key_mask=keep, **options),
            lambda *x: one_by_one(x, keep, **options),
        )
    )
    for a, b in zip(given, want, strict=True):
        torch.testing.assert_close(a, b)
    assert given[0].transpose(1, 2).is_contiguous()


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_textbook(masked, dtype, backend):
    """One softmax over all tokens; each sees its own sequence, in blocks from its start."""
    tokens = sum(LENGTHS)
    seen = torch.zeros(4, tokens, tokens, dtype=torch.bool)
    for a, n in zip(CU.tolist(), LENGTHS, strict=False):
        if n:
            seen[:, a : a + n, a : a + n] = blocks(mixed(n), True)
    keep = drawn_mask(tokens) if masked else None
    options = {"key_mask": keep, "causal": True, "backend": backend, "return_lse": True}
    call = seen_lse(functools.partial(sparse_attention, pattern=mixed, cu_seqlens=CU, **options))
    x = [t.to(dtype) for t in draw(1, 4, tokens, 9, 7, kv=2)]
    assert_accurate(call, ruled(seen, key_mask=keep), x, names="o lse dq dk dv")


@needs_cpp("sparse_fwd")
@pytest.mark.parametrize("lengths", [LENGTHS, (300, 13), (13, 300), (33, 33, 34)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_the_bits_of_the_loop(lengths, count):
    """On any number of threads; few sequences are cut into segments, as they would be alone."""
    tokens = sum(lengths)
    x, keep = draw(1, 4, tokens, 8, 12, kv=2), drawn_mask(tokens)
    options = {"backend": "cpp", "softcap": 3.0, "alibi": torch.linspace(0.1, 0.5, 4)}
    packed = functools.partial(
        sparse_attention, pattern=mixed, cu_seqlens=cu(lengths), key_mask=keep, **options
    )

    def alone(*x):
        return one_by_one(x, keep, lengths, mixed, return_lse=True, **options)

    with threads(count):
        got = outputs_and_gradients(packed, x)
        want = outputs_and_gradients(lambda *x: alone(*x)[0], x)
        assert all(map(torch.equal, got, want))
        assert torch.equal(packed(*x, return_lse=True)[1], alone(*x)[1])


@needs_cpp("sparse_fwd")
def test_one_call_for_all_sequences(monkeypatch):
    monkeypatch.setattr(sparse_packed, "each_group", None)
    x = draw(1, 4, sum(LENGTHS), 8)
    f = functools.partial(sparse_attention, pattern=mixed, cu_seqlens=CU, return_lse=True)
    assert len(outputs_and_gradients(f, x)) == 5


def given(x, pattern=mixed, lengths=LENGTHS):
    """The arguments of the packed op before its options."""
    row_ptr, col, col_ptr, row, plan = sparse_packed.joined(pattern, list(lengths), x[0])
    return *x, row_ptr, col, col_ptr, row, None, None, plan


def test_the_operators():
    """What PyTorch asks of one, and shapes without memory."""
    x = given(draw(1, 4, sum(LENGTHS), 8, 12, kv=2))
    options = CU, True, 0.4, 2.0
    o, lse = OPS["sparse_packed_fwd"].overload(*x, *options)
    torch.library.opcheck(OPS["sparse_packed_fwd"].overload, (*x, *options))
    tests = "test_schema", "test_faketensor"
    backward = *x, o, lse, o, None, *options
    torch.library.opcheck(OPS["sparse_packed_bwd"].overload, backward, test_utils=tests)


def test_flops_are_those_of_the_sequences():
    def count(f):
        mapping = {getattr(torch.ops.tab, key): op.flops for key, op in OPS.items()}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            outputs_and_gradients(f, x)
        return counter.get_total_flops()

    x = draw(1, 4, sum(LENGTHS), 8)
    many = count(lambda *x: one_by_one(x, pattern=mixed, return_lse=True)[0])
    assert count(functools.partial(sparse_attention, pattern=mixed, cu_seqlens=CU)) == many > 0


@needs_cpp("sparse_fwd")
def test_plans_that_point_out_of_the_tensors():
    """Who calls the op itself reads no foreign memory."""
    *x, plan = given(draw(1, 4, sum(LENGTHS), 8))
    options = CU, False, 0.4, 0.0
    run = OPS["sparse_packed_fwd"].overload
    for column, value in ((0, 0), (0, 1), (1, 3), (2, -1), (2, 99), (3, -1), (3, 999), (4, 999)):
        wrong = plan.clone()
        wrong[-1, column] = value
        with pytest.raises(RuntimeError, match="plan, row_ptr and col point outside"):
            run(*x, wrong, *options)
    for at, number in ((3, 99), (3, -1), (4, 99), (4, -1)):  # row_ptr, col
        wrong = [t.clone() if i == at else t for i, t in enumerate(x)]
        wrong[at][-2] = number
        with pytest.raises(RuntimeError, match="plan, row_ptr and col point outside"):
            run(*wrong, plan, *options)
    with pytest.raises(RuntimeError, match="plan has the wrong shape"):
        run(*x, plan[1:], *options)
    with pytest.raises(RuntimeError, match="cu_seqlens does not fit the tokens"):
        run(*x, plan, CU + 1, *options[1:])


def test_no_token_reaches_another_sequence():
    x = draw(1, 4, sum(LENGTHS), 8)
    f = functools.partial(sparse_attention, pattern=near, cu_seqlens=CU)
    clean = f(*x)
    for t in x:
        t[:, :, 5:25] = torch.nan
    inside = (torch.arange(sum(LENGTHS)) >= 5) & (torch.arange(sum(LENGTHS)) < 25)
    o = f(*x)
    torch.testing.assert_close(o[:, :, ~inside], clean[:, :, ~inside])
    assert o[:, :, inside].isnan().all()


def test_nested_and_the_other_layout():
    parts = [torch.randn(n, 4, 8) for n in LENGTHS if n]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged).requires_grad_()
    o = sparse_attention(x, x, x, near, layout="bnhd")
    for part, given in zip(parts, o.unbind(), strict=True):
        want = sparse_attention(*[part[None]] * 3, near(len(part)), layout="bnhd")[0]
        torch.testing.assert_close(given, want)
    o.values().sum().backward()
    assert x.grad.is_nested


def test_derivatives_of_any_order():
    ends = torch.tensor([0, 3, 7])
    x = [t.requires_grad_() for t in draw(1, 2, 7, 2, dtype=torch.float64)]
    make = functools.partial(BlockPattern.sliding_window, window=1, sinks=1, block_size=2)
    f = functools.partial(sparse_attention, pattern=make, cu_seqlens=ends, return_lse=True)
    assert torch.autograd.gradcheck(f, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, x, fast_mode=True)


def test_compiled_meta_and_nothing():
    x = draw(1, 4, sum(LENGTHS), 8)
    f = functools.partial(sparse_attention, pattern=near, causal=True)
    compiled = torch.compile(lambda *x: f(*x, cu_seqlens=CU).sin(), backend="aot_eager")
    torch.testing.assert_close(compiled(*x), f(*x, cu_seqlens=CU).sin())
    assert f(*(t.to("meta") for t in x), cu_seqlens=CU.to("meta")).shape == x[0].shape
    for ends in ([0], [0, 0, 0]):
        assert f(*draw(1, 4, 0, 8), cu_seqlens=torch.tensor(ends)).shape == (1, 4, 0, 8)


def test_errors():
    x = draw(1, 4, sum(LENGTHS), 8)
    for pattern, message in (
        (near(sum(LENGTHS)), r"a function of a sequence's length .* got BlockPattern\(n=78"),
        (lambda n: near(n + 1), r"of pattern\(5\) a BlockPattern for 5 queries .* got .*\(n=6"),
        (lambda n: None, r"of pattern\(5\) .* got None"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_attention(*x, pattern, cu_seqlens=CU)
    with pytest.raises(ValueError, match="wants a BlockPattern, got _lru_cache_wrapper"):
        sparse_attention(*x, near)
    with pytest.raises(ValueError, match="it ends at 45"):
        sparse_attention(*x, near, cu_seqlens=CU[:-1])
