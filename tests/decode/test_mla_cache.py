"""The latent cache, in one piece and in pages, against the causal function of each sequence."""

import copy
import gc
import io

import pytest
import torch
from textbook.mla import operands
from torch.testing import assert_close

import tab

B, H, N, DN, DR, R, DV = SIZE = 3, 4, 37, 8, 4, 10, 6
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def pool(pages=64, page_size=4, dtype=torch.float64):
    return tab.PagePool(pages=pages, page_size=page_size, width=R + DR, dtype=dtype)


def made(how, *w, dtype=torch.float64):
    return tab.MLACache(*w, pool=None if how == "rows" else pool(200, how, dtype))


def whole(qn, qr, c, kr, uk, uv):
    return tab.mla_attention(qn, qr, c, kr, uk, uv, causal=True, form="fused", backend="reference")


def cut(x, now):
    """These tokens of q_nope, q_rope, c_kv and k_rope."""
    return [t[:, :, now] if t.dim() == 4 else t[:, now] for t in x[:4]]


def decode(cache, x, first=0):
    steps = [cache.step(*cut(x, slice(i, i + 1))) for i in range(first, x[0].shape[2])]
    return torch.cat(steps, 2)


each = pytest.mark.parametrize("how", ("rows", 1, 4, 64))


@each
def test_token_by_token(how, generator):
    x = operands(SIZE, generator, torch.float64)
    cache = made(how, *x[4:])
    assert_close(decode(cache, x), whole(*x), **EXACT)
    assert cache.length == N and cache.lengths == [N] * B


@each
def test_a_step_that_raises_has_added_nothing(how, generator, monkeypatch):
    x = operands(SIZE, generator, torch.float64)
    cache = made(how, *x[4:])
    with monkeypatch.context() as patched:
        patched.setattr("tab.ops.decode.mla.mla_decode", lambda *_, **__: 1 / 0)
        for now in (0, 1):  # the first token, and one behind others
            with pytest.raises(ZeroDivisionError):
                cache.step(*cut(x, slice(now, now + 1)))
            assert cache.length == now
            if not now:
                cache.prefill(*cut(x, slice(0, 1)))
    assert_close(decode(cache, x, 1), whole(*x)[:, :, 1:], **EXACT)


@each
@pytest.mark.parametrize("lengths", ((N,), (1, 36), (9, 1, 27), (0, 30, 7), (20, 1, 1, 15)))
def test_chunks(how, lengths, generator):
    x = operands(SIZE, generator, torch.float64)
    cache, first, outputs = made(how, *x[4:]), 0, []
    for n in lengths:
        outputs.append(cache.prefill(*cut(x, slice(first, first + n))))
        first += n
    assert_close(torch.cat(outputs, 2), whole(*x), **EXACT)


@each
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_dtypes(how, dtype, generator):
    x = operands(SIZE, generator, dtype)
    cache = made(how, *x[4:], dtype=dtype)
    o = torch.cat([cache.prefill(*cut(x, slice(0, 9))), cache.prefill(*cut(x, slice(9, 20))),
                   decode(cache, x, 20)], 2)  # fmt: skip
    truth = whole(*(t.double() for t in x))
    bound = 2 * (whole(*x).double() - truth).abs().max() + 2 * torch.finfo(dtype).eps
    assert o.dtype == dtype and (o.double() - truth).abs().max() <= bound


@each
def test_sequences_of_different_length(how, generator):
    """Prompts of 0, 12 and 5 tokens in chunks of up to 9 and 8, then steps: each as if alone."""
    x = operands(SIZE, generator, torch.float64)
    chunks = (torch.tensor([0, 9, 5]), 9), (torch.tensor([0, 3, 0]), 8)
    cache, used, outputs = made(how, *x[4:]), [0] * B, [[] for _ in range(B)]
    for lengths, width in chunks:
        # What stands behind the real tokens reaches nobody.
        given = [
            torch.full((B, *t.shape[1:-2], width, t.shape[-1]), torch.nan).double() for t in x[:4]
        ]
        for b, n in enumerate(lengths.tolist()):
            for t, g in zip(x, given, strict=False):
                g[b, ..., :n, :] = t[b, ..., used[b] : used[b] + n, :]
        o = cache.prefill(*given, lengths=lengths)
        for b, n in enumerate(lengths.tolist()):
            outputs[b].append(o[b, :, :n])
            assert (o[b, :, n:] == 0).all()
            used[b] += n
    assert cache.lengths == used == [0, 12, 5] and cache.length == 12
    for _ in range(10):
        now = [torch.stack([t[b, ..., used[b] : used[b] + 1, :] for b in range(B)]) for t in x[:4]]
        o = cache.step(*now)
        for b in range(B):
            outputs[b].append(o[b])
            used[b] += 1
    for b in range(B):
        alone = [t[b : b + 1, ..., : used[b], :] for t in x[:4]]
        assert_close(torch.cat(outputs[b], 1), whole(*alone, *x[4:])[0], **EXACT)


@pytest.mark.parametrize("source", ("rows", 4))
@pytest.mark.parametrize("target", ("rows", 3))
def test_state_dict_goes_from_pages_to_rows_and_back(source, target, generator):
    x = operands(SIZE, generator, torch.float64)
    cache = made(source, *x[4:])
    cache.prefill(*cut(x, slice(0, 20)), lengths=torch.tensor([20, 3, 0]))
    buffer = io.BytesIO()
    torch.save(cache.state_dict(), buffer)
    rest = decode(cache, x, 20)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    again = made(target, *x[4:])
    again.prefill(*cut(x, slice(0, 2)))
    again.load_state_dict(state)
    assert again.lengths == [20, 3, 0]
    assert_close(decode(again, x, 20), rest, **EXACT)
    again.load_state_dict(made(source, *x[4:]).state_dict())
    assert again.length == again.bytes == 0


@each
def test_reorder(how, generator):
    x, index = operands(SIZE, generator, torch.float64), torch.tensor([2, 0, 2, 2])
    cache = made(how, *x[4:])
    decode(cache, cut(x, slice(0, 22)))
    cache.reorder(index)
    tails = operands((4, *SIZE[1:]), generator, torch.float64)
    x = [
        *(torch.cat([t[index], u], -2) for t, u in zip(cut(x, slice(0, 22)), tails, strict=False)),
        *x[4:],
    ]
    assert_close(decode(cache, x, 22), whole(*x)[:, :, 22:], **EXACT)


@each
def test_reset_and_inference_mode(how, generator):
    x = operands(SIZE, generator, torch.float64)
    cache = made(how, *x[4:])
    with torch.inference_mode():
        decode(cache, cut(x, slice(0, 9)))
    cache.reset()
    assert cache.length == cache.bytes == 0 and cache.lengths == []
    with torch.inference_mode():
        cache.prefill(*cut(x, slice(0, 9)))
    assert_close(decode(cache, x, 9), whole(*x)[:, :, 9:], **EXACT)


# --- pages ----------------------------------------------------------------------------------------


def test_pages_are_taken_and_given_back(generator):
    x = operands(SIZE, generator, torch.float64)
    shared = pool(pages=12)
    first, second = (tab.MLACache(*x[4:], pool=shared) for _ in range(2))
    first.prefill(*cut(x, slice(0, 9)), lengths=torch.tensor([9, 4, 1]))
    assert (shared.used, shared.free) == (3 + 1 + 1, 7)
    assert first.bytes == 5 * 4 * (R + DR) * 8 and shared.bytes == 12 * 4 * (R + DR) * 8
    second.prefill(*cut(x, slice(0, 5)))
    assert shared.used == 5 + 6
    first.reorder(torch.tensor([1]))  # two sequences ended
    assert shared.used == 1 + 6
    first.prefill(*(t[1:2] for t in cut(x, slice(4, 24))))  # pages that others had
    assert shared.used == 6 + 6
    eight = cut(x, slice(0, 8))
    assert_close(decode(second, eight, 5), whole(*eight, *x[4:])[:, :, 5:], **EXACT)
    del second
    gc.collect()
    assert shared.used == 6
    first.reset()
    assert shared.used == 0


def test_beams_share_pages_until_they_part(generator):
    x = operands(SIZE, generator, torch.float64)
    shared = pool()
    cache = tab.MLACache(*x[4:], pool=shared)
    cache.prefill(*(t[:1] for t in cut(x, slice(0, 10))))
    assert shared.used == 3
    cache.reorder(torch.zeros(3, dtype=torch.int64))
    assert shared.used == 3 and cache.bytes == 3 * 4 * (R + DR) * 8
    prompt = [t[:1].expand(3, *t.shape[1:]) for t in cut(x, slice(0, 10))]
    tails = operands(SIZE, generator, torch.float64)[:4]
    joined = [torch.cat([p, t], -2) for p, t in zip(prompt, tails, strict=True)]
    assert_close(decode(cache, joined, 10), whole(*joined, *x[4:])[:, :, 10:], **EXACT)
    assert shared.used == 2 + 3 * 10  # two full pages of the prompt, and 47 tokens in twelve each


def test_a_page_left_out_of_the_pool_changes_nothing(generator):
    x = operands(SIZE, generator, torch.float64)
    cache = tab.MLACache(*x[4:], pool=pool(pages=5))
    cache.prefill(*cut(x, slice(0, 4)))
    state = cache.state_dict()
    with pytest.raises(RuntimeError, match=r"has 2 pages of 4 rows left, and 3 are needed; reset"):
        cache.step(*cut(x, slice(4, 5)))
    with pytest.raises(RuntimeError, match=r"and 6 are needed"):
        cache.prefill(*cut(x, slice(4, 12)))
    assert_close(cache.state_dict(), state, rtol=0, atol=0)
    cache.reorder(torch.tensor([0, 2]))
    cache.step(*(t[[0, 2]] for t in cut(x, slice(4, 5))))
    assert cache.lengths == [5, 5]


def test_a_copy_has_a_pool_of_its_own(generator):
    x = operands(SIZE, generator, torch.float64)
    for how in ("rows", 4):
        cache = made(how, *x[4:])
        cache.prefill(*cut(x, slice(0, 9)))
        other = copy.deepcopy(cache)
        for one in (cache, other):
            assert_close(decode(one, x, 9), whole(*x)[:, :, 9:], **EXACT)


# --- what is refused ------------------------------------------------------------------------------


def test_errors(generator):
    x = operands(SIZE, generator, torch.float64)
    cache = tab.MLACache(*x[4:])
    cache.prefill(*cut(x, slice(0, 9)))
    one = cut(x, slice(9, 10))
    for f, words in (
        (lambda: cache.step(*cut(x, slice(9, 11))), r"one token of each sequence.*\(3, 4, 2, 8\)"),
        (lambda: cache.step(*(t[:2] for t in one)), r"the 3 sequences.*c_kv \(2, 1, 10\)"),
        (lambda: cache.step(*one[:3], one[3][..., :3]), "k_rope .* to fit"),
        (lambda: cache.step(one[0], one[1][..., :3], one[2], one[3][..., :3]), "R . Dr numbers"),
        (lambda: cache.step(*(t.float() for t in one)), "one dtype"),
        (lambda: cache.prefill(*one, lengths=torch.tensor([1, 2, 0])), r"from 0 to N = 1.*\[1, 2"),
        (lambda: cache.prefill(*one, lengths=torch.tensor([1.0] * 3)), "whole numbers"),
        (lambda: cache.reorder(torch.tensor([3])), "its 3 sequences"),
        (lambda: tab.MLACache(x[4][0], x[5]), r"w_uk \(H, Dn, R\).*w_uk \(8, 10\)"),
        (lambda: tab.MLACache(*x[4:], capacity=-1), "capacity ≥ 0"),
        (lambda: tab.MLACache(*x[4:], pool=pool(dtype=torch.float32)).prefill(*cut(x, slice(0, 3))),
         "a dtype and a device as it holds them.*float32.*float64"),
        (lambda: tab.PagePool(pages=0, page_size=1, width=1), "≥ 1.*0, 1, 1"),
        (lambda: tab.PagePool(pages=1, page_size=1, width=1, dtype=torch.int64), "int64"),
        (lambda: cache.load_state_dict({**cache.state_dict(), "lengths": torch.tensor([1, 2, 3])}),
         r"lengths \[1, 2, 3\] of 9 tokens"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            f()
    grad = [t.requires_grad_() for t in one]
    with pytest.raises(RuntimeError, match=r"MLACache.step records no gradients.*mla_attention"):
        cache.step(*grad)
