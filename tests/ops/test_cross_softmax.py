"""More or fewer keys than queries in local and sparse attention: the last of both stand at one
place."""

from functools import partial

import pytest
import torch
from backends import needs_cpp, reference_and_cpp
from proof import LAYOUTS, assert_accurate, layout, outputs_and_gradients, poisoned
from softmax_cases import seen_lse
from tasks import threads
from textbook.softmax import blocks, draw, in_window, ruled

from tab import BlockPattern, SparseCache, local_attention, sparse_attention
from tab.ops import OPS
from tab.ops.local import local_bwd, local_fwd

BACKENDS = reference_and_cpp("local_fwd")
NAMES = "o lse dq dk dv"
LENGTHS = [(1, 70), (70, 1), (40, 131), (131, 40), (64, 65)]
SLOPES = torch.tensor([0.3, 0.02])


def drawn(n, m, size=4, heads=2):
    """A pattern for each head, or for all; some rows see nothing."""
    g = torch.Generator().manual_seed(n)
    mask = torch.rand(max(heads, 1), -(-n // size), -(-m // size), generator=g) < 0.5
    return BlockPattern.from_blocks(mask if heads else mask[0], size, n, n_keys=m)


def case(name, n, m, causal=False, **options):
    """-> the call, o and L, and who sees whom."""
    options.update(causal=causal, return_lse=True)
    if name == "local":
        call = partial(local_attention, window=(9, 4), **options)
        return seen_lse(call), in_window(n, 9, 4, causal, keys=m)
    pattern = drawn(n, m)
    return seen_lse(partial(sparse_attention, pattern=pattern, **options)), blocks(pattern, causal)


@pytest.mark.each_isa
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["local", "sparse"])
@pytest.mark.parametrize(("n", "m"), LENGTHS)
def test_against_the_textbook(name, n, m, backend):
    for causal in (False, True):
        call, seen = case(name, n, m, causal, backend=backend)
        assert_accurate(call, ruled(seen), draw(2, 2, n, 8, 12, keys=m), names=NAMES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["local", "sparse"])
@pytest.mark.parametrize(("n", "m"), [(30, 75), (75, 30)])
def test_under_every_rule(name, n, m, backend):
    """A mask of keys, a cap, a bias by the distance of places, sinks, shared heads; bfloat16."""
    keep = torch.stack([torch.arange(m) < m // 2, torch.arange(m) % 3 != 1])
    told = {"key_mask": keep, "softcap": 2.0}
    call, seen = case(name, n, m, alibi=SLOPES, backend=backend, **told)
    truth = ruled(seen, slopes=SLOPES, **told)
    x = [*draw(2, 2, n, 8, keys=m, kv=1), torch.tensor([0.5, -1.0])]
    f = lambda q, k, v, s: call(q, k, v, sinks=s)  # noqa: E731
    assert_accurate(f, truth, x, names=NAMES + " dsinks")
    half = [t.bfloat16() for t in x]
    assert_accurate(f, truth, half, floor=2**-8, names=NAMES + " dsinks")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["local", "sparse"])
def test_the_last_queries_of_a_sequence(name, backend):
    """Are those of the whole, whatever the layout of q, k and v."""
    x = draw(1, 2, 72, 16)
    if name == "local":
        f = partial(local_attention, window=11, causal=True, backend=backend)
        whole, last = f(*x), f(x[0][:, :, 40:], *x[1:])
    else:
        pattern = BlockPattern.bigbird(72, heads=2, block_size=8, num_random=1)
        f = partial(sparse_attention, causal=True, backend=backend)
        whole, last = f(*x, pattern), f(x[0][:, :, 40:], *x[1:], pattern.tail(32))
    torch.testing.assert_close(last, whole[:, :, 40:])


@pytest.mark.parametrize("how", LAYOUTS)
@needs_cpp("local_fwd")
def test_layouts(how):
    for name in ("local", "sparse"):
        call, seen = case(name, 20, 45, backend="cpp")
        x = [layout(t, how) for t in draw(2, 2, 20, 16, keys=45)]  # read where they lie
        assert_accurate(call, ruled(seen), x, names=NAMES)


@needs_cpp("local_fwd")
def test_any_number_of_threads():
    """Segments of the queries, some before the first key, some of keys that nobody sees."""
    for name in ("local", "sparse"):
        for n, m in ((900, 300), (300, 900)):
            call, seen = case(name, n, m, True, backend="cpp")
            x = draw(1, 2, n, 8, keys=m)
            for count in (2, 3):
                with threads(count):
                    assert_accurate(call, ruled(seen), x, names=NAMES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["local", "sparse"])
def test_a_mask_is_of_keys_alone(name, backend):
    """What masked keys hold reaches nobody; what a query holds is its own, whatever is masked at
    its place."""
    keep = torch.arange(50) % 3 != 1
    call, _ = case(name, 20, 50, key_mask=keep[None], backend=backend)
    x = draw(1, 2, 20, 8, keys=50)
    dirty = [x[0], *(torch.where(keep[:, None], t, torch.nan) for t in x[1:])]
    for a, b in zip(*(outputs_and_gradients(call, t) for t in (x, dirty)), strict=True):
        torch.testing.assert_close(a, b)
    x[0] = x[0].clone()
    x[0][:, :, 4] = torch.nan  # whose place is masked
    o, _ = call(*x)
    row = torch.arange(20) == 4
    assert o[:, :, row].isnan().all() and o[:, :, ~row].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["local", "sparse"])
def test_no_keys_and_no_queries(name, backend):
    for n, m in ((5, 0), (0, 5), (0, 0)):
        call, _ = case(name, n, m, backend=backend)
        x = [t.requires_grad_() for t in draw(2, 2, n, 8, 12, keys=m)]
        with poisoned():
            o, _ = call(*x)
            grads = torch.autograd.grad(o.sum(), x)
        assert o.shape == (2, 2, n, 12) and not o.any()
        assert [g.shape for g in grads] == [t.shape for t in x]
        assert not any(g.any() for g in grads)


# --- PyTorch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local", "sparse"])
@pytest.mark.parametrize(("n", "m"), [(3, 6), (6, 3)])
def test_derivatives_of_any_order(name, n, m):
    x = [t.requires_grad_() for t in draw(1, 2, n, 2, 3, keys=m, dtype=torch.float64)]
    call, _ = case(name, n, m, True)
    assert torch.autograd.gradcheck(call, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, x, fast_mode=True)


def test_opcheck_and_without_memory():
    q, k, v = draw(1, 2, 7, 4, keys=20)
    options = None, None, 3, 2, 0, 0, False, 0.5, 0.0
    o, lse = local_fwd.overload(q, k, v, *options)
    torch.library.opcheck(local_fwd.overload, (q, k, v, *options))
    torch.library.opcheck(local_bwd.overload, (o, q, k, v, o, lse, *options))
    for name in ("local", "sparse"):
        call, _ = case(name, 7, 20)
        o, lse = call(*(t.to("meta") for t in (q, k, v)))
        assert o.shape == (1, 2, 7, 4) and lse.shape == (1, 2, 7)


@pytest.mark.parametrize("name", ["local", "sparse"])
def test_compiled_and_exported(name):
    call, _ = case(name, 9, 20, True)

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return call(q, k, v)

    x = tuple(draw(2, 2, 9, 4, keys=20))
    torch.testing.assert_close(torch.export.export(Attention(), x).module()(*x), call(*x))
    compiled = torch.compile(Attention(), backend="aot_eager", fullgraph=True)
    for a, b in zip(*(outputs_and_gradients(f, x) for f in (compiled, call)), strict=True):
        torch.testing.assert_close(a, b)


# --- patterns and errors --------------------------------------------------------------------------


def test_rectangular_patterns():
    mask = torch.tensor([[1, 0, 0], [0, 1, 1]]).bool()
    pattern = BlockPattern.from_blocks(mask, 4, 7, n_keys=10)
    assert torch.equal(pattern.to_blocks()[0], mask) and (pattern.blocks, pattern.key_blocks) == (
        2,
        3,
    )
    assert pattern.to_dense().shape == (1, 7, 10) and pattern.density == 0.5
    assert pattern.col_ptr.tolist() == [[0, 1, 2, 3]] and pattern.row.tolist() == [0, 1, 1]
    whole = BlockPattern.bigbird(38, heads=2, block_size=4, num_random=1)
    assert torch.equal(whole.tail(14).to_dense(), whole.to_dense()[:, 24:])
    assert whole.tail(2).to_dense().shape == (2, 2, 38)
    with pytest.raises(ValueError, match=r"whole blocks of 4 queries, got 15; nearest: 14 or 18"):
        whole.tail(15)
    with pytest.raises(ValueError, match=r"n=7, n_keys=10 in blocks of 4 wants .* \(2, 3\)"):
        BlockPattern.from_blocks(mask.T, 4, 7, n_keys=10)


def test_errors():
    q, k, v = draw(1, 2, 8, 4, keys=12)
    with pytest.raises(ValueError, match=r"N = 8, N_k = 8, .* tensors of N = 8, N_k = 12"):
        sparse_attention(q, k, v, drawn(8, 8))
    with pytest.raises(ValueError, match=r"q and k of one shape, v with the same B, H, N, or both"):
        local_attention(q, k, v, window=1, grid=(2, 4))
    with pytest.raises(ValueError, match=r"as many keys as queries, .* n_keys=12"):
        SparseCache(drawn(8, 12))
    with pytest.raises(ValueError, match=r"wants key_mask \(B, N\) = \(1, 12\)"):
        local_attention(q, k, v, window=1, key_mask=torch.ones(1, 8).bool())
    for name in ("local_fwd", "sparse_fwd"):
        assert OPS[name].takes["cuda"](q, k) == "it takes as many keys as queries, got 12 and 8"
